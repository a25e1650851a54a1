"""Decides whether Triton or torch serves a call, and why."""

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_norm import captures, overrides, plain
from triton_norm.channels import layout
from triton_norm.tuning import limits
from triton_norm.tuning.limits import MOST_ROW_COLUMNS

INTERPRETED = limits.INTERPRETED
BACKENDS = ("auto", "triton", "torch")
VARIABLE = "TRITON_NORM_BACKEND"
_transforms_active = torch._C._are_functorch_transforms_active
_function_modes = torch._C._len_torch_function_stack
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _checked(name: str, source: str) -> str:
    """Returns the name of a backend. Raises ValueError, which names the source, for any other name."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, but got {name!r}")
    return name


_DEFAULT = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


class _Override(threading.local):
    name = _DEFAULT


override = _Override()
_newest = _DEFAULT
"""Compiled code uses this backend, the one set last in any thread: torch 2.11 doesn't guard on a thread's own."""
_contexts: dict[object, str] = {}
"""Each open context has its backend here, by a token, the newest last: threads leave theirs in any order."""


def backend_in_force() -> str:
    """Returns the name of the backend in force for a call from here."""
    return _newest if torch.compiler.is_compiling() else override.name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Sets the backend of calls in this context, in this thread.

    A backward uses the backend of its forward. Compiled code uses the one set last in any thread. The environment
    variable TRITON_NORM_BACKEND sets the default.

    Args:
        name: "auto" (the default): the kernels if they can serve the call, else torch. "torch": torch. "triton": the
            kernels, or RuntimeError with the reason if they can't serve the call.

    Raises:
        ValueError: an unknown name.
    """
    global _newest
    before = override.name, _newest
    override.name = _newest = _checked(name, "backend")
    token = None if torch.compiler.is_compiling() else _entered(name)
    try:
        yield
    finally:
        override.name, _newest = before
        if token is not None:
            del _contexts[token]
            _newest = next(reversed(_contexts.values()), _DEFAULT)


def _entered(name: str) -> object:
    token = object()
    _contexts[token] = name
    return token


@dataclass(frozen=True)
class Explanation:
    """Tells where a call goes.

    Args:
        function: name of the function.
        backend: "triton" or "torch".
        reason: why.
        copies: tensors that have to be copied first, and why.
    """

    function: str
    backend: str
    reason: str
    copies: tuple[str, ...] = ()

    def __str__(self) -> str:
        copied = "".join(f"\n  copies {copy}" for copy in self.copies)
        return f"{self.function}: {self.backend}, because {self.reason}{copied}"


def unserved(tensors: Sequence[Tensor | None], columns: int | None = None, is_distributed: bool = False) -> str | None:
    """Returns why the kernels can't serve calls on tensors like these, or None.

    Args:
        tensors: x and the others.
        columns: columns of x's rows; None: x has channels.
        is_distributed: x is a DTensor; `rows.sharded.unserved` knows which ones the kernels serve.
    """
    x, *_ = tensors
    assert x is not None
    if not HAS_TRITON:
        return "triton is not installed"
    if not (x.is_cuda or (INTERPRETED and x.is_cpu)):
        return f"the input is on {x.device}" + (", and TRITON_INTERPRET is not set" if x.is_cpu else "")
    for tensor in tensors:
        if tensor is None:
            continue
        if plain.is_subclass(tensor) and not (is_distributed and plain.is_distributed(tensor)):
            return f"{type(tensor).__name__} is a subclass of Tensor"
        if tensor.layout != torch.strided or tensor.is_nested:
            return "a tensor is not strided"
        if tensor.dtype not in plain.FLOATING:
            return f"of dtype {tensor.dtype}"
        if torch.compiler.is_compiling() or is_distributed:  # torch.compile can't trace the rest
            continue
        if tensor.is_neg():
            return "a tensor holds its elements negated, as the imaginary part of a conjugate does"
        if not plain.has_memory(tensor):
            return "a tensor has no memory of its own, as one that was kept from a transform of torch.func"
    if columns is not None and plain.holds(columns > MOST_ROW_COLUMNS):
        return f"a row has more than {MOST_ROW_COLUMNS} columns"
    if plain.holds(x.numel() == 0):
        return "the input has no elements"
    return layout.beyond(x.shape) if columns is None else None


def unserved_now() -> str | None:
    """Returns why the kernels can't serve any call at this moment, or None."""
    if _transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _function_modes():
        return overrides.active_mode()
    return "torch.jit.trace is recording" if captures.is_traced() else None


def goes_to_triton(reason: str | None, compiles_torch: Tensor | None = None, exports_torch: bool = True) -> bool:
    """Decides whether a call goes to the kernels or their operators. Raises RuntimeError if only they may, but can't.

    Args:
        reason: reason from `unserved`.
        compiles_torch: input of a call that torch.compile should record as torch's functions, if its sizes are known.
        exports_torch: torch.export should record torch's functions. Backend "triton" records operators in both cases.
    """
    compiling = torch.compiler.is_compiling()
    chosen = _newest if compiling else override.name
    if chosen == "torch" or (compiling and captures.records_torch(chosen, exports_torch, compiles_torch)):
        return False
    reason = reason or unserved_now()
    if reason is not None and chosen == "triton":
        raise RuntimeError(f"backend 'triton' can't serve this call: {reason}")
    return reason is None


@functools.cache
def _cast_by_autocast(operator: str) -> bool:
    """Decides whether CUDA's autocast computes aten::operator in float32. The CPU's autocast never does."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "AutocastCUDA"))


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def autocasts(function: str, x: Tensor) -> bool:
    """Decides whether CUDA's autocast is on and computes this function of x in float32."""
    return torch.is_autocast_enabled("cuda") and _is_on_gpu(x) and _cast_by_autocast(function)


def is_fusible() -> bool:
    """Decides whether torch.compile records the call, and may fuse it with neighbouring operations."""
    return captures.is_fusible(backend_in_force())


def explanation(function: str, copies: tuple[str, ...], x: Tensor, reason: str | None) -> Explanation:
    """Returns the decision of `goes_to_triton` for an eager call, in words. Doesn't raise."""
    chosen = backend_in_force()
    if chosen == "torch":
        return Explanation(function, "torch", "backend 'torch' was asked for")
    reason = reason or unserved_now()
    if reason is None:
        how = "interpreted on the CPU" if INTERPRETED and x.is_cpu else f"on {x.device}"
        local = "on local tensors, " if plain.is_distributed(x) else ""
        return Explanation(function, "triton", f"the kernels serve it, {local}{how}", copies)
    return explained_by(function, reason)


def explained_by(function: str, reason: str) -> Explanation:
    refused = "; backend 'triton' makes this an error" if backend_in_force() == "triton" else ""
    return Explanation(function, "torch", reason + refused)


def instead_of(
    function: Any, torch_function: Callable[..., Any], tensors: tuple[Any, ...], fused: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """Returns the function to call instead if a mode or an argument overrides `function` by `__torch_function__`, or
    None. Raises RuntimeError if backend "triton" was set, since only the kernels may serve the call then.

    Args:
        fused: values of the keyword-only arguments of `function`, in order.
    """
    options = dict(zip(function.__kwdefaults__, fused, strict=True))
    overriding = overrides.override_of(function, torch_function, tensors, options)
    if overriding is None:
        return None
    reason, instead = overriding
    goes_to_triton(reason)
    return instead
