"""Checks arguments before anything is written. Raises torch's exception types, and names the argument."""

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from triton_norm import activations
from triton_norm.plain import FLOATING, holds
from triton_norm.specs import (
    BatchNormOptions,
    BatchNormTensors,
    GroupNormOptions,
    Inputs,
    InstanceNormOptions,
)

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def is_tensor(function: str, name: str, value: object, optional: bool = True) -> None:
    if not (isinstance(value, Tensor) or (optional and value is None)):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def module(function: str, name: str, value: object) -> None:
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{function}(): argument '{name}' must be torch.nn.Module, not {type(value).__name__}")


def is_number(function: str, name: str, value: object) -> None:
    """Accepts a real number that fits a float, or a tensor of no dimensions with such a value, as torch does."""
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return
    scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad
    if not (scalar or isinstance(value, numbers.Real)):
        raise TypeError(f"{function}(): argument '{name}' must be float, not {type(value).__name__}")
    if torch.compiler.is_compiling():
        return
    try:
        float(value)  # type: ignore[arg-type]
    except OverflowError as error:
        raise OverflowError(f"{function}(): argument '{name}': {error}") from None
    except RuntimeError as error:  # a complex tensor on meta
        raise RuntimeError(f"{function}(): argument '{name}': {error}") from None


def is_dense(function: str, name: str, tensor: Tensor, jagged: bool = False) -> None:
    """Requires a strided tensor; with `jagged`, also accepts a nested one in the jagged layout, which has a shape."""
    if jagged and tensor.layout == torch.jagged:
        return
    if tensor.is_nested:
        raise NotImplementedError(f"{function}(): not implemented for nested {name}")
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"{function}(): not implemented for {name} of layout {tensor.layout}")


