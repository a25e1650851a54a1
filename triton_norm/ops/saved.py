"""What autograd keeps between a forward and its backward, and who can serve that backward.

Between the two, hooks may have packed the saved tensors and given them back otherwise, and the backward may run under
another mode than the forward: of vmap, of forward-mode differentiation, of tensors that are no plain memory.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_norm.plain import TYPES, is_plain

T = TypeVar("T", bound=tuple[Any, ...])
Form = tuple[torch.dtype, torch.Size, torch.device]


class Kept(NamedTuple):
    """What a backward knows of its forward beside the saved tensors; calls of one kind have it in common.

    forms: of the saved tensors, None where calls are traced.
    dx, dresidual: the types of x and the residual.
    weight, bias: their types and shapes.
    """

    forms: tuple[Form | None, ...] | None
    dx: torch.dtype
    dresidual: torch.dtype | None
    weight: tuple[torch.dtype, torch.Size] | None
    bias: tuple[torch.dtype, torch.Size] | None


def _form(tensor: Tensor | None) -> Form | None:
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.device)


def _parameter(tensor: Tensor | None) -> tuple[torch.dtype, torch.Size] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape)


def save(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    inputs: Sequence[Tensor | None],
    memory: dict[Any, Any] | None,
    layout: str | None = None,
) -> None:
    """Saves a NamedTuple of tensors for the backward, and as `ctx.kept` what else it has to know.

    Args:
        inputs: x, residual, weight and bias.
        memory: of the calls of this one's kind, where that is made once a layout; None where calls are traced.
        layout: what the shapes of saved tensors depend on beside the call's kind.
    """
    ctx.save_for_backward(*tensors)
    key = Kept, layout
    kept = None if memory is None else memory.get(key)
    if kept is None:
        x, residual, weight, bias = inputs
        assert x is not None
        forms = None if memory is None else tuple(map(_form, tensors))
        dresidual = None if residual is None else residual.dtype
        kept = Kept(forms, x.dtype, dresidual, _parameter(weight), _parameter(bias))
        if memory is not None:
            memory[key] = kept
    ctx.kept = kept


def restored(ctx: Any, kind: type[T]) -> T:
    """Returns the NamedTuple of this kind that `save` saved.

    Raises:
        RuntimeError: a hook has given back a tensor of another type, shape or device. Its values are in doubt, and the
            kernels that were compiled for the first one would read past its end. Other strides are no error.
    """
    tensors, forms = ctx.saved_tensors, ctx.kept.forms
    if forms is not None:
        for tensor, form in zip(tensors, forms, strict=True):
            if tensor is not None and (tensor.dtype, tensor.shape, tensor.device) != form:
                raise RuntimeError(_changed(kind, tensors, forms))
    return kind(*tensors)


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


def shaped(gradient: Tensor | None, parameter: tuple[torch.dtype, torch.Size] | None) -> Tensor | None:
    """Returns the gradient [n] of a parameter in the parameter's own shape."""
    if gradient is None or parameter is None or len(parameter[1]) == 1:
        return gradient
    return gradient.view(parameter[1])


def savable(x: Tensor, intercepted: bool) -> Tensor:
    """Returns x, or a copy where x was made under torch.inference_mode: autograd saves no such tensors."""
    if intercepted and torch.compiler.is_compiling():  # which can't trace the question
        return x
    return x.clone() if x.is_inference() else x
