"""Fused modules whose parts have hooks or are replaced, and modules that convert(fuse=True) leaves as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.fused_blocks import (
    BasicBlock,
    OwnBlock,
    Reduced,
    built,
    sequential,
    trained,
)
from support.vision import find, importable  # noqa: F401


def _hook(module: nn.Module, calls: list[Any]) -> None:
    module.register_forward_hook(lambda module, inputs, y: calls.append(y.clone()))


def _pre_hook(module: nn.Module, calls: list[Any]) -> None:
    module.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].clone()))


def _backward_hook(module: nn.Module, calls: list[Any]) -> None:
    module.register_full_backward_hook(lambda module, dx, dy: calls.append(dy[0].clone()))


def _replaced(module: nn.Module, calls: list[Any]) -> None:
    own = module.forward
    module.forward = lambda x: calls.append(x.clone()) or own(x)


# torch refuses an addition in place to the result of a module with a backward hook: bn2 has none.
@pytest.mark.parametrize(
    ("part", "observe"),
    [
        *(("bn1", observe) for observe in (_hook, _pre_hook, _backward_hook, _replaced)),
        *(("relu", observe) for observe in (_hook, _pre_hook, _backward_hook, _replaced)),
        *(("bn2", observe) for observe in (_hook, _pre_hook, _replaced)),
        ("conv2", _backward_hook),
        ("downsample", _backward_hook),
    ],
)
def test_what_is_put_between_later_is_called(part, observe, device):
    theirs, ours, x = built("basic, strided", device)
    for module in (theirs, ours):
        module.relu.inplace = False  # torch refuses a backward hook before an activation in place
    seen, expected = [], []
    observe(getattr(ours, part), seen)
    observe(getattr(theirs, part), expected)
    torch.testing.assert_close(trained(ours, x), trained(theirs, x), rtol=1e-4, atol=1e-5)
    assert len(expected) > 0
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_all_modules_see_each_part(device):
    theirs, ours, x = built("basic", device)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, inputs, y: seen.append(type(m).__name__))
    try:
        torch.testing.assert_close(ours(x), theirs(x))
        report = tn.convert(sequential(), fuse=True)
    finally:
        handle.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert report.fused == {}
    assert "1 + 2: Conv" not in str(report)
    assert report.skipped["3"] == "1 + 2: GroupNorm has hooks or another forward"


def test_parts_replaced_later_are_called(device):
    theirs, ours, x = built("basic, strided", device)
    for module in (theirs, ours):
        module.relu, module.bn1 = nn.Tanh(), nn.Identity()
    torch.testing.assert_close(ours(x), theirs(x))


class Broadcast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


def test_a_shortcut_that_returns_nothing_is_an_error(device):
    for fuse in (False, True):
        model = BasicBlock(2, 2, downsample=Nothing()).to(device)
        assert bool(tn.convert(model, fuse=fuse).fused) == fuse
        with pytest.raises(TypeError):
            model(torch.randn(2, 2, 4, 4, device=device))


@pytest.mark.parametrize("shortcut", [Broadcast, Doubled])
def test_a_shortcut_of_another_shape_or_dtype(shortcut, device):
    """torch adds it in place, in the dtype of the norm's result."""
    theirs = BasicBlock(2, 2, downsample=shortcut()).to(device)
    ours = copy.deepcopy(theirs)
    assert tn.convert(ours, fuse=True).fused == {"": "bn1 + relu, bn2 + shortcut + relu"}
    x = torch.randn(2, 2, 4, 4, device=device)
    torch.testing.assert_close(ours(x), theirs(x))


def test_wrong_inputs_raise_torchs_errors_and_move_nothing(device):
    theirs, ours, _ = built("sequential", device)
    before = copy.deepcopy(ours.state_dict())
    for x in (torch.randn(2, 3, 6, 6, device=device), [1.0], None):
        with pytest.raises((RuntimeError, TypeError)) as expected:
            theirs(x)
        with pytest.raises(expected.type):
            ours(x)
    torch.testing.assert_close(ours.state_dict(), before)


def test_a_norm_that_the_shortcut_has_too_moves_in_its_order(device):
    norm = nn.BatchNorm2d(2)
    theirs = BasicBlock(2, 2, downsample=nn.Sequential(nn.Conv2d(2, 2, 1), norm))
    theirs.bn2 = norm
    theirs.to(device)
    ours = copy.deepcopy(theirs)
    report = tn.convert(ours, fuse=True)
    assert report.fused == {}
    reason = "the shortcut has the same norm"
    assert report.skipped[""] == f"bn1 + relu: {reason}; bn2 + shortcut + relu: {reason}"
    x = torch.randn(2, 2, 4, 4, device=device)
    torch.testing.assert_close(trained(ours, x), trained(theirs, x), rtol=1e-4, atol=1e-5)


