"""What autograd keeps between a forward and its backward, and who can serve that backward.

Between the two, hooks may have packed the saved tensors and given them back otherwise, and the backward may run under
another mode than the forward: of vmap, of forward-mode differentiation, of tensors that are no plain memory.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_norm.plain import is_plain

T = TypeVar("T")


def _form(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.device)


def save(ctx: Any, tensors: Any) -> None:
    """Saves a NamedTuple of tensors for the backward, with their types, shapes and devices."""
    ctx.save_for_backward(*tensors)
    if not torch.compiler.is_compiling():
        ctx.forms = [_form(tensor) for tensor in tensors]


def restored(ctx: Any, kind: type[T]) -> T:
    """Returns the NamedTuple of this kind that `save` saved.

    Raises:
        RuntimeError: a hook has given back a tensor of another type, shape or device. Its values are in doubt, and the
            kernels that were compiled for the first one would read past its end. Other strides are no error.
    """
    tensors: Any = kind(*ctx.saved_tensors)
    if not torch.compiler.is_compiling():
        for name, tensor, form in zip(tensors._fields, tensors, ctx.forms, strict=True):
            if _form(tensor) != form:
                was, now = (_described(*each) if each else "None" for each in (form, _form(tensor)))
                raise RuntimeError(f"{name} was saved for backward as {was}, but a hook has given back {now}")
    return tensors  # type: ignore[no-any-return]


def _described(dtype: torch.dtype, shape: torch.Size, device: torch.device) -> str:
    return f"{dtype} of shape {list(shape)} on {device}"


def needs_torch(gradients: Sequence[Tensor | None], saved: Iterable[Tensor | None]) -> bool:
    """Returns whether a backward has to be composed of torch's own functions.

    That is so where it is itself differentiated, in reverse or forward mode, or vmapped, or where its tensors are not
    plain memory: torch's functions obey all of these, and a kernel launch none.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    for tensor in gradients:
        if tensor is not None and not is_plain(tensor):
            return True
    return any(tensor is not None and (tensor.is_neg() or not is_plain(tensor)) for tensor in saved)


def bias_like(x: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Returns zeros in place of a bias that was not saved: no gradient depends on its values."""
    return torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)


def savable(x: Tensor) -> Tensor:
    """Returns x, or a copy where x was made under torch.inference_mode: autograd saves no such tensors."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x
