"""What the operators of both families share: their registration, and small conversions for launches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_library = torch.library.Library("triton_norm", "DEF")


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines triton_norm::<schema> for every device, and returns it.

    `Library` costs a third of `torch.library.custom_op`'s time per call, and its operators may move running statistics
    inside an autograd.Function. torch.compile sees the operator as one opaque node.
    """
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,)).rpartition("::")[2]
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triton_norm::{name}", fake, lib=_library)
    return getattr(torch.ops.triton_norm, name).default


def is_intercepted() -> bool:
    """Whether something traces or intercepts operators; otherwise one costs time and does what its function does."""
    return bool(torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state())


def tuple_operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines an operator from functions that give a tuple of tensors, with None for what a call has no use for.

    Returns a function that calls the operator and gives the same: the operator's own results can't be None, and are
    tensors of no elements then.
    """

    def filled(function: Callable[..., Any]) -> Callable[..., Any]:
        def fill(*arguments: Any) -> tuple[Tensor, ...]:
            return tuple(nothing(arguments[0]) if found is None else found for found in function(*arguments))

        return fill

    defined = operator(schema, filled(implementation), filled(fake))

    def call(*arguments: Any) -> Any:
        return tuple(found if found.numel() else None for found in defined(*arguments))

    return call


@functools.cache
def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, name_of(dtype))


@functools.cache
def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nothing(x: Tensor) -> Tensor:
    """Stands for an output that was not asked for: an operator's results can't be None."""
    return x.new_empty(0)


def contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


class Wanted(NamedTuple):
    """The types of the gradients that a backward is asked for, None for those that it is not."""

    dx: torch.dtype | None
    dresidual: torch.dtype | None
    dweight: torch.dtype | None
    dbias: torch.dtype | None
