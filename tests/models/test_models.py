"""Models of Hugging Face's transformers take a step of training as they are, converted, and reverted: all else equal.

On torch's path the bits are the same. The kernels round otherwise, so their results are compared with the same model in
fp64, from which they may be as far as the unconverted model's.
"""

from __future__ import annotations

import collections
import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.models import (
    CASES,
    FULL,
    TINY,
    WITH_BATCH_NORM,
    Size,
    assert_same_bits,
    built,
    convert,
    expected,
    norms_of,
    step,
)

if TYPE_CHECKING:
    from triton_norm.testing.guards import Guard

pytestmark = pytest.mark.usefixtures("few_programs")

HALVES = ("llama", "gemma", "t5")
by_name = pytest.mark.parametrize("name", CASES)
MODES = [*((name, True) for name in CASES), *((name, False) for name in WITH_BATCH_NORM)]
modes = pytest.mark.parametrize(("name", "training"), MODES)


@by_name
def test_every_norm_is_converted_and_comes_back(name: str) -> None:
    model, _ = built(name, FULL)
    before = {key: type(norm) for key, norm in norms_of(model).items()}
    keys = list(model.state_dict())
    report = tn.convert(model)
    were = (text.partition(" → ")[0] for text in report.converted.values())
    assert collections.Counter(were) == CASES[name].norms(FULL.layers)
    assert report.skipped == {}
    assert report.converted.keys() == before.keys()
    assert all(type(norm) is not before[key] for key, norm in norms_of(model).items())
    assert list(model.state_dict()) == keys
    assert tn.revert(model) == tuple(before)
    assert {key: type(norm) for key, norm in norms_of(model).items()} == before


def assert_a_step_agrees(name: str, size: Size, training: bool, device: str) -> None:
    model, inputs = built(name, size, device)
    model.train(training)
    reference = expected(model, inputs)
    convert(model)
    with tn.backend("triton"):
        reference.check(step(model, inputs))


# Interpreted, the 52 norms of MobileNetV2 take seconds.
@pytest.mark.parametrize(("name", "training"), [mode for mode in MODES if mode != ("mobilenet_v2", False)])
def test_a_step_through_the_kernels(name: str, training: bool, device: str, guard: Guard | None) -> None:
    assert_a_step_agrees(name, TINY, training, device)
    if guard is not None:
        forwards = [kernel for kernel in guard.kernels if kernel.endswith("forward_kernel")]
        assert len(forwards) == sum(CASES[name].norms(TINY.layers).values())


@modes
@pytest.mark.gpu
def test_a_step_in_full(name: str, training: bool, device: str) -> None:
    assert_a_step_agrees(name, FULL, training, device)


@modes
@pytest.mark.unguarded
def test_torchs_path_has_the_bits_of_torch(name: str, training: bool) -> None:
    """The second step is of the same model reverted."""
    theirs, inputs = built(name, FULL)
    theirs.train(training)
    ours = copy.deepcopy(theirs)
    convert(ours)
    with tn.backend("torch"):
        assert_same_bits(step(ours, inputs), step(theirs, inputs))
    tn.revert(ours)
    assert_same_bits(step(ours, inputs), step(theirs, inputs))


def nearly_same_bits(actual: Tensor, other: Tensor) -> None:
    """But where fp32 roundoff moves a value over the middle between two neighbours."""
    assert (actual.dtype, actual.shape) == (other.dtype, other.shape)
    assert (actual == other).double().mean() > 0.98
    torch.testing.assert_close(actual, other, rtol=2 * torch.finfo(actual.dtype).eps, atol=0)


@pytest.mark.parametrize("name", HALVES)
def test_a_step_in_bf16(name: str, device: str) -> None:
    """Each norm rounds its input in the model where Hugging Face's does."""
    model, inputs = built(name, TINY, device)
    model.bfloat16()
    reference = expected(model, inputs)
    convert(model)
    compared = []

    def compare(norm: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        with torch.no_grad():
            nearly_same_bits(y, type(norm).original.forward(norm, *arguments))
        compared.append(norm)

    for norm in norms_of(model).values():
        norm.register_forward_hook(compare)
    with tn.backend("triton"):
        reference.check(step(model, inputs), torch.bfloat16)
    assert set(compared) == set(norms_of(model).values())


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.unguarded
def test_torchs_path_in_bf16_has_the_bits_of_torch(name: str) -> None:
    theirs, inputs = built(name, FULL)
    theirs.bfloat16()
    ours = copy.deepcopy(theirs)
    convert(ours)
    with tn.backend("torch"):
        assert_same_bits(step(ours, inputs), step(theirs, inputs))


def test_a_wrong_norm_would_be_noticed(device: str) -> None:
    """The bounds are near: of a relative error of 1e-5 in every norm's weight."""
    model, inputs = built("gemma", TINY, device)
    reference = expected(model, inputs)
    with torch.no_grad():
        for norm in norms_of(model).values():
            norm.weight += 1e-5 * (1 + norm.weight)
    with pytest.raises(AssertionError, match="from exact"):
        reference.check(step(model, inputs))
