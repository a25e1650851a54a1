"""Activations by torch's own functions, for results that kernels are compared with."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

TORCHS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, slope: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, slope: F.silu(z),
    "gelu": lambda z, slope: F.gelu(z),
    "gelu_tanh": lambda z, slope: F.gelu(z, approximate="tanh"),
}
"""Names and functions (z, slope) → y, where slope is leaky_relu's below 0."""

SIDED = ("relu", "leaky_relu")
"""Activations whose gradient depends on z by the side of 0 alone."""


def activated(z: Tensor, activation: str | None, slope: float = 0.01) -> Tensor:
    """Returns f(z), or z without an activation."""
    return z if activation is None else TORCHS[activation](z, slope)
