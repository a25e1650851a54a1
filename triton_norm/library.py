"""Defines the `torch.library` operators of all families, each with a fake and a derivative; small conversions.

An operator is a node of whatever records it: torch.compile, torch.export, make_fx. A recorded node is differentiated,
faked and run later by whoever has the graph, so each operator knows its own derivative.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

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


_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    str | None: "str?",
    torch.dtype | None: "ScalarType?",
}


class _Bundle(NamedTuple):
    """A kind of NamedTuple, whose fields may be NamedTuples, as the flat arguments of an operator.

    schema: an argument each, in order.
    make: (the values, in order) → the NamedTuple.
    """

    schema: list[str]
    make: Callable[[Sequence[Any]], Any]


def _bundle(kind: Any) -> _Bundle:
    schema: list[str] = []
    makers: list[tuple[Callable[[Sequence[Any]], Any], slice]] = []
    for name, field in get_type_hints(kind).items():
        start = len(schema)
        if field in _KINDS:
            schema.append(f"{_KINDS[field]} {name}")
            makers.append((_only, slice(start, start + 1)))
        else:
            inner = _bundle(field)
            schema += inner.schema
            makers.append((inner.make, slice(start, len(schema))))
    if all(make is _only for make, _ in makers):
        return _Bundle(schema, kind._make)
    return _Bundle(schema, lambda values: kind._make([make(values[place]) for make, place in makers]))


def _flat(call: Any) -> list[Any]:
    """Returns the arguments of an operator from the NamedTuple of a call; torch.compile traces this."""
    values: list[Any] = []
    for value in call:
        if isinstance(value, tuple):
            values += _flat(value)
        else:
            values.append(value)
    return values


def _only(values: Sequence[Any]) -> Any:
    (value,) = values
    return value


def recorded(
    name: str,
    call: Any,
    n_results: int,
    present: Callable[[Any], Sequence[bool]],
    compute: Function,
    fake: Function,
    derivative: Derivative | None = None,
) -> Function:
    """Defines the operator of calls of one kind, and returns a function of a call that gives its results.

    An operator's own results can't be None, and are tensors of no elements then.

    Args:
        call: the kind, a NamedTuple whose fields, or theirs, are the operator's arguments.
        n_results: tensors.
        present: (call) → which of the results are not None.
        compute: (call) → the results, with None for what the call has no use for.
        fake: the same, of tensors without contents.
        derivative: `setup` is (ctx, call, results), and returns how many of these, the first, have gradients.
    """
    bundle = _bundle(call)

    def filled(function: Function) -> Function:
        def fill(*arguments: Any) -> tuple[Tensor, ...]:
            results = function(bundle.make(arguments))
            return tuple([nothing(arguments[0]) if result is None else result for result in results])

        return fill

    def unfilled(made: Any, results: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return tuple([result if there else None for result, there in zip(results, present(made), strict=True)])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        assert derivative is not None
        made = bundle.make(inputs)
        n_differentiable = derivative.setup(ctx, made, unfilled(made, output))
        ctx.mark_non_differentiable(*output[n_differentiable:])

    schema = f"{name}({', '.join(bundle.schema)}) -> ({', '.join(['Tensor'] * n_results)})"
    derived = None if derivative is None else Derivative(setup, derivative.backward)
    defined = operator(schema, filled(compute), filled(fake), derived)
    return lambda made: unfilled(made, defined(*_flat(made)))


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
