"""Normalizes the sum of two tensors in one launch, where the norm is known and nothing else observes it."""

from typing import Any

import torch
from torch import Tensor

from triton_norm import captures, functional, modules, plain
from triton_norm.converting.gated import SERVED
from triton_norm.converting.hugging_face import RowNorm, is_counterpart
from triton_norm.converting.joining import is_observed, layer_of
from triton_norm.specs import RowOptions, RowTensors
from triton_norm.symbolic import is_signed


def is_row_norm(cls: Any) -> bool:
    """Decides whether norms of exactly this class can take a sum."""
    if layer_of(cls) in (modules.LayerNorm, modules.RMSNorm):
        return True
    return issubclass(cls, RowNorm) and is_counterpart(cls)


def add_and_normalize(norm: Any, augend: Any, addend: Any) -> tuple[Any, Any]:
    """Returns norm(augend + addend) and the sum, rounded as these two operations round."""
    call = _call(norm, augend, addend)
    if call is None:
        total = augend + addend
        return norm(total), total

    def one_by_one(_: Tensor) -> tuple[Any, Any]:
        total = augend + addend
        return norm(total), total

    normalized: tuple[Any, Any] = functional.normalize_rows(*call, one_by_one)
    return normalized


def _call(norm: Any, augend: Any, addend: Any) -> tuple[str, RowTensors, RowOptions] | None:
    """Returns the arguments of normalize_rows, or None where the sum and the norm are two operations."""
    if plain.is_subclass(augend) or plain.is_subclass(addend) or captures.is_traced():
        return None
    if augend.dtype not in SERVED or addend.dtype not in SERVED or augend.device != addend.device:
        return None
    # The sum is contiguous here. torch's may not be, and code behind it may rely on that, if neither operand is.
    if augend.shape != addend.shape or not (augend.is_contiguous() or addend.is_contiguous()):
        return None
    x, residual = addend, augend
    if x.dtype != residual.dtype:
        total = torch.promote_types(x.dtype, residual.dtype)
        if x.dtype != total:
            x, residual = residual, x
        if x.dtype != total:  # the sum of float16 and bfloat16 is in float32
            return None
    call = _row_call(norm, x)
    if call is None or is_observed(norm) or norm._compiled_call_impl is not None:
        return None
    function, (_, _, weight, bias), options = call
    if _overrides(weight) or _overrides(bias):
        return None
    if residual.dtype != x.dtype:
        options = options._replace(residual_dtype=x.dtype)
    return function, RowTensors._make((x, residual, weight, bias)), options


def _overrides(parameter: Tensor | None) -> bool:
    return parameter is not None and plain.is_subclass(parameter)


def _row_call(norm: Any, x: Tensor) -> tuple[str, RowTensors, RowOptions] | None:
    """Returns the arguments with which normalize_rows computes the norm's forward, or None for other norms."""
    cls = type(norm)
    layer = layer_of(cls)
    if layer is modules.LayerNorm:
        weight, bias = modules.weight_and_bias_of(norm)
        options = RowOptions._make((norm.normalized_shape, norm.eps, None, 0.0, None, None))
        return "layer_norm", RowTensors._make((x, None, weight, bias)), options
    if layer is modules.RMSNorm:
        options = RowOptions._make((norm.normalized_shape, norm.eps, None, 0.0, None, None))
        return "rms_norm", RowTensors._make((x, None, modules.weight_of(norm), None)), options
    if isinstance(norm, RowNorm) and is_signed(cls.forward, RowNorm.forward):
        return norm.row_call(x)
    return None
