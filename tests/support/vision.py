"""Classes of torchvision and timm; where these are not installed, stand-ins of the same names, parts and results.

A stand-in is found by its class's module and name, as the classes on the lists are.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inplanes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _convolution(planes, planes, 3), nn.BatchNorm2d(planes)
        self.relu, self.downsample = nn.ReLU(inplace=True), downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inplanes, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _convolution(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _convolution(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.relu, self.downsample = nn.ReLU(inplace=True), downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, block: Any, layers: list[int], num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = _convolution(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.maxpool, self.avgpool = nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
        width = 64
        for place, n_blocks in enumerate(layers):
            outputs, blocks = 64 * 2**place * block.expansion, []
            for number in range(n_blocks):
                stride = 2 if place and not number else 1
                shortcut = None
                if stride != 1 or width != outputs:
                    shortcut = nn.Sequential(_convolution(width, outputs, 1, stride), nn.BatchNorm2d(outputs))
                blocks.append(block(width, 64 * 2**place, stride, shortcut))
                width = outputs
            setattr(self, f"layer{place + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.fc(torch.flatten(x, 1))


class Conv2dNormActivation(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, activation_layer: Any = nn.ReLU):
        norm = nn.BatchNorm2d(out_channels)
        super().__init__(_convolution(in_channels, out_channels, kernel_size), norm, activation_layer(inplace=True))
        self.out_channels = out_channels


class _TimmRows(nn.Module):
    """Normalizes rows by a formula; `kind`, `channels_first`, `float32` and `activated` are the class's."""

    def __init__(self, channels: int, eps: float = 1e-6, act_layer: Any = nn.ReLU, drop_layer: Any = None) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self._fast_norm = (channels,), eps, False
        self.elementwise_affine = True
        self.weight = nn.Parameter(torch.ones(channels))
        if self.kind == "layer_norm":
            self.bias = nn.Parameter(torch.zeros(channels))
        if self.activated:
            self.drop = nn.Identity() if drop_layer is None else drop_layer()
            self.act = act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x, self.weight, getattr(self, "bias", None)]
        y, weight, bias = (each.float() if self.float32 and each is not None else each for each in tensors)
        if self.kind == "layer_norm":
            y = y.permute(0, 2, 3, 1) if self.channels_first else y
            y = F.layer_norm(y, self.normalized_shape, weight, bias, self.eps)
            y = y.permute(0, 3, 1, 2) if self.channels_first else y
        elif self.channels_first:
            y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + self.eps) * weight[:, None, None]
        else:
            y = F.rms_norm(y, self.normalized_shape, weight, self.eps)
        y = y.to(x.dtype) if self.float32 else y
        return self.act(self.drop(y)) if self.activated else y


class _Activated:
    def __init__(self, *arguments: Any, act_layer: Any = nn.ReLU, drop_layer: Any = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._fast_norm = False
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class BatchNormAct2d(_Activated, nn.BatchNorm2d):
    pass


class SyncBatchNormAct(nn.SyncBatchNorm):
    """Has parts that timm's function, which makes it from a BatchNormAct2d, sets."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if hasattr(self, "drop"):
            x = self.drop(x)
        return self.act(x) if hasattr(self, "act") else x


class _GroupNorm(nn.GroupNorm):
    def __init__(self, num_channels: int, num_groups: int = 32) -> None:
        super().__init__(num_groups, num_channels)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class _GroupNorm1(nn.GroupNorm):
    def __init__(self, num_channels: int) -> None:
        super().__init__(1, num_channels)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _timm() -> dict[str, list[type[nn.Module]]]:
    norms: list[Any] = [type("GroupNorm", (_GroupNorm,), {}), type("GroupNorm1", (_GroupNorm1,), {})]
    activated: list[Any] = [
        BatchNormAct2d,
        SyncBatchNormAct,
        type("GroupNormAct", (_Activated, _GroupNorm), {}),
        type("GroupNorm1Act", (_Activated, _GroupNorm1), {}),
    ]
    for name, kind in (("LayerNorm", "layer_norm"), ("RmsNorm", "rms_norm")):
        base = (nn.LayerNorm,) if name == "LayerNorm" else ()
        for suffix in ("", "Fp32", "2d", "2dFp32"):
            for made, act in ((norms, False), (activated, True)):
                own = {"kind": kind, "channels_first": "2d" in suffix, "float32": "Fp32" in suffix, "activated": act}
                made.append(type(f"{name}{'Act' if act else ''}{suffix}", (_TimmRows, *base), own))
    return {"timm.layers.norm": norms, "timm.layers.norm_act": activated}


def _stand_ins() -> dict[str, ModuleType]:
    classes: dict[str, list[type[nn.Module]]] = {
        "torchvision.models.resnet": [BasicBlock, Bottleneck, ResNet],
        "torchvision.ops.misc": [Conv2dNormActivation],
        **_timm(),
    }
    modules = {}
    for path, made in classes.items():
        modules[path] = ModuleType(path)
        for cls in made:
            cls.__module__, cls.__qualname__ = path, cls.__name__
            setattr(modules[path], cls.__name__, cls)
    return modules


def _results(stand_in: ModuleType) -> ModuleType:
    try:
        return importlib.import_module(stand_in.__name__)
    except (ImportError, RuntimeError):  # torchvision's operators may be another torch's
        return stand_in


MODULES = {path: _results(module) for path, module in _stand_ins().items()}


def find(path: str) -> Any:
    """Returns a class by module.Class."""
    module, _, name = path.rpartition(".")
    return getattr(MODULES[module], name)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pickle find the stand-ins by name."""
    for path, module in MODULES.items():
        for package in itertools.accumulate(path.split(".")[:-1], "{}.{}".format):
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setitem(sys.modules, path, module)
