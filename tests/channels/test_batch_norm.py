"""batch_norm through the kernels, with and without a residual and an activation, against torch in fp64."""

import math

import mpmath
import pytest
import torch
from torch.nn import functional as F

import triton_norm
from support.channel_norms import ACTIVATIONS, FUSED, KINDS, MODES, SHAPES, SPLIT, Call, drawn, laid, share
from support.oracle import DTYPES, differentiated, ulp
from support.pairwise import pairwise
from support.turns import taking_turns
from triton_norm.channels.layout import kind_of

pytestmark = pytest.mark.usefixtures("through_the_kernels")

HALF = torch.bfloat16


def is_laid_out(dtype, fused, layout, training):
    """Returns False for fp64 samples of 49 positions, which are not folded."""
    return (dtype, layout[0]) != (torch.float64, "folded")


@pairwise(
    {"dtype": DTYPES, "activation, residual": [(None, None), *FUSED], "kind, shape": SHAPES, "training": [True, False]},
    is_laid_out,
)
def test_matches_fp64(dtype, activation, residual, kind, shape, training, device):
    call = drawn(shape, kind, device, dtype, training=training, residual=residual, activation=activation)
    result = call.against_oracle()
    for tensor in (result.y, result.dx, result.dresidual):
        assert tensor is None or tensor.stride() == call.x.stride()


SIZES = [
    ("flat", (3, 1, 2, 2)),
    ("last", (5, 1)),
    ("flat", (1, 1, 300, 500)),  # one long channel, in ten tiles
    ("last", (50_001, 3)),  # features by the thousands: an odd number of rows of three
    ("flat", (2, 3, 201, 201)),  # odd positions: one element an access
    ("last", (2, 3, 120, 100)),
    ("flat", (2, 64, 14, 14)),
    ("last", (2, 64, 14, 14)),
    ("folded", (9, 64, 7, 7)),
    ("last", (4, 64, 7, 7)),
    ("last", (7, 64, 1, 1)),
    ("last", (2, 100_000)),
    ("folded", (8, 10_001, 2)),
    ("flat", (2, 6, 3, 4, 5)),
]


@pytest.mark.parametrize(("kind", "shape"), SIZES)
def test_sizes(kind, shape, numbers, device):
    if shape[1] == 100_000:
        numbers(channels_last_lanes=8192)  # fewer programs
    drawn(shape, kind, device).against_oracle()


TYPES = [(dtype, dtype) for dtype in DTYPES[1:]]
TYPES += [(HALF, torch.float32), (torch.float32, torch.float16), (torch.float64, HALF), (torch.float16, torch.float64)]


@pairwise({"dtype, residual": TYPES, "kind": KINDS, "activation": ACTIVATIONS})
def test_a_residual_of_the_same_type_or_another(activation, kind, dtype, residual, device):
    """Results are rounded once, after the activation."""
    result = drawn(SPLIT[kind][0], kind, device, dtype, residual=residual, activation=activation).against_oracle()
    assert (result.y.dtype, result.dx.dtype, result.dresidual.dtype) == (dtype, dtype, residual)


@pairwise(
    {
        "dtype, parameters": [(HALF, torch.float32), (HALF, torch.float64), (torch.float64, torch.float16)],
        "activation": [None, "relu", "silu"],
        "backend": ["triton", "torch"],
        "training": [True, False],
    }
)
def test_parameters_of_another_type(dtype, parameters, activation, backend, training, device):
    residual = None if activation is None else dtype
    call = drawn((4, 6, 9), "flat", device, dtype, training=training, residual=residual, activation=activation)
    call = call.of(weight=torch.randn(6, device=device).to(parameters), bias=call.bias.to(parameters))
    call = call.away_from_kinks()
    with triton_norm.backend(backend):
        result = call.against_oracle()
    assert (result.y.dtype, result.dweight.dtype, result.dbias.dtype) == (dtype, parameters, parameters)


