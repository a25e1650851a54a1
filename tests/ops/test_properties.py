"""Properties of any shape, stride, type, flag and launch: against torch in fp64, and without an oracle.

`pytest --hypothesis-profile=long tests/ops/test_properties.py` draws 50 times as many cases, others each time.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import triton_norm
from support.oracle import Inputs, Results, assert_within, differentiated, ulp, widen
from support.row_norms import LAYER_NORM
from support.strategies import (
    BF16,
    CHANNELS,
    F16,
    F32,
    F64,
    ROWS,
    Case,
    Channels,
    Layout,
    Rows,
    channels,
    cut,
    rows,
)
from triton_norm.tuning.limits import INTERPRETED

EITHER = st.one_of(rows(fused=True), channels(fused=True))


def examples(fraction: float) -> Any:
    """So many times as many as the profile says."""
    return settings(max_examples=max(1, int(fraction * settings().max_examples)))


def roomy(test: Any) -> Any:
    """Makes the frame so long that those above it have room in the chunk of memory that Python gets for it: kernels go
    back and forth over the end of an ordinary chunk, and map and unmap the next one thousands of times a second."""
    test.__code__ = test.__code__.replace(co_stacksize=40000)
    return test


@pytest.fixture(autouse=True)
def _through_the_kernels():
    with triton_norm.backend("triton"):
        yield


def same(one: Any, other: Any) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextlib.contextmanager
def launched(case: Case, *inputs: Tensor | None) -> Iterator[None]:
    """Cut up as the case says; all memory of the inputs stays as it was, gaps too."""
    storages = [tensor.untyped_storage() for tensor in inputs if tensor is not None]
    memories = [torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage) for storage in storages]
    before = [memory.clone() for memory in memories]
    with cut(case.cut, ROWS if isinstance(case, Rows) else CHANNELS):
        yield
    assert same(memories, before), "an input has been written to"


def run(case: Case, tensors: Inputs, needs_grad: Collection[int] = range(4)) -> Results:
    with launched(case, *tensors):
        return differentiated(case.ours, tensors.leaves(), (tensors.dy, tensors.dtotal), needs_grad)


NEEDS_GRAD = st.one_of(st.just({0, 1, 2, 3}), st.sets(st.integers(0, 3)))
"""The indices of the leaves that need a gradient."""


def present(tensors: Inputs, needs_grad: set[int]) -> set[int]:
    """Returns those of the leaves that are there, or all of these."""
    leaves = {i for i, leaf in enumerate(tensors.leaves()) if leaf is not None}
    return needs_grad & leaves or leaves


def against_fp64(case: Case, needs_grad: set[int], device: str) -> None:
    tensors = case.settled(case.drawn(device))
    needs_grad = present(tensors, needs_grad)
    results = run(case, tensors, needs_grad)
    assert results.y.dtype == (case.out or case.x)
    for i, (grad, leaf) in enumerate(zip(results.gradients, tensors.leaves(), strict=True)):
        assert (grad is not None) == (i in needs_grad), i
        assert grad is None or (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape), i
    case.bound(tensors).check(results)


@examples(4)
@given(rows(), NEEDS_GRAD)
@roomy
def test_rows_match_fp64(device, case, needs_grad):
    against_fp64(case, needs_grad, device)


@examples(2)
@given(rows(fused=True), NEEDS_GRAD)
@roomy
def test_fused_rows_match_fp64(device, case, needs_grad):
    against_fp64(case, needs_grad, device)


@examples(1.4)
@given(channels(), NEEDS_GRAD)
@roomy
def test_channels_match_fp64(device, case, needs_grad):
    against_fp64(case, needs_grad, device)


@examples(1.2)
@given(channels(fused=True), NEEDS_GRAD)
@roomy
def test_fused_channels_match_fp64(device, case, needs_grad):
    against_fp64(case, needs_grad, device)


def of_samples(tensors: Inputs, chosen: Any) -> Inputs:
    parameters = {"weight": tensors.weight, "bias": tensors.bias}
    return Inputs(*(None if t is None else t[chosen] for t in tensors))._replace(**parameters)


@examples(0.4)
@given(rows(fused=True, strided=False), st.integers(0, 98), st.sampled_from((math.nan, math.inf, -6e4)))
@roomy
def test_a_row_has_the_same_bits_beside_any_others(device, case, place, poison):
    """Alone, and among rows of another content."""
    tensors = case.drawn(device)
    flat = Inputs(*(None if t is None else t.reshape(-1, *case.parameter_shape) for t in tensors))
    flat = flat._replace(weight=tensors.weight, bias=tensors.bias)
    row = place % len(flat.x)
    chosen = slice(row, row + 1)
    whole, alone = run(case, flat), run(case, of_samples(flat, chosen))
    x = torch.full_like(flat.x, poison)
    x[chosen] = flat.x[chosen]
    neighbour = run(case, flat._replace(x=x))
    for every, one, other in zip(whole[:4], alone[:4], neighbour[:4], strict=True):
        assert every is None or same((every[chosen], other[chosen]), (one, one))


@examples(0.3)
@given(channels(fused=True), st.integers(0, 98), st.sampled_from((math.nan, math.inf, -6e4)))
@roomy
def test_a_channel_has_the_same_bits_beside_any_others(device, case, place, poison):
    tensors = case.drawn(device)
    chosen = place % case.shape[1]
    others = [channel for channel in range(case.shape[1]) if channel != chosen]
    x = tensors.x.clone()
    x[:, others] = poison
    x = case.x_layout._replace(expanded=()).of(x)
    one = run(case, tensors._replace(x=case.x_layout._replace(expanded=()).of(tensors.x)))
    other = run(case, tensors._replace(x=x))
    for a, b in zip(one[:4], other[:4], strict=True):
        assert a is None or torch.equal(a[:, chosen], b[:, chosen])
    for a, b in zip(one[4:], other[4:], strict=True):
        assert a is None or torch.equal(a[chosen], b[chosen])


@examples(0.3)
@given(channels(fused=True, strided=False, modes=(False,)), st.integers(0, 98))
@roomy
def test_in_evaluation_a_sample_has_the_same_bits_in_any_batch(device, case, place):
    tensors = case.drawn(device)
    chosen = slice(place % case.shape[0], None)
    whole, part = run(case, tensors), run(case, of_samples(tensors, chosen))
    assert same((t if t is None else t[chosen] for t in whole[:4]), part[:4])


@examples(0.3)
@given(EITHER, NEEDS_GRAD)
@roomy
def test_the_same_call_gives_the_same_bits(device, case, needs_grad):
    """Fewer gradients have these bits too, unless other programs take the sums: on a GPU, and where programs wait."""
    tensors = case.drawn(device)
    if not INTERPRETED or case.cut in ("waiting", "holding"):
        needs_grad = {0, 1, 2, 3}
    needs_grad = present(tensors, needs_grad)
    every, some = run(case, tensors), run(case, tensors, needs_grad)
    saved = (grad if i in needs_grad else None for i, grad in enumerate(every.gradients))
    assert same((*every[:2], *saved), some)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the width of accesses may change the order of sums")
@examples(0.4)
@given(rows(fused=True))
@roomy
def test_strided_rows_give_the_bits_of_contiguous_ones(device, case):
    tensors = case.drawn(device)
    assert same(run(case, tensors), run(case, Inputs(*(t if t is None else t.contiguous() for t in tensors))))


@examples(0.4)
@given(
    st.one_of(
        rows(dtypes=(F32, BF16, F64), hard=("normal", "outlier", "constant")),
        channels(modes=(True,), dtypes=(F32, BF16, F64), hard=("normal", "outlier", "constant")),
    ),
    st.integers(-8, 8),
)
@roomy
def test_a_power_of_two_in_x_and_in_the_root_of_eps_changes_no_bit(device, case, power):
    tensors = case.drawn(device)
    one = run(case, tensors)
    scaled = dataclasses.replace(case, eps=case.eps * 4.0**power)
    other = run(scaled, tensors._replace(x=case.x_layout.of(tensors.x * 2.0**power)))
    assert same(one._replace(dx=one.dx * 2.0**-power), other)


@examples(1.5)
@given(
    st.one_of(
        rows(norms=(LAYER_NORM,), dtypes=(F32, F64), hard=("normal",)),
        channels(modes=(True,), dtypes=(F32, F64), hard=("normal",)),
    ),
    st.integers(-12, 12),
)
@roomy
def test_a_constant_added_to_x_changes_y_by_no_more_than_without_it(device, case, power):
    """x are multiples of 1/16 below 32, so that the sums are exact; the truth is of x alone, and of the mean's terms
    those are left that are centred."""
    tensors = case.drawn(device)
    x = (tensors.x * 16).round() / 16
    exact = tensors._replace(x=(x.double() - x.double().mean(case.axes, keepdim=True)))
    bound = case.bound(exact)
    bound.roundoff = torch.finfo(case.x).eps / 2
    shifted = tensors._replace(x=x + math.copysign(2.0 ** abs(power), power))
    with torch.no_grad(), launched(case, *shifted):
        y = case.ours(*shifted.leaves())
    assert_within(y, bound.exact.y, bound.errors().y)


@examples(0.3)
@given(
    st.one_of(
        rows(norms=(LAYER_NORM,), dtypes=(F32, F64)),
        channels(modes=(True,), dtypes=(F32, F64)),
    )
)
@roomy
def test_gradients_of_what_is_centred_sum_to_zero(device, case):
    """But for roundoff, whatever the data: y does not change with a constant added to x."""
    tensors = case.drawn(device)
    bound = case.bound(tensors)
    error = ulp(bound.exact.dx, case.x) + bound.errors().dx
    dx = run(case, tensors).dx.double().cpu()
    assert (dx.sum(case.axes).abs() <= error.sum(case.axes)).all()


@settings(examples(0.4), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(EITHER)
@roomy
def test_inference_gives_the_bits_of_training_and_writes_no_statistics(device, guard, case):
    tensors = case.drawn(device)
    training = run(case, tensors)
    if guard is not None:
        guard.launches.clear()
    with torch.no_grad(), launched(case, *tensors):
        result = case.ours(*tensors.leaves())
    assert same(result if isinstance(result, tuple) else (result, None), training[:2])
    if guard is not None and not (isinstance(case, Channels) and case.training):
        assert not any("statistics_ptr" in launch.arguments for launch in guard.launches)


@examples(1)
@given(
    channels(modes=(True,)),
    st.sampled_from((0.1, 0.0, 1.0, 0.25, None)),
    st.sampled_from((torch.int64, torch.int32)),
    st.integers(0, 5),
    st.integers(1, 3),
)
@roomy
def test_running_statistics_move_by_torchs_formula(device, case, momentum, kind, count, step):
    if case.running == F16 and case.hard in ("far", "outlier", "huge"):
        case = dataclasses.replace(case, hard="normal")  # fp16 may not hold those variances
    tensors = case.drawn(device)
    before = case.statistics(device)
    mean, var = (Layout((0,), (step,), step).of(t) for t in before)
    counter = torch.tensor(count, dtype=kind, device=device)
    options = {"momentum": momentum, "eps": case.eps, "num_batches_tracked": counter}
    with launched(case, *tensors):
        triton_norm.batch_norm(tensors.x, mean, var, tensors.weight, tensors.bias, True, **options)
    assert counter.item() == count + 1
    if momentum == 0.0:
        assert same((mean, var), before)
    fraction = 1 / (count + 1) if momentum is None else momentum
    bound, left = case.bound(tensors), widen(tensors.x)
    first, _, mean_terms = (t.squeeze() for t in case.moments(left))
    left = left - left.mean(case.axes, keepdim=True)
    left = left - (rest := left.mean(case.axes, keepdim=True))  # as a first mean in fp64 is rounded, too
    unbiased = bound.count / (bound.count - 1)
    batch_var = left.square().mean(case.axes) * unbiased
    slip = bound.slack(mean_terms).square() * unbiased  # in what the variance is about
    for moved, saved, batch, terms, more in (
        (mean, widen(before[0]), first + rest.squeeze(), mean_terms, 0.0),
        (var, widen(before[1]), batch_var, batch_var, fraction * slip),
    ):
        exact = (1 - fraction) * saved + fraction * batch
        assert_within(moved, exact, bound.slack((1 - fraction) * saved.abs() + fraction * terms) + more)


@examples(6.5)
@given(
    st.sampled_from(("layer_norm", "rms_norm", "batch_norm")),
    st.lists(st.integers(0, 3), min_size=2, max_size=5),
    st.sampled_from((F32, BF16, F16, F64)),
    st.sampled_from((F32, F64)),
    st.booleans(),
    st.booleans(),
)
def test_empty_tensors_are_as_torchs(device, function, shape, dtype, saved, training, residual):
    if function == "batch_norm":
        shape[1] = max(shape[1], 1)  # torch's raises IndexError without channels
    shape[0] = 0 if math.prod(shape) else shape[0]
    x = torch.ones(shape, dtype=dtype, device=device, requires_grad=True)
    if function == "batch_norm":
        weight = torch.ones(shape[1], dtype=saved, device=device, requires_grad=True)
        running = torch.ones(2, shape[1], dtype=saved, device=device)
        arguments: tuple[Any, ...] = (*running, weight, None, training)
    else:
        weight = torch.ones(shape[-1], dtype=saved, device=device, requires_grad=True)
        running = None
        arguments = ((shape[-1],), weight)
    fused = {"residual": torch.ones_like(x)} if residual else {}
    with triton_norm.backend("auto"):
        y = getattr(triton_norm, function)(x, *arguments, **fused)
    y = y[0] if isinstance(y, tuple) else y
    assert (y.shape, y.dtype) == (x.shape, dtype)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert (dx.shape, dx.dtype, dweight.dtype) == (x.shape, dtype, saved)
    assert dweight.shape == weight.shape
    assert not dweight.any()
    assert running is None or (running == 1).all()


MODULES = {1: (nn.BatchNorm1d, triton_norm.BatchNorm1d), 2: (nn.BatchNorm2d, triton_norm.BatchNorm2d)}


@examples(0.2)
@given(
    st.sampled_from((1, 2)),
    st.sampled_from((0.1, 1.0, 0.0, None)),
    st.booleans(),
    st.booleans(),
    st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(0, 99),
)
@roomy
def test_modules_follow_torchs_through_any_steps(device, rank, momentum, affine, tracks, steps, seed):
    """Results agree in fp64, to many more digits than a wrong flag or formula would leave."""
    options = {"momentum": momentum, "affine": affine, "track_running_stats": tracks, "dtype": F64, "device": device}
    theirs, ours = (module(3, **options) for module in MODULES[rank])
    generator = torch.Generator().manual_seed(seed)
    for training, samples, positions in steps:
        alone = (training or not tracks) and samples * positions == 1  # an error
        x = torch.randn(samples + alone, 3, *[positions] * rank, generator=generator, dtype=F64).to(device)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("x", "residual", "total"), [(F32, F64, F32), (F16, F64, F32), (F32, F32, F64), (F64, F32, F32)]
)
def test_a_sum_with_fp64_in_it_is_rounded_once(x, residual, total, backend, norm, device):
    """2^-25 is less than half an ulp of 1 in fp32; with another 2^-26 beyond it, sums are on the other side."""
    input = torch.tensor([[1.0, 0.1, -3.0, 2.0]], dtype=F64).to(device, x)
    added = torch.tensor([[2.0**-24 + 2.0**-40, 0.3, 2.0**-24, 1 / 3]], dtype=F64).to(device, residual)
    with triton_norm.backend(backend):
        _, result = norm.ours((4,), residual=added, residual_dtype=total)(input)
    assert torch.equal(result, (input.double() + added.double()).to(total))
