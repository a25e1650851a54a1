"""Calls of group_norm and instance_norm of either library, with a residual and an activation."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.activations import activated

N_GROUPS = 3
PATHS = pytest.mark.parametrize("path", ["auto", "torch"])
Inputs = Sequence[Tensor | None]

CALLS: dict[str, Callable[..., Tensor]] = {
    "group_norm": lambda norms, x, weight, bias, **own: norms.group_norm(x, N_GROUPS, weight, bias, **own),
    "instance_norm": lambda norms, x, weight, bias, **own: norms.instance_norm(x, None, None, weight, bias, **own),
}
"""Names and calls: (torch.nn.functional or triton_norm, x, weight, bias) → y."""
EVERY_CALL = pytest.mark.parametrize("name", CALLS)

LAYERS: dict[str, Callable[[ModuleType], nn.Module]] = {
    "GroupNorm": lambda norms: norms.GroupNorm(N_GROUPS, 6),
    "GroupNorm, plain": lambda norms: norms.GroupNorm(1, 6, affine=False),
    "InstanceNorm1d": lambda norms: norms.InstanceNorm1d(6),
    "InstanceNorm1d, affine": lambda norms: norms.InstanceNorm1d(6, affine=True),
    "InstanceNorm1d, tracking": lambda norms: norms.InstanceNorm1d(6, affine=True, track_running_stats=True),
    "InstanceNorm1d, no momentum": lambda norms: norms.InstanceNorm1d(6, momentum=None, track_running_stats=True),
}
"""Kinds, and what makes a layer of torch.nn or triton_norm, for input [N, 6, *]."""
EVERY_LAYER = pytest.mark.parametrize("kind", LAYERS)


def pair(kind: str, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """Returns this library's layer and torch's, with the same parameters and buffers."""
    ours, theirs = (LAYERS[kind](norms) for norms in (triton_norm, nn))
    for tensor in theirs.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device), theirs.to(device)


def drawn(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Returns x, residual, weight and bias."""
    x, residual = 2 * torch.randn(2, *shape, dtype=torch.float64) + 1
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
    return tuple(tensor.to(device, dtype) for tensor in (x, residual, weight, bias))


def ours(name: str, activation: str | None = None) -> Callable[..., Tensor]:
    """Returns (x, residual, weight, bias) → y, by this library."""
    own: dict[str, Any] = {"activation": activation, "negative_slope": 0.2}
    return lambda x, residual, weight, bias: CALLS[name](triton_norm, x, weight, bias, residual=residual, **own)


def theirs(name: str, activation: str | None = None) -> Callable[..., Tensor]:
    """Returns (x, residual, weight, bias) → y, composed of torch's functions."""

    def composed(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)  # torch's has no backward for a bias alone
        z = CALLS[name](F, x, weight, bias)
        z = z if residual is None else z + residual
        return activated(z, activation, 0.2)

    return composed


def stepped(function: Callable[..., Tensor], inputs: Inputs, dy: Tensor) -> list[Tensor]:
    """Returns y and the gradients of all inputs that are there."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(y.dtype))]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
