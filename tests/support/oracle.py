"""Exact results by torch in fp64, and how far from them a correctly rounded computation may be: see ErrorBound."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from support.activations import near_a_kink
from triton_norm import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

FACTOR = 8.0
"""Roundings that the operations on one element may add up to, in units of roundoff."""


class Curve(NamedTuple):
    """Upper bounds of |f'| and |f''| of an activation f that is curved."""

    steepest: float
    bend: float


# σ = 1 / (1 + e^-z), Φ the standard normal distribution, φ = Φ'.
# hardswish: f' = (2 z + 3) / 6 between its kinks at -3 and 3, and is largest at 3.
# silu: f' = σ + z σ (1 - σ) is largest at z = 2.40, where it is 1.0998; |f''| at 0, where it is 2 σ'(0) = 1/2.
# gelu: f' = Φ + z φ, f'' = (2 - z²) φ. So f' is largest at √2, where it is 1.1289; |f''| at 0: 2 φ(0) = 0.798.
# gelu_tanh: f' is largest at z = 1.42, where it is 1.1290; |f''| at 0, where it is √(2/π) = 2 φ(0) too.
CURVES = {
    "hardswish": Curve(1.5, 1 / 3),
    "silu": Curve(1.1, 0.5),
    "gelu": Curve(1.13, 0.8),
    "gelu_tanh": Curve(1.13, 0.8),
}
"""Activations that are curved; the others are straight between their kinks."""


class Inputs(NamedTuple):
    """The tensors of one call and the gradients of its outputs; None for those that are missing."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    dtotal: Tensor | None = None

    def leaves(self) -> tuple[Tensor | None, ...]:
        return self[:4]


class Results(NamedTuple):
    """The outputs and the gradients of one call; None for those that are missing."""

    y: Tensor
    total: Tensor | None
    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        return self[2:]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]


def differentiated(
    function: Callable[..., Any],
    leaves: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs_grad: Sequence[int] = range(4),
) -> Results:
    """Returns the outputs of function(x, residual, weight, bias) and the leaves' gradients.

    Args:
        leaves: x, residual, weight and bias.
        grads: The gradients of y and, where there is one, of the total.
        needs_grad: The indices of the leaves that need a gradient.
    """
    own = [None if t is None else t.detach().requires_grad_(i in needs_grad) for i, t in enumerate(leaves)]
    outputs = function(*own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    requested = [leaf for leaf in own if leaf is not None and leaf.requires_grad]
    # A total has a gradient only if x or the residual needs one.
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=False) if output.requires_grad]
    gradients = iter(torch.autograd.grad([output for output, _ in pairs], requested, [grad for _, grad in pairs]))
    total = outputs[1].detach() if len(outputs) > 1 else None
    of_leaves = (next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in own)
    return Results(outputs[0].detach(), total, *of_leaves)


def run(function: Callable[..., Any], x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> Results:
    """Returns the results of function(x, weight, bias) for dy."""
    return differentiated(lambda x, _, weight, bias: function(x, weight, bias), (x, None, weight, bias), (dy,))


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the distance between neighbours of a type at the values of an fp64 tensor."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(info.smallest_normal)))
    return info.eps * torch.exp2(exponent)


def assert_within(actual: Tensor, exact: Tensor, error: Tensor, name: str = "y") -> None:
    """Asserts that `actual` is no farther from `exact` than `error` and one ulp, for the final rounding."""
    assert actual.shape == exact.shape
    bound = ulp(exact, actual.dtype) + error
    excess = ((actual.detach().double().cpu() - exact).abs() / bound).nan_to_num(nan=math.inf)
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= 1.0, f"{worst:.3g} times the bound, at {int(excess.argmax())} of {name} {list(exact.shape)}"


class Moments(NamedTuple):
    """The mean and the variance that x is normalized by, in fp64, and the terms that the mean's error grows from."""

    mean: Tensor
    var: Tensor
    mean_terms: Tensor


def moments_about(mean: Tensor, x: Tensor, axes: Sequence[int]) -> Moments:
    """Returns the moments of x about a mean, which is rounded to the type computed in."""
    return Moments(mean, (x - mean).square().mean(axes, keepdim=True), mean.abs())


@dataclass(frozen=True)
class Formula:
    """A normalization, as fp64 computes it.

    Args:
        function: Returns y of (x, residual, weight, bias), where the residual is added to the affine x_hat.
        axes: The axes that are reduced.
        parameter_shape: The shape in which weight and bias are broadcast to x.
        moments: The moments that x is normalized by.
        computed: The type that is computed in.
        constant: The moments are constants, so that x has no gradient through them.
        centred: A constant added to x changes nothing.
        x_hat_dtype: The type that x_hat is rounded to.
    """

    function: Callable[..., Tensor]
    axes: tuple[int, ...]
    parameter_shape: tuple[int, ...]
    moments: Moments
    eps: float
    computed: torch.dtype
    constant: bool = False
    centred: bool = True
    activation: str | None = None
    slope: float = 0.0
    x_hat_dtype: torch.dtype | None = None


