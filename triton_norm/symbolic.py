"""Makes torch.fx and torch.jit see a layer of this library as the torch layer that it stands for."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

REVERTED = "_triton_norm_reverted"
"""This attribute marks a module that was reverted while its forward was wrapped. The wrapper may still call the
converted class's forward, which then calls the restored class's."""

WAS = "_triton_norm_was"
"""This attribute of a converted module holds its former class."""


class Scriptable:
    """Lets torch.jit.script replace the layer by one of the class `original`, torch's or Hugging Face's."""

    original: type[nn.Module]

    def __prepare_scriptable__(self: Any) -> nn.Module:
        """Returns the layer to script, which shares parameters, buffers and hooks with this one.

        torch.jit.script also replaces this layer in the model passed to it: `convert` converts it again. A subclass,
        whose forward may do more, is scripted itself.
        """
        module: nn.Module = self
        return standing_for(module) or module


def standing_for(module: nn.Module) -> nn.Module | None:
    """Returns a module of the class `original` with the same attributes, or None for a subclass."""
    cls = vars(type(module)).get("original")
    if cls is None:
        return None
    made: nn.Module = cls.__new__(cls)
    made.__dict__.update(module.__dict__)
    for name in (WAS, REVERTED):
        made.__dict__.pop(name, None)
    if _forward_is_its_class(module):
        made.__dict__.pop("forward", None)
    return made


def signed(forward: Any, original: Any) -> Any:
    """Returns a copy of this library's forward with the signature of the class's own, in which torch.jit.trace and
    others look up the names of arguments."""
    copied = FunctionType(forward.__code__, forward.__globals__, closure=forward.__closure__)
    return functools.update_wrapper(copied, original)


def is_signed(forward: Any, ours: Any) -> bool:
    """Decides whether a class's forward is a copy that `signed` has made of ours."""
    return getattr(forward, "__code__", None) is ours.__code__


def _forward_is_its_class(module: nn.Module) -> bool:
    return bool(module.forward == MethodType(type(module).forward, module))


def instead(module: nn.Module, forward: Any, input: Any) -> Callable[..., Any] | None:
    """Returns the function to call instead of this library's `forward`, or None to continue with it.

    A reverted module calls its class's forward. A layer traced by torch.fx becomes a node that calls the layer, if the
    tracer would treat torch's own layer as a leaf.
    """
    if type(module).forward is not forward:
        return functools.partial(type(module).forward, module) if REVERTED in module.__dict__ else None
    tracer = input.tracer if isinstance(input, fx.Proxy) else None
    return _leaf(module, tracer) if isinstance(tracer, fx.Tracer) and tracer.root is not module else None


def _leaf(module: Any, tracer: fx.Tracer) -> Callable[..., Any] | None:
    theirs, name = standing_for(module), tracer.path_of_module(module)
    if theirs is None or not tracer.is_leaf_module(theirs, name):
        return None
    legacy = module._backward_hooks and not module._is_full_backward_hook
    if legacy or module._forward_pre_hooks or module._forward_hooks or not _forward_is_its_class(module):
        raise TraceError(
            f"{type(module).__name__} {name!r} has hooks or a wrapped forward, which torch.fx would run while it "
            f"traces, and again in the graph: trace the model before triton_norm.convert, or after triton_norm.revert"
        )
    return lambda input, **options: tracer.create_proxy("call_module", name, (input,), options)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Pauses torch.jit.trace's recording in this context: sizes are then ints, which compare without a warning."""
    state: Any = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def of_sizes(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function that compares sizes and computes no tensor, in `untraced`."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
        return function(*arguments)
    with untraced():
        return function(*arguments)
