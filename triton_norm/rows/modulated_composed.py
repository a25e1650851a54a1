"""Composes the gradients of gated and modulated rows of torch's functions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.rows.layout import first_column_axis
from triton_norm.rows.modulated_backward import Gradients
from triton_norm.specs import ModulatedGradientDtypes, ModulatedSpec, ModulatedTensors


def composed(
    tensors: Any,
    spec: ModulatedSpec,
    gradient_dtypes: ModulatedGradientDtypes,
    shapes: Sequence[Any],
    compute: torch.dtype,
) -> Gradients:
    """Returns the gradients of the backward kernels.

    Args:
        tensors: fields of ModulatedBackwardTensors; statistics are not read.
        shapes: of scale, shift and residual_gate.
        compute: the type that the forward computed in.
    """
    dy, dtotal, total, _, weight, bias, gate, scale, shift, _, _ = tensors
    total = total.to(compute)
    row = total.shape[first_column_axis(total.shape, spec.rows.n_cols) :]
    _, shift_shape, _ = shapes
    inner = (
        None if weight is None else weight.reshape(row),
        _unsaved(total, gradient_dtypes.dbias_dtype, row) if bias is None else bias.reshape(row),
        gate,
        scale,
        _unsaved(total, gradient_dtypes.dshift_dtype, shift_shape) if shift is None else shift,
    )
    as_dy = spec._replace(rows=spec.rows._replace(out_dtype=dy.dtype))

    def function(total: Tensor, *inner: Tensor | None) -> Tensor:
        return reference.modulate(total, row, ModulatedTensors._make((total, None, *inner, None)), as_dy)

    dx, dresidual, *of_inner, dresidual_gate = (dtype is not None for dtype in gradient_dtypes)
    needs = dx or dresidual or dresidual_gate, *of_inner
    result, *gradients = reference.gradients(function, (total, *inner), dy, needs)
    if result is not None and dtotal is not None:
        result = result + dtotal
    return through_total(result, tensors, spec, gradient_dtypes, gradients)


def _unsaved(total: Tensor, dtype: torch.dtype | None, shape: Any) -> Tensor | None:
    """Returns zeros for a tensor that was not saved, since no gradient depends on its values; None if it needs none."""
    return None if dtype is None else torch.zeros(shape, dtype=dtype, device=total.device, requires_grad=True)


def through_total(
    dtotal: Tensor | None,
    tensors: Any,
    spec: ModulatedSpec,
    gradient_dtypes: ModulatedGradientDtypes,
    of_inner: Sequence[Tensor | None] = (None,) * 5,
) -> Gradients:
    """Returns all gradients, those of x, residual and residual_gate from that of total.

    Args:
        dtotal: gradient of total, by way of y too; None: nothing depends on total.
        tensors: fields of ModulatedBackwardTensors.
        of_inner: gradients of weight, bias, gate, scale and shift.
    """
    _, _, total, x, *_, residual_gate, _ = tensors
    dx, dresidual_gate = dtotal, None
    if dtotal is not None and residual_gate is not None:
        n_outer = first_column_axis(total.shape, spec.rows.n_cols)
        outer = reference.outer_shape(residual_gate.shape, total.shape, n_outer, False)
        compute = torch.float64 if gradient_dtypes.dx_dtype == torch.float64 else reference.compute_dtype(x, total)
        by_row = residual_gate.reshape(*outer, *total.shape[n_outer:]).to(compute)
        wide = dtotal.to(compute)
        dx = wide * by_row
        if gradient_dtypes.dresidual_gate_dtype is not None:
            dresidual_gate = (wide * x.to(compute)).sum_to_size(by_row.shape).reshape(residual_gate.shape)
    return tuple(
        None if dtype is None or gradient is None else gradient.to(dtype)
        for gradient, dtype in zip((dx, dtotal, *of_inner, dresidual_gate), gradient_dtypes, strict=True)
    )
