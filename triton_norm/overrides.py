"""The protocol by which others take a call of a function of torch's: `__torch_function__` of a mode or an argument."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor
from torch.overrides import _get_current_function_mode_stack, handle_torch_function

from triton_norm import plain

Function = Callable[..., Any]

# Those of torch that change nothing of a call, or no more than torch's own functions do.
_INERT = (
    torch._C._disabled_torch_function_impl,
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    NestedTensor.__torch_function__.__func__,  # type: ignore[attr-defined]
)


def active_mode() -> str | None:
    """Returns in words which mode takes calls here, None where none does.

    torch's own modes, such as that of `with torch.device(...)` and those of its tracers, take none: they look for
    certain functions of torch, and let the others pass.
    """
    for mode in reversed(_get_current_function_mode_stack()):
        if not type(mode).__module__.startswith("torch."):
            return f"the mode {type(mode).__name__} takes it"
    return None


def overriding_argument(arguments: tuple[Any, ...]) -> str | None:
    """Returns in words which argument takes calls by a `__torch_function__` of its own, None where none does."""
    if not torch._C._is_torch_function_enabled():
        return None
    for argument in arguments:
        if type(argument) not in plain.TYPES:
            override = getattr(type(argument), "__torch_function__", None)
            if override is not None and getattr(override, "__func__", override) not in _INERT:
                return f"{type(argument).__name__} takes it by its __torch_function__"
    return None


def taker(
    function: Function, torch_function: Function, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[str, Function] | None:
    """Returns who takes a call of `function`, in words, and what to call instead; None where nobody does.

    That is asked after torch.overrides.has_torch_function has said that somebody may. Whoever takes the call is handed
    torch's own function, unless one of the options, which torch's has not, differs from its default.

    Args:
        arguments: those that may override: the tensors.
        options: the keyword-only arguments of `function`, by name.
    """
    who = active_mode() or overriding_argument(arguments)
    if who is None:
        return None
    if _are_defaults(function, options):
        return who, torch_function
    return who, functools.partial(handle_torch_function, function, arguments, **options)


def _are_defaults(function: Any, options: dict[str, Any]) -> bool:
    for name, default in function.__kwdefaults__.items():
        given = options[name]
        if given is not default and not (type(given) is type(default) and given == default):
            return False
    return True
