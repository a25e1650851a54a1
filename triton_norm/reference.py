"""Implements the same functions in plain differentiable torch: fallback, double backward and explanation.

Computes in fp32, in fp64 for fp64 input, and rounds once at the end.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm.activations import activate, apply_gate
from triton_norm.plain import has_known_sizes
from triton_norm.specs import (
    BatchNormSpec,
    BatchNormTensors,
    GroupNormSpec,
    Inputs,
    ModulatedSpec,
    ModulatedTensors,
    RowSpec,
)

MOST_REDUCED_AXES = 64
"""torch's sums reduce at most this many axes."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float = 0.0) -> Tensor:
    """Returns x_hat · (weight + weight_offset) + bias."""
    y = x_hat
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y


def add(x: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x + residual, rounded once to dtype: in float64 if x is float64, and otherwise of dtype."""
    compute = torch.float64 if dtype == torch.float64 else compute_dtype(x, residual)
    return _total(x.to(compute) + residual.to(compute), x, dtype)


def _total(wide: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a total, which is normalized in float64 if x is float64."""
    return rounded(wide, dtype) if x.dtype == torch.float64 else wide.to(dtype)


def normalize(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, spec: RowSpec
) -> Tensor:
    """Returns y = (x − mean) / sqrt(var + eps) · (weight + weight_offset) + bias over the trailing axes, var biased.

    If the spec is not `centred`, mean is 0 and var is E[x²]: RMSNorm.
    """
    axes = tuple(range(-len(normalized_shape), 0))
    x_hat = x.to(compute_dtype(x))
    if spec.centred:
        x_hat = x_hat - x_hat.mean(axes, keepdim=True)
    x_hat = x_hat / root((x_hat * x_hat).mean(axes, keepdim=True) + spec.eps)
    x_hat = rounded(x_hat, spec.x_hat_dtype)
    return affine(x_hat, weight, bias, spec.weight_offset).to(spec.out_dtype or x.dtype)


def root(squares: Tensor) -> Tensor:
    """Returns a standard deviation, to divide by: torch.rsqrt's gradient has the third power of its result, which
    leaves float32's range for inputs of 1e13."""
    return squares.sqrt()


def outer_shape(shape: Sequence[int], x_shape: Sequence[int], n_outer: int, per_head: bool) -> list[int]:
    """Returns a modulation's lengths along the n_outer axes of x before its columns, 1 for those that are missing.

    Args:
        per_head: its axes are x's last ones, not its first.
    """
    own = list(shape[: len(shape) - (len(x_shape) - n_outer)])
    missing = [1] * (n_outer - len(own))
    return missing + own if per_head else own + missing


def _modulation(own: Tensor, x: Tensor, n_outer: int, per_head: bool, dtype: torch.dtype) -> Tensor:
    return own.reshape(*outer_shape(own.shape, x.shape, n_outer, per_head), *x.shape[n_outer:]).to(dtype)


def add_gated(x: Tensor, residual: Tensor, residual_gate: Tensor, n_outer: int, dtype: torch.dtype) -> Tensor:
    """Returns residual + residual_gate · x, as `add`."""
    compute = torch.float64 if dtype == torch.float64 else compute_dtype(x, residual)
    gate = _modulation(residual_gate, x, n_outer, False, compute)
    return _total(residual.to(compute) + gate * x.to(compute), x, dtype)


def modulate(
    total: Tensor,
    normalized_shape: Sequence[int],
    tensors: ModulatedTensors,
    spec: ModulatedSpec,
    norm: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Returns y = (norm(v) · weight + bias) · (scale + scale_offset) + shift, times f(gate).

    The gate multiplies total instead, v = total · f(gate), if the spec says so; otherwise v = total.

    Args:
        total: x, or the sum of x and residual; fields x, residual and residual_gate of `tensors` are not read.
        norm: has the arguments of `normalize`, which is used if it is None.
    """
    compute, n_outer = compute_dtype(total), total.dim() - len(normalized_shape)
    x, gate = total.to(compute), None
    if tensors.gate is not None:
        gate = apply_gate(tensors.gate.to(compute), spec.gate_activation)
        if spec.gate_first:
            x, gate = x * gate, None
    as_x = spec.rows._replace(out_dtype=compute)
    y = (norm or normalize)(x, normalized_shape, tensors.weight, tensors.bias, as_x)
    if tensors.scale is not None:
        y = y * (_modulation(tensors.scale, total, n_outer, spec.per_head, compute) + spec.scale_offset)
    if tensors.shift is not None:
        y = y + _modulation(tensors.shift, total, n_outer, False, compute)
    if gate is not None:
        y = rounded(y, spec.product_dtype) * gate
    return y.to(spec.rows.out_dtype or total.dtype)


def statistics(total: Tensor, gate: Tensor | None, axes: tuple[int, ...], spec: ModulatedSpec) -> Tensor:
    """Returns the means, if the spec is `centred`, and then rstd, of the rows that `modulate` normalizes, flat."""
    x = total.to(compute_dtype(total))
    if gate is not None and spec.gate_first:
        x = x * apply_gate(gate.to(x.dtype), spec.gate_activation)
    means = []
    if spec.rows.centred:
        mean = x.mean(axes, keepdim=True)
        means, x = [mean.flatten()], x - mean
    rstd = torch.rsqrt((x * x).mean(axes, keepdim=True) + spec.rows.eps)
    return torch.cat([*means, rstd.flatten()])


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns x rounded to this dtype, but in its own. The gradient is not rounded, unlike a cast's. None: x."""
    if dtype is None or dtype == x.dtype:
        return x
    narrow = x.to(dtype).to(x.dtype)
    return x + (narrow - x).masked_fill(narrow == x, 0.0).detach()  # exact; infinity less infinity would be NaN


def batch_norm(tensors: BatchNormTensors, spec: BatchNormSpec) -> Tensor:
    """Returns y = f((x − mean) / sqrt(var + eps) · weight + bias + residual), with statistics over every axis but the
    second. Doesn't update running statistics."""
    whole, residual, weight, bias, running_mean, running_var, _ = tensors
    x = whole
    if x.dim() > MOST_REDUCED_AXES:
        x, residual = x.flatten(2), None if residual is None else residual.flatten(2)
    axes = (0, *range(2, x.dim()))
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    wide = x.to(compute_dtype(x))
    if spec.training:
        centred = wide - wide.mean(axes, keepdim=True)
        var = (centred * centred).mean(axes, keepdim=True)
    else:
        assert running_mean is not None and running_var is not None
        centred = wide - running_mean.to(wide.dtype).view(shape)
        var = running_var.to(wide.dtype).view(shape)
    weight = None if weight is None else weight.reshape(shape)
    bias = None if bias is None else bias.reshape(shape)
    z = affine(centred / root(var + spec.eps), weight, bias)
    if residual is not None:
        z = z + residual.to(wide.dtype)
    y = activate(z, spec.activation, spec.slope).to(x.dtype)
    return y if x is whole else y.view(whole.shape)


def group_norm(tensors: Inputs, spec: GroupNormSpec) -> Tensor:
    """Returns y = f((x − mean) / sqrt(var + eps) · weight + bias + residual), with statistics over the positions and
    channels of each group of a sample."""
    whole, residual, weight, bias = tensors
    x = whole
    if x.dim() >= MOST_REDUCED_AXES:  # a group has an axis more
        x, residual = x.flatten(2), None if residual is None else residual.flatten(2)
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    n_groups = max(spec.n_groups, 1)  # InstanceNorm has none without channels
    grouped = x.to(compute_dtype(x)).unflatten(1, (n_groups, x.shape[1] // n_groups))
    axes = tuple(range(2, grouped.dim()))
    centred = grouped - grouped.mean(axes, keepdim=True)
    x_hat = centred / root((centred * centred).mean(axes, keepdim=True) + spec.eps)
    weight = None if weight is None else weight.reshape(shape)
    bias = None if bias is None else bias.reshape(shape)
    z = affine(x_hat.flatten(1, 2), weight, bias)
    if residual is not None:
        z = z + residual.to(z.dtype)
    y = activate(z, spec.activation, spec.slope).to(spec.out_dtype or x.dtype)
    return y if x is whole else y.view(whole.shape)


def check_writable(*tensors: Tensor) -> None:
    """Raises torch's RuntimeError for inference tensors outside torch.inference_mode; torch itself writes first."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    for tensor in tensors:
        if tensor.is_inference():
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")


def count(counter: Tensor | None, momentum: float | None) -> float | Tensor:
    """Increments the counter, if any. Returns the momentum, or if that is None 1 / number of batches. Reading the
    counter waits for the GPU; in a recorded call the result is a tensor."""
    if counter is not None:
        check_writable(counter)
        counter.add_(1)
    if momentum is not None:
        return momentum
    if counter is None:
        return 0.0
    return 1.0 / counter.double() if torch.compiler.is_compiling() else 1.0 / float(counter)


def move_running_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float | Tensor) -> None:
    """Updates both in place: running = (1 − momentum) · running + momentum · batch, with the unbiased variance.

    If the batch's size is unknown while recording, an empty batch leaves both unchanged, and one value a channel leaves
    the variance unchanged.
    """
    if x.dim() > MOST_REDUCED_AXES:
        x = x.flatten(2)
    axes = (0, *range(2, x.dim()))
    n: Any = x.shape[0] * math.prod(x.shape[2:])
    unbiased: Any
    with torch.no_grad():
        x, is_known = x.to(compute_dtype(x)), has_known_sizes(x)
        if is_known:  # as torch's batch_norm does, so that Inductor computes them once
            var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
            unbiased = n / max(n - 1, 1)
        else:  # torch's function would warn of too few values
            n = x.new_full((), n)
            mean = x.sum(axes, keepdim=True) / n.clamp(min=1)
            var = (x - mean).square().sum(axes, keepdim=True) / n.clamp(min=1)
            unbiased = n / (n - 1).clamp(min=1)
        moved = []
        for running, batch, factor, least in ((running_mean, mean, 1.0, 1), (running_var, var, unbiased, 2)):
            wide = running.to(torch.promote_types(running.dtype, mean.dtype))
            fraction = momentum.to(wide) if isinstance(momentum, Tensor) else momentum
            now = (1.0 - fraction) * wide + fraction * factor * batch.view(running.shape)
            moved.append(now if is_known else torch.where(n >= least, now, wide))
        check_writable(running_mean, running_var)
        running_mean.copy_(moved[0])  # nothing can fail from here on
        running_var.copy_(moved[1])


def move_instance_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    """Updates both in place: running = (1 − momentum) · running + momentum · batch.

    batch is the mean over the samples of each sample's mean, or of its unbiased variance. If the batch's size is
    unknown while recording, an empty batch leaves both unchanged.
    """
    n: Any = math.prod(x.shape[2:])
    with torch.no_grad():
        wide = x.to(compute_dtype(x)).flatten(2)
        mean = wide.mean(2, keepdim=True)
        m2 = (wide - mean).square().sum(2)
        _move_towards((mean.mean(0).flatten(), m2.mean(0) / (n - 1)), (running_mean, running_var), momentum, x)


def move_by_moments(moments: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, x: Tensor) -> None:
    """Updates both in place as `move_instance_statistics`, from the moments of x.

    Args:
        moments: [3, N · C], mean, mean_lo and M2 of each channel of each sample.
    """
    n: Any = math.prod(x.shape[2:])
    with torch.no_grad():
        mean, mean_lo, m2 = moments.view(3, *x.shape[:2]).mean(1)
        _move_towards((mean + mean_lo, m2 / (n - 1)), (running_mean, running_var), momentum, x)


def _move_towards(batch: Sequence[Tensor], running: Sequence[Tensor], momentum: float, x: Tensor) -> None:
    moved = []
    for statistic, towards in zip(running, batch, strict=True):
        wide = statistic.to(torch.promote_types(statistic.dtype, towards.dtype))
        now = (1.0 - momentum) * wide + momentum * towards
        moved.append(now if has_known_sizes(x) else torch.where(towards.new_full((), x.numel()) > 0, now, wide))
    check_writable(*running)
    for statistic, now in zip(running, moved, strict=True):  # nothing can fail from here on
        statistic.copy_(now)


def differentiable(*tensors: Tensor | None) -> list[Any]:
    """Returns the tensors, with a detached copy that requires grad in place of each that does not."""
    return [
        tensor if tensor is None or tensor.requires_grad else tensor.detach().requires_grad_() for tensor in tensors
    ]


def gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    dy: Any,
    needs: Sequence[bool],
    may_be_unused: bool = False,
) -> list[Tensor | None]:
    """Returns the gradients of function(*inputs) for the inputs that need one, None for the others.

    They are differentiable if autograd is on, and in forward mode. Each input is passed as a view of its own: a tensor
    that is passed twice has a gradient for each.

    Args:
        dy: gradient of the output of `function`, or of each of its outputs.
        may_be_unused: an output may not depend on an input, whose gradient is None then.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        targets = [view for view, needed in zip(views, needs, strict=True) if needed and view is not None]
        y = function(*views)
        computed = iter(torch.autograd.grad(y, targets, dy, create_graph=create_graph, allow_unused=may_be_unused))
    return [next(computed) if needed and view is not None else None for view, needed in zip(views, needs, strict=True)]
