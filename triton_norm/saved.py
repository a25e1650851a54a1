"""Handles the state that autograd saves between a forward and its backward, and decides who can run the backward.

Hooks may have packed the saved tensors and restored different ones, and the backward may run under another mode than
the forward: vmap, forward-mode differentiation, or tensors without plain memory.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_norm.plain import TYPES, is_plain


class TensorMeta(NamedTuple):
    """Holds a tensor's dtype, shape and device."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


class ForwardFacts(NamedTuple):
    """Holds facts of a forward that its backward needs apart from the saved tensors; equal for calls of one signature.

    Args:
        saved: of each saved tensor; None while tracing.
        dx, dresidual: dtypes of x and residual.
        weight, bias: None for a parameter that is None.
    """

    saved: tuple[TensorMeta | None, ...] | None
    dx: torch.dtype
    dresidual: torch.dtype | None
    weight: TensorMeta | None
    bias: TensorMeta | None

    @property
    def parameter_shape(self) -> torch.Size | None:
        parameter = self.weight or self.bias
        return None if parameter is None else parameter.shape


def meta_of(tensor: Tensor | None) -> TensorMeta | None:
    return None if tensor is None else TensorMeta(tensor.dtype, tensor.shape, tensor.device)


def facts_of(saved: Iterable[Tensor | None] | None, inputs: Sequence[Tensor | None]) -> ForwardFacts:
    """Returns the facts of a forward for its backward.

    Args:
        saved: the saved tensors; None while tracing.
        inputs: x, residual, weight and bias.
    """
    x, residual, weight, bias = inputs
    assert x is not None
    metas = None if saved is None else tuple(map(meta_of, saved))
    dresidual = None if residual is None else residual.dtype
    return ForwardFacts(metas, x.dtype, dresidual, meta_of(weight), meta_of(bias))


def check_restored(facts: Any, kind: Any, tensors: Sequence[Tensor | None]) -> None:
    """Checks the saved tensors that a backward receives.

    Args:
        facts: those of the forward.
        kind: the NamedTuple that they were saved as.

    Raises:
        RuntimeError: a hook restored a tensor of another dtype, shape or device: its values may be wrong, and kernels
            compiled for the original would read past its end. Other strides are valid.
    """
    if facts.saved is None:
        return
    for name, tensor, before in zip(kind._fields, tensors, facts.saved, strict=False):  # fields may have defaults
        after = meta_of(tensor)
        if before is not None and after is not None and before != after:
            saved, restored = _described(before), _described(after)
            raise RuntimeError(f"{name} was saved for backward as {saved}, but a hook has given back {restored}")


def _described(meta: TensorMeta) -> str:
    return f"{meta.dtype} of shape {list(meta.shape)} on {meta.device}"


def needs_torch(gradients: Iterable[Tensor | None], saved: Iterable[Tensor | None], intercepted: bool) -> bool:
    """Decides whether a backward must be composed of torch's functions.

    So it must if it is itself differentiated, in reverse or forward mode, or vmapped, or if its tensors have no plain
    memory: torch's functions support all of these, a kernel launch none. torch.compile can't trace most of the queries.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return True
    if intercepted and torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    for tensor in gradients:
        if tensor is not None and not is_plain(tensor):
            return True
    return any(tensor is not None and (type(tensor) not in TYPES or tensor.is_neg()) for tensor in saved)


def bias_like(x: Tensor, facts: ForwardFacts) -> Tensor | None:
    """Returns zeros for a bias that was not saved, or None without a bias: no gradient depends on its values."""
    if facts.bias is None:
        return None
    return torch.zeros(facts.bias.shape, dtype=facts.bias.dtype, device=x.device, requires_grad=True)


def shaped(gradient: Tensor | None, parameter: TensorMeta | None) -> Tensor | None:
    """Returns a parameter's gradient, which is computed as a vector, in the parameter's shape."""
    if gradient is None or parameter is None or len(parameter.shape) == 1:
        return gradient
    return gradient.view(parameter.shape)


class Needs(NamedTuple):
    """Tells which inputs of a call need gradients."""

    x: bool
    residual: bool
    weight: bool
    bias: bool


def needs_of(ctx: Any) -> Needs:
    x, residual, weight, bias, *_ = ctx.needs_input_grad
    return Needs(x, residual, weight, bias)


def needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_unsavable(x: Tensor) -> bool:
    """Decides whether x was made under torch.inference_mode: autograd can save a copy only."""
    return not torch.compiler.is_compiling() and x.is_inference()  # torch.compile can't trace the query