class ErrorBound:
    """The exact results of one call, and for each the largest error of a correctly rounded computation.

    An error is growth · u · terms, beside the ulp of the final rounding: u is the roundoff of the type computed in, and
    terms the sum of the absolute values that a result is made up from, so that cancellation is paid for and nothing
    else is. Growth is FACTOR for the operations on an element, plus the growth of roundoff in a sum of n terms: log2 n
    for means, whose terms are added in a tree, sqrt n for dweight and dbias, which programs sum in turns. Where
    elements cancel, their mean is as inexact as their sizes make it, and so is x_hat. An error of z, which is
    activated, grows by f' in y and by f'' in the gradient of z, g = dy · f'(z). x_hat_dtype rounds by half an ulp of
    its own.

    torch, whose fp64 is as inexact as the kernels', is given x without a first mean. All of it is on the CPU, as
    torch's BatchNorm on CUDA has no backward for a bias without a weight, and contiguous, as on the CPU it has a wrong
    dx for some strides of x and dy.

    Args:
        inputs: Those of the call, where x is the tensor that is normalized: the sum, if a residual is added first.
    """

    def __init__(self, formula: Formula, inputs: Inputs) -> None:
        self.formula = formula
        x, residual, weight, bias, dy, dtotal = (widen(tensor) for tensor in inputs)
        mean, var, mean_terms = formula.moments
        self.rstd = torch.rsqrt(var + formula.eps)
        self.count = math.prod(x.shape[axis] for axis in formula.axes)
        self.roundoff = torch.finfo(formula.computed).eps / 2
        self.growth = FACTOR + math.log2(self.count)
        zero = torch.zeros((), dtype=torch.float64)
        self.w = zero + 1 if weight is None else weight.reshape(formula.parameter_shape)
        b = zero if bias is None else bias.reshape(formula.parameter_shape)
        added = zero if residual is None else residual
        x_hat = (x - mean) * self.rstd
        self.blur = x_hat.abs() + mean_terms * self.rstd
        self.rounding = self._rounding_of(x_hat)
        self.z = x_hat * self.w + b + added
        self.z_terms = (self.blur * self.w).abs() + b.abs() + added.abs()
        self.dtotal_terms = zero if dtotal is None else dtotal.abs()
        self._set_gradient(dy)
        y, _, dx, dresidual, *rest = differentiated(
            formula.function, (x - mean if formula.centred else x, residual, weight, bias), (dy,)
        )
        if residual is None:  # or it is in x
            dx = dresidual = dx if dtotal is None else dx + dtotal
        self.exact = Results(y, x, dx, dresidual, *rest)

    def _rounding_of(self, x_hat: Tensor) -> Tensor:
        dtype = self.formula.x_hat_dtype
        if dtype is None or torch.finfo(dtype).eps / 2 <= self.roundoff:
            return torch.zeros_like(x_hat)
        info = torch.finfo(dtype)
        return info.eps / 2 * (x_hat.abs() + self.slack(self.blur) + info.smallest_normal)

    def _set_gradient(self, dy: Tensor) -> None:
        """Sets the terms of the gradient of z, and the largest derivative of the activation."""
        activation, slope = self.formula.activation, self.formula.slope
        z = self.z.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(reference.activate(z, activation, slope).sum(), z)
        curve = CURVES.get(activation) if activation else None
        self.g_terms = dy.abs() * (derivative.abs() + (1 + curve.bend * self.z_terms if curve else 0))
        self.steepest = curve.steepest if curve else max(1.0, abs(slope))

    def slack(self, terms: Tensor, growth: float = 0.0) -> Tensor:
        """Returns the error of a result with these terms, whose roundoff grows by so much beside the mean's."""
        return (self.growth + growth) * self.roundoff * terms

    def near_kinks(self) -> Tensor:
        """Returns the elements whose z is so near a kink that the derivative may be either side's."""
        return near_a_kink(self.z, self.formula.activation, self.slack(self.z_terms))

    def errors(self) -> Results:
        """Returns the largest error of each result, but for its final rounding."""
        formula, exact = self.formula, self.exact
        y = self.slack(self.z_terms) * self.steepest + self.rounding * self.w.abs()
        terms = (self.w * self.g_terms).abs()
        if not formula.constant:
            terms = terms + terms.mean(formula.axes, True) + self.blur * (terms * self.blur).mean(formula.axes, True)
        dx = self.slack(terms * self.rstd + self.dtotal_terms)
        rank = exact.dx.dim()
        lengths = (1,) * (rank - len(formula.parameter_shape)) + formula.parameter_shape
        summed = tuple(axis for axis in range(rank) if lengths[axis] == 1)
        growth = math.sqrt(math.prod(exact.dx.shape[axis] for axis in summed))
        of_weight = self.slack(self.g_terms * self.blur, growth) + self.g_terms * self.rounding
        of_parameters = (
            None if true is None else (error.sum(summed) if summed else error).reshape(true.shape)
            for true, error in ((exact.dweight, of_weight), (exact.dbias, self.slack(self.g_terms, growth)))
        )
        dresidual = dx if exact.dresidual is exact.dx else self.slack(self.g_terms)
        return Results(y, torch.zeros_like(exact.dx), dx, dresidual, *of_parameters)

    def check(self, results: Results) -> None:
        """Asserts that all results are within their bounds."""
        for name, actual, exact, error in zip(results._fields, results, self.exact, self.errors(), strict=True):
            if actual is not None:
                assert_within(actual, exact, error, name)


def widen(tensor: Tensor | None) -> Tensor | None:
    """Returns the tensor in fp64, on the CPU and contiguous."""
    return None if tensor is None else tensor.detach().double().cpu().contiguous()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the type that a call on x computes in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def batch_norm_on_cpu(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    """Returns torch's result on the CPU: on CUDA it takes no more than five axes."""
    tensors = (None if tensor is None else tensor.cpu() for tensor in (x, *running, weight, bias))
    return F.batch_norm(*tensors, training, 0.0, eps)
