"""triton_norm.layer_norm through the kernels, against torch in fp64."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from oracle import Results, check, layer_norm_oracle, run

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def _through_the_kernels():
    with triton_norm.backend("triton"):
        yield


def layer_norm(normalized_shape: tuple[int, ...], eps: float = 1e-5):
    return lambda x, weight, bias: triton_norm.layer_norm(x, normalized_shape, weight, bias, eps)


def drawn(shape: tuple[int, ...], n_axes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x, weight, bias and dy."""
    normalized = shape[len(shape) - n_axes :]
    x = (3 * torch.randn(shape, dtype=torch.float64) + 2).to(device, dtype)
    weight, bias = (torch.randn(normalized, dtype=torch.float64).to(device, dtype) for _ in range(2))
    return x, weight, bias, torch.randn(shape, dtype=torch.float64).to(device, dtype)


def against_oracle(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, n_axes: int = 1) -> Results:
    normalized = tuple(x.shape[x.dim() - n_axes :])
    actual = run(layer_norm(normalized), x, weight, bias, dy)
    axes = tuple(range(x.dim() - n_axes, x.dim()))
    check(actual, x, weight, bias, dy, axes, layer_norm_oracle(normalized, x.dim()))
    return actual


@pytest.fixture
def small_tiles(numbers):
    """Interpreted with tiles as small, against these rows, as a GPU's are against real ones."""
    numbers(INTERPRETED_TILE=128, INTERPRETED_SMS=3, WHOLE_ROW_FORWARD_BYTES=512, WHOLE_ROW_BACKWARD_BYTES=256)


SHAPES = [
    ((4, 32), 1),  # a power of two
    ((3, 1000), 1),  # divisible by 8 but not by 16
    ((5, 33), 1),  # odd: one element an access
    ((7, 1), 1),  # one column: x_hat is 0
    ((1, 257), 1),  # one row, a prime past a power of two
    ((131, 6), 1),  # many short rows, more than a tile of them
    ((2, 3, 4, 8), 1),  # leading axes
    ((2, 3, 4, 6), 3),  # several normalized axes
    ((5,), 1),  # no leading axis
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "n_axes"), SHAPES)
def test_matches_fp64(shape, n_axes, dtype, device):
    against_oracle(*drawn(shape, n_axes, dtype, device), n_axes)


@pytest.mark.parametrize(
    "columns", [65537, 40000]
)  # past one row in registers: an odd length, and one with wide accesses
def test_long_rows(columns, device):
    against_oracle(*drawn((3, columns), 1, torch.float32, device))


@pytest.mark.parametrize("columns", [96, 129, 200, 384])
@pytest.mark.parametrize("rows", [1, 2, 27])
@pytest.mark.usefixtures("small_tiles")
def test_pieces_and_many_programs(rows, columns, device):
    against_oracle(*drawn((rows, columns), 1, torch.float32, device))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_either_parameter_may_be_missing(with_weight, with_bias, device):
    x, weight, bias, dy = drawn((6, 48), 1, torch.float32, device)
    against_oracle(x, weight if with_weight else None, bias if with_bias else None, dy)


