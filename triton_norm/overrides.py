"""Finds the modes and arguments that override a call of torch's functions by `__torch_function__`."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor
from torch.overrides import _get_current_function_mode_stack, handle_torch_function

from triton_norm import plain

Function = Callable[..., Any]

# torch's implementations that change nothing of a call, or no more than torch's own functions do.
_INERT = (
    torch._C._disabled_torch_function_impl,
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    NestedTensor.__torch_function__.__func__,  # type: ignore[attr-defined]
)


def active_mode() -> str | None:
    """Returns a description of the mode that overrides calls here, or None.

    Skips torch's own modes, such as that of `with torch.device(...)` and of its tracers: they act on certain functions
    of torch, and pass on all others.
    """
    for mode in reversed(_get_current_function_mode_stack()):
        if not type(mode).__module__.startswith("torch."):
            return f"the mode {type(mode).__name__} takes it"
    return None


def overriding_argument(arguments: tuple[Any, ...]) -> str | None:
    """Returns a description of the argument that overrides calls by its own `__torch_function__`, or None."""
    if not torch._C._is_torch_function_enabled():
        return None
    for argument in arguments:
        if type(argument) not in plain.TYPES:
            override = getattr(type(argument), "__torch_function__", None)
            if override is not None and getattr(override, "__func__", override) not in _INERT:
                return f"{type(argument).__name__} takes it by its __torch_function__"
    return None


def override_of(
    function: Function, torch_function: Function, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[str, Function] | None:
    """Returns (description of the override, function to call instead) for a call of `function`, or None.

    Called after torch.overrides.has_torch_function has reported a candidate. The override receives torch's own
    function, or this library's if an option that torch's function lacks differs from its default.

    Args:
        arguments: tensors that may override.
        options: keyword-only arguments of `function`, by name.
    """
    description = active_mode() or overriding_argument(arguments)
    if description is None:
        return None
    if _are_defaults(function, options):
        return description, torch_function
    return description, functools.partial(handle_torch_function, function, arguments, **options)


def _are_defaults(function: Any, options: dict[str, Any]) -> bool:
    for name, default in function.__kwdefaults__.items():
        value = options[name]
        if value is not default and not (type(value) is type(default) and value == default):
            return False
    return True
