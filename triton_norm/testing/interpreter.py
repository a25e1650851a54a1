"""Makes Triton's interpreter compute as a GPU does, and reports the memory that a kernel touches.

Only this package depends on the private parts of triton.runtime.interpreter, the same in Triton 3.6 to 3.9.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_norm.testing import arithmetic, faster
from triton_norm.testing.process_wide import process_wide

Array: TypeAlias = arithmetic.Array
Program: TypeAlias = tuple[int, int, int]
AccessKind: TypeAlias = Literal["load", "store", "atomic"]

BUILDER = interpreter.InterpreterBuilder
TensorHandle = interpreter.TensorHandle
SEM = ir.MEM_SEMANTIC
ACQUIRING = (SEM.ACQUIRE, SEM.ACQUIRE_RELEASE)
RELEASING = (SEM.RELEASE, SEM.ACQUIRE_RELEASE)
MISSING = object()
EXACTLY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class Observer:
    """Receives the reports of `observe`. Every method does nothing here; override those of interest.

    A method that raises ends the launch with that very error, before the reported access takes place.
    """

    def launch_begins(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        """Reports a launch with its tensor arguments by name; those of a tuple argument `a` are "a[0]", "a[1]", ..."""

    def access(self, kind: AccessKind, addresses: Array, itemsize: int, program: Program) -> None:
        """Reports an access before it takes place.

        Args:
            addresses: uint64 [lanes], first byte of each lane that is not masked off.
            itemsize: bytes of a lane.
            program: position of the program in the grid.
        """

    def synchronizes(self, addresses: Array, acquires: bool, releases: bool, program: Program) -> None:
        """Reports the memory semantics of an atomic, right after its `access`."""

    def launch_ends(self) -> None:
        """Reports the end of a launch that did not raise."""


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    saved = {name: vars(owner).get(name, MISSING) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in saved.items():
            if value is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@process_wide
def correct_rounding() -> Iterator[None]:
    """Makes interpreted kernels round to bf16 as a GPU does.

    Let r(a) be the bf16 nearest to the number a, ties to even; a NaN stays NaN.

        operation                   here              Triton's own interpreter
        fp32, fp16 → bf16           r(a)              truncated to 16 bits: off by up to an ulp, not half of one
        fp64, integers → bf16       r(a), in one step garbage: the number is taken for an integer
        a + b, a < b, ... in bf16   r(a + b), a < b   garbage: the 16 bits are taken for an integer
        tl.sum of bf16              r of each sum     garbage, the same
        tl.fma(a, b, c)             one rounding      two, in fp32 and fp16 as well
        a constant in bf16          r(a)              AttributeError

    As on a GPU, too, a Python float or bool argument is an fp32 or int1 scalar with a scalar's methods; minimum,
    maximum and clamp drop NaN unless told to propagate it; overflow and NaN cause no warning.

    The context applies to all threads, and may be nested. Entering and leaving wait until no other thread interprets a
    kernel of this library; kernels of your own must not run meanwhile.

    Raises:
        RuntimeError: on entering, if the interpreter is off: TRITON_INTERPRET=1 must be set before triton_norm, or
            anything else that imports triton, is imported.
    """
    with ExitStack() as stack:
        for owner, attributes in arithmetic.replacements():
            stack.enter_context(_replaced(owner, **attributes))
        yield


@process_wide
def int32_overflow_is_an_error() -> Iterator[None]:
    """Raises AssertionError if an integer sum, difference or product overflows, or a tl.device_assert fails.

    Triton's own check consists of a dozen of its operations, this one of NumPy's.
    """
    builder = interpreter.interpreter_builder
    with (
        _replaced(builder, options=dataclasses.replace(builder.options, debug=True)),
        _replaced(TritonSemantic, binary_op_sanitize_overflow_impl=_require_no_overflow),
    ):
        yield


def _require_no_overflow(semantic: Any, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    width, name = lhs.type.scalar.int_bitwidth, operation.__name__
    if width == 1 or width >= 64:
        return
    a, b = lhs.handle.data, rhs.handle.data
    exact = EXACTLY[name](a.astype(np.int64), b.astype(np.int64))
    limits = np.iinfo(a.dtype)
    assert exact.size == 0 or (exact.min() >= limits.min and exact.max() <= limits.max), (
        f"int{width} overflow detected for operation {name}"
    )


class _NothingToRestore:
    def restore(self) -> None:
        pass


@process_wide
def fast_launches() -> Iterator[None]:
    """Makes interpreted kernels faster, with the same results.

    Triton's own interpreter patches all of triton.language at each call of a @triton.jit function; here it is patched
    once. Integer overflow is checked only within `int32_overflow_is_an_error`.
    """
    original, original_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    scalar_np_dtype = functools.cache(interpreter._get_np_dtype)
    scopes: list[Any] = []
    patched: set[int] = set()
    looked_at: dict[int, Any] = {}

    def patch_lang(fn: Any) -> Any:
        names = fn.__globals__
        if id(names) not in looked_at:
            looked_at[id(names)] = names
            modules = {id(tl), id(tl.core)}.intersection(map(id, names.values()))
            if not modules <= patched:
                scopes.append(original(fn))
                patched.update(modules)
        return _NothingToRestore()

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original_tensor(tensor, scope)
        # Triton 3.6 converts an array of one element to int, which NumPy deprecates.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else scalar_np_dtype(scalar)

    functions = (patch_lang, patch_lang_tensor, get_np_dtype, faster.patch_attr)
    builder = interpreter.interpreter_builder
    try:
        with (
            _replaced(interpreter, **{f"_{f.__name__}": f for f in functions}),
            _replaced(builder, options=dataclasses.replace(builder.options, sanitize_overflow=False)),
            ExitStack() as stack,
        ):
            for owner, attributes in itertools.chain(faster.types_made_once(), faster.operands_matched_once()):
                stack.enter_context(_replaced(owner, **attributes))
            yield
    finally:
        for scope in reversed(scopes):
            scope.restore()


def _itemsize(pointers: Any) -> int:
    return int(max(1, pointers.get_element_ty().primitive_bitwidth // 8))


def _unmasked(pointers: Any, mask: Any) -> Array:
    addresses: Array = pointers.data
    taken = mask.data.astype(bool, copy=False)  # int1 & int1 is an int32 array where one of them was a scalar
    return addresses.reshape(-1) if taken.all() else addresses[np.broadcast_to(taken, addresses.shape)]


@functools.cache
def _poison(dtype: Any) -> Any:
    np_dtype = interpreter._get_np_dtype(dtype)
    if dtype.is_floating() and np_dtype.kind != "f":
        return np.iinfo(np_dtype).max  # a NaN in bf16 and in the fp8 formats of NVIDIA
    return np.nan if np_dtype.kind == "f" else True if np_dtype.kind == "b" else np.iinfo(np_dtype).max


_gives_other = [False]
"""The last entry tells if the current load has `other=`. Triton drops an `other` that is a single 0, which is false."""


def _load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
    _gives_other.append(other is not None)
    try:
        return _unobserved_load(self, pointers, mask, other, *rest)
    finally:
        _gives_other.pop()


_unobserved_load = TritonSemantic.load


def _observed_accesses(observer: Observer, poison_masked_loads: bool) -> dict[str, Callable[..., Any]]:
    load, store = BUILDER.create_masked_load, BUILDER.create_masked_store
    rmw, cas = BUILDER.create_atomic_rmw, BUILDER.create_atomic_cas

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        observer.access("load", _unmasked(pointers, mask), _itemsize(pointers), self.grid_idx)
        if other is None and not _gives_other[-1] and poison_masked_loads and not mask.data.all():
            dtype = pointers.get_element_ty()
            fill = np.full(pointers.data.shape, _poison(dtype), dtype=interpreter._get_np_dtype(dtype))
            other = TensorHandle(fill, dtype)
        return load(self, pointers, mask, other, *rest, **named)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        observer.access("store", _unmasked(pointers, mask), _itemsize(pointers), self.grid_idx)
        return store(self, pointers, value, mask, *rest)

    def atomic(addresses: Array, itemsize: int, sem: Any, program: Program) -> None:
        observer.access("atomic", addresses, itemsize, program)
        observer.synchronizes(addresses, sem in ACQUIRING, sem in RELEASING, program)

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        atomic(_unmasked(pointers, mask), _itemsize(pointers), sem, self.grid_idx)
        return rmw(self, op, pointers, value, mask, sem, scope)

    def create_atomic_cas(self: Any, pointers: Any, compare: Any, value: Any, sem: Any, scope: Any) -> Any:
        atomic(pointers.data.reshape(-1), _itemsize(pointers), sem, self.grid_idx)
        return cas(self, pointers, compare, value, sem, scope)

    return {f.__name__: f for f in (create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas)}


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(argument, torch.Tensor):
        yield name, argument
    elif isinstance(argument, TensorWrapper | TensorDescriptor):
        yield from _tensors(name, argument.base)
    elif isinstance(argument, tuple):
        for i, item in enumerate(argument):
            yield from _tensors(f"{name}[{i}]", item)


def _root_cause(error: BaseException) -> BaseException:
    """Unwraps an error: Triton wraps it in an InterpreterError for every @triton.jit function that it leaves."""
    while isinstance(error, InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@process_wide
def observe(observer: Observer, *, poison_masked_loads: bool = False) -> Iterator[None]:
    """Reports every launch and every access to memory to `observer`.

    An error inside a kernel is raised as itself, not as an InterpreterError. With `poison_masked_loads`, the lanes that
    a load without `other=` masks off read NaN (integers: their largest value); Triton's own interpreter reads 0.
    """
    executor = interpreter.GridExecutor
    original = executor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        arguments = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
        tensors = dict(pair for name, value in arguments.items() for pair in _tensors(name, value))
        observer.launch_begins(self.fn.__name__, tensors)
        try:
            original(self, *args, **kwargs)
        except InterpreterError as error:
            raise _root_cause(error) from None
        observer.launch_ends()

    accesses = _observed_accesses(observer, poison_masked_loads)
    loads = _replaced(TritonSemantic, load=_load)
    with _replaced(BUILDER, **accesses), loads, _replaced(executor, __call__=call):
        yield
