"""Modules whose norms convert(fuse=True) joins with their neighbours, and steps of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.vision import find, importable  # noqa: F401

BasicBlock, Bottleneck = (find(f"torchvision.models.resnet.{name}") for name in ("BasicBlock", "Bottleneck"))

Conv2dNormActivation = find("torchvision.ops.misc.Conv2dNormActivation")


class Named(nn.Sequential):
    """Runs by the code that it inherits, however it is constructed."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.SiLU())


class Own(nn.Sequential):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Reduced(nn.Sequential):
    """Is copied in its own way, with an attribute that a subclass could leave out."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Reduced, tuple(self)


class OwnBlock(BasicBlock):
    """May do more than its base."""


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.LeakyReLU(0.2)),
        Named(4),
        Own(nn.BatchNorm2d(4), nn.ReLU()),
        nn.InstanceNorm2d(4),
        nn.Mish(),
    )


def strided() -> nn.Module:
    """A block whose shortcut has a norm of its own."""
    return BasicBlock(2, 4, 2, nn.Sequential(nn.Conv2d(2, 4, 1, 2, bias=False), nn.BatchNorm2d(4)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "sequential": sequential,
    "basic": lambda: BasicBlock(2, 2),
    "basic, strided": strided,
    "bottleneck": lambda: nn.Sequential(nn.Conv2d(2, 4, 1), Bottleneck(4, 1)),
    "layer": lambda: Conv2dNormActivation(2, 4, activation_layer=nn.SiLU),
}

OF_BLOCKS = pytest.mark.parametrize("name", BLOCKS)


def built(name: str, device: str, training: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, a copy that is fused, and an input."""
    theirs = BLOCKS[name]().to(device).train(training)
    for part in theirs.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 1.5)
    ours = copy.deepcopy(theirs)
    assert tn.convert(ours, fuse=True).fused
    return theirs, ours, torch.randn(3, 2, 6, 6, device=device)


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Results of a step, and the gradients and the buffers after it."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.sin().sum().backward()
    gradients = {f"d{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(model.named_buffers())}
