"""Defines the `torch.library` operators of all families, each with a fake and a derivative; small conversions.

An operator is a node of whatever records it: torch.compile, torch.export, make_fx. A recorded node is differentiated,
faked and run later by whoever has the graph, so each operator knows its own derivative.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., Any]


class Derivative(NamedTuple):
    """The derivative of an operator, for `torch.library.register_autograd`.

    setup: (ctx, inputs, output) saves for `backward`.
    backward: (ctx, *gradients of the outputs) → the gradients of the inputs, of which the last may be left out.
    """

    setup: Function
    backward: Function


def _library() -> torch.library.Library:
    """Returns a library of this import's own: a second copy of the package in one process, as torch.package makes one,
    has another namespace."""
    for number in itertools.count(1):
        try:
            return torch.library.Library("triton_norm" if number == 1 else f"triton_norm_{number}", "DEF")
        except RuntimeError as error:
            if "TORCH_LIBRARY" not in str(error):
                raise
    raise AssertionError


_LIBRARY = _library()
DEFINED: dict[str, Any] = {}
"""All operators, by name."""


def operator(schema: str, implementation: Function, fake: Function, derivative: Derivative | None = None) -> Any:
    """Defines <namespace>::<schema> for every device, and returns it.

    An operator without a derivative gives tensors that require no gradient: what it gives depends on its inputs in a
    way that another operator's derivative accounts for. Only such may write its arguments.

    `Library` costs a third of `torch.library.custom_op`'s time per call.
    """
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,)).rpartition("::")[2]
    full_name = f"{_LIBRARY.ns}::{name}"
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(full_name, fake, lib=_LIBRARY)
    defined = DEFINED[name] = getattr(getattr(torch.ops, _LIBRARY.ns), name).default
    if derivative is None:
        _LIBRARY.impl(name, _without_gradient(defined), "Autograd")
        return defined
    n_inputs = len(defined._schema.arguments)

    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        found = tuple(derivative.backward(ctx, *gradients))
        return found + (None,) * (n_inputs - len(found))

    torch.library.register_autograd(full_name, backward, setup_context=derivative.setup, lib=_LIBRARY)
    return defined


def _without_gradient(defined: Any) -> Function:
    """Returns the operator's kernel for autograd: below that, and with one more version of what is written."""
    names = [argument.name for argument in defined._schema.arguments if argument.is_write]
    places = [place for place, argument in enumerate(defined._schema.arguments) if argument.is_write]

    def call(*arguments: Any) -> Any:
        for place, name in zip(places, names, strict=True):
            for tensor in arguments[place]:
                if tensor.requires_grad and torch.is_grad_enabled():
                    raise RuntimeError(f"{defined.name()}(): {name} requires grad, and can't be moved")
        with torch._C._AutoDispatchBelowAutograd():
            found = defined(*arguments)
        written = [tensor for place in places for tensor in arguments[place]]
        torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])
        return found

    return call


def tuple_operator(
    schema: str,
    implementation: Function,
    fake: Function,
    present: Callable[..., Sequence[bool]],
    derivative: Derivative | None = None,
) -> Function:
    """Defines an operator from functions that give a tuple of tensors, with None for what a call has no use for.

    Returns a function that calls the operator and gives the same: the operator's own results can't be None, and are
    tensors of no elements then.

    Args:
        present: of the operator's arguments, which of its results are not None.
    """

    def filled(function: Function) -> Function:
        def fill(*arguments: Any) -> tuple[Tensor, ...]:
            return tuple(nothing(arguments[0]) if found is None else found for found in function(*arguments))

        return fill

    defined = operator(schema, filled(implementation), filled(fake), derivative)

    def call(*arguments: Any) -> Any:
        there = present(*arguments)
        return tuple(found if wanted else None for found, wanted in zip(defined(*arguments), there, strict=True))

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
