"""Resolves a public call to its spec, the backend that serves it, and its plan, which is cached for similar calls."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import captures, checks, dispatch, plans, reference, symbolic
from triton_norm.channels.function import BatchNormPlan
from triton_norm.plain import HALVES
from triton_norm.rows.plan import plan_of
from triton_norm.specs import BatchNormOptions, BatchNormSpec, BatchNormTensors, RowOptions, RowSpec, RowTensors


class Call(NamedTuple):
    """Holds the result of resolving a call.

    Args:
        spec: a RowSpec or BatchNormSpec.
        reason: why the kernels can't serve such calls, or None.
        plan: plan of a call that the kernels serve and nothing records or intercepts, or None.
        shape: normalized_shape as given, a tuple of integers; None for a BatchNorm.
    """

    spec: Any
    reason: str | None
    plan: Any
    shape: Any = None


def check_rows(function: str, tensors: RowTensors, options: RowOptions) -> Call:
    """Checks a call of layer_norm or rms_norm. Returns it without a plan."""
    shape = checks.rows(function, tensors, options)
    eps = torch.finfo(reference.compute_dtype(tensors.x)).eps if options.eps is None else options.eps
    n_cols, centred = math.prod(shape), function == "layer_norm"
    out_dtype = options.out_dtype
    if out_dtype is None and tensors.x.dtype in HALVES and dispatch.autocasts(function, tensors.x):
        out_dtype = torch.float32  # autocast would cast the input; the kernel reads it unchanged
    dtypes = out_dtype, options.residual_dtype, options.x_hat_dtype
    spec = RowSpec._make((n_cols, float(eps), float(options.weight_offset), centred, *dtypes))
    return Call._make((spec, dispatch.unserved(tensors, columns=n_cols), None, options.normalized_shape))


def batch_norm_spec(tensors: BatchNormTensors, options: BatchNormOptions, whole: bool = True) -> BatchNormSpec:
    """Checks a call of batch_norm. Returns its spec.

    Args:
        whole: x is the whole batch; otherwise it may have one value a channel.
    """
    checks.batch_norm(tensors, options, whole)
    training, momentum, eps, activation, slope = options
    momentum = None if momentum is None else float(momentum)
    return BatchNormSpec._make((training, momentum, float(eps), activation, float(slope)))


def check_batch_norm(tensors: BatchNormTensors, options: BatchNormOptions, whole: bool = True) -> Call:
    spec = batch_norm_spec(tensors, options, whole)
    *read, _ = tensors
    return Call._make((spec, dispatch.unserved(read), None, None))


def rows(key: Any, function: str, tensors: RowTensors, options: RowOptions) -> Call:
    """Resolves a call of layer_norm or rms_norm, and caches it unless the key is None."""
    return _kept(key, tensors, options, lambda: check_rows(function, tensors, options), plan_of)


def batch_norm(key: Any, tensors: BatchNormTensors, options: BatchNormOptions) -> Call:
    """Resolves a call of batch_norm and caches it, as `rows`."""
    for running in (tensors.running_mean, tensors.running_var):
        if isinstance(running, Tensor) and running.requires_grad:
            key = None  # raises while gradients are recorded
    return _kept(key, tensors, options, lambda: check_batch_norm(tensors, options), BatchNormPlan)


def _kept(key: Any, tensors: Any, options: Any, check: Callable[[], Call], plan_of: Callable[[Any, Any], Any]) -> Call:
    with symbolic.untraced():
        call = check()
    if dispatch.unserved_now() is not None or captures.is_intercepted(*tensors):
        return call
    if call.reason is None:
        call = call._replace(plan=plan_of(call.spec, tensors))
    # A list has no hash, and a tensor may hold another value next time.
    if key is not None and not any(isinstance(option, (Tensor, list)) for option in options):
        plans.keep(key, tensors, call)
    return call
