"""Defines the `torch.library` operators of all families, each with a fake and a derivative.

A recorded operator is differentiated, faked and run later, by torch.compile, torch.export, make_fx or others, so each
operator has its own derivative.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

Function = Callable[..., Any]


class Derivative(NamedTuple):
    """Holds the derivative of an operator, for `torch.library.register_autograd`.

    Args:
        setup: (ctx, inputs, output) saves for `backward`.
        backward: (ctx, *gradients of the outputs) → gradients of the inputs; trailing ones may be missing.
    """

    setup: Function
    backward: Function


def _library() -> torch.library.Library:
    """Returns a library with a namespace of its own: this package's name, and a number if another copy of it has that.

    torch.package may import a second copy. The Hugging Face Hub's kernels are copies with unique names.
    """
    package = __name__.split(".")[-2]
    for number in itertools.count(1):
        try:
            return torch.library.Library(package if number == 1 else f"{package}_{number}", "DEF")
        except RuntimeError as error:
            if "TORCH_LIBRARY" not in str(error):
                raise
    raise AssertionError


_LIBRARY = _library()
DEFINED: dict[str, Any] = {}
"""This dict holds all operators, by name."""


def operator(schema: str, implementation: Function, fake: Function, derivative: Derivative | None = None) -> Any:
    """Defines <namespace>::<schema> for every device, and returns it.

    The outputs of an operator without a derivative don't require grad: another operator's derivative accounts for their
    dependence on the inputs. Only such operators may write to their arguments.

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
        result = tuple(derivative.backward(ctx, *gradients))
        return result + (None,) * (n_inputs - len(result))

    torch.library.register_autograd(full_name, backward, setup_context=derivative.setup, lib=_LIBRARY)
    return defined


def _without_gradient(defined: Any) -> Function:
    """Returns the operator's autograd kernel: runs it below autograd, and increments versions of written tensors."""
    names = [argument.name for argument in defined._schema.arguments if argument.is_write]
    places = [place for place, argument in enumerate(defined._schema.arguments) if argument.is_write]

    def call(*arguments: Any) -> Any:
        for place, name in zip(places, names, strict=True):
            for tensor in arguments[place]:
                if tensor.requires_grad and torch.is_grad_enabled():
                    raise RuntimeError(f"{defined.name()}(): {name} requires grad, and can't be moved")
        with torch._C._AutoDispatchBelowAutograd():
            result = defined(*arguments)
        written = [tensor for place in places for tensor in arguments[place]]
        torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])
        return result

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
    """Describes a NamedTuple type, possibly nested, as the flat arguments of an operator.

    Args:
        schema: the arguments, in order.
        make: (values, in order) → the NamedTuple.
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
    """Returns the operator's arguments from a call's NamedTuple. torch.compile traces this."""
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
    """Defines an operator for calls of one type. Returns a function from a call to its results.

    An operator can't return None: it returns an empty tensor instead.

    Args:
        call: type of the call, a NamedTuple, possibly nested, of the operator's arguments.
        n_results: number of results.
        present: (call) → mask of the results that are not None.
        compute: (call) → results, None for those that the call doesn't need.
        fake: as compute, without contents.
        derivative: its `setup` is (ctx, call, results), and returns how many leading results have gradients.
    """
    bundle = _bundle(call)

    def filled(function: Function) -> Function:
        def fill(*arguments: Any) -> tuple[Tensor, ...]:
            results = function(bundle.make(arguments))
            return tuple([nothing(arguments[0]) if result is None else result for result in results])

        return fill

    def unfilled(made: Any, results: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return tuple([result if exists else None for result, exists in zip(results, present(made), strict=True)])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        assert derivative is not None
        made = bundle.make(inputs)
        n_differentiable = derivative.setup(ctx, made, unfilled(made, output))
        ctx.mark_non_differentiable(*output[n_differentiable:])

    schema = f"{name}({', '.join(bundle.schema)}) -> ({', '.join(['Tensor'] * n_results)})"
    derived = None if derivative is None else Derivative(setup, derivative.backward)
    defined = operator(schema, filled(compute), filled(fake), derived)
    return lambda made: unfilled(made, defined(*_flat(made)))


Types = tuple[torch.dtype | None, ...]
"""Dtypes of several tensors, None for those that are None."""


def dtypes_of(tensors: Sequence[Tensor | None]) -> Types:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


@functools.cache
def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, name_of(dtype))


@functools.cache
def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nothing(x: Tensor) -> Tensor:
    """Returns an empty tensor that stands for None, which an operator can't return."""
    return x.new_empty(0)


def contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
