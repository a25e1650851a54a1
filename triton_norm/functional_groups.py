"""Implements torch.nn.functional's group_norm and instance_norm, as functional.py does the others."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from triton_norm import captures, functional, plans, reference, resolve
from triton_norm.activations import activate
from triton_norm.channels import groups
from triton_norm.dispatch import goes_to_triton, instead_of, override
from triton_norm.plain import HALVES, has_known_sizes, holds
from triton_norm.specs import (
    BatchNormSpec,
    BatchNormTensors,
    GroupNormOptions,
    GroupNormSpec,
    Inputs,
    InstanceNormOptions,
)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual) for each group of channels of a sample.

    Without residual and activation f this is torch.nn.functional.group_norm. Group g of a sample holds the channels
    from g · C / num_groups on, C / num_groups of them, with all their positions. mean and var = E[(x − mean)²], the
    biased variance, are those of the group.

    Args:
        input: x, [N, C, *], float32, float16, bfloat16 or float64, channels-first or channels-last.
        num_groups: number of groups; divides C.
        weight, bias: [C], any of these dtypes; None: 1 and 0.
        eps: added to the variance, under the root.
        residual: of input's shape, any of these dtypes; added before the activation.
        activation: f: "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh" (GELU by tanh) or None.
        negative_slope: slope of leaky_relu below 0.

    Returns:
        y, of input's shape and dtype, or float32 under CUDA's autocast. The kernels keep input's memory format; torch's
        function keeps it on the CPU alone.

    Raises:
        RuntimeError: shapes or devices don't match, or num_groups is negative or does not divide C.
        ZeroDivisionError: num_groups is 0.
        NotImplementedError: a dtype or layout is not supported.
        ValueError: a single value in all, or an unknown activation.
        TypeError: an argument has the wrong type.

    Statistics are computed and saved in float32; in float64 for float64 input. A sample's bits don't depend on its
    batch.

    Memory: see docs/memory.md.
    Source: Wu and He, "Group Normalization" (2018).
    """
    tensors = input, residual, weight, bias
    options = num_groups, eps, activation, negative_slope
    if has_torch_function_variadic(*tensors):
        return overridable_group_norm(tensors, options)
    return normalize_groups(tensors, options)


def overridable_group_norm(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Computes group_norm, or calls the override by a mode or a tensor, if there is one; as normalize_groups."""
    input, residual, weight, bias = tensors
    num_groups, eps, *fused = options
    instead = instead_of(group_norm, F.group_norm, tensors, (residual, *fused))
    if instead is None:
        return normalize_groups(tensors, options)
    return instead(input, num_groups, weight=weight, bias=bias, eps=eps)  # type: ignore[no-any-return]


def normalize_groups(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Computes group_norm.

    Args:
        tensors, options: fields of Inputs and GroupNormOptions.
    """
    if is_compiling():
        call = resolve.check_group_norm(Inputs._make(tensors), GroupNormOptions._make(options))
    else:
        _, residual, weight, bias = tensors
        key = "group_norm", options, *map(type, options), residual is None, weight is None, bias is None
        call = plans.find(key, tensors)
        if call is None:
            call = resolve.group_norm(key, Inputs._make(tensors), GroupNormOptions._make(options))
        if call.plan is not None and override.name != "torch":
            return groups.launch(tensors, call.plan)
    named = Inputs._make(tensors)
    if goes_to_triton(call.reason, compiles_torch=named.x):
        return groups.record(named, call.spec)  # type: ignore[no-any-return]
    return _torch_group_norm(named, call.spec)


def _torch_group_norm(tensors: Inputs, spec: GroupNormSpec) -> Tensor:
    """Normalizes by torch's function, on wider tensors if it does not take these dtypes or would round twice."""
    x, residual, weight, bias = tensors
    if not _takes_sizes(x):
        return reference.group_norm(tensors, spec)
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)  # torch's has no backward for a bias alone
    if _fits(tensors, spec):
        return _finished(F.group_norm(x, spec.n_groups, weight, bias, spec.eps), residual, spec)
    x, weight, bias = _widened(x, weight, bias)
    z = F.group_norm(x, spec.n_groups, weight, bias, spec.eps)
    return _finished(z, residual, spec).to(spec.out_dtype or tensors.x.dtype)


def _is_empty(x: Tensor) -> bool:
    """Decides whether x is known to have no elements. torch.jit.trace records sizes, and would warn of a comparison."""
    return not captures.is_traced() and holds(x.numel() == 0)


def _takes_sizes(x: Tensor) -> bool:
    """Decides whether torch's function takes x's sizes: it fails for unknown ones, and fails or returns NaN for 0."""
    return has_known_sizes(x) and not _is_empty(x)


def _fits(tensors: Inputs, spec: GroupNormSpec) -> bool:
    """Decides whether torch's function takes tensors of these dtypes, and the result is rounded once."""
    x, residual, weight, bias = tensors
    rounds_once = x.dtype not in HALVES or (residual is None and spec.activation is None)
    return rounds_once and all(tensor is None or tensor.dtype == x.dtype for tensor in (weight, bias))


def _widened(x: Tensor, *parameters: Tensor | None) -> list[Any]:
    """Returns the tensors in the dtype in which x's statistics are computed."""
    compute = reference.compute_dtype(x)
    return [None if tensor is None else tensor.to(compute) for tensor in (x, *parameters)]


