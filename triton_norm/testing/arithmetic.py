"""Implements a GPU's arithmetic for the interpreter; `triton_norm.testing.correct_rounding` applies it."""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Array: TypeAlias = npt.NDArray[Any]
Function: TypeAlias = Callable[..., Any]

BUILDER = interpreter.InterpreterBuilder
TensorHandle = interpreter.TensorHandle


def _widened(data: Array) -> Array:
    """Returns bf16, which the interpreter stores as uint16, as fp32."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def _fp32_rounded_to_odd(data: Array) -> Array:
    """Truncates fp64 to fp32 with a sticky last bit, so that rounding to fewer bits then rounds the original value."""
    nearest = data.astype(np.float32)
    back = nearest.astype(np.float64)
    bits: Array = nearest.view(np.uint32) - (np.abs(back) > np.abs(data))
    bits |= (back != data) & ~np.isnan(data)
    return bits.view(np.float32)


def _as_fp32(data: Array) -> Array:
    return _fp32_rounded_to_odd(data) if data.dtype == np.float64 else data.astype(np.float32)


def to_bf16(data: Array) -> Array:
    """Rounds numbers of any type to the nearest bf16, ties to even, returned as uint16."""
    wide = _as_fp32(data)
    bits = wide.view(np.uint32)
    nearest = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return np.where(np.isnan(wide), 0x7FFF, nearest).astype(np.uint16)


def _toward_zero_to_bf16(data: Array) -> Array:
    wide = _as_fp32(data)
    return np.where(np.isnan(wide), 0x7FFF, wide.view(np.uint32) >> 16).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    # The handle of a comparison's result has the operands' dtype, though its data are bool.
    return bool(handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16)


def _number(handle: Any) -> Array:
    data: Array = handle.data
    return _widened(data) if _is_bf16(handle) else data


def _cast(self: Any, source: Any, target: Any) -> Any:
    data, dtype = _number(source), target.scalar
    if dtype == tl.bfloat16:
        return TensorHandle(to_bf16(data), dtype)
    return TensorHandle(data.astype(interpreter._get_np_dtype(dtype)), dtype)


def _rounding_cast(original: Function) -> Function:
    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.scalar != tl.bfloat16 or source.dtype.scalar.is_fp8():
            return original(self, source, target, rounding)
        toward_zero = rounding == ir.ROUNDING_MODE.RTZ
        return TensorHandle((_toward_zero_to_bf16 if toward_zero else to_bf16)(source.data), tl.bfloat16)

    return create_fp_to_fp


def _binary(original: Function) -> Function:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Function) -> Any:
        if not _is_bf16(lhs):
            return original(self, lhs, rhs, op)
        result = op(_number(lhs), _number(rhs))
        return TensorHandle(to_bf16(result) if result.dtype == np.float32 else result, tl.bfloat16)

    return binary_op


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounds once, except in fp64: the product of two narrower numbers is exact in fp64."""
    result = _number(x).astype(np.float64) * _number(y) + _number(z)
    return TensorHandle(to_bf16(result) if _is_bf16(z) else result.astype(z.data.dtype), z.dtype.scalar)


def _dot(original: Function) -> Function:
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(_widened(t.data), tl.float32) if _is_bf16(t) else t for t in (a, b))
        return original(self, a, b, *rest)

    return create_dot


def _clamp(original: Function) -> Function:
    def create_clampf(self: Any, x: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
        if propagate_nan == ir.PROPAGATE_NAN.ALL:
            return original(self, x, low, high, propagate_nan)
        return TensorHandle(np.fmin(np.fmax(x.data, low.data), high.data), x.dtype.scalar)

    return create_clampf


def _sum(original: Function) -> Function:
    """Rounds every partial sum of bf16, which tl.sum does not widen."""

    def reduce(self: Any, operand: Any) -> Any:
        return self.generic_reduce((operand,))[0] if _is_bf16(operand.handle) else original(self, operand)

    return reduce


def _scalar_argument(original: Function) -> Function:
    """Converts a float argument to an fp32 scalar. Triton leaves it a Python float, and would add two in fp64."""

    def implicit_cvt(argument: Any) -> Any:
        if isinstance(argument, bool):
            return tl.tensor(TensorHandle(np.array([argument]), tl.int1), tl.int1)
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return original(argument)

    return implicit_cvt


def _without_warnings(original: Function) -> Function:
    """Silences NumPy's warnings: a GPU does not report overflow or NaN."""

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            original(self, *args, **kwargs)

    return call


def _minimum(self: Any, lhs: Any, rhs: Any) -> Any:
    return self.binary_op(lhs, rhs, np.fmin)


def _maximum(self: Any, lhs: Any, rhs: Any) -> Any:
    return self.binary_op(lhs, rhs, np.fmax)


def _bf16_constant(self: Any, value: float) -> Any:
    return TensorHandle(to_bf16(np.array([value], dtype=np.float64)), tl.bfloat16)


def replacements() -> list[tuple[Any, dict[str, Function]]]:
    """Returns pairs of an owner and the attributes to replace in it."""
    executor, reduce = interpreter.GridExecutor, interpreter.ReduceOps
    builder: dict[str, Function] = {
        "cast_impl": _cast,
        "create_fp_to_fp": _rounding_cast(BUILDER.create_fp_to_fp),
        "binary_op": _binary(BUILDER.binary_op),
        "create_fma": _fma,
        "create_dot": _dot(BUILDER.create_dot),
        "create_minnumf": _minimum,
        "create_maxnumf": _maximum,
        "create_clampf": _clamp(BUILDER.create_clampf),
        "get_bf16": _bf16_constant,
    }
    return [
        (BUILDER, builder),
        (reduce, {"sum": _sum(reduce.sum)}),
        (interpreter, {"_implicit_cvt": _scalar_argument(interpreter._implicit_cvt)}),
        (executor, {"__call__": _without_warnings(executor.__call__)}),
    ]
