"""Resolves a public call to its spec, the backend that serves it, and its plan, which is cached for similar calls."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import captures, checks, checks_rows, dispatch, plans, reference, symbolic
from triton_norm.channels import group_layout
from triton_norm.channels.function import BatchNormPlan
from triton_norm.channels.groups import GroupNormPlan
from triton_norm.channels.running import InstanceStatistics
from triton_norm.plain import HALVES, is_distributed
from triton_norm.rows import modulation, sharded
from triton_norm.rows.modulated_plan import Expanding, modulated_plan_of
from triton_norm.rows.plan import plan_of
from triton_norm.specs import (
    BatchNormOptions,
    BatchNormSpec,
    BatchNormTensors,
    GroupNormOptions,
    GroupNormSpec,
    Inputs,
    InstanceNormOptions,
    ModulatedOptions,
    ModulatedSpec,
    ModulatedTensors,
    RowOptions,
    RowSpec,
    RowTensors,
)


class Call(NamedTuple):
    """Holds the result of resolving a call.

    Args:
        spec: a RowSpec, ModulatedSpec, BatchNormSpec or GroupNormSpec.
        reason: why the kernels can't serve such calls, or None.
        plan: plan of a call that the kernels serve and nothing records or intercepts, or None.
        shape: normalized_shape as passed, a tuple of integers; None for a norm over channels.
        sharding: places the results of a call on DTensors; None for other tensors.
    """

    spec: Any
    reason: str | None
    plan: Any
    shape: Any = None
    sharding: Any = None


def check_rows(function: str, tensors: RowTensors, options: RowOptions) -> Call:
    """Checks a call of layer_norm or rms_norm. Returns it without a plan."""
    shape = checks_rows.rows(function, tensors, options)
    eps = torch.finfo(reference.compute_dtype(tensors.x)).eps if options.eps is None else options.eps
    n_cols, centred = math.prod(shape), function == "layer_norm"
    out_dtype = options.out_dtype
    if out_dtype is None and tensors.x.dtype in HALVES and dispatch.autocasts(function, tensors.x):
        out_dtype = torch.float32  # autocast would cast the input; the kernel reads it unchanged
    dtypes = out_dtype, options.residual_dtype, options.x_hat_dtype
    spec = RowSpec._make((n_cols, float(eps), float(options.weight_offset), centred, *dtypes))
    distributed, n_outer = any(is_distributed(tensor) for tensor in tensors), tensors.x.dim() - len(shape)
    reason, sharding = dispatch.unserved(tensors, n_cols, distributed), None
    if reason is None and distributed:
        reason = sharded.unserved(tensors, n_outer)
        sharding = sharded.Sharding(spec, tensors, n_outer) if reason is None else None
    return Call._make((spec, reason, None, options.normalized_shape, sharding))


def check_modulated(function: str, tensors: ModulatedTensors, options: ModulatedOptions) -> Call:
    """Checks a call of layer_norm or rms_norm with a gate or a modulation. Returns it without a plan."""
    x, residual, weight, bias, *_ = tensors
    plain, gate_activation, gate_first, product_dtype, per_head = options
    offset = plain.weight_offset
    if per_head:  # the weight is a modulation
        checks.is_number(function, "weight_offset", offset)
        plain = plain._replace(weight_offset=0.0)
    call = check_rows(function, RowTensors._make((x, residual, weight, bias)), plain)
    checks_rows.modulated(function, tensors, options)
    scale_offset = float(offset) if per_head else 1.0
    spec = ModulatedSpec._make((call.spec, gate_activation, gate_first, product_dtype, scale_offset, per_head))
    reason = call.reason or dispatch.unserved(tensors, columns=call.spec.n_cols)
    return call._replace(spec=spec, reason=reason)


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
    return Call._make((spec, dispatch.unserved(read), None, None, None))


def check_group_norm(tensors: Inputs, options: GroupNormOptions) -> Call:
    """Checks a call of group_norm. Returns it without a plan."""
    n_groups = checks.group_norm(tensors, options)
    _, eps, activation, slope = options
    out_dtype = None
    if tensors.x.dtype in HALVES and dispatch.autocasts("group_norm", tensors.x):
        out_dtype = torch.float32  # autocast would cast the input; the kernel reads it unchanged
    spec = GroupNormSpec._make((n_groups, float(eps), activation, float(slope), out_dtype))
    return Call._make((spec, _unserved_groups(tensors, n_groups), None, None, None))


def _unserved_groups(tensors: Sequence[Tensor | None], n_groups: int) -> str | None:
    x, *_ = tensors
    assert x is not None
    return dispatch.unserved(tensors) or group_layout.beyond(x.shape, n_groups)


def check_instance_norm(tensors: BatchNormTensors, options: InstanceNormOptions) -> Call:
    """Checks a call of instance_norm. Returns it without a plan. Its spec is a GroupNormSpec, or a BatchNormSpec for a
    call that normalizes with the running statistics."""
    checks.instance_norm(tensors, options)
    use_input_stats, momentum, eps, activation, slope = options
    if not use_input_stats:
        return check_batch_norm(tensors, BatchNormOptions._make((False, momentum, eps, activation, slope)))
    spec = GroupNormSpec._make((tensors.x.shape[1], float(eps), activation, float(slope), None))
    *read, _ = tensors
    return Call._make((spec, _unserved_groups(read, spec.n_groups), None, None, None))


def rows(key: Any, function: str, tensors: RowTensors, options: RowOptions) -> Call:
    """Resolves a call of layer_norm or rms_norm, and caches it unless the key is None."""
    return _cached(key, tensors, options, lambda: check_rows(function, tensors, options), plan_of)


def modulated(key: Any, function: str, tensors: ModulatedTensors, options: ModulatedOptions) -> Call:
    """Resolves a call with a gate or a modulation and caches it, as `rows`."""

    def make_plan(spec: Any, tensors: ModulatedTensors) -> Any:
        return modulated_plan_of(spec, tensors) if modulation.expanded(tensors, spec) is tensors else Expanding(spec)

    return _cached(key, tensors, options.rows, lambda: check_modulated(function, tensors, options), make_plan)


def batch_norm(key: Any, tensors: BatchNormTensors, options: BatchNormOptions) -> Call:
    """Resolves a call of batch_norm and caches it, as `rows`."""
    return _cached(
        _cached_key(key, tensors), tensors, options, lambda: check_batch_norm(tensors, options), BatchNormPlan
    )


def group_norm(key: Any, tensors: Inputs, options: GroupNormOptions) -> Call:
    """Resolves a call of group_norm and caches it, as `rows`."""
    return _cached(key, tensors, options, lambda: check_group_norm(tensors, options), GroupNormPlan)


def instance_norm(key: Any, tensors: BatchNormTensors, options: InstanceNormOptions) -> Call:
    """Resolves a call of instance_norm and caches it, as `rows`."""

    def make_plan(spec: Any, tensors: BatchNormTensors) -> Any:
        if isinstance(spec, BatchNormSpec):
            return BatchNormPlan(spec, tensors)
        inputs = Inputs._make((tensors.x, tensors.residual, tensors.weight, tensors.bias))
        tracks = tensors.running_mean is not None
        return GroupNormPlan(spec, inputs, InstanceStatistics(tensors, float(options.momentum)) if tracks else None)

    return _cached(
        _cached_key(key, tensors), tensors, options, lambda: check_instance_norm(tensors, options), make_plan
    )


def _cached_key(key: Any, tensors: BatchNormTensors) -> Any:
    """Returns the key, or None for running statistics that require grad: these raise while gradients are recorded."""
    running = tensors.running_mean, tensors.running_var
    return None if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in running) else key


def _cached(
    key: Any, tensors: Any, options: Any, check: Callable[[], Call], make_plan: Callable[[Any, Any], Any]
) -> Call:
    with symbolic.untraced():
        call = check()
    if dispatch.unserved_now() is not None or captures.is_intercepted(*tensors):
        return call
    if call.reason is None and call.sharding is None:
        call = call._replace(plan=make_plan(call.spec, tensors))
    # A list has no hash, and a tensor may hold another value next time.
    if key is not None and not any(isinstance(option, (Tensor, list)) for option in options):
        plans.keep(key, tensors, call)
    return call
