"""How torch.fx and torch.jit find a layer of this library: as torch's own in its place."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

REVERTED = "_triton_norm_reverted"
"""An attribute of a module whose class `revert` has exchanged while its forward was wrapped. The wrapper may still call
the forward of the class before, which then calls that of the class now."""

WAS = "_triton_norm_was"
"""The attribute of a converted module that holds the class it had."""


class Scriptable:
    """A layer in whose place torch.jit.script takes one of the class `original`, torch's or Hugging Face's."""

    original: type[nn.Module]

    def __prepare_scriptable__(self: Any) -> nn.Module:
        """Returns the layer to script, which shares parameters, buffers and hooks with this one.

        torch.jit.script puts it in place of this one in the model that it is given, too: `convert` converts it again.
        A subclass, whose forward may do more, is scripted itself.
        """
        module: nn.Module = self
        return standing_for(module) or module


def standing_for(module: nn.Module) -> nn.Module | None:
    """Returns a module of the class that this one's class stands for, with the same attributes; None of a subclass."""
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


def _forward_is_its_class(module: nn.Module) -> bool:
    return bool(module.forward == MethodType(type(module).forward, module))


def instead(module: nn.Module, forward: Any, input: Any) -> Callable[..., Any] | None:
    """Returns what to call instead of `forward`, a forward of this library's that is called; None to go on with it.

    A module that was reverted is given the forward of its class. A layer that torch.fx traces is given a node of the
    graph that calls the layer, where the tracer would make torch's own layer a leaf.
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
    """Keeps torch.jit.trace from recording in this context: sizes are ints there, which compare without a warning, and
    no tensors."""
    state: Any = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
