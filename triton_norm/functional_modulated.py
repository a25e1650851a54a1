"""Computes layer_norm and rms_norm with a gate or a modulation, for functional.py."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from triton_norm import plans, reference, resolve
from triton_norm.dispatch import goes_to_triton, is_fusible, override
from triton_norm.rows import modulated
from triton_norm.rows.modulation import expanded
from triton_norm.specs import ModulatedOptions, ModulatedSpec, ModulatedTensors, RowOptions, RowSpec

SILU = "silu"
"""This is the default of gate_activation. Values are compared by identity: `==` of an array is an array."""

LENGTH_TYPES = {int}
"""The elements of normalized_shape are of these types: 4.0 equals 4 in a key, but is not a length."""


def is_plain(modulation: tuple[Any, ...], of_gate: tuple[Any, ...]) -> bool:
    """Decides whether a call has neither a gate nor a modulation, nor an option of a gate.

    Args:
        modulation: gate, scale, shift, residual_gate and head_weight.
        of_gate: gate_activation, gate_first and product_dtype.
    """
    gate_activation, gate_first, product_dtype = of_gate
    of_no_gate = gate_activation is SILU and gate_first is False and product_dtype is None
    return of_no_gate and all(tensor is None for tensor in modulation)


def bundled(
    function: str, tensors: tuple[Any, ...], modulation: tuple[Any, ...], options: Any, of_gate: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns the fields of ModulatedTensors, and those of ModulatedOptions.

    Args:
        tensors, options: fields of RowTensors and RowOptions.
        modulation, of_gate: as in `is_plain`.

    Raises:
        ValueError: head_weight and scale.
    """
    gate, scale, shift, residual_gate, head_weight = modulation
    if head_weight is None:
        return (*tensors, gate, scale, shift, residual_gate), (options, *of_gate, False)
    if scale is not None:
        raise ValueError(f"{function}(): head_weight was given with scale; both multiply the normalized input")
    return (*tensors, gate, head_weight, shift, residual_gate), (options, *of_gate, True)


def _named(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[ModulatedTensors, ModulatedOptions]:
    rows, *of_gate = options
    return ModulatedTensors._make(tensors), ModulatedOptions._make((RowOptions._make(rows), *of_gate))


def normalize_modulated(
    function: str, tensors: tuple[Any, ...], options: tuple[Any, ...], instead: Callable[[], Any] | None = None
) -> Any:
    """Computes layer_norm or rms_norm with a gate or a modulation.

    Args:
        tensors, options: fields of ModulatedTensors and ModulatedOptions, which a warm call does not name to save time.
        instead: computes y if the kernels can't serve the call; None: torch's functions.
    """
    if is_compiling():
        call = resolve.check_modulated(function, *_named(tensors, options))
    else:
        _, residual, weight, bias, gate, scale, shift, residual_gate = tensors
        (shape, eps, _, weight_offset, _, _), _, gate_first, _, _ = options
        presence = residual is None, weight is None, bias is None, gate is None, scale is None, shift is None
        key = function, options, type(eps), type(weight_offset), type(gate_first), presence, residual_gate is None
        call = plans.find(key, tensors)
        if call is None or (shape is not call.shape and {*map(type, shape)} != LENGTH_TYPES):
            call = resolve.modulated(key, function, *_named(tensors, options))
        if call.plan is not None and override.name != "torch":
            return modulated.launch(tensors, call.plan)
    named, own = _named(tensors, options)
    if goes_to_triton(call.reason):
        return modulated.record(expanded(named, call.spec), call.spec, is_fusible())
    if instead is not None:
        return instead()
    return _torch_modulated(named, tuple(own.rows.normalized_shape), call.spec)


def _torch_modulated(tensors: ModulatedTensors, normalized_shape: tuple[int, ...], spec: ModulatedSpec) -> Any:
    """Computes the call by plain torch: torch has no function of this kind.

    torch's own norm is in it where it is recorded, for whoever looks for that. Eager calls have none: on the CPU its
    backward misreads saved tensors that come back with other strides.
    """
    x, residual, residual_gate = tensors.x, tensors.residual, tensors.residual_gate
    norm = _torch_norm if is_compiling() else None
    if residual is None:
        return reference.modulate(x, normalized_shape, tensors, spec, norm).contiguous()
    dtype = spec.rows.total_dtype or residual.dtype
    if residual_gate is None:
        read = reference.add(x, residual, dtype)
    else:
        read = reference.add_gated(x, residual, residual_gate, x.dim() - len(normalized_shape), dtype)
    spec = spec._replace(rows=spec.rows._replace(out_dtype=spec.rows.out_dtype or x.dtype))
    return reference.modulate(read, normalized_shape, tensors, spec, norm).contiguous(), read.to(dtype)


def _torch_norm(
    x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, spec: RowSpec
) -> Tensor:
    """Normalizes by torch's own function, in x's type, or by reference.py if that has no such form."""
    if spec.weight_offset != 0.0 or spec.x_hat_dtype is not None:
        return reference.normalize(x, normalized_shape, weight, bias, spec)
    weight, bias = (None if parameter is None else parameter.to(x.dtype) for parameter in (weight, bias))
    if spec.centred:
        return F.layer_norm(x, normalized_shape, weight, bias, spec.eps)
    return F.rms_norm(x, normalized_shape, weight, spec.eps)
