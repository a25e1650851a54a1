"""torch in fp64 as the truth, and how far from it a correctly rounded fp32 computation may be.

A bound is one ulp of the output's type, for the final rounding, plus growth · u · scale: u is the roundoff of the type
that was computed in, scale the sum of the absolute values of the terms that make the result up, so that cancellation is
paid for and nothing else is. Growth is FACTOR for the operations on an element, plus how roundoff grows in a sum of n
terms: log2 n for means, whose terms are added in a tree, sqrt n for dweight and dbias, which programs sum in turns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_norm.tuning.limits import INTERPRETED

FACTOR = 8.0


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of a type at the values of an fp64 tensor."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(info.smallest_normal)))
    return info.eps * torch.exp2(exponent)


def assert_within(actual: Tensor, exact: Tensor, scale: Tensor, growth: float, computed: torch.dtype) -> None:
    assert actual.shape == exact.shape
    roundoff = torch.finfo(computed).eps / 2
    exact = exact.cpu()
    bound = ulp(exact, actual.dtype) + (FACTOR + growth) * roundoff * scale.cpu()
    excess = ((actual.detach().double().cpu() - exact).abs() / bound).nan_to_num(nan=math.inf)
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= 1.0, f"{worst:.3g} times the bound, at {int(excess.argmax())} of {tuple(exact.shape)}"


@dataclass
class Results:
    """What a normalization and its backward give; None where there is nothing to ask for."""

    y: Tensor
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.y, self.dx, self.dweight, self.dbias) if tensor is not None]


def run(function: Callable[..., Tensor], x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> Results:
    """y and the gradients of function(x, weight, bias) for dy."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    asked = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, asked, dy))
    grads = [None if leaf is None else next(found) for leaf in leaves]
    return Results(y.detach(), *grads)


def assert_same_but_for_order(actual: Tensor, expected: Tensor) -> None:
    """In the same bits where interpreted; a kernel compiled for other outputs may add a few terms in another order."""
    if INTERPRETED:
        assert torch.equal(actual, expected)
        return
    slack = 8 * torch.finfo(compute_dtype(expected)).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(expected.dtype).eps, atol=slack)


def _sum(terms: Tensor, axes: tuple[int, ...]) -> Tensor:
    return terms.sum(axes) if axes else terms


def widen(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check(
    actual: Results,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    axes: tuple[int, ...],
    exact_function: Callable[..., Tensor],
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float = 1e-5,
    constant: bool | None = None,
) -> None:
    """Holds every tensor of `actual` to `exact_function` in fp64.

    axes: those reduced over; the parameters' axes are the others (BatchNorm) or these (LayerNorm). mean and rstd are
    given where they are not the biased moments of x over them: as constants (evaluation), unless `constant` is False.
    """
    # Contiguous: torch's own BatchNorm on the CPU has a wrong dx for some strides of x and dy.
    wide, wide_dy = x.double().contiguous(), dy.double().contiguous()
    exact = run(exact_function, wide, widen(weight), widen(bias), wide_dy)
    constant = mean is not None if constant is None else constant
    mean = wide.mean(axes, keepdim=True) if mean is None else mean
    rstd = torch.rsqrt(wide.var(axes, correction=0, keepdim=True) + eps) if rstd is None else rstd
    parameter_axes = exact_function.parameter_axes  # type: ignore[attr-defined]
    shape = [length if axis in parameter_axes else 1 for axis, length in enumerate(x.shape)]
    w = torch.ones(shape, dtype=torch.float64, device=x.device) if weight is None else weight.double().reshape(shape)
    b = torch.zeros(shape, dtype=torch.float64, device=x.device) if bias is None else bias.double().reshape(shape)
    computed = compute_dtype(x)
    growth = math.log2(math.prod(x.shape[axis] for axis in axes))
    x_hat = (wide - mean) * rstd
    blur = x_hat.abs() + mean.abs() * rstd  # the mean is rounded to the type computed in
    assert_within(actual.y, exact.y, (blur * w).abs() + b.abs(), growth, computed)
    wdy = (w * wide_dy).abs()
    if actual.dx is not None:
        terms = wdy
        if not constant:
            terms = terms + wdy.mean(axes, keepdim=True) + blur * (wdy * blur).mean(axes, keepdim=True)
        assert_within(actual.dx, exact.dx, terms * rstd.abs(), growth, computed)
    summed = tuple(axis for axis in range(x.dim()) if axis not in parameter_axes)
    sum_growth = growth + math.sqrt(math.prod(x.shape[axis] for axis in summed))
    if actual.dweight is not None:
        scale = _sum(wide_dy.abs() * blur, summed).reshape(exact.dweight.shape)
        assert_within(actual.dweight, exact.dweight, scale, sum_growth, computed)
    if actual.dbias is not None:
        assert_within(
            actual.dbias, exact.dbias, _sum(wide_dy.abs(), summed).reshape(exact.dbias.shape), sum_growth, computed
        )


def batch_norm_on_cpu(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    """torch's, which on CUDA has no backward for a bias without a weight, and takes no more than five axes."""
    given = (None if tensor is None else tensor.cpu() for tensor in (x, *running, weight, bias))
    return F.batch_norm(*given, training, 0.0, eps).to(x.device)


def batch_norm_oracle(running: tuple[Tensor, Tensor] | None, eps: float = 1e-5) -> Callable[..., Tensor]:
    """In training where `running` is None, otherwise in evaluation with those statistics."""

    def exact(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        statistics = (None, None) if running is None else (running[0].double(), running[1].double())
        return batch_norm_on_cpu(x, statistics, weight, bias, running is None, eps)

    exact.parameter_axes = (1,)  # type: ignore[attr-defined]
    return exact