def matches_input(function: str, name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise RuntimeError(
            f"{function}(): expected all tensors to be on the same device, but input is on {x.device} "
            f"and {name} is on {value.device}"
        )
    if value.dtype not in FLOATING and not (x.is_complex() and value.is_complex()):
        raise NotImplementedError(f"{function}(): {name} must be of a floating-point type, but got {value.dtype}")


def is_floating(function: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise NotImplementedError(
            f"{function}(): not implemented for input of {x.dtype}; expected one of "
            + ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        )


def is_dtype(function: str, name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{function}(): argument '{name}' must be torch.dtype, not {type(value).__name__}")
    if value not in FLOATING:
        raise NotImplementedError(f"{function}(): {name} must be a floating-point type, but got {value}")


def index(value: Any) -> Any:
    """Returns an integer, or the integer that the value stands for; None for any other value."""
    if type(value) is int or type(value) is torch.SymInt:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor, but not one integer
        return None


def has_shape_of_input(function: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Requires a tensor of input's shape, device and kind of dtype."""
    is_dense(function, name, tensor, jagged=x.layout == torch.jagged)
    if tensor.shape != x.shape:
        raise RuntimeError(
            f"{function}(): expected {name} to be of the same shape as input, "
            f"but got {name} of shape {list(tensor.shape)} and input of size {list(x.shape)}"
        )
    matches_input(function, name, tensor, x)


def batch_norm(bundle: BatchNormTensors, options: BatchNormOptions, whole: bool = True) -> None:
    """Checks batch_norm's arguments, torch's as torch does. Also rejects running statistics whose elements share memory
    or would become NaN, and a counter that can't count.

    Args:
        whole: x is the whole batch; otherwise it may have one value a channel.
    """
    x, residual, weight, bias, running_mean, running_var, num_batches_tracked = bundle
    training, momentum, eps, activation, negative_slope = options
    is_tensor("batch_norm", "input", x, optional=False)
    tensors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in (*tensors.items(), ("num_batches_tracked", num_batches_tracked)):
        is_tensor("batch_norm", name, tensor)
    if not isinstance(training, bool):
        raise TypeError(f"batch_norm(): argument 'training' must be bool, not {type(training).__name__}")
    is_number("batch_norm", "eps", eps)
    if momentum is not None:
        is_number("batch_norm", "momentum", momentum)
    if x.layout in _SPARSE or x.is_nested:  # torch's batch_norm takes MKL-DNN's layout
        is_dense("batch_norm", "input", x)
    if x.dim() < 2 and (x.dim() == 0 or not holds(x.numel() == 0)):  # for torch, an empty vector has no channels
        raise RuntimeError(
            f"batch_norm(): expected input of at least 2 dimensions (N, C, *), but got input of size {list(x.shape)}"
        )
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError("batch_norm(): running_mean and running_var must be defined in evaluation mode")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm(): running_mean and running_var must either both be None or neither be None")
    _check_values_per_channel(x, training, eps, whole)
    is_floating("batch_norm", x)
    n_channels = x.shape[1] if x.dim() > 1 else 0
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        is_dense("batch_norm", name, tensor)
        if tensor.numel() != n_channels:
            raise RuntimeError(
                f"batch_norm(): {name} should contain {n_channels} elements, one for each channel of input of size "
                f"{list(x.shape)}, but got {name} of shape {list(tensor.shape)}"
            )
        matches_input("batch_norm", name, tensor, x)
        if name.startswith("running"):
            _check_statistics("batch_norm", name, tensor, training)
    if training and running_mean is not None:
        _check_momentum("batch_norm", momentum, running_mean)
    _check_counter(x, momentum, num_batches_tracked)
    _activated("batch_norm", x, residual, activation, negative_slope)


def _activated(
    function: str, x: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float
) -> None:
    """Checks the arguments that torch's functions over channels lack."""
    is_tensor(function, "residual", residual)
    if residual is not None:
        has_shape_of_input(function, "residual", residual, x)
    if residual is not None or activation is not None:
        is_dense(function, "input", x)
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"{function}(): argument 'activation' must be str or None, not {type(activation).__name__}")
    activations.check(activation, function)
    is_number(function, "negative_slope", negative_slope)


def _check_momentum(function: str, momentum: float | None, running_mean: Tensor) -> None:
    """Rejects NaN, which would turn the statistics into NaN unnoticed until evaluation."""
    if momentum is not None and not torch.compiler.is_compiling() and math.isnan(momentum):
        raise ValueError(
            f"{function}(): momentum must not be nan, which running_mean and running_var of shape "
            f"{list(running_mean.shape)} would become"
        )


def _check_counter(x: Tensor, momentum: float | None, num_batches_tracked: Tensor | None) -> None:
    if num_batches_tracked is None:
        if momentum is None:
            raise TypeError(
                "batch_norm(): argument 'momentum' must be float, not NoneType, unless num_batches_tracked is given"
            )
        return
    is_dense("batch_norm", "num_batches_tracked", num_batches_tracked)
    dtype = num_batches_tracked.dtype
    if num_batches_tracked.numel() != 1 or dtype == torch.bool or dtype.is_complex:
        raise RuntimeError(
            "batch_norm(): num_batches_tracked must be one real number, but got a tensor of shape "
            f"{list(num_batches_tracked.shape)} and {dtype}"
        )
    if num_batches_tracked.is_meta and not x.is_meta:
        raise RuntimeError(f"batch_norm(): input is on {x.device}, but num_batches_tracked is on meta: it has no value")


def _check_statistics(function: str, name: str, running: Tensor, training: bool) -> None:
    if running.dim() != 1:
        raise RuntimeError(f"{function}(): {name} must have one dimension, but is of shape {list(running.shape)}")
    if running.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{function}(): not differentiable with respect to {name}, which requires grad")
    if training and running.numel() > 1 and running.stride(0) == 0:  # torch's would update one element repeatedly
        raise RuntimeError(
            f"{function}(): the elements of {name} share memory (shape {list(running.shape)}, stride 0), "
            "and can't be moved one by one"
        )


def _check_values_per_channel(x: Tensor, training: bool, eps: float, whole: bool) -> None:
    if not training:
        if eps < 0.0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        return
    if whole and holds(x.shape[0] * math.prod(x.shape[2:]) == 1):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")


def group_norm(bundle: Inputs, options: GroupNormOptions) -> int:
    """Checks group_norm's arguments, torch's as torch does. Returns the number of groups."""
    x, residual, weight, bias = bundle
    num_groups, eps, activation, negative_slope = options
    is_tensor("group_norm", "input", x, optional=False)
    is_tensor("group_norm", "weight", weight)
    is_tensor("group_norm", "bias", bias)
    n_groups = None if isinstance(num_groups, Tensor) and num_groups.dim() > 0 else index(num_groups)
    if n_groups is None:
        raise TypeError(f"group_norm(): argument 'num_groups' must be int, not {type(num_groups).__name__}")
    is_number("group_norm", "eps", eps)
    is_dense("group_norm", "input", x)
    if x.dim() < 2:
        raise RuntimeError(
            f"group_norm(): expected input of at least 2 dimensions (N, C, *), but got input of size {list(x.shape)}"
        )
    if n_groups == 0:
        raise ZeroDivisionError("group_norm(): num_groups must be greater than 0, but got 0")
    per_group, positions = x.shape[0] * x.shape[1] // n_groups, list(x.shape[2:])
    if holds(per_group * math.prod(positions) == 1):
        size = [per_group, n_groups, *positions]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if n_groups < 0:
        raise RuntimeError(f"group_norm(): num_groups must be greater than 0, but got {n_groups}")
    if holds(x.shape[1] % n_groups != 0):
        raise RuntimeError(
            f"group_norm(): expected the number of channels to be divisible by num_groups={n_groups}, "
            f"but got input of size {list(x.shape)}"
        )
    is_floating("group_norm", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        _one_per_channel("group_norm", name, parameter, x)
    _activated("group_norm", x, residual, activation, negative_slope)
    return n_groups  # type: ignore[no-any-return]


def _one_per_channel(function: str, name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    is_dense(function, name, tensor)
    if tensor.shape != x.shape[1:2]:
        raise RuntimeError(
            f"{function}(): {name} should contain {x.shape[1]} elements, one for each channel of input of size "
            f"{list(x.shape)}, but got {name} of shape {list(tensor.shape)}"
        )
    matches_input(function, name, tensor, x)


def instance_norm(bundle: BatchNormTensors, options: InstanceNormOptions) -> None:
    """Checks instance_norm's arguments, torch's as torch does. Also rejects running statistics whose elements share
    memory or would become NaN."""
    x, residual, weight, bias, running_mean, running_var, _ = bundle
    use_input_stats, momentum, eps, activation, negative_slope = options
    is_tensor("instance_norm", "input", x, optional=False)
    tensors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        is_tensor("instance_norm", name, tensor)
    if not isinstance(use_input_stats, bool):
        kind = type(use_input_stats).__name__
        raise TypeError(f"instance_norm(): argument 'use_input_stats' must be bool, not {kind}")
    is_number("instance_norm", "eps", eps)
    is_number("instance_norm", "momentum", momentum)
    is_dense("instance_norm", "input", x)
    if use_input_stats and holds(math.prod(x.shape[2:]) == 1):
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {x.shape}")
    if x.dim() < 2:
        raise IndexError(
            f"instance_norm(): expected input of at least 2 dimensions (N, C, *), but got input of size {list(x.shape)}"
        )
    if not use_input_stats and (running_mean is None or running_var is None):
        raise RuntimeError("instance_norm(): running_mean and running_var must be defined without use_input_stats")
    if (running_mean is None) != (running_var is None):
        raise ValueError("instance_norm(): running_mean and running_var must either both be None or neither be None")
    if not use_input_stats and eps < 0.0:
        raise ValueError(f"instance_norm(): eps must be non-negative without use_input_stats, but got {eps}")
    is_floating("instance_norm", x)
    for name, tensor in tensors.items():
        _one_per_channel("instance_norm", name, tensor, x)
        if tensor is not None and name.startswith("running"):
            _check_statistics("instance_norm", name, tensor, use_input_stats)
    if use_input_stats and running_mean is not None:
        _check_momentum("instance_norm", momentum, running_mean)
    _activated("instance_norm", x, residual, activation, negative_slope)
