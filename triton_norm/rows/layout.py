"""Describes how tensors are read as rows, without a copy if their strides allow it, for forward and backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm.library import Types, name_of, triton_dtype
from triton_norm.plain import collapsed_stride
from triton_norm.specs import RowSpec
from triton_norm.tuning.configs import vector_width

MOST_ROW_AXES = 3
"""A tensor is read without a copy if its rows can be numbered along this many axes."""


class RowStrides(NamedTuple):
    """Holds the strides of a tensor's rows along up to three axes, and of its columns.

    Args:
        inner, middle, outer: elements from one row to the next along an axis; the outer two are None if there is one.
        column: 1, or 0 if each row is one element, expanded.
    """

    inner: int
    middle: int | None
    outer: int | None
    column: int

    @property
    def extents(self) -> int:
        """The strides that an access of several columns has to divide, or'ed."""
        return self.inner | (self.middle or 0) | (self.outer or 0) if self.column else 0

    def over(self, vector: int) -> tuple[int, int | None, int | None]:
        """Returns the row strides in units of `vector` columns; undivided if a row is one element."""
        unit = vector if self.column else 1
        middle, outer = (None if stride is None else stride // unit for stride in (self.middle, self.outer))
        return self.inner // unit, middle, outer


def row_vecs(strides: RowStrides | None, vector: int) -> tuple[int, int | None, int | None]:
    """Returns a kernel's arguments row_vecs, middle_vecs and outer_vecs of one tensor, which may be None."""
    return (0, None, None) if strides is None else strides.over(vector)


class RowLayout(NamedTuple):
    """Describes how tensors of one shape are read as rows.

    Args:
        n_inner, n_middle: rows along the inner two axes; None, both, if all rows are along one axis.
        strides: strides of each tensor, or of its copy; None for a tensor that is None.
        copied: tells of each tensor whether it has to be copied first.
    """

    n_inner: int | None
    n_middle: int | None
    strides: tuple[RowStrides | None, ...]
    copied: tuple[bool, ...]


def first_column_axis(shape: Sequence[int], n_cols: int) -> int:
    """Returns the first of the trailing axes that form a row of n_cols elements."""
    axis, n = len(shape), 1
    while n < n_cols:
        axis -= 1
        n *= shape[axis]
    return axis


def _column_stride(x: Tensor, axis: int, n_cols: int) -> int | None:
    return 1 if n_cols == 1 else collapsed_stride(x.shape[axis:], x.stride()[axis:])


def _row_axes(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Returns the fewest axes along which rows of these strides can be numbered: lengths, and strides of each tensor,
    the innermost first."""
    lengths: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in reversed(range(len(shape))):
        if shape[axis] == 1:
            continue
        if lengths and all(own[axis] == step[-1] * lengths[-1] for own, step in zip(strides, steps, strict=True)):
            lengths[-1] *= shape[axis]
        else:
            lengths.append(shape[axis])
            for own, step in zip(strides, steps, strict=True):
                step.append(own[axis])
    return lengths, steps


def copies(x: Tensor, n_cols: int, broadcast: bool = False) -> bool:
    """Decides whether x has to be copied to be read as rows.

    Args:
        broadcast: a row may be one element, expanded.
    """
    axis = first_column_axis(x.shape, n_cols)
    if x.is_neg() or _column_stride(x, axis, n_cols) not in ((0, 1) if broadcast else (1,)):
        return True
    lengths, _ = _row_axes(x.shape[:axis], [x.stride()])
    return len(lengths) > MOST_ROW_AXES


def _dense_strides(shape: Sequence[int]) -> list[int]:
    strides, reach = [], 1
    for length in reversed(shape):
        strides.append(reach)
        reach *= length
    return strides[::-1]


def layout_of(tensors: Sequence[Tensor | None], n_cols: int, broadcast: Sequence[bool]) -> RowLayout:
    """Returns how tensors are read together. Where they have more axes than three, the last ones are copied.

    Args:
        tensors: the first is not None.
        broadcast: tells of each tensor whether a row may be one element, expanded.
    """
    first, *_ = tensors
    assert first is not None
    shape, axis = first.shape, first_column_axis(first.shape, n_cols)
    copied = [
        tensor is not None and (tensor.shape != shape or copies(tensor, n_cols, may_be_expanded))
        for tensor, may_be_expanded in zip(tensors, broadcast, strict=True)
    ]
    while True:
        places = [place for place, tensor in enumerate(tensors) if tensor is not None]
        strides = [_dense_strides(shape) if copied[place] else tensors[place].stride() for place in places]  # type: ignore[union-attr]
        lengths, steps = _row_axes(shape[:axis], strides)
        if len(lengths) <= MOST_ROW_AXES:
            break
        copied[max(place for place in places if not (copied[place] or tensors[place].is_contiguous()))] = True  # type: ignore[union-attr]
    result: list[RowStrides | None] = [None] * len(tensors)
    for place, own in zip(places, steps, strict=True):
        tensor = tensors[place]
        assert tensor is not None
        column = 1 if copied[place] else _column_stride(tensor, axis, n_cols)
        assert column is not None
        inner, middle, outer = (*own, *((n_cols,) if not own else ()), 0, 0)[:3]
        result[place] = RowStrides(inner, middle, outer, column)
        if len(lengths) < 2:
            result[place] = RowStrides(inner, None, None, column)
    n_inner, n_middle = lengths[:2] if len(lengths) > 1 else (None, None)
    return RowLayout(n_inner, n_middle, tuple(result), tuple(copied))


def readable(tensor: Tensor | None, copied: bool) -> Tensor | None:
    """Returns the tensor, or the copy of it that the kernels read."""
    return tensor.resolve_neg().contiguous() if tensor is not None and copied else tensor


def vector_of(misaligned: int, extents: int, itemsizes: Sequence[int]) -> int:
    """Returns the widest access in columns: 16 bytes of the narrowest type, or less by addresses and extents, or'ed."""
    vector = vector_width(min(itemsizes), extents)
    return min(vector, max(1, (misaligned & -misaligned) // max(itemsizes))) if misaligned else vector


def rounded_to(spec: RowSpec, compute: torch.dtype) -> Any:
    """Returns the type that the kernels round x_hat to; None if it is not narrower than the compute type."""
    return narrower(spec.x_hat_dtype, compute)


def narrower(dtype: torch.dtype | None, compute: torch.dtype) -> Any:
    """Returns Triton's type, or None if it is not narrower than the compute type."""
    return None if dtype is None or dtype.itemsize >= compute.itemsize else triton_dtype(dtype)


def present(types: Types) -> list[torch.dtype]:
    return [dtype for dtype in types if dtype is not None]


def names(types: Types) -> tuple[str, ...]:
    return tuple(name_of(dtype) for dtype in present(types))


def exchange_workspace(
    n_teams: int, slots: tuple[int, ...], n_counts: int, compute: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns (partials, counters): the workspace in which a row's peers exchange sums, `slots` for each team, and
    zeroed counters, `n_counts` for each team."""
    partials = torch.empty((n_teams, *slots), dtype=compute, device=device)
    return partials, torch.zeros(2 + n_counts * n_teams, dtype=torch.int32, device=device)


def empty_options(x: Tensor, dtype: torch.dtype | None, exact: bool) -> dict[str, Any]:
    """Returns options for torch.empty_like that make a contiguous tensor of x's shape.

    They are empty if x is such a tensor itself: torch.empty_like then takes two thirds of the time.

    Args:
        dtype: None: x's.
        exact: x's strides are known.
    """
    if exact and dtype in (None, x.dtype) and x.is_contiguous():
        return {}
    return {"dtype": dtype, "memory_format": torch.contiguous_format}
