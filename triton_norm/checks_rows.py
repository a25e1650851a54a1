"""Checks the arguments of layer_norm and rms_norm, as checks.py does the others."""

import torch
from torch import Tensor

from triton_norm import activations, checks
from triton_norm.plain import FLOATING
from triton_norm.specs import ModulatedOptions, ModulatedTensors, RowOptions, RowTensors


def _normalized_shape(function: str, normalized_shape: object) -> tuple[int, ...]:
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(
            f"{function}(): argument 'normalized_shape' must be tuple of ints, not {type(normalized_shape).__name__}"
        )
    shape = []
    for element in normalized_shape:
        length = checks.index(element)
        if length is None:
            raise TypeError(
                f"{function}(): argument 'normalized_shape' must be tuple of ints, "
                f"but found element of type {type(element).__name__}"
            )
        shape.append(length)
    if not shape:
        raise RuntimeError(f"{function}(): expected normalized_shape to have at least one dimension, but got []")
    return tuple(shape)


def _row_parameter(function: str, name: str, parameter: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    checks.is_tensor(function, name, parameter)
    checks.is_dense(function, name, parameter)
    if parameter.shape != shape:
        raise RuntimeError(
            f"{function}(): expected {name} to be of the same shape as normalized_shape, "
            f"but got {name} of shape {list(parameter.shape)} and normalized_shape={list(shape)}"
        )
    checks.matches_input(function, name, parameter, x)


def rows(function: str, tensors: RowTensors, options: RowOptions) -> tuple[int, ...]:
    """Checks layer_norm's or rms_norm's arguments, torch's as torch does. Returns normalized_shape as a tuple."""
    x, residual, weight, bias = tensors
    normalized_shape, eps, residual_dtype, weight_offset, x_hat_dtype, out_dtype = options
    checks.is_tensor(function, "input", x, optional=False)
    shape = _normalized_shape(function, normalized_shape)
    if not (eps is None and function == "rms_norm"):
        checks.is_number(function, "eps", eps)
    if x.dim() == 0 and function == "rms_norm":
        raise ValueError("rms_norm(): expected input of at least one dimension, but got input of size []")
    ragged = x.is_nested and (x.layout == torch.jagged or function == "layer_norm")  # torch's own checks its lengths
    if not ragged:
        checks.is_dense(function, "input", x, jagged=True)
    if not ragged and x.shape[-len(shape) :] != shape:
        expected = ", ".join(("*", *map(str, shape)))
        raise RuntimeError(
            f"{function}(): given normalized_shape={list(shape)}, expected input with shape [{expected}], "
            f"but got input of size {list(x.shape)}"
        )
    if x.dtype not in FLOATING and not (x.is_complex() and function == "rms_norm"):
        checks.is_floating(function, x)
    if weight is not None:
        _row_parameter(function, "weight", weight, shape, x)
    if bias is not None:
        _row_parameter(function, "bias", bias, shape, x)
    is_torchs = isinstance(weight_offset, float) and weight_offset == 0.0
    if not is_torchs or any(own is not None for own in (residual, residual_dtype, x_hat_dtype, out_dtype)):
        _fused(function, tensors, options)
    return shape


def _fused(function: str, tensors: RowTensors, options: RowOptions) -> None:
    """Checks the arguments that torch's functions lack."""
    x, residual, weight, _ = tensors
    _, _, residual_dtype, weight_offset, x_hat_dtype, out_dtype = options
    checks.is_tensor(function, "residual", residual)
    checks.is_number(function, "weight_offset", weight_offset)
    checks.is_dtype(function, "residual_dtype", residual_dtype)
    checks.is_dtype(function, "x_hat_dtype", x_hat_dtype)
    checks.is_dtype(function, "out_dtype", out_dtype)
    checks.is_dense(function, "input", x, jagged=True)
    checks.is_floating(function, x)
    if residual is None:
        if residual_dtype is not None:
            raise ValueError(f"{function}(): residual_dtype={residual_dtype} was given without a residual")
    else:
        checks.has_shape_of_input(function, "residual", residual, x)
    if weight_offset and weight is None:
        raise ValueError(f"{function}(): weight_offset={weight_offset} was given without a weight")


def modulated(function: str, tensors: ModulatedTensors, options: ModulatedOptions) -> None:
    """Checks the gate and the modulation of a call whose other arguments `rows` has checked."""
    x, residual, _, _, gate, scale, shift, residual_gate = tensors
    _, gate_activation, gate_first, product_dtype, per_head = options
    named = {
        "gate": gate,
        "head_weight" if per_head else "scale": scale,
        "shift": shift,
        "residual_gate": residual_gate,
    }
    for name, tensor in named.items():
        checks.is_tensor(function, name, tensor)
    checks.is_dense(function, "input", x)
    checks.is_floating(function, x)
    if gate_activation is not None and not isinstance(gate_activation, str):
        kind = type(gate_activation).__name__
        raise TypeError(f"{function}(): argument 'gate_activation' must be str or None, not {kind}")
    activations.check_gate(gate_activation, function)
    if not isinstance(gate_first, bool):
        raise TypeError(f"{function}(): argument 'gate_first' must be bool, not {type(gate_first).__name__}")
    checks.is_dtype(function, "product_dtype", product_dtype)
    if gate is not None:
        checks.has_shape_of_input(function, "gate", gate, x)
        if gate_first and product_dtype is not None:
            raise ValueError(f"{function}(): product_dtype={product_dtype} needs a gate behind the norm")
    elif gate_first or product_dtype is not None:
        option = "gate_first=True" if gate_first else f"product_dtype={product_dtype}"
        raise ValueError(f"{function}(): {option} was given without a gate")
    if residual_gate is not None and residual is None:
        raise ValueError(f"{function}(): residual_gate was given without a residual")
    row = tuple(options.rows.normalized_shape)
    for name, tensor in named.items():
        if tensor is None or name == "gate":
            continue
        if name == "head_weight":
            _head_weight(function, tensors, row)
        else:
            _modulation(function, name, tensor, x, row)


def _head_weight(function: str, tensors: ModulatedTensors, row: tuple[int, ...]) -> None:
    x, head_weight = tensors.x, tensors.scale
    assert head_weight is not None
    for name in ("weight", "bias"):
        if getattr(tensors, name) is not None:
            raise ValueError(f"{function}(): head_weight was given with {name}, which it replaces")
    checks.is_dense(function, "head_weight", head_weight)
    if x.dim() == len(row) or head_weight.shape != x.shape[-len(row) - 1 :]:
        expected = ", ".join(("H", *map(str, row)))
        raise RuntimeError(
            f"{function}(): expected input [*, {expected}] and head_weight [{expected}], but got head_weight of shape "
            f"{list(head_weight.shape)} and input of size {list(x.shape)}"
        )
    checks.matches_input(function, "head_weight", head_weight, x)


def _modulation(function: str, name: str, own: Tensor, x: Tensor, row: tuple[int, ...]) -> None:
    checks.is_dense(function, name, own)
    outer, of_x = own.shape[: own.dim() - len(row)], x.shape[: x.dim() - len(row)]
    fits = own.dim() >= len(row) and own.shape[own.dim() - len(row) :] == row and len(outer) <= len(of_x)
    if not (fits and all(length in (1, whole) for length, whole in zip(outer, of_x, strict=False))):
        raise RuntimeError(
            f"{function}(): expected {name} to be of input's shape, where leading axes may have length 1, and may be "
            f"missing before normalized_shape={list(row)}, but got {name} of shape {list(own.shape)} and input of size "
            f"{list(x.shape)}"
        )
    checks.matches_input(function, name, own, x)