@MODES
def test_parameters_and_running_statistics_of_any_stride(training, device):
    call = drawn((4, 6, 9), "flat", device)
    weight, bias, mean, var = (torch.rand(6, 4, device=device) + 0.5).T
    exact_mean, exact_var = mean.double(), var.double()
    results, exact = (
        differentiated(
            lambda x, _, w, b, f=function, r=running: f(x, *r, w, b, training),
            (call.x.to(dtype), None, weight.to(dtype), bias.to(dtype)),
            (call.dy.to(dtype),),
        )
        for function, running, dtype in (
            (triton_norm.batch_norm, (mean, var), torch.float32),
            (F.batch_norm, (exact_mean, exact_var), torch.float64),
        )
    )
    for a, b in zip([*results.tensors(), mean, var], [*exact.tensors(), exact_mean, exact_var], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


SOME_FUSED = [(None, HALF), ("relu", torch.float32), ("leaky_relu", None), ("silu", torch.float32)]


@pairwise({"activation, residual": SOME_FUSED, "kind": KINDS, "one_launch": [True, False]})
def test_several_programs_a_channel(activation, residual, kind, one_launch, numbers, guard, device):
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


@pairwise({"activation, residual": FUSED, "dtype": DTYPES, "training": [True, False]})
def test_torchs_path_matches_fp64(activation, residual, dtype, training, device):
    call = drawn((3, 5, 5, 7), "flat", device, dtype, training=training, residual=residual, activation=activation)
    with triton_norm.backend("torch"):
        call.against_oracle()


@pairwise(
    {
        "slope": [0.0, 0.3, 1.0, 2.0, -0.5],
        "residual": [None, torch.float64],
        "dtype": [torch.float32, torch.float64],
    }
)
def test_slopes(slope, residual, dtype, device):
    drawn((2, 3, 4, 4), "flat", device, dtype, residual=residual, activation="leaky_relu", slope=slope).against_oracle()


HARD = {
    "mean is 1e4 times std": lambda shape: 1e4 + torch.randn(shape),
    "constant": lambda shape: torch.full(shape, 1e4 / 3),
    "a constant per channel": lambda shape: (torch.randn(shape[1]) * 1e3)[:, None, None].expand(shape).contiguous(),
    "one outlier": lambda shape: torch.randn(shape).index_put((torch.tensor(0),), torch.tensor(1e6)),
    "squares near the largest": lambda shape: torch.randn(shape).sign() * 1e18,
    "large, of one sign": lambda shape: 3e38 * (1 - 1e-3 * torch.rand(shape)),
}


@pytest.mark.parametrize("kind", ["flat", "last"])
@pytest.mark.parametrize("data", HARD)
def test_no_less_exact_than_torch_on_hard_data(data, kind, numbers, device):
    numbers(interpreted_tile_elements=256, multiprocessors=2, min_split_elements=64, channels_last_lanes=16)
    x = laid(HARD[data]((4, 6, 9, 10)).to(device), kind)
    weight, bias = torch.randn(2, 6, device=device)
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
    theirs, ours = (f(x, None, None, weight, bias, True).double() for f in (F.batch_norm, triton_norm.batch_norm))
    assert ours.isfinite().all()
    known = theirs.isfinite()
    their_error, our_error = ((y - exact)[known].abs().max() if known.any() else 0.0 for y in (theirs, ours))
    assert our_error <= 2 * their_error + 4 * torch.finfo(torch.float32).eps * exact.abs().max().clamp_min(1)


UNEVEN = {
    "normal": lambda x, place: x,
    "mean 1e6 times std": lambda x, place: x + 1e6,
    "an outlier in the first tile": lambda x, place: torch.where(place == 0, 1e6, x),
    "an outlier in the last tile": lambda x, place: torch.where(place == 1, 1e6, x),
    "drift": lambda x, place: x + 2e3 * place - 1e3,
    "a step": lambda x, place: 1e-3 * x + 1e3 * (place > 0.5),
}
"""Channels of many tiles, not all alike, from noise x and the place of an element in its channel, 0 to 1."""


MANY_TILES = [("flat", (32, 8, 4, 8)), ("last", (32, 8, 4, 8)), ("folded", (120, 8, 3, 3))]


@pairwise({"data": list(UNEVEN), "kind, shape": MANY_TILES, "one_launch": [True, False]})
def test_moments_of_many_tiles_are_those_of_all(data, kind, shape, one_launch, numbers, device):
    """No mean leaves an error of its own size, and a constant channel leaves none."""
    share(numbers, 512 if kind == "folded" else 128, one_launch, channels_last_lanes=8)
    place = torch.linspace(0, 1, shape[0] * shape[2] * shape[3]).view(shape[0], 1, *shape[2:])
    x = UNEVEN[data](torch.randn(shape), place)
    x[:, 1] = 1e6 / 3
    x = laid(x, kind).to(device)
    assert kind_of(x) == kind
    exact = F.batch_norm(x.double().cpu(), None, None, training=True)
    with taking_turns():
        y = triton_norm.batch_norm(x, None, None, training=True).double().cpu()
    assert not y[:, 1].any()
    largest = exact.abs().amax((0, 2, 3), keepdim=True).clamp_min(1)
    assert ((y - exact).abs() / largest).max() <= 8 * torch.finfo(torch.float32).eps


@pairwise({"of": ["x", "residual", "dy"], "activation": ACTIVATIONS, "training": [True, False]})
def test_nan_and_inf_where_torch_has_them(of, activation, training, device):
    """Each in two channels, at an element whose z is far below 0 and at one far above; another channel has none."""
    call = drawn((3, 7, 5, 5), "flat", device, training=training, residual=torch.float32, activation=activation)
    poisons = torch.tensor([math.nan, math.inf, -math.inf], device=device).repeat(2)
    call.residual[1, :3, 2, 3] -= 50.0
    call.residual[1, 3:, 2, 3] += 50.0
    getattr(call, of)[1, :6, 2, 3] = poisons
    wide = [tensor.double() for tensor in call.inputs()]  # in fp32 torch's GELU of ∞ is NaN on the CPU
    ours, theirs = call.run(), differentiated(call.composed, wide, (call.dy.double(),))
    for one, other in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4, equal_nan=True)