@pytest.mark.parametrize("parameters", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parameters_of_another_type(dtype, parameters, device):
    x, _, _, dy = drawn((4, 40), 1, dtype, device)
    _, weight, bias, _ = drawn((4, 40), 1, parameters, device)
    actual = against_oracle(x, weight, bias, dy)
    assert (actual.y.dtype, actual.dx.dtype) == (dtype, dtype)
    assert (actual.dweight.dtype, actual.dbias.dtype) == (parameters, parameters)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("columns", [24, 300])
def test_only_the_gradients_asked_for(asked, columns, device):
    *inputs, dy = drawn((9, columns), 1, torch.float32, device)
    everything = run(layer_norm((columns,)), *inputs, dy)
    leaves = [tensor.requires_grad_(i in asked) for i, tensor in enumerate(inputs)]
    y = layer_norm((columns,))(*leaves)
    found = torch.autograd.grad(y, [leaves[i] for i in asked], dy)
    expected = (everything.dx, everything.dweight, everything.dbias)
    for i, grad in zip(asked, found, strict=True):
        assert torch.equal(grad, expected[i])


def test_inference_gives_the_bits_of_training_and_saves_nothing(device):
    x, weight, bias, dy = drawn((6, 100), 1, torch.bfloat16, device)
    training = run(layer_norm((100,)), x, weight, bias, dy).y
    y = triton_norm.layer_norm(x, (100,), weight, bias)
    assert y.grad_fn is None
    with torch.no_grad():
        frozen = triton_norm.layer_norm(x, (100,), weight.requires_grad_(), bias)
    assert frozen.grad_fn is None
    assert torch.equal(y, training)
    assert torch.equal(frozen, training)


LAYOUTS = {
    "row-strided": lambda x: torch.stack((x, x), 1)[:, 0],
    "padded rows": lambda x: F.pad(x, (0, 3))[:, :-3],
    "offset by one element": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.t().contiguous().t(),
    "one column expanded": lambda x: x[:, :1].expand(x.shape),
    "every second column": lambda x: torch.stack((x, x), 2)[:, :, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["input", "gradient", "both"])
def test_layouts(layout, of, device):
    x, weight, bias, dy = drawn((12, 64), 1, torch.float32, device)
    lay = LAYOUTS[layout]
    against_oracle(lay(x) if of != "gradient" else x, weight, bias, lay(dy) if of != "input" else dy)


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean, lambda y: y.mean(-1).square().sum()])
def test_expanded_gradients_are_read_where_they_lie(reduce, device, monkeypatch):
    x, weight, bias, _ = drawn((4, 3, 64), 1, torch.float32, device)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y = triton_norm.layer_norm(leaf, (64,), weight, bias)
    monkeypatch.setattr(Tensor, "contiguous", _must_not_copy)
    reduce(y).backward()
    monkeypatch.undo()
    reduce(F.layer_norm(exact, (64,), weight.double(), bias.double())).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def _must_not_copy(self, *args, **kwargs):
    assert self.numel() <= 64 or self.is_contiguous(), "a gradient was copied"
    return self


def test_strided_rows_are_not_copied(guard, device):
    x = torch.randn(16, 2, 64, device=device)[:, 1]
    assert not triton_norm.explain(triton_norm.layer_norm, x, (64,)).copies
    assert triton_norm.explain(triton_norm.layer_norm, x.t(), (16,)).copies
    if guard is not None:
        triton_norm.layer_norm(x, (64,))
        assert guard.loaded(x) == x.numel() * x.itemsize


HARD = {
    "mean is 1e4 times std": lambda n: 1e4 + torch.randn(6, n),
    "constant rows": lambda n: torch.tensor([0.1, 1e4 / 3, -7.7, 0.0, 1e-30, 1e30])[:, None].expand(6, n).contiguous(),
    "of both signs, squares near the largest": lambda n: torch.randn(6, n).sign() * 1e18,
    "large, of one sign": lambda n: 3e38 * (1 - 1e-3 * torch.rand(6, n)),
    "the largest, of both signs": lambda n: torch.randn(6, n).sign() * 1.6e38,
    "one outlier": lambda n: torch.cat((torch.full((6, 1), 1e6), torch.randn(6, n - 1)), 1),
    "tiny": lambda n: torch.randn(6, n) * 1e-20,
}


@pytest.mark.parametrize("columns", [64, 1000, 40001])
@pytest.mark.parametrize("data", HARD)
def test_no_less_exact_than_torch_on_hard_data(data, columns, device):
    x = HARD[data](columns).to(device)
    weight, bias = torch.randn(2, columns, device=device)
    exact = F.layer_norm(x.double(), (columns,), weight.double(), bias.double())
    theirs, ours = (f(x, (columns,), weight, bias).double() for f in (F.layer_norm, triton_norm.layer_norm))
    assert ours.isfinite().all()  # torch's on the CPU is NaN where the variance overflows
    rows = theirs.isfinite().all(1)
    their_error, our_error = ((y - exact)[rows].abs().amax() if rows.any() else 0.0 for y in (theirs, ours))
    assert our_error <= 2 * their_error + 4 * torch.finfo(torch.float32).eps * exact.abs().max().clamp_min(1)


