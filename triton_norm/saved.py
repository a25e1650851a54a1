"""What autograd keeps between a forward and its backward, and who can serve that backward.

Between the two, hooks may have packed the saved tensors and given them back otherwise, and the backward may run under
another mode than the forward: of vmap, of forward-mode differentiation, of tensors that are no plain memory.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_norm.plain import TYPES, is_plain

Form = tuple[torch.dtype, torch.Size, torch.device]


class Parameter(NamedTuple):
    """The type and shape of a weight or bias, whose gradient has them too."""

    dtype: torch.dtype
    shape: torch.Size


class Kept(NamedTuple):
    """What a backward knows of its forward beside the saved tensors; calls of one kind have it in common.

    forms: of the saved tensors, None where calls are traced.
    dx, dresidual: the types of x and the residual.
    weight, bias: their types and shapes.
    """

    forms: tuple[Form | None, ...] | None
    dx: torch.dtype
    dresidual: torch.dtype | None
    weight: Parameter | None
    bias: Parameter | None

    @property
    def parameter_shape(self) -> torch.Size | None:
        """The shape that weight and bias have in common."""
        parameter = self.weight or self.bias
        return None if parameter is None else parameter.shape


def _form(tensor: Tensor | None) -> Form | None:
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.device)


def _parameter(tensor: Tensor | None) -> Parameter | None:
    return None if tensor is None else Parameter(tensor.dtype, tensor.shape)


def kept_of(saved: Iterable[Tensor | None] | None, inputs: Sequence[Tensor | None]) -> Kept:
    """Returns what a backward has to know of its forward.

    Args:
        saved: the saved tensors; None where calls are traced.
        inputs: x, residual, weight and bias.
    """
    x, residual, weight, bias = inputs
    assert x is not None
    forms = None if saved is None else tuple(map(_form, saved))
    dresidual = None if residual is None else residual.dtype
    return Kept(forms, x.dtype, dresidual, _parameter(weight), _parameter(bias))


def check_restored(kept: Kept, kind: Any, tensors: Sequence[Tensor | None]) -> None:
    """Checks the saved tensors that a backward is given.

    Args:
        kind: the NamedTuple that they were saved as.

    Raises:
        RuntimeError: a hook has given back a tensor of another type, shape or device. Its values are in doubt, and the
            kernels that were compiled for the first one would read past its end. Other strides are no error.
    """
    if kept.forms is not None:
        for tensor, form in zip(tensors, kept.forms, strict=True):
            if tensor is not None and (tensor.dtype, tensor.shape, tensor.device) != form:
                raise RuntimeError(_changed(kind, tensors, kept.forms))


def _changed(kind: Any, tensors: Sequence[Tensor | None], forms: Sequence[Form | None]) -> str:
    for name, tensor, form in zip(kind._fields, tensors, forms, strict=True):
        if tensor is not None and form is not None and _form(tensor) != form:
            was, now = _described(*form), _described(tensor.dtype, tensor.shape, tensor.device)
            return f"{name} was saved for backward as {was}, but a hook has given back {now}"
    return "a saved tensor was changed by a hook"


def _described(dtype: torch.dtype, shape: torch.Size, device: torch.device) -> str:
    return f"{dtype} of shape {list(shape)} on {device}"


def needs_torch(gradients: Iterable[Tensor | None], saved: Iterable[Tensor | None], intercepted: bool) -> bool:
    """Returns whether a backward has to be composed of torch's own functions.

    That is so where it is itself differentiated, in reverse or forward mode, or vmapped, or where its tensors are not
    plain memory: torch's functions obey all of these, and a kernel launch none. Nothing else can be asked of what
    torch.compile traces.
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


def bias_like(x: Tensor, kept: Kept) -> Tensor | None:
    """Returns zeros in place of a bias that was not saved, None where there was none: no gradient depends on its
    values."""
    if kept.bias is None:
        return None
    dtype, shape = kept.bias
    return torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)


def shaped(gradient: Tensor | None, parameter: Parameter | None) -> Tensor | None:
    """Returns the gradient [n] of a parameter in the parameter's own shape."""
    if gradient is None or parameter is None or len(parameter.shape) == 1:
        return gradient
    return gradient.view(parameter.shape)


class Needs(NamedTuple):
    """Which inputs a backward is asked for the gradients of."""

    x: bool
    residual: bool
    weight: bool
    bias: bool


def needs_of(ctx: Any) -> Needs:
    """Returns which of a call's first four inputs need gradients."""
    x, residual, weight, bias, *_ = ctx.needs_input_grad
    return Needs(x, residual, weight, bias)


def needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Returns whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_unsavable(x: Tensor) -> bool:
    """Returns whether x was made under torch.inference_mode: autograd saves a copy alone."""
    return not torch.compiler.is_compiling() and x.is_inference()  # which torch.compile can't trace
