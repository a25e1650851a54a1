"""The arguments that torch's functions don't have: residual, residual_dtype, weight_offset, x_hat_dtype, out_dtype."""

import pytest
import torch

import triton_norm
from support.oracle import run
from support.pairwise import pairwise
from support.row_norms import NORMS

pytestmark = pytest.mark.usefixtures("through_the_kernels")

HALF = torch.bfloat16
TYPES = [
    (torch.float32, torch.float32, None),
    (HALF, HALF, None),
    (HALF, torch.float32, None),  # a stream in fp32
    (HALF, HALF, torch.float32),
    (torch.float32, torch.float16, None),
    (torch.float16, torch.float64, torch.float32),
]


def parts(norm, dtype, residual_dtype, device, shape=(6, 40)):
    """x, residual, weight, bias, dy and dtotal."""
    x, weight, bias, dy = norm.drawn(shape, 1, dtype, device)
    residual, dtotal = torch.randn(2, *shape, device=device).to(residual_dtype)
    return x, residual, weight, bias, dy, dtotal


@pairwise({"dtype, residual_dtype, total_dtype": TYPES, "columns": [40, 33, 300], "norm": NORMS})
def test_is_the_sum_and_the_norm_of_the_rounded_sum(norm, dtype, residual_dtype, total_dtype, columns, numbers, device):
    """Bit for bit; property tests hold the gradients to fp64."""
    numbers(interpreted_tile_elements=128, multiprocessors=3, whole_row_bytes=512)
    x, residual, weight, bias, dy, dtotal = parts(norm, dtype, residual_dtype, device, (6, columns))
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    y, total = norm.ours((columns,), residual=residual, residual_dtype=total_dtype)(x, weight, bias)
    assert (y.dtype, total.dtype) == (dtype, total_dtype or residual_dtype)
    wide = torch.float64 if torch.float64 in (dtype, residual_dtype) else torch.float32
    assert torch.equal(total, (x.to(wide) + residual.to(wide)).to(total.dtype))
    assert torch.equal(y, norm.ours((columns,), out_dtype=dtype)(total.detach(), weight, bias))
    dx, dresidual, dweight = torch.autograd.grad((y, total), leaves, (dy, dtotal.to(total.dtype)))
    assert (dx.dtype, dresidual.dtype, dweight.dtype) == (dtype, residual_dtype, weight.dtype)


def test_gives_the_bits_of_the_two_steps(norm, device):
    """Sum and norm in one launch are those of two launches, forward and backward."""
    x, residual, weight, bias, dy, _ = parts(norm, torch.float32, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    y, total = norm.ours((40,), residual=residual)(x, weight, bias)
    summed = x + residual
    z = norm.ours((40,))(summed, weight, bias)
    assert torch.equal(total, summed)
    assert torch.equal(y, z)
    for actual, expected in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(z, leaves, dy), strict=True):
        assert torch.equal(actual, expected)


def test_only_the_total_is_used(norm, guard, device):
    x, residual, weight, bias, _, dtotal = parts(norm, HALF, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in (x, residual)]
    _, total = norm.ours((40,), residual=residual)(x, weight, bias)
    launches = None if guard is None else len(guard.launches)
    dx, dresidual = torch.autograd.grad(total, leaves, dtotal)
    assert torch.equal(dresidual, dtotal)
    assert torch.equal(dx, dtotal.to(HALF))
    assert guard is None or len(guard.launches) == launches


def test_weight_offset_is_added_in_fp32(norm, device):
    """The sum would be 1 in bf16."""
    weight = torch.full((40,), 1e-3, dtype=HALF, device=device)
    x = torch.randn(6, 40, device=device).to(HALF)
    y = norm.ours((40,), weight_offset=1.0, out_dtype=torch.float32)(x, weight)
    plain = norm.ours((40,), out_dtype=torch.float32)(x)
    torch.testing.assert_close(y / plain, torch.full_like(y, 1 + weight[0].item()), rtol=1e-6, atol=0)


def by_steps(norm, x, weight, bias, x_hat_dtype, out_dtype):
    """Returns x_hat_dtype's result by torch: the norm without a weight, rounded, and then the weight."""
    x_hat = norm.theirs((x.shape[-1],))(x.float()).to(x_hat_dtype).float()
    y = x_hat * weight.float()
    return (y if bias is None else y + bias.float()).to(out_dtype)


