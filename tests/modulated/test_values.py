"""Rows with a gate or a modulation: values and gradients against fp64, for any shapes, types, strides and launches."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

import triton_norm
from support.modulated import NAMES, OUTER, Bound, Modulated
from support.modulated_strategies import modulated


def examples(fraction):
    """Returns settings of so many times as many examples as the profile says."""
    return settings(max_examples=max(1, int(fraction * settings().max_examples)))


def against_fp64(case, device, backend):
    tensors = case.drawn(device)
    storages = {name: tensor.untyped_storage() for name, tensor in tensors.items() if tensor is not None}
    memories = [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in storages.values()]
    before = [memory.clone() for memory in memories]
    with triton_norm.backend(backend):
        result = case.run(tensors)
    assert all(map(torch.equal, memories, before)), "an input has been written to"
    assert result["y"].dtype == (case.out or tensors["x"].dtype)
    assert result["y"].is_contiguous()
    if result["total"] is not None:
        Bound(case, tensors, None).check_total(result["total"])
    case.check(tensors, result)


@examples(3)
@given(modulated())
def test_kernels_match_fp64(device, case):
    against_fp64(case, device, "triton")


@given(modulated(by_torch=True))
def test_torchs_path_matches_fp64(device, case):
    against_fp64(case, device, "torch")


@examples(0.3)
@given(modulated())
def test_the_same_call_gives_the_same_bits(device, case):
    tensors = case.drawn(device)
    with triton_norm.backend("triton"):
        assert same(*(case.run(tensors).values() for _ in range(2)))


def same(one, other):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


SHARED = ("weight", "bias")
"""Their gradients are sums over all samples."""


@pytest.mark.parametrize("lengths", [(), (1,), (5,)], ids=["a sample's", "also a sample's", "each row's"])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 2, 37, 150])
def test_a_sample_does_not_depend_on_the_others(n_tokens, gate_first, lengths, numbers, device):
    """Batches have one, three and eight samples; several programs share one that has many tokens."""
    numbers(interpreted_tile_elements=256, multiprocessors=3, modulated_split_rows=16)
    lengths = (n_tokens,) if lengths == (5,) else lengths
    case = Modulated(
        "layer_norm",
        (8, n_tokens, 24),
        1,
        dict.fromkeys(NAMES, torch.float32),
        {name: (8, *lengths, 24) for name in OUTER},
        chunks=frozenset(OUTER),
        gate_first=gate_first,
    )
    tensors = case.drawn(device)

    def of(samples):
        batch = {name: t if name in SHARED else t[samples] for name, t in tensors.items()}
        with triton_norm.backend("triton"):
            result = case.run(batch)
        return [tensor for name, tensor in result.items() if name[1:] not in SHARED]

    whole = of(slice(None))
    for samples in (slice(2, 3), slice(4, 7), slice(7, None)):
        assert same(of(samples), [tensor[samples] for tensor in whole])


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("n_cols", [17, 32, 75])
def test_long_rows_in_pieces(n_cols, gate_first, numbers, device, guard):
    """A sample has the same bits in every batch, and the same launches: one forward, and three backward."""
    numbers(interpreted_tile_elements=32, multiprocessors=3, modulated_split_rows=2, backward_span_bytes=64)
    shapes = {name: (4, n_cols) for name in OUTER}
    case = Modulated(
        "layer_norm", (4, 5, n_cols), 1, dict.fromkeys(NAMES, torch.float32), shapes, gate_first=gate_first
    )
    tensors = case.drawn(device)

    def of(samples):
        with triton_norm.backend("triton"):
            return case.run({name: t if name in SHARED else t[samples] for name, t in tensors.items()})

    whole = of(slice(None))
    case.check(tensors, whole)
    if guard is not None:
        kernels = [launch.kernel for launch in guard.launches]
        backward = ("row_sums", "backward", "backward_finalise")
        assert kernels == [f"modulated_{name}_kernel" for name in ("forward", *backward)]
    part = of(slice(1, 3))
    own = [name for name in whole if name[1:] not in SHARED]
    assert same([part[name] for name in own], [whole[name][1:3] for name in own])


def test_more_programs_than_one_share_a_sample(numbers, device, guard):
    """Three programs do, of which two begin behind the first row of their sample."""
    numbers(interpreted_tile_elements=256, multiprocessors=3, modulated_split_rows=16)
    x, scale = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 150, 24), (2, 24)))
    with triton_norm.backend("triton"):
        triton_norm.layer_norm(x, (24,), scale=scale).sum().backward()
    if guard is not None:
        backward = next(launch for launch in guard.launches if launch.kernel == "modulated_backward_kernel")
        assert backward.bytes("store", "sums_ptr") == 2 * 3 * 24 * 4


SPECIAL = (math.inf, -math.inf, math.nan, 1e30, -1e30, 100.0, -100.0, 0.0, -0.0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("activation", ["silu", "sigmoid", None])
def test_gates_that_are_not_finite_or_far_from_zero(activation, gate_first, backend, device):
    """NaN is where torch's own composition has it, in values and gradients, and infinities too."""
    x, dy = torch.randn(2, len(SPECIAL), 4, device=device)
    gate = torch.tensor(SPECIAL, device=device).view(-1, 1).repeat(1, 4)
    gate[:, 1:] = torch.randn(len(SPECIAL), 3, device=device)

    def composed(x, gate):
        f = {"silu": F.silu, "sigmoid": torch.sigmoid, None: lambda z: z}[activation]
        return F.rms_norm(x * f(gate), (4,)) if gate_first else F.rms_norm(x, (4,)) * f(gate)

    def ours(x, gate):
        options = {"gate_activation": activation, "gate_first": gate_first}
        return triton_norm.rms_norm(x, (4,), gate=gate, **options)

    result = []
    with triton_norm.backend(backend):
        for function in (ours, composed):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, gate)]
            y = function(*leaves)
            result.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for one, other in zip(*result, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_rows(shape, backend, device):
    """The gradient of a modulation is zero then."""
    x, gate = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    scale = torch.randn(shape[0], 4, device=device, requires_grad=True)
    with triton_norm.backend(backend):
        y, total = triton_norm.layer_norm(x, (4,), gate=gate, scale=scale, residual=x, residual_gate=scale)
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert scale.grad is not None
    assert not scale.grad.any()
    assert x.grad.shape == gate.grad.shape == shape


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_modulation_by_hand(backend, device):
    """Rows [1, 3] are normalized to [-1, 1]."""
    x = torch.tensor([[[1.0, 3.0], [1.0, 3.0]], [[1.0, 3.0], [3.0, 1.0]]], device=device)
    scale = torch.tensor([[1.0, 2.0], [0.0, -1.0]], device=device)
    shift = torch.tensor([[10.0, 10.0], [20.0, 20.0]], device=device)
    gate = torch.tensor([2.0, 3.0], device=device).expand(2, 2, 2)
    with triton_norm.backend(backend):
        result = triton_norm.layer_norm(x, (2,), eps=0.0, scale=scale, shift=shift, gate=gate, gate_activation=None)
        heads = triton_norm.layer_norm(x, (2,), eps=0.0, head_weight=scale, weight_offset=1.0, shift=shift)
    expected = torch.tensor([[[16.0, 39.0], [16.0, 39.0]], [[38.0, 60.0], [42.0, 60.0]]], device=device)
    torch.testing.assert_close(result, expected)
    rows_of_heads = torch.tensor([[[8.0, 13.0], [9.0, 10.0]], [[18.0, 23.0], [21.0, 20.0]]], device=device)
    torch.testing.assert_close(heads, rows_of_heads)
