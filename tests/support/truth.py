"""What a call and its backward should give, in fp64, and how far they may be off."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from support.oracle import FACTOR, ulp, widen
from support.strategies import F32, F64, Case, Given, Rows
from triton_norm import reference

SMOOTH = 1.5  # more than a derivative of silu, or of the slopes drawn up to 1, is
BENT = 0.5  # silu's second derivative


class Found(NamedTuple):
    """What a call and its backward give; None where there is nothing to ask for."""

    y: Tensor
    total: Tensor | None
    dx: Tensor
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


class Truth:
    """A call in fp64, and what its errors grow from: as in oracle.py, the absolute values of a result's terms.

    Where elements cancel, their mean is as inexact as their sizes make it, and so is x_hat. torch, whose fp64 is as
    inexact as ours, is given x without a first mean. An error of z, which is activated, grows by f' in y and by f'' in
    the gradient of z, g = dy · f'(z). x_hat_dtype rounds by half an ulp of its own. `tensors` are those given, but for
    dy where z may be on either side of relu's kink: 0.
    """

    def __init__(self, case: Case, tensors: Given) -> None:
        self.case = case
        summed = case.summed(tensors.x, tensors.residual)
        added = None if isinstance(case, Rows) else widen(tensors.residual)
        x, weight, bias = summed.double().contiguous(), widen(tensors.weight), widen(tensors.bias)
        weight = None if weight is None else weight + case.offset
        mean, var, mean_terms = case.moments(x)
        self.rstd = torch.rsqrt(var + case.eps)
        self.count = math.prod(x.shape[axis] for axis in case.axes)
        self.roundoff = torch.finfo(F64 if F64 in (tensors.x.dtype, summed.dtype) else F32).eps / 2
        self.growth = FACTOR + math.log2(self.count)
        shape = case.parameter_shape if isinstance(case, Rows) else (1, -1, *(1 for _ in x.shape[2:]))
        zero = torch.zeros((), dtype=F64, device=x.device)
        self.w, b = zero + 1 if weight is None else weight.reshape(shape), zero if bias is None else bias.reshape(shape)
        x_hat = (x - mean) * self.rstd
        self.blur = x_hat.abs() + mean_terms * self.rstd
        self.rounding = 0 * x_hat
        if case.x_hat is not None and torch.finfo(case.x_hat).eps / 2 > self.roundoff:
            info = torch.finfo(case.x_hat)
            self.rounding = info.eps / 2 * (x_hat.abs() + self.slack(self.blur) + info.smallest_normal)
        z = x_hat * self.w + b + (zero if added is None else added)
        self.z_terms = (self.blur * self.w).abs() + b.abs() + (zero if added is None else added.abs())
        self.tensors = tensors
        if case.activation in ("relu", "leaky_relu"):
            near = z.abs() <= self.slack(self.z_terms)
            if near.any():
                self.tensors = tensors._replace(dy=tensors.dy.clone().masked_fill_(near, 0.0))
        dy = self.tensors.dy.double().contiguous()
        slope = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(
            reference.activate(slope, case.activation, getattr(case, "slope", 0)).sum(), slope
        )
        curved = case.activation == "silu"
        self.g_terms = dy.abs() * (slope.abs() + (1 + BENT * self.z_terms if curved else 0))
        self.steepest = max(SMOOTH if curved else 1.0, abs(getattr(case, "slope", 0)))
        left = x - mean if case.centred else x
        leaves = [None if t is None else t.detach().requires_grad_() for t in (left, added, weight, bias)]
        y = case.exact(*leaves)
        grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
        dx, dresidual, *rest = (None if leaf is None else next(grads) for leaf in leaves)
        if isinstance(case, Rows):
            dx = dresidual = dx if tensors.dtotal is None else dx + tensors.dtotal.double()
        self.exact = Found(y.detach(), summed.double(), dx, dresidual, *rest)

    def slack(self, terms: Tensor, growth: float = 0.0) -> Tensor:
        return (self.growth + growth) * self.roundoff * terms

    def errors(self) -> Found:
        case, tensors = self.case, self.tensors
        y = self.slack(self.z_terms) * self.steepest + self.rounding * self.w.abs()
        terms = (self.w * self.g_terms).abs()
        if not case.constant:
            terms = terms + terms.mean(case.axes, True) + self.blur * (terms * self.blur).mean(case.axes, True)
        of_total = 0.0 if tensors.dtotal is None else tensors.dtotal.double().abs()
        dx = self.slack(terms * self.rstd + of_total)
        summed = tuple(range(len(case.shape) - case.n_axes)) if isinstance(case, Rows) else case.axes
        growth = math.sqrt(math.prod(case.shape[axis] for axis in summed))
        of_parameters = [
            (t.sum(summed) if summed else t).reshape(case.parameter_shape)
            for t in (
                self.slack(self.g_terms * self.blur, growth) + self.g_terms * self.rounding,
                self.slack(self.g_terms, growth),
            )
        ]
        return Found(y, 0 * dx, dx, dx if isinstance(case, Rows) else self.slack(self.g_terms), *of_parameters)

    def check(self, found: Found) -> None:
        tensors, case = self.tensors, self.case
        assert found.y.dtype == (case.out or case.x)
        for name, grad, of in zip(found._fields[2:], found[2:], tensors.inputs(), strict=True):
            assert (grad is None) == (of is None), name
            assert grad is None or (grad.dtype, grad.shape) == (of.dtype, of.shape), name
        for name, actual, exact, error in zip(found._fields, found, self.exact, self.errors(), strict=True):
            if actual is not None:
                within(actual, exact, error, name)


def within(actual: Tensor, exact: Tensor, error: Tensor, name: str = "it") -> None:
    """But for the final rounding."""
    excess = ((actual.double() - exact).abs() / (ulp(exact, actual.dtype) + error)).nan_to_num(nan=math.inf)
    assert not excess.numel() or excess.max() <= 1.0, f"{name} is {excess.max():.3g} times the bound off"