def activated_in(activation, z):
    """Returns y, f', the terms of f' and the exponent at z, by arithmetic of 40 digits."""
    if activation == "hardswish":
        left = min(max(z + 3, 0), 6) / 6
        slope = (2 * z + 3) / 6 if abs(z) < 3 else left
        return z * left, slope, slope, 0
    if activation == "silu":
        exponent, left = z, 1 / (1 + mpmath.exp(-z))
        right = left * (1 - left) * z
    elif activation == "gelu":
        exponent, left, right = z * z / 2, mpmath.ncdf(z), z * mpmath.npdf(z)
    else:
        root, cube = mpmath.sqrt(2 / mpmath.pi), mpmath.mpf("0.044715")
        exponent = 2 * root * z * (1 + cube * z * z)
        left = 1 / (1 + mpmath.exp(-exponent))
        right = left * (1 - left) * z * 2 * root * (1 + 3 * cube * z * z)
    return z * left, left + right, left + abs(right), abs(exponent)


@pytest.mark.parametrize(
    ("activation", "farthest"), [("hardswish", 6.0), ("silu", 87.0), ("gelu", 12.8), ("gelu_tanh", 10.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curved_activations_are_exact_far_from_zero(dtype, activation, farthest, device):
    """z is x itself: mean 0, variance 1 and eps 0. Beyond, y is subnormal in fp32, or e^-z overflows. An exponent is
    rounded in fp64 alone: in fp32 its rounding error is corrected for."""
    z = torch.cat((torch.linspace(-farthest, farthest, 113), torch.linspace(-1, 1, 96)))
    z = torch.cat((z, torch.tensor([1e30, -1e30, 1e15, -1e15, 1e4, -1e4, -30.0]))).to(device, dtype)
    z = z.view(27, 2, 4).requires_grad_()
    mean, var = torch.zeros(2, device=device, dtype=dtype), torch.ones(2, device=device, dtype=dtype)
    y = triton_norm.batch_norm(z, mean, var, eps=0.0, activation=activation)
    (dx,) = torch.autograd.grad(y, z, torch.ones_like(y))
    with mpmath.workdps(40):
        exact = [list(map(float, activated_in(activation, mpmath.mpf(one)))) for one in z.flatten().tolist()]
    exact_y, exact_dx, terms, exponent = torch.tensor(exact, dtype=torch.float64).T.reshape(4, *z.shape).to(device)
    ulps = 8 + (exponent if dtype == torch.float64 else 0)
    assert ((y - exact_y).abs() <= (4 if activation == "silu" else ulps) * ulp(exact_y, dtype)).all()
    assert ((dx - exact_dx).abs() <= ulps * ulp(terms, dtype)).all()


def test_channels_past_two_to_the_31_elements(device):
    """Two samples are far apart in a storage that is reserved and not touched between them."""
    stride = 2**31 + 64
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * stride:
        pytest.skip("less than 6 GB of GPU memory free")
    storage = torch.UntypedStorage(2 * (stride + 64), device=device)
    x = torch.empty(0, dtype=torch.float16, device=device).set_(storage, 0, (2, 4, 16), (stride, 16, 1))
    x.copy_(torch.randn(2, 4, 16))
    Call(x, None, None, None, torch.randn(2, 4, 16, device=device).half()).against_oracle()