@pytest.mark.parametrize("columns", [64, 1000, 40001])
@pytest.mark.parametrize("ratio", [1e4, 1e6])
def test_a_large_mean_leaves_no_error_of_its_own_size(ratio, columns, device):
    x = (ratio + torch.randn(4, columns)).to(device)
    exact = F.layer_norm(x.double(), (columns,))
    error = (triton_norm.layer_norm(x, (columns,)) - exact).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_where_torch_has_them(poison, device):
    x, weight, bias, dy = drawn((6, 65), 1, torch.float32, device)
    x[1, 3] = x[4, 64] = poison
    ours = run(layer_norm((65,)), x, weight, bias, dy)
    theirs = run(functools.partial(_torch_layer_norm, shape=(65,)), x, weight, bias, dy)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def _torch_layer_norm(x, weight, bias, shape):
    return F.layer_norm(x, shape, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_largest_values_of_the_halves(dtype, device):
    x = (torch.randn(4, 96).sign() * torch.finfo(dtype).max).to(device, dtype)
    theirs, ours = (f(x, (96,)) for f in (F.layer_norm, triton_norm.layer_norm))
    assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("columns", [24, 200])
@pytest.mark.usefixtures("small_tiles")
def test_same_bits_every_run(columns, device):
    inputs = drawn((19, columns), 1, torch.float32, device)
    first, second = (run(layer_norm((columns,)), *inputs).tensors() for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("columns", [24, 300])
@pytest.mark.usefixtures("small_tiles")
def test_a_row_has_the_same_bits_in_any_batch(columns, device):
    x, weight, bias, dy = drawn((19, columns), 1, torch.float32, device)
    whole = run(layer_norm((columns,)), x, weight, bias, dy)
    for rows in (slice(5, 9), slice(18, 19), slice(0, 19, 3)):
        part = run(layer_norm((columns,)), x[rows], weight, bias, dy[rows])
        assert torch.equal(part.y, whole.y[rows])
        assert torch.equal(part.dx, whole.dx[rows])


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5, 1])
def test_eps(eps, device):
    x, weight, bias, dy = drawn((3, 32), 1, torch.float32, device)
    actual = run(layer_norm((32,), eps), x * 1e-3, weight, bias, dy)
    check(actual, x * 1e-3, weight, bias, dy, (1,), layer_norm_oracle((32,), 2, eps), eps=eps)


@pytest.mark.unguarded  # fp64 through thousands of launches; the kernels are guarded above
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_of_both_orders(affine, device):
    x, weight, bias, _ = drawn((2, 2, 2), 2, torch.float64, device)
    leaves = [x.requires_grad_()] + [p.requires_grad_() for p, kept in zip((weight, bias), affine, strict=True) if kept]

    def function(x, *parameters):
        found = iter(parameters)
        weight, bias = (next(found) if kept else None for kept in affine)
        return triton_norm.layer_norm(x, (2, 2), weight, bias)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_module_loads_torchs_state_and_agrees(device):
    theirs = nn.LayerNorm((4, 10), device=device)
    with torch.no_grad():
        theirs.weight.uniform_()
        theirs.bias.uniform_()
    ours = triton_norm.LayerNorm((4, 10), device=device)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, 10, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, nn.LayerNorm)
    assert str(ours) == str(theirs)


def test_module_without_parameters_and_without_bias(device):
    x = torch.randn(3, 10, device=device)
    for options in ({"elementwise_affine": False}, {"bias": False}):
        ours, theirs = triton_norm.LayerNorm(10, device=device, **options), nn.LayerNorm(10, device=device, **options)
        assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
        torch.testing.assert_close(ours(x), theirs(x))


def test_rows_past_two_to_the_31_elements(device):
    """Two rows far apart in a storage that is reserved and not touched between them."""
    stride = 2**31 + 64
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * stride:
        pytest.skip("less than 13 GB of GPU memory free")
    storage = torch.UntypedStorage(2 * (stride + 64), device=device)
    x = torch.empty(0, dtype=torch.float16, device=device).set_(storage, 0, (2, 64), (stride, 1))
    x.copy_(torch.randn(2, 64))
    against_oracle(x, None, None, torch.randn(2, 64, device=device).half())
