"""What a call asks for, and why the kernels can't serve it: checked, and remembered for the calls like it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from triton_norm import captures, checks, dispatch, plain, reference, symbolic
from triton_norm.dispatch import unserved
from triton_norm.ops import channel_plans, rows
from triton_norm.tuning.memory import when_forgotten

MOST_SERVED = 4096
AskedOfRows = tuple[rows.Options, str | None]
AskedOfBatchNorm = tuple[channel_plans.Options, str | None]
Arguments = tuple[Any, ...]
"""Of layer_norm, but for the input: normalized_shape, weight, bias, eps and the keyword ones in order."""

_rows: dict[Any, AskedOfRows] = {}
_batch_norms: dict[Any, AskedOfBatchNorm] = {}
"""Calls found right, by the kinds of their arguments."""

for _remembered in (_rows, _batch_norms):
    when_forgotten(_remembered.clear)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    own_memory = plain.has_memory(tensor)
    return type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.is_neg(), own_memory, tensor.shape


def check_rows(
    function: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    weight_offset: float,
    x_hat_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> AskedOfRows:
    """What a call asks for, and why the kernels can't serve it; raises what is to be raised of its arguments."""
    shape = checks.rows(function, x, normalized_shape, weight, bias, eps)
    fused = residual_dtype, weight_offset, x_hat_dtype, out_dtype
    plain = isinstance(weight_offset, float) and weight_offset == 0.0
    if not plain or any(given is not None for given in (residual, residual_dtype, x_hat_dtype, out_dtype)):
        checks.fused(function, x, weight, residual, *fused)
    if eps is None:
        eps = torch.finfo(reference.compute_dtype(x)).eps
    n_cols, centred = math.prod(shape), function == "layer_norm"
    # By _make: of a NamedTuple's constructor Dynamo guards on an address, which is another one in another process.
    asked = n_cols, float(eps), float(weight_offset), centred, out_dtype, residual_dtype, x_hat_dtype, None
    options = rows.Options._make(asked)
    return options, unserved(x, weight, bias, residual, columns=n_cols)


def _checked_rows(function: str, x: Tensor, arguments: Arguments) -> AskedOfRows:
    """Returns `check_rows` of a call that is not compiled, with room for launchers unless the tensors are none of
    memory."""
    with symbolic.untraced():
        options, reason = check_rows(function, x, *arguments)
    fake = any(isinstance(argument, FakeTensor) for argument in (x, *arguments))
    return (options if fake else options._replace(launchers={})), reason


def of_rows(function: str, x: Tensor, arguments: Arguments) -> AskedOfRows:
    """As `check_rows`; a call like an earlier one is not checked again."""
    if torch.compiler.is_compiling():
        return check_rows(function, x, *arguments)
    normalized_shape, weight, bias, eps, residual, residual_dtype, weight_offset, x_hat_dtype, out_dtype = arguments
    try:
        key = (
            function,
            dispatch.INTERPRETED,
            normalized_shape,
            type(x),
            x.dtype,
            x.device,
            x.layout,
            x.is_neg(),
            plain.has_memory(x),
            x.shape,
            None if weight is None else _kind(weight),
            None if bias is None else _kind(bias),
            type(eps),
            eps,
            None if residual is None else _kind(residual),
            residual_dtype,
            type(weight_offset),
            weight_offset,
            x_hat_dtype,
            out_dtype,
        )
        found = _rows.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensors, nested ones, a list for a shape
        return _checked_rows(function, x, arguments)
    if found is not None:
        for length in normalized_shape:
            if type(length) is not int:  # 4.0 equals 4, but is no length
                return _checked_rows(function, x, arguments)
        return found
    found = _checked_rows(function, x, arguments)
    if isinstance(eps, Tensor) or isinstance(weight_offset, Tensor):
        return found  # the same tensor may hold another value next time
    if captures.is_traced():  # which makes tensors of sizes
        return found
    if len(_rows) >= MOST_SERVED:
        _rows.clear()
    _rows[key] = found
    return found


def _movable(running: Tensor | None) -> bool:
    """Whether nothing but its kind can stand against moving a running statistic."""
    return running is None or (running.is_contiguous() and not running.requires_grad)


def check_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    *,
    whole: bool = True,
) -> AskedOfBatchNorm:
    """What a call asks for, and why the kernels can't serve it; raises what is to be raised of its arguments. Unless x
    is the `whole` batch, it may be of one value per channel."""
    checks.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, whole)
    checks.activated(x, residual, activation, negative_slope)
    share = None if momentum is None else float(momentum)
    asked = training, share, float(eps), activation, float(negative_slope), None
    options = channel_plans.Options._make(asked)  # as in `check_rows`
    return options, unserved(x, running_mean, running_var, weight, bias, residual)


def of_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> AskedOfBatchNorm:
    """As `check_batch_norm`; a call like an earlier one is not checked again."""
    tensors = x, running_mean, running_var, weight, bias, num_batches_tracked, residual
    numbers = momentum, eps, negative_slope
    key = None
    if not torch.compiler.is_compiling() and all(number is None or type(number) is float for number in numbers):
        try:
            kinds = [None if tensor is None else _kind(tensor) for tensor in tensors]
            if type(training) is bool and _movable(running_mean) and _movable(running_var):
                key = (dispatch.INTERPRETED, *kinds, training, *numbers, activation)
                found = _batch_norms.get(key)
                if found is not None:
                    return found
        except (AttributeError, RuntimeError, TypeError):  # no tensors, nested ones
            key = None
    fused = residual, activation, negative_slope
    checked = *tensors[:5], training, momentum, eps, num_batches_tracked, *fused
    if torch.compiler.is_compiling():
        return check_batch_norm(*checked)
    with symbolic.untraced():
        options, reason = check_batch_norm(*checked)
    if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
        options = options._replace(prepared={})
    if key is None or captures.is_traced():  # which makes tensors of sizes
        return options, reason
    if len(_batch_norms) >= MOST_SERVED:
        _batch_norms.clear()
    found = _batch_norms[key] = options, reason
    return found