def _other(self: Any, x: Tensor) -> Tensor:
    """Leaves the shortcut out."""
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def _renamed(self: Any, y: Tensor) -> Tensor:
    return y


OWN_FORWARD = BasicBlock.forward


def _moving(self: Any, x: Tensor) -> Tensor:
    """Moves the running statistics twice."""
    self.bn1(self.conv1(x))
    return OWN_FORWARD(self, x)


def _failing(self: Any, x: Tensor) -> Tensor:
    raise ValueError("patched\nfor some reason")


@pytest.mark.parametrize(
    ("cls", "forward", "reason"),
    [
        (BasicBlock, _other, "its version of BasicBlock computes something else than the one that is known"),
        (
            BasicBlock,
            _failing,
            "its version of BasicBlock could not be tried on small tensors, and raised ValueError: patched",
        ),
        (nn.ReLU, _failing, "its version of ReLU raised ValueError on a few numbers"),
        (BasicBlock, _moving, "its version of BasicBlock computes something else than the one that is known"),
        (BasicBlock, _renamed, "its version of BasicBlock takes other arguments"),
        (nn.ReLU, lambda self, x: x, "its version of ReLU computes something else than the one that is known"),
    ],
)
def test_a_patched_class_is_skipped(cls, forward, reason, monkeypatch):
    model = nn.Sequential(BasicBlock(2, 2))
    before = type(model[0])
    monkeypatch.setattr(cls, "forward", forward)
    report = tn.convert(model, fuse=True)
    assert report.fused == {}
    assert report.skipped == {"0": f"bn1 + relu: {reason}; bn2 + shortcut + relu: {reason}"}
    assert type(model[0]) is before
    assert type(model[0].bn1) is tn.BatchNorm2d


def test_modules_that_lack_parts_of_their_class_are_left():
    model = nn.Sequential(BasicBlock(2, 2), OwnBlock(2, 2))
    del model[0].relu, model[1].bn2
    report = tn.convert(model, fuse=True)
    assert (report.fused, report.skipped, len(report.converted)) == ({}, {}, 3)


def test_modules_that_are_skipped_and_why():
    model = nn.ModuleDict(
        {
            "own": OwnBlock(2, 2),
            "replaced": nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()),
            "hooked": BasicBlock(2, 2),
            "reduced": Reduced(nn.BatchNorm2d(2), nn.ReLU()),
        }
    )
    model["replaced"].forward = lambda x: x
    model["hooked"].bn1.register_forward_hook(lambda module, inputs, y: y)
    model["hooked"].bn2.forward = lambda x: x
    report = tn.convert(model, fuse=True)
    subclass = "OwnBlock is a subclass of torchvision.BasicBlock: its forward may differ"
    assert report.fused == {}
    assert report.skipped == {
        "own": f"bn1 + relu: {subclass}; bn2 + shortcut + relu: {subclass}",
        "replaced": "0 + 1: its forward was replaced on the module itself",
        "hooked": "bn1 + relu: BatchNorm2d has hooks or another forward; "
        "bn2 + shortcut + relu: the norm stays BatchNorm2d",
        "reduced": "0 + 1: Reduced is a subclass of torch.nn.Sequential: its forward may differ",
        "hooked.bn2": "its forward was replaced on the module itself",
    }


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ({}, ["", "0"]),
        ({"exclude": "0"}, [""]),
        ({"exclude": "0.bn?"}, [""]),
        ({"exclude": "0.bn1"}, ["", "0"]),
        ({"exclude": nn.Sequential}, ["0"]),
        ({"include": "0"}, ["0"]),
        ({"include": [nn.BatchNorm2d]}, []),
        ({"include": [nn.BatchNorm2d, BasicBlock]}, ["0"]),
    ],
)
def test_include_and_exclude(arguments, fused):
    model = nn.Sequential(BasicBlock(2, 2), nn.BatchNorm2d(2), nn.ReLU())
    report = tn.convert(model, fuse=True, **arguments)
    assert list(report.fused) == fused
    theirs = (nn.Sequential, BasicBlock)
    assert [
        name for name, part in model.named_modules() if isinstance(part, theirs) and type(part) not in theirs
    ] == fused
