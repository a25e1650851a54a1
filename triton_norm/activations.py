"""Defines the activations that can follow a normalization, by name, in plain torch.

kernels/activations.py implements them under the same names.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """Defines an activation y = f(z).

    Args:
        function: (z, slope) → y, torch's own.
        gradient: (dy, z, slope) → dy · f'(z); with `side`, (dy, side(z), slope).
        side: z → mask that f' depends on alone, so that one bit an element suffices for the backward; None: f' needs z.

    `slope` is leaky_relu's slope below 0; the others ignore it.
    """

    function: Callable[[Tensor, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]
    side: Callable[[Tensor], Tensor] | None = None


def _silu_gradient(dy: Tensor, z: Tensor, slope: float) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1.0 + z * (1.0 - sigmoid)) * dy


def _gelu_gradient(dy: Tensor, z: Tensor, slope: float) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    distribution = 0.5 * torch.erfc(-math.sqrt(0.5) * z)
    return (distribution + z * density) * dy


def _gelu_tanh_gradient(dy: Tensor, z: Tensor, slope: float) -> Tensor:
    root = math.sqrt(2 / math.pi)
    sigmoid = torch.sigmoid(2 * root * z * (1 + 0.044715 * z * z))
    twice_u_slope = 2 * root * (1 + 3 * 0.044715 * z * z)
    return (sigmoid + sigmoid * (1.0 - sigmoid) * z * twice_u_slope) * dy


ACTIVATIONS = {
    "relu": Activation(
        lambda z, slope: torch.relu(z),
        lambda dy, positive, slope: torch.where(positive, dy, 0.0),
        lambda z: ~(z <= 0),  # as torch: NaN passes, and an infinite dy stops at 0
    ),
    "silu": Activation(lambda z, slope: F.silu(z), _silu_gradient),
    "gelu": Activation(lambda z, slope: F.gelu(z), _gelu_gradient),
    "gelu_tanh": Activation(lambda z, slope: F.gelu(z, approximate="tanh"), _gelu_tanh_gradient),
    "leaky_relu": Activation(
        F.leaky_relu,
        lambda dy, positive, slope: torch.where(positive, dy, dy * slope),
        lambda z: z > 0,
    ),
}


def named(activation: str, function: str = "batch_norm") -> Activation:
    """Returns the activation of this name; raises ValueError, in the name of `function`, if there is none."""
    try:
        return ACTIVATIONS[activation]
    except KeyError:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{function}(): activation must be one of {known} or None, but got {activation!r}") from None


def check(activation: str | None, function: str = "batch_norm") -> None:
    if activation is not None:
        named(activation, function)


def activate(z: Tensor, activation: str | None, slope: float) -> Tensor:
    """Returns f(z), or z without an activation."""
    return z if activation is None else named(activation).function(z, slope)


def gradient(dy: Tensor, z: Tensor, activation: str | None, slope: float) -> Tensor:
    """Returns dy · f'(z), or dy without an activation."""
    if activation is None:
        return dy
    chosen = named(activation)
    return chosen.gradient(dy, z if chosen.side is None else chosen.side(z), slope)


def gradient_by_side(dy: Tensor, positive: Tensor, activation: str | None, slope: float) -> Tensor:
    """Returns dy · f'(z), given side(z); raises ValueError if f' needs z itself."""
    if not has_side(activation):
        raise ValueError(f"the gradient of activation {activation!r} needs more than the side of 0")
    assert activation is not None
    return named(activation).gradient(dy, positive, slope)


def has_side(activation: str | None) -> bool:
    """Decides whether the gradient depends on z by a mask alone."""
    return activation is not None and named(activation).side is not None


GATES: dict[str | None, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    None: lambda gate: gate,
}
"""The activations of a gate, by name. kernels/modulated.py implements them, and their derivatives."""


def check_gate(activation: str | None, function: str) -> None:
    """Raises ValueError, in the name of `function`, for an unknown activation of a gate."""
    if activation not in GATES:
        known = ", ".join(map(repr, GATES))
        raise ValueError(f"{function}(): gate_activation must be one of {known}, but got {activation!r}")


def apply_gate(gate: Tensor, activation: str | None) -> Tensor:
    """Returns f(gate)."""
    return GATES[activation](gate)