def _finished(z: Tensor, residual: Tensor | None, spec: GroupNormSpec) -> Tensor:
    return activate(z if residual is None else z + residual.to(z.dtype), spec.activation, spec.slope)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual) for each channel of each sample.

    Without residual and activation f this is torch.nn.functional.instance_norm. With `use_input_stats`, mean and var =
    E[(x − mean)²], the biased variance, are taken over the positions of the channel. The running statistics, if any,
    are updated in place: running = (1 − momentum) · running + momentum · batch, where batch is the mean over the
    samples of each sample's mean, or of its unbiased variance. Otherwise mean and var are the running statistics, and
    this is batch_norm in evaluation.

    Args:
        input: x, [N, C, *], float32, float16, bfloat16 or float64, channels-first or channels-last.
        running_mean, running_var: [C], any of these dtypes; both may be None with `use_input_stats`.
        weight, bias: [C], any of these dtypes; None: 1 and 0.
        use_input_stats: normalizes with the statistics of each sample.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance, under the root.
        residual: of input's shape, any of these dtypes; added before the activation.
        activation: f: "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh" (GELU by tanh) or None.
        negative_slope: slope of leaky_relu below 0.

    Returns:
        y, of input's shape and dtype. The kernels keep input's memory format; torch's function gives contiguous memory.

    Raises:
        RuntimeError: shapes or devices don't match, or running statistics are missing.
        NotImplementedError: a dtype or layout is not supported.
        ValueError: one position a channel, one of the running statistics without the other, NaN for momentum, a
            negative eps without `use_input_stats`, or an unknown activation.
        IndexError: input has less than two dimensions, without `use_input_stats`.
        TypeError: an argument has the wrong type.

    Running statistics are unchanged after an empty batch, and after an error, unless a launch fails after the one that
    updates them. Statistics are computed and saved in float32; in float64 for float64 input. A sample's bits don't
    depend on its batch.

    Memory: see docs/memory.md.
    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization"
    (2016).
    """
    tensors = input, residual, weight, bias, running_mean, running_var, None
    options = use_input_stats, momentum, eps, activation, negative_slope
    if has_torch_function_variadic(*tensors):
        return overridable_instance_norm(tensors, options)
    return normalize_instances(tensors, options)


def overridable_instance_norm(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Computes instance_norm, or calls the override by a mode or a tensor, if there is one; as normalize_instances."""
    input, residual, weight, bias, running_mean, running_var, _ = tensors
    use_input_stats, momentum, eps, *fused = options
    arguments = input, residual, running_mean, running_var, weight, bias
    instead = instead_of(instance_norm, F.instance_norm, arguments, (residual, *fused))
    if instead is None:
        return normalize_instances(tensors, options)
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    named |= {"use_input_stats": use_input_stats, "momentum": momentum, "eps": eps}
    return instead(input, **named)  # type: ignore[no-any-return]


def normalize_instances(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Computes instance_norm.

    Args:
        tensors, options: fields of BatchNormTensors, without a counter, and InstanceNormOptions.
    """
    if is_compiling():
        call = resolve.check_instance_norm(BatchNormTensors._make(tensors), InstanceNormOptions._make(options))
    else:
        _, residual, weight, bias, running_mean, _, _ = tensors
        presence = residual is None, weight is None, bias is None, running_mean is None
        key = "instance_norm", options, *map(type, options), *presence
        call = plans.find(key, tensors)
        if call is None:
            call = resolve.instance_norm(key, BatchNormTensors._make(tensors), InstanceNormOptions._make(options))
    if isinstance(call.spec, BatchNormSpec):
        return functional.normalize_resolved(tensors, call)
    x, residual, weight, bias, running_mean, running_var, _ = tensors
    inputs, (_, momentum, *_) = (x, residual, weight, bias), options
    if call.plan is not None and override.name != "torch":
        if running_mean is None:
            return groups.launch(inputs, call.plan)
        return groups.launch_tracking(inputs, call.plan, running_mean, running_var)
    named = Inputs._make(inputs)
    y: Tensor
    if goes_to_triton(call.reason, compiles_torch=named.x):
        if running_mean is None:
            return groups.record(named, call.spec)  # type: ignore[no-any-return]
        y, moments = groups.record(named, call.spec, moments=True)
    else:
        return _torch_instance_norm(BatchNormTensors._make(tensors), call.spec, float(momentum))
    reference.move_by_moments(moments, running_mean, running_var, float(momentum), named.x)
    return y


def _torch_instance_norm(tensors: BatchNormTensors, spec: GroupNormSpec, momentum: float) -> Tensor:
    """Normalizes by torch's function, which also updates the running statistics if it takes their dtype.

    An empty batch changes nothing; torch's function would turn the statistics into NaN.
    """
    x, residual, weight, bias, running_mean, running_var, _ = tensors
    inputs = Inputs._make((x, residual, weight, bias))
    running = None
    if running_mean is not None and running_var is not None and not _is_empty(x):
        running = running_mean, running_var
        reference.check_writable(*running)
    if _takes_sizes(x):
        if bias is not None and weight is None:
            weight = torch.ones_like(bias)  # torch's has no backward for a bias alone on CUDA
        fits = _fits(inputs, spec)
        wide = x if x.dim() <= 5 else x.flatten(2)  # cuDNN takes at most 5 axes
        if not fits:
            wide, weight, bias = _widened(wide, weight, bias)
        moved: tuple[Tensor | None, Tensor | None] = None, None
        if running is not None and all(statistic.dtype == wide.dtype for statistic in running):
            moved, running = running, None
        z = F.instance_norm(wide, *moved, weight, bias, True, momentum, spec.eps)
        y = _finished(z if x.dim() <= 5 else z.view(x.shape), residual, spec)
        y = y if fits else y.to(x.dtype)
    else:
        y = reference.group_norm(inputs, spec)
    if running is not None:
        reference.move_instance_statistics(x, *running, momentum)
    return y
