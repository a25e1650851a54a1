"""triton_norm.layer_norm and rms_norm through the kernels, against torch in fp64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import triton_norm
from support.oracle import DTYPES, run

pytestmark = pytest.mark.usefixtures("through_the_kernels")


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
def test_matches_fp64(norm, shape, n_axes, dtype, device):
    norm.against_oracle(*norm.drawn(shape, n_axes, dtype, device), n_axes)


@pytest.mark.parametrize("columns", [65537, 40000])
def test_rows_too_long_for_registers(norm, columns, device):
    """One length is odd, one allows wide accesses."""
    norm.against_oracle(*norm.drawn((3, columns), 1, torch.float32, device))


@pytest.mark.parametrize("columns", [96, 129, 200, 384])
@pytest.mark.parametrize("rows", [1, 2, 27])
def test_pieces_and_many_programs(norm, rows, columns, numbers, device):
    """Tiles are as small, against these rows, as a GPU's are against real ones."""
    numbers(interpreted_tile_elements=128, multiprocessors=3, whole_row_bytes=512)
    norm.against_oracle(*norm.drawn((rows, columns), 1, torch.float32, device))


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean, lambda y: y.mean(-1).square().sum()])
def test_expanded_gradients_are_not_copied(norm, reduce, device, monkeypatch):
    x, weight, bias, _ = norm.drawn((4, 3, 64), 1, torch.float32, device)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y = norm.ours((64,))(leaf, weight, bias)
    monkeypatch.setattr(Tensor, "contiguous", _must_not_copy)
    reduce(y).backward()
    monkeypatch.undo()
    reduce(norm.theirs((64,))(exact, *(None if t is None else t.double() for t in (weight, bias)))).backward()
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
    "mean is 1e6 times std": lambda n: 1e6 + torch.randn(6, n),
    "constant rows": lambda n: torch.tensor([0.1, 1e4 / 3, -7.7, 0.0, 1e-30, 1e30])[:, None].expand(6, n).contiguous(),
    "of both signs, squares near the largest": lambda n: torch.randn(6, n).sign() * 1e18,
    "large, of one sign": lambda n: 3e38 * (1 - 1e-3 * torch.rand(6, n)),
    "the largest, of both signs": lambda n: torch.randn(6, n).sign() * 1.6e38,
    "one outlier": lambda n: torch.cat((torch.full((6, 1), 1e6), torch.randn(6, n - 1)), 1),
    "tiny": lambda n: torch.randn(6, n) * 1e-20,
}


@pytest.mark.parametrize("columns", [64, 1000, 40001])
@pytest.mark.parametrize("data", HARD)
def test_no_less_exact_than_torch_on_hard_data(norm, data, columns, device):
    x = HARD[data](columns).to(device)
    weight, bias = torch.randn(2, columns, device=device)
    theirs, ours = norm.theirs((columns,)), norm.ours((columns,))
    exact = theirs(x.double(), weight.double(), bias.double())
    theirs, ours = (f(x, weight, bias).double() for f in (theirs, ours))
    assert ours.isfinite().all()  # torch's on the CPU is NaN where the variance overflows
    rows = theirs.isfinite().all(1)
    their_error, our_error = ((y - exact)[rows].abs().amax() if rows.any() else 0.0 for y in (theirs, ours))
    if data.startswith("mean"):
        their_error = 0.0  # no error of the mean's own size is left
    assert our_error <= 2 * their_error + 4 * torch.finfo(torch.float32).eps * exact.abs().max().clamp_min(1)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_where_torch_has_them(norm, poison, device):
    x, weight, bias, dy = norm.drawn((6, 65), 1, torch.float32, device)
    x[1, 3] = x[4, 64] = poison
    ours = run(norm.ours((65,)), x, weight, bias, dy)
    # On the CPU: on CUDA torch's rms_norm gets the mean of squares by way of a variance, which is NaN beside inf.
    theirs = run(norm.theirs((65,)), *(None if tensor is None else tensor.cpu() for tensor in (x, weight, bias, dy)))
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(a.isfinite().cpu(), b.isfinite())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_largest_values_of_the_halves(norm, dtype, device):
    x = (torch.randn(4, 96).sign() * torch.finfo(dtype).max).to(device, dtype)
    theirs, ours = (f(x) for f in (norm.theirs((96,)), norm.ours((96,))))
    assert (ours.isfinite() | ~theirs.isfinite()).all()  # torch's is NaN beside a mean of 0, as the variance overflows


@pytest.mark.unguarded  # fp64 through thousands of launches; the kernels are guarded above
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_of_both_orders(norm, affine, device):
    x, weight, bias, _ = norm.drawn((2, 2, 2), 2, torch.float64, device)
    parameters = [saved and parameter for parameter, saved in zip((weight, bias), affine, strict=True)]
    leaves = [leaf.requires_grad_() for leaf in (x, *parameters) if isinstance(leaf, Tensor)]

    def function(x, *arguments):
        result = iter(arguments)
        return norm.ours((2, 2))(x, *(next(result) if isinstance(p, Tensor) else None for p in parameters))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_second_gradients_of_a_tensor_that_is_input_and_weight(norm, device):
    def twice(function, x):
        (first,) = torch.autograd.grad(function(x, x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    x = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    torch.testing.assert_close(twice(norm.ours((6,)), x), twice(norm.theirs((6,)), x))


def test_module_loads_torchs_state_and_agrees(norm, device):
    theirs = norm.torch_module((4, 10), device=device)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_()
    ours = norm.module((4, 10), device=device)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, 10, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, norm.torch_module)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}])
def test_module_without_parameters_and_without_bias(norm, options, device):
    if not norm.has_bias and "bias" in options:
        options = {}
    ours, theirs = norm.module(10, device=device, **options), norm.torch_module(10, device=device, **options)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    x = torch.randn(3, 10, device=device)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norms_own_epsilon_is_that_of_the_type_computed_in(dtype, device):
    x = (1e-4 * torch.randn(3, 8, device=device)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = F.rms_norm(x.double(), (8,), eps=torch.finfo(wide).eps)
    tolerance = torch.finfo(dtype).eps
    for y in (triton_norm.rms_norm(x, (8,)), triton_norm.RMSNorm(8, device=device, dtype=dtype)(x)):
        torch.testing.assert_close(y.double(), exact, rtol=2 * tolerance, atol=0)


def test_rows_past_two_to_the_31_elements(norm, device):
    """Two rows far apart in a storage that is reserved and not touched between them."""
    stride = 2**31 + 64
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * stride:
        pytest.skip("less than 13 GB of GPU memory free")
    storage = torch.UntypedStorage(2 * (stride + 64), device=device)
    x = torch.empty(0, dtype=torch.float16, device=device).set_(storage, 0, (2, 64), (stride, 1))
    x.copy_(torch.randn(2, 64))
    norm.against_oracle(x, None, None, torch.randn(2, 64, device=device).half())
