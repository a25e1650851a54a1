"""convert(fuse=True) on models of Hugging Face's transformers."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.vision import find
from triton_norm.converting import convert, fusing

transformers = pytest.importorskip("transformers")


def resnet(layer_type: str) -> nn.Module:
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 1], "layer_type": layer_type}
    return transformers.ResNetModel(transformers.ResNetConfig(**sizes))


def regnet(layer_type: str) -> nn.Module:
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "groups_width": 4}
    return transformers.RegNetModel(transformers.RegNetConfig(layer_type=layer_type, **sizes))


def mobilenet_v2(padding: bool) -> nn.Module:
    sizes = {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4, "image_size": 16}
    config = transformers.MobileNetV2Config(tf_padding=padding, **sizes)
    return transformers.MobileNetV2Model(config)


BUILT = {
    "ResNet, basic": (lambda: resnet("basic"), "ResNetBasicLayer"),
    "ResNet, bottleneck": (lambda: resnet("bottleneck"), "ResNetBottleNeckLayer"),
    "RegNet, X": (lambda: regnet("x"), "RegNetXLayer"),
    "RegNet, Y": (lambda: regnet("y"), "RegNetYLayer"),
    "MobileNetV2": (lambda: mobilenet_v2(False), "MobileNetV2InvertedResidual"),
    "MobileNetV2, padded": (lambda: mobilenet_v2(True), "MobileNetV2InvertedResidual"),
}


def pictures(device: str) -> Tensor:
    return torch.randn(2, 3, 16, 16, device=device)


def stepped(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x).last_hidden_state
    y.sin().sum().backward()
    gradients = {f"d{name}": each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"y": y.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("name", BUILT)
def test_a_fused_model_is_as_exact_as_the_converted_one(name, device):
    build, layer = BUILT[name]
    parts = build().to(device)
    fused, exact = copy.deepcopy(parts), copy.deepcopy(parts).double()
    tn.convert(parts)
    report = tn.convert(fused, fuse=True)
    assert report.skipped == {}
    assert layer in {type(fused.get_submodule(name)).__name__ for name in report.fused}
    n_norms = sum(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    assert n_norms == len(report.converted)
    x = pictures(device)
    with tn.backend("torch"):  # the kernels' numbers have tests of their own
        actual, expected = stepped(fused, x), stepped(parts, x)
    of_exact = stepped(exact, x.double())
    assert actual.keys() == expected.keys()
    for key, tensor in of_exact.items():
        error, of_parts = ((result[key].double() - tensor).abs().max() for result in (actual, expected))
        assert error <= 2 * of_parts + 64 * 2.0**-24 * tensor.abs().max(), key


def test_the_kernels_compute_a_fused_model(device, guard):
    """One launch forward for each norm, its shortcut and its activation."""
    model = resnet("basic").to(device)
    report = tn.convert(model, fuse=True)
    with tn.backend("triton"), torch.no_grad():
        model(pictures(device))
    assert guard is None or len(guard.launches) == len(report.converted)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "place"), [("ResNet, basic", "encoder.stages.1.layers.0"), ("MobileNetV2, padded", "layer.1")]
)
def test_a_fused_layer_compiles_without_a_graph_break(name, place, device):
    build, _ = BUILT[name]
    layer = build().get_submodule(place).to(device)
    assert tn.convert(layer, fuse=True).fused[""]
    eager = copy.deepcopy(layer)
    channels = next(layer.parameters()).shape[1]
    x = torch.randn(2, channels, 6, 6, device=device)
    with tn.backend("torch"):
        expected = eager(x)
        actual = torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(actual, expected)


def _trial() -> Any:
    return fusing.trials(functools.partial(convert._target, sync_batch_norm=False))


@pytest.mark.parametrize("path", fusing.FUSIBLE)
def test_every_class_computes_what_the_list_says(path):
    module, _, name = path.rpartition(".")
    if path.startswith("torchvision"):
        cls = find(path)
    else:
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            pytest.skip("not in the installed transformers")
    assert fusing.counterpart(cls) is not None
    assert _trial()(cls) is None


def test_an_activation_that_is_a_function_is_called(device):
    """The class takes a function for hidden_act, where the configuration does."""
    theirs = mobilenet_v2(padding=True).conv_stem.first_conv.to(device)
    del theirs.activation
    theirs.activation = torch.nn.functional.silu
    ours = copy.deepcopy(theirs)
    report = tn.convert(ours, fuse=True)
    assert report.skipped == {"": "normalization + activation: function is not among the activations that are known"}
    x = pictures(device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["layer", "layer.1", "layer.1.activation", "shortcut"])
def test_hooks_on_modules_that_are_passed_over(place, device):
    theirs = resnet("basic").encoder.stages[1].layers[0].to(device)
    ours = copy.deepcopy(theirs)
    tn.convert(ours, fuse=True)
    seen: list[list[Tensor]] = [[], []]
    for model, into in zip((ours, theirs), seen, strict=True):
        model.get_submodule(place).register_forward_hook(lambda m, inputs, y, into=into: into.append(y.clone()))
    x = torch.randn(2, 4, 6, 6, device=device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
    assert len(seen[1]) == 1


def test_a_sum_with_the_input_has_their_common_dtype(device):
    """The last norm's result is in half precision under autocast, and the input of the layer may be in float32."""
    theirs = mobilenet_v2(padding=False).layer[1].to(device)
    ours = copy.deepcopy(theirs)
    assert "reduce_1x1.normalization + shortcut" in tn.convert(ours, fuse=True).fused[""]
    x = torch.randn(2, next(theirs.parameters()).shape[1], 6, 6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected, actual = theirs(x), ours(x)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=2.0**-5, atol=2.0**-5)
