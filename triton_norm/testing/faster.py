"""Makes Triton's interpreter cheaper by the Python that it runs for each operation of a kernel, with the same results.

A program's operations cost the interpreter far more in describing types and shapes than in arithmetic.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle
MOST_CONSTANTS = 4096
# Operations of two tensors of one of these types have that type, divisions included.
CLOSED = {id(dtype) for dtype in (tl.int1, tl.int32, tl.int64, tl.float32, tl.float64)}
INTEGERS = {id(tl.int32), id(tl.int64)}
NUMBERS = (int, float)


def types_made_once() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields owners and the attributes to replace in each, so that types store their shape as a tuple of Python ints.

    Triton's own types and tensors describe their shape by many Python objects, made and compared in each operation.
    """
    make_type, make_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, dict[str, Any]] = {}

    def type_init(self: Any, element_ty: Any, shape: Any) -> None:
        lengths = tuple([length if type(length) is int else int(length) for length in shape])
        made = types.get((id(element_ty), lengths))
        if made is None:
            make_type(self, element_ty, shape)
            self._lengths = lengths
            made = types[id(element_ty), lengths] = dict(vars(self))  # keeps element_ty alive, and so its id valid
        vars(self).update(made)

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        lengths = _lengths(type) if type.is_block() else ()
        made = shapes.get(lengths)
        if made is None:
            make_tensor(self, handle, type)
            if lengths is not None:
                own = "handle", "type", "dtype"
                shapes[lengths] = {name: value for name, value in vars(self).items() if name not in own}
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        vars(self).update(made)

    yield tl.core.block_type, {"__init__": type_init}
    yield tl.core.tensor, {"__init__": tensor_init}


def _lengths(type: Any) -> Any:
    """Returns the lengths of a block type's axes, None for a scalar type."""
    return vars(type).get("_lengths")


def operands_matched_once() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields owners and the attributes to replace in each, so that the types and shapes of two operands are compared
    once, where they differ at all."""
    match, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    tensor = tl.core.tensor

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = _lengths(lhs.type), _lengths(rhs.type)
        if left == right:
            return lhs, rhs
        if right is None:
            return lhs, _spread(rhs, lhs.type)
        if left is None:
            return _spread(lhs, rhs.type), rhs
        return broadcast(self, lhs, rhs)

    @functools.lru_cache(MOST_CONSTANTS)
    def constant(semantic: Any, dtype: Any, kind: type, number: Any, first: bool, options: tuple[Any, ...]) -> Any:
        """Returns a number as the scalar that it is beside a tensor of `dtype`; None where the tensor is cast."""
        scalar = tensor(TensorHandle(np.zeros(1, interpreter._get_np_dtype(dtype)), dtype), dtype)
        lhs, rhs = match(semantic, *((number, scalar) if first else (scalar, number)), *options)
        value, unchanged = (lhs, rhs) if first else (rhs, lhs)
        return value if unchanged is scalar else None

    def is_offset(pointer: Any, offset: Any, allowed: bool) -> bool:
        return allowed and type(pointer.dtype) is tl.pointer_type and id(offset.dtype) in INTEGERS

    def binary_op_type_checking_impl(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        left: Any = type(lhs)
        right: Any = type(rhs)
        if left is right is tensor:
            if id(rhs.dtype) in CLOSED and (lhs.dtype is rhs.dtype or is_offset(lhs, rhs, allow_lhs_ptr)):
                return broadcast_impl_value(self, lhs, rhs)
        elif left is tensor and right in NUMBERS and rhs and id(lhs.dtype) in CLOSED:
            value = constant(self, lhs.dtype, right, rhs, False, options)
            if value is not None:
                return broadcast_impl_value(self, lhs, value)
        elif right is tensor and left in NUMBERS and lhs and id(rhs.dtype) in CLOSED:
            value = constant(self, rhs.dtype, left, lhs, True, options)
            if value is not None:
                return broadcast_impl_value(self, value, rhs)
        return match(self, lhs, rhs, *options)

    yield TritonSemantic, {f.__name__: f for f in (broadcast_impl_value, binary_op_type_checking_impl)}


def _spread(scalar: Any, block: Any) -> Any:
    """Returns a scalar as a tensor of a block's shape, a view of the one number: np.broadcast_to, at less cost."""
    shape, dtype, number = _lengths(block), scalar.type.scalar, scalar.handle.data
    view = np.ndarray(shape, number.dtype, number, 0, (0,) * len(shape))
    view.flags.writeable = False
    return tl.core.tensor(TensorHandle(view, dtype), tl.core.block_type(dtype, list(shape)))


def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Replaces an operation of triton.language by one that needs no semantic passed."""
    function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def call(*args: Any, _semantic: Any = None, **named: Any) -> Any:
        return function(*args, _semantic=semantic, **named)

    scope.set_attr(obj, name, call)
