"""Maps the rows of x to the rows of its modulations: scale, shift and residual_gate."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from triton_norm.plain import collapsed_stride, computed_in, holds
from triton_norm.reference import outer_shape
from triton_norm.rows.layout import first_column_axis
from triton_norm.specs import ModulatedSpec, ModulatedTensors


class Numbering(NamedTuple):
    """Numbers the modulations: row r of x has number r // n_tokens % n_modulations.

    Args:
        n_tokens: rows of x in sequence that have one modulation.
        n_modulations: number of modulations.
    """

    n_tokens: int
    n_modulations: int


def _compute_dtype(tensors: ModulatedTensors, spec: ModulatedSpec) -> torch.dtype:
    """Returns the type that the kernels compute in: float64 if x or total is."""
    total = None if tensors.residual is None else spec.rows.total_dtype or tensors.residual.dtype
    return computed_in(tensors.x.dtype, total)


def _named(tensors: ModulatedTensors, spec: ModulatedSpec) -> dict[str, tuple[Tensor, bool]]:
    """Returns the modulations that are not None, each with its `per_head`."""
    result = {"scale": spec.per_head, "shift": False, "residual_gate": False}
    named = tensors._asdict()
    return {name: (named[name], per_head) for name, per_head in result.items() if named[name] is not None}


def expanded(tensors: ModulatedTensors, spec: ModulatedSpec) -> ModulatedTensors:
    """Returns the tensors with all modulations along the same axes of x, which follow each other; `tensors` itself if
    they already are.

    A modulation of fewer axes is expanded to those of the others. autograd sums its gradient, in the type computed in:
    in a narrower one the gradient of each row would be rounded first.
    """
    shape = tensors.x.shape
    n_outer = first_column_axis(shape, spec.rows.n_cols)
    named = _named(tensors, spec)
    outer = {name: outer_shape(own.shape, shape, n_outer, per_head) for name, (own, per_head) in named.items()}
    axes = [axis for axis in range(n_outer) if not holds(shape[axis] == 1)]
    varying = [place for place, axis in enumerate(axes) if any(lengths[axis] != 1 for lengths in outer.values())]
    if not varying:
        return tensors
    run = axes[varying[0] : varying[-1] + 1]
    wider = {}
    for name, lengths in outer.items():
        if any(lengths[axis] == 1 for axis in run):
            own, _ = named[name]
            target = [shape[axis] if axis in run else lengths[axis] for axis in range(n_outer)]
            wide = own.to(torch.promote_types(own.dtype, _compute_dtype(tensors, spec)))
            wider[name] = wide.reshape(*lengths, *shape[n_outer:]).expand(*target, *shape[n_outer:])
    return tensors._replace(**wider) if wider else tensors


def numbering_of(tensors: ModulatedTensors, spec: ModulatedSpec) -> Numbering:
    """Returns the numbers of modulations after `expanded`; without any, each row has a number of its own."""
    x = tensors.x
    n_outer = first_column_axis(x.shape, spec.rows.n_cols)
    for own, per_head in _named(tensors, spec).values():
        lengths = outer_shape(own.shape, x.shape, n_outer, per_head)
        n_tokens = 1
        for axis in reversed(range(n_outer)):
            if lengths[axis] != 1:
                break
            n_tokens *= x.shape[axis]
        return Numbering(n_tokens, math.prod(lengths))
    return Numbering(1, x.numel() // spec.rows.n_cols)


def row_stride(own: Tensor | None, n_column_axes: int) -> int | None:
    """Returns the stride between a modulation's rows, 0 for None, or None if it has to be copied."""
    if own is None:
        return 0
    axis = own.dim() - n_column_axes
    row = collapsed_stride(own.shape[:axis], own.stride()[:axis])
    column = 1 if math.prod(own.shape[axis:]) == 1 else collapsed_stride(own.shape[axis:], own.stride()[axis:])
    return None if own.is_neg() or column != 1 else row


def copied_modulations(tensors: ModulatedTensors, spec: ModulatedSpec) -> dict[str, str]:
    """Returns the modulations that have to be copied, by name, and why."""
    wider = _named(expanded(tensors, spec), spec)
    n_column_axes = tensors.x.dim() - first_column_axis(tensors.x.shape, spec.rows.n_cols)
    result = {}
    for name, (own, _) in _named(tensors, spec).items():
        wide, _ = wider[name]
        if wide is not own:
            result[name] = "it varies along other axes than the other modulations, or along axes that are not adjacent"
        elif row_stride(own, n_column_axes) is None:
            result[name] = "its columns are not adjacent, or its rows have no common stride"
    return result