ROUNDED = [
    (HALF, HALF, HALF, HALF),
    (HALF, HALF, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float32, torch.float16),
    (torch.float32, HALF, HALF, HALF),
]


@pairwise({"dtype, x_hat_dtype, weight_dtype, out_dtype": ROUNDED, "columns": [40, 33, 300], "norm": NORMS})
def test_x_hat_is_rounded_before_the_weight(
    norm, dtype, x_hat_dtype, weight_dtype, out_dtype, columns, numbers, device
):
    """Bits are those of the steps, but where fp32 roundoff moves x_hat over the middle between two neighbours."""
    numbers(interpreted_tile_elements=128, multiprocessors=3, whole_row_bytes=512)
    x, weight, bias, dy = norm.drawn((12, columns), 1, torch.float32, device)
    x, weight, dy = x.to(dtype), weight.to(weight_dtype), dy.to(out_dtype)
    bias = None if bias is None else bias.to(weight_dtype)
    function = norm.ours((columns,), x_hat_dtype=x_hat_dtype, out_dtype=out_dtype)
    actual = run(function, x, weight, bias, dy)
    expected = by_steps(norm, x, weight, bias, x_hat_dtype, out_dtype)
    single = norm.ours((columns,), out_dtype=out_dtype)(x, weight, bias)
    fp32 = torch.finfo(torch.float32).eps
    close = torch.isclose(actual.y.double(), expected.double(), rtol=4 * fp32, atol=4 * fp32)
    assert (~close).double().mean() < 0.01
    torch.testing.assert_close(actual.y, expected, rtol=4 * torch.finfo(x_hat_dtype).eps, atol=4 * fp32)
    assert (single != actual.y).double().mean() > 0.1
    x_hat = norm.theirs((columns,))(x.float()).to(x_hat_dtype).double()
    dweight = (dy.double() * x_hat).sum(0)
    tolerance = 2 * torch.finfo(weight_dtype).eps
    scale = (dy.double() * x_hat).abs().sum(0).max().item()
    close = torch.isclose(actual.dweight.double(), dweight, rtol=tolerance, atol=tolerance * scale / 4)
    assert (~close).double().mean() < 0.05  # unrounded, or rounded otherwise, most are not
    plain = run(norm.ours((columns,), out_dtype=out_dtype), x, weight, bias, dy)
    assert torch.equal(actual.dx, plain.dx)


@pytest.mark.parametrize("x_hat_dtype", [torch.float32, torch.float64])
def test_x_hat_is_not_rounded_to_more_than_it_has(norm, x_hat_dtype, device):
    x, weight, bias, _ = norm.drawn((6, 40), 1, torch.float32, device)
    assert torch.equal(norm.ours((40,), x_hat_dtype=x_hat_dtype)(x, weight, bias), norm.ours((40,))(x, weight, bias))


@pytest.mark.parametrize(("dtype", "residual_dtype", "total_dtype"), TYPES)
def test_torchs_path_computes_the_same(norm, dtype, residual_dtype, total_dtype, device):
    x, residual, weight, bias, dy, dtotal = parts(norm, dtype, residual_dtype, device)
    results = {}
    for backend in ("triton", "torch"):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, weight)]
        with triton_norm.backend(backend):
            options = {"weight_offset": 1.0, "x_hat_dtype": torch.float16}
            function = norm.ours((40,), residual=leaves[1], residual_dtype=total_dtype, **options)
            y, total = function(leaves[0], leaves[2], bias)
        grads = torch.autograd.grad((y, total), leaves, (dy, dtotal.to(total.dtype)))
        results[backend] = (y, total, *grads)
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        eps = 4 * max(torch.finfo(t).eps for t in (ours.dtype, dtype, residual_dtype))
        torch.testing.assert_close(ours, theirs, rtol=eps, atol=eps * theirs.abs().max().item())


def test_modules_take_them(norm, device):
    module = norm.module(40, device=device)
    x, residual = torch.randn(2, 6, 40, device=device)
    y, total = module(x, residual=residual, weight_offset=1.0, out_dtype=torch.float16, residual_dtype=torch.float64)
    assert (y.dtype, total.dtype) == (torch.float16, torch.float64)
    assert "residual" in str(triton_norm.explain(module, x, residual=residual.t().contiguous().t()))
    assert not triton_norm.explain(module, x, residual=residual).copies
