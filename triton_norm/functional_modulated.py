"""Computes layer_norm and rms_norm with a gate or a modulation, for functional.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.compiler import is_compiling

from triton_norm import plans, reference, resolve
from triton_norm.dispatch import goes_to_triton, is_fusible, override
from triton_norm.rows import modulated
from triton_norm.rows.modulation import spread
from triton_norm.specs import ModulatedOptions, ModulatedSpec, ModulatedTensors, RowOptions


class Modulation(NamedTuple):
    """Holds the keyword arguments of layer_norm and rms_norm for a gate and a modulation, in their order."""

    gate: Tensor | None = None
    gate_activation: str | None = "silu"
    gate_first: bool = False
    product_dtype: Any = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual_gate: Tensor | None = None
    head_weight: Tensor | None = None


PLAIN = tuple(Modulation())
"""These are the values in a call without a gate or a modulation."""


def bundles(
    function: str, tensors: tuple[Any, ...], options: tuple[Any, ...], modulation: Modulation
) -> tuple[ModulatedTensors, ModulatedOptions]:
    """Returns the call's bundles.

    Args:
        tensors, options: fields of RowTensors and RowOptions.

    Raises:
        ValueError: head_weight and scale.
    """
    gate, gate_activation, gate_first, product_dtype, scale, shift, residual_gate, head_weight = modulation
    if head_weight is not None and scale is not None:
        raise ValueError(f"{function}(): head_weight was given with scale; both multiply the normalized input")
    scale = head_weight if scale is None else scale
    of_gate = gate_activation, gate_first, product_dtype
    return (
        ModulatedTensors._make((*tensors, gate, scale, shift, residual_gate)),
        ModulatedOptions._make((RowOptions._make(options), *of_gate, head_weight is not None)),
    )


def normalize_modulated(
    function: str, tensors: ModulatedTensors, options: ModulatedOptions, instead: Callable[[], Any] | None = None
) -> Any:
    """Computes layer_norm or rms_norm with a gate or a modulation.

    Args:
        instead: computes y if the kernels can't serve the call; None: reference.py.
    """
    if is_compiling():
        call = resolve.check_modulated(function, tensors, options)
    else:
        key, plain = None, options.rows
        if isinstance(plain.normalized_shape, tuple):  # 4.0 equals 4, but is not a length
            types = type(plain.eps), type(plain.weight_offset), type(options.gate_first)
            lengths = (*map(type, plain.normalized_shape),)
            key = "modulated", function, options, types, lengths, *[tensor is None for tensor in tensors]
        call = plans.find(key, tensors)
        if call is None:
            call = resolve.modulated(key, function, tensors, options)
        if call.plan is not None and override.name != "torch":
            return modulated.launch(tensors, call.plan)
    if goes_to_triton(call.reason):
        return modulated.record(spread(tensors, call.spec), call.spec, is_fusible())
    if instead is not None:
        return instead()
    return _torch_modulated(tensors, tuple(options.rows.normalized_shape), call.spec)


def _torch_modulated(tensors: ModulatedTensors, normalized_shape: tuple[int, ...], spec: ModulatedSpec) -> Any:
    """Computes the call by reference.py: torch has no function of this kind."""
    x, residual, residual_gate = tensors.x, tensors.residual, tensors.residual_gate
    if residual is None:
        return reference.modulate(x, normalized_shape, tensors, spec)
    dtype = spec.rows.total_dtype or residual.dtype
    if residual_gate is None:
        total = reference.add(x, residual, dtype)
    else:
        total = reference.add_gated(x, residual, residual_gate, x.dim() - len(normalized_shape), dtype)
    spec = spec._replace(rows=spec.rows._replace(out_dtype=spec.rows.out_dtype or x.dtype))
    return reference.modulate(total, normalized_shape, tensors, spec), total
