"""y and the gradients of what may be fused behind batch_norm, against torch's functions in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

import triton_norm
from support.channel_norms import (
    ACTIVATIONS,
    DTYPES,
    FUSED,
    KINDS,
    MODES,
    SHAPES,
    SPLIT,
    drawn,
    laid,
    share,
    taking_turns,
)
from support.oracle import differentiated, ulp

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _through_the_kernels():
    with triton_norm.backend("triton"):
        yield


@MODES
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize(("activation", "residual"), FUSED)
def test_matches_fp64(activation, residual, kind, shape, training, device):
    call = drawn(shape, kind, device, training=training, residual=residual, activation=activation)
    found = call.against_oracle()
    for tensor in (found.y, found.dx, *([] if residual is None else [found.dresidual])):
        assert tensor.stride() == call.x.stride()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_other_types(activation, kind, dtype, device):
    """Rounded once, after the activation."""
    shape, _ = SPLIT[kind]
    drawn(shape, kind, device, dtype, residual=dtype, activation=activation).against_oracle()


@pytest.mark.parametrize(
    ("dtype", "residual"),
    [(HALF, torch.float32), (torch.float32, torch.float16), (torch.float64, HALF), (torch.float16, torch.float64)],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_residual_of_another_type(activation, kind, dtype, residual, device):
    shape, _ = SPLIT[kind]
    found = drawn(shape, kind, device, dtype, residual=residual, activation=activation).against_oracle()
    assert (found.y.dtype, found.dx.dtype, found.dresidual.dtype) == (dtype, dtype, residual)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_parameters_in_fp32_beside_halves(activation, kind, backend, device):
    """As mixed precision has them."""
    call = drawn(SPLIT[kind][0], kind, device, HALF, residual=HALF, activation=activation)
    call = call.of(weight=torch.randn_like(call.weight, dtype=torch.float32), bias=call.bias.float())
    call = call.away_from_the_kink()
    with triton_norm.backend(backend):
        found = call.against_oracle()
    assert (found.y.dtype, found.dweight.dtype, found.dbias.dtype) == (HALF, torch.float32, torch.float32)


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "residual"), [(None, HALF), ("relu", torch.float32), ("leaky_relu", None), ("silu", torch.float32)]
)
def test_by_several_programs_a_channel(activation, residual, kind, one_launch, numbers, guard, device):
    shape, tile = SPLIT[kind]
    share(numbers, tile, one_launch)
    with taking_turns():
        drawn(shape, kind, device, residual=residual, activation=activation).against_oracle()
    if guard is not None:
        assert len(guard.launches) == (2 if one_launch else 4)
        assert "sync_ptr" in guard.launches[0].arguments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_evaluation_by_several_programs_a_channel(activation, kind, numbers, guard, device):
    shape, tile = SPLIT[kind]
    share(numbers, tile)
    drawn(shape, kind, device, training=False, residual=HALF, activation=activation).against_oracle()
    assert guard is None or len(guard.launches) == 2


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("residual", [None, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes(slope, residual, dtype, device):
    drawn((2, 3, 4, 4), "flat", device, dtype, residual=residual, activation="leaky_relu", slope=slope).against_oracle()


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_residual_that_is_the_input(activation, device):
    call = drawn((3, 4, 5, 3), "flat", device, residual=torch.float32, activation=activation)
    call = call.of(residual=call.x).away_from_the_kink()
    apart = call.run()
    leaf = call.x.clone().requires_grad_()
    (found,) = torch.autograd.grad(call.ours(leaf, leaf, call.weight, call.bias), leaf, call.dy)
    assert torch.equal(found, apart.dx + apart.dresidual)


STRIDED = {
    "every second sample": lambda x: torch.stack((x, x), 1)[:, 0],
    "some of the channels": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "rows of an image padded": lambda x: F.pad(x, (0, 2))[..., :-2],
    "offset by one element": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "one element expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "one sample expanded": lambda x: x[:1].expand(x.shape),
    "one channel expanded": lambda x: x[:, :1].expand(x.shape),
    "one position expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
    "height and width exchanged": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels first": lambda x: x.contiguous(),
    "channels last": lambda x: laid(x, "last"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize(("of", "activation"), [("residual", "silu"), ("dy", "relu")])
def test_strides(of, activation, strided, kind, device):
    shape = (9, 8, 3, 4) if kind == "folded" else (4, 8, 6, 6)
    call = drawn(shape, kind, device, residual=torch.float32, activation=activation)
    call = call.of(**{of: STRIDED[strided](getattr(call, of))})
    (call if of == "dy" else call.away_from_the_kink()).against_oracle()


@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("of", ["x", "residual", "dy"])
def test_nan_and_inf_where_torch_has_them(of, activation, training, device):
    """Each in two channels, at an element whose z is far below 0 and at one far above; another channel has none."""
    call = drawn((3, 7, 5, 5), "flat", device, training=training, residual=torch.float32, activation=activation)
    poisons = torch.tensor([math.nan, math.inf, -math.inf], device=device).repeat(2)
    call.residual[1, :3, 2, 3] -= 50.0
    call.residual[1, 3:, 2, 3] += 50.0
    getattr(call, of)[1, :6, 2, 3] = poisons
    ours, theirs = call.run(), differentiated(call.composed, call.inputs(), (call.dy,))
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silu_is_exact_far_from_zero(dtype, device):
    """z is x itself: mean 0, variance 1 and eps 0. Below −87 e^−z overflows in fp32, and the true y is next to 0."""
    far = torch.tensor([1e4, -1e4, 80.0, -80.0, 87.0, -87.0, 20.0, -20.0, 1e-3, -1e-3, 1e-30, 0.0])
    z = torch.cat((far, torch.linspace(-87, 87, 116))).to(device, dtype).view(8, 2, 8).requires_grad_()
    mean, var = torch.zeros(2, device=device, dtype=dtype), torch.ones(2, device=device, dtype=dtype)
    y = triton_norm.batch_norm(z, mean, var, eps=0.0, activation="silu")
    (dx,) = torch.autograd.grad(y, z, torch.ones_like(y))
    exact = z.detach().double().requires_grad_()
    exact_y = F.silu(exact)
    (exact_dx,) = torch.autograd.grad(exact_y.sum(), exact)
    exact_y = exact_y.detach()
    assert ((y - exact_y).abs() <= 4 * ulp(exact_y, dtype)).all()
    # σ(z) · (1 + z · (1 − σ(z))) is 0 near −1.28: a sum of terms of this size.
    terms = torch.sigmoid(exact.detach()) * (1 + exact.detach().abs() * torch.sigmoid(-exact.detach()))
    assert ((dx - exact_dx).abs() <= 4 * ulp(terms, dtype)).all()
