"""Defines the layers whose forward `kernels.kernelize` puts in the place of a module's own.

The Hub's rule: a layer is a subclass of torch.nn.Module that defines `forward` alone, without a constructor or state.
forward reads the attributes that are annotated here off the module that it is put into. `has_backward` and
`can_torch_compile` are the two class variables that the rule allows. transformers looks layers up by these names.
"""

from typing import Any

import torch
from torch import Tensor, nn

from triton_norm.functional import layer_norm, rms_norm


class RMSNorm(nn.Module):
    """Computes x̂ = x / sqrt(E[x²] + eps), rounds it to x's dtype, and multiplies it by weight, as LlamaRMSNorm does."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Any:
        x, weight = hidden_states, self.weight
        y_dtype = torch.promote_types(x.dtype, weight.dtype)
        return rms_norm(x, weight.shape, weight, self.variance_epsilon, x_hat_dtype=x.dtype, out_dtype=y_dtype)


class RMSNormZeroCentered(nn.Module):
    """Computes x / sqrt(E[x²] + eps) · (1 + weight), rounded once to x's dtype, as Qwen3_5RMSNorm does."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Any:
        return rms_norm(x, self.weight.shape, self.weight, self.eps, weight_offset=1.0, out_dtype=x.dtype)


class RMSNormGated(nn.Module):
    """Computes x / sqrt(E[x²] + eps) · weight · f(gate), rounded once to x's dtype, as KimiLinearRMSNormGated does.

    Qwen3NextRMSNormGated, of the same name on the Hub, also rounds before it multiplies by weight and by f(gate).
    """

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float
    activation: str

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Any:
        x, weight, f = hidden_states, self.weight, "silu" if self.activation == "swish" else self.activation
        return rms_norm(x, weight.shape, weight, self.variance_epsilon, gate=gate, gate_activation=f, out_dtype=x.dtype)


class LayerNorm(nn.Module):
    """Computes torch.nn.LayerNorm."""

    has_backward = True
    can_torch_compile = True

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Any:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
