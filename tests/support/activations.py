"""Activations by torch's own functions, for results that kernels are compared with, and where their slopes jump."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import triton_norm


def _passing_nan(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """Returns (z, slope) → function(z), whose gradient at NaN is dy, as on a GPU. On the CPU torch's functions have
    there dy for some elements, and 0 or NaN for others, by their places in memory."""

    def passing(z: Tensor, slope: float) -> Tensor:
        return torch.where(z.isnan(), z, function(torch.where(z.isnan(), 0.0, z)))

    return passing


TORCHS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, slope: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "relu6": _passing_nan(F.relu6),
    "silu": lambda z, slope: F.silu(z),
    "hardswish": _passing_nan(F.hardswish),
    "gelu": lambda z, slope: F.gelu(z),
    "gelu_tanh": lambda z, slope: F.gelu(z, approximate="tanh"),
}
"""Names and functions (z, slope) → y, where slope is leaky_relu's below 0."""

MASKED = ("relu", "leaky_relu", "relu6")
"""Activations whose gradient depends on z by a mask alone."""

KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
"""The z at which the slope of an activation jumps; the others have none."""

AT_KINKS = [kink for kinks in KINKS.values() for kink in kinks]


def activated(z: Tensor, activation: str | None, slope: float = 0.01) -> Tensor:
    """Returns f(z), or z without an activation."""
    return z if activation is None else TORCHS[activation](z, slope)


def reach(activation: str | None) -> float:
    """Returns the factor of z of normal numbers that takes some of them past all kinks of the activation."""
    return max(1.0, *map(abs, KINKS.get(activation, (0.0,)))) if activation else 1.0


def near_a_kink(z: Tensor, activation: str | None, distance: Tensor | float) -> Tensor:
    """Returns the mask of the elements that are no farther from a kink than `distance`."""
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(activation, ()) if activation else ():
        near |= (z - kink).abs() <= distance
    return near


def assert_kinks_are_torchs(name: str, dtype: torch.dtype, added: bool, device: str) -> None:
    """Asserts that y and dx are torch's at the kinks of all activations and next to them.

    z is x itself: mean 0, variance 1 and eps 0. dy is 2, infinite or NaN: nothing of it is left where the slope is 0.

    Args:
        added: adds a residual, of zeros: the kernels then store a mask as bits.
    """
    eps = torch.finfo(dtype).eps
    next_to = (0.0, -eps, eps, -1.0, 1.0)
    z = torch.tensor([kink + distance * max(1.0, abs(kink)) for kink in AT_KINKS for distance in next_to])
    z = z.to(device, dtype).repeat(3, 1, 1).requires_grad_()
    dy = torch.tensor([2.0, math.inf, math.nan]).to(device, dtype).view(3, 1, 1).repeat(1, 1, z.shape[2])
    mean, var = torch.tensor([[0.0], [1.0]], device=device, dtype=dtype)
    residual = torch.zeros_like(z) if added else None
    y = triton_norm.batch_norm(z, mean, var, eps=0.0, residual=residual, activation=name, negative_slope=0.25)
    expected = TORCHS[name](z.double(), 0.25)
    (dx,), (expected_dx,) = (torch.autograd.grad(each, z, dy.to(each.dtype)) for each in (y, expected))
    for one, other in ((y, expected), (dx, expected_dx)):
        torch.testing.assert_close(one.double(), other.double(), rtol=2 * eps, atol=0.0, equal_nan=True)
