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
        gradient: (dy, z, slope) → dy · f'(z); with `mask`, (dy, mask(z), slope).
        mask: z → the elements at which f'(z) = 1, if f' depends on z by this mask alone. One bit an element then
            suffices for the backward. None: f' needs z.

    `slope` is leaky_relu's slope below 0; the others ignore it.
    """

    function: Callable[[Tensor, float], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]
    mask: Callable[[Tensor], Tensor] | None = None


def _silu_gradient(dy: Tensor, z: Tensor, slope: float) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1.0 + z * (1.0 - sigmoid)) * dy


def _hardswish_gradient(dy: Tensor, z: Tensor, slope: float) -> Tensor:
    ramp = dy * ((z + 1.5) / 3.0)  # z / 3 + 0.5, which would cancel near -1.5
    return torch.where(z <= -3.0, 0.0, torch.where(z < 3.0, ramp, dy))


def _gelu_gradient(dy: Tensor, z: Tensor, slope: float) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    distribution = 0.5 * torch.erfc(-math.sqrt(0.5) * z)
    return (distribution + z * density) * dy


def _gelu_tanh_gradient(dy: Tensor, z: Tensor, slope: float) -> Tensor:
    root = math.sqrt(2 / math.pi)
    sigmoid = torch.sigmoid(2 * root * z * (1 + 0.044715 * z * z))
    twice_u_slope = 2 * root * (1 + 3 * 0.044715 * z * z)
    return (sigmoid + sigmoid * (1.0 - sigmoid) * z * twice_u_slope) * dy


def _stopped(dy: Tensor, passing: Tensor, slope: float) -> Tensor:
    return torch.where(passing, dy, 0.0)


ACTIVATIONS = {
    "relu": Activation(
        lambda z, slope: torch.relu(z),
        _stopped,
        lambda z: ~(z <= 0),  # as torch: NaN passes, and an infinite dy stops at 0
    ),
    "relu6": Activation(
        lambda z, slope: F.relu6(z),
        _stopped,
        lambda z: ~((z <= 0) | (z >= 6)),  # as torch on a GPU: on the CPU it lets some NaN pass, and not others
    ),
    "leaky_relu": Activation(
        F.leaky_relu,
        lambda dy, passing, slope: torch.where(passing, dy, dy * slope),
        lambda z: z > 0,
    ),
    "silu": Activation(lambda z, slope: F.silu(z), _silu_gradient),
    "hardswish": Activation(lambda z, slope: F.hardswish(z), _hardswish_gradient),
    "gelu": Activation(lambda z, slope: F.gelu(z), _gelu_gradient),
    "gelu_tanh": Activation(lambda z, slope: F.gelu(z, approximate="tanh"), _gelu_tanh_gradient),
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
    return chosen.gradient(dy, z if chosen.mask is None else chosen.mask(z), slope)


def gradient_by_mask(dy: Tensor, passing: Tensor, activation: str | None, slope: float) -> Tensor:
    """Returns dy · f'(z), computed from mask(z); raises ValueError if f' needs z itself."""
    if not has_mask(activation):
        raise ValueError(f"the gradient of activation {activation!r} needs more than a mask")
    assert activation is not None
    return named(activation).gradient(dy, passing, slope)


def has_mask(activation: str | None) -> bool:
    """Decides whether the gradient depends on z by a mask alone."""
    return activation is not None and named(activation).mask is not None


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
