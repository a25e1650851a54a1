"""Reads tensors as rows, and holds helpers that forward and backward share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm.library import name_of, triton_dtype
from triton_norm.specs import RowSpec
from triton_norm.tuning.configs import vector_width

Types = tuple[torch.dtype | None, ...]


class Rows(NamedTuple):
    """Holds a tensor as rows, and its strides; `column` is 0 if each row is one element, expanded."""

    tensor: Tensor
    stride: int
    column: int


def as_rows(x: Tensor, n_cols: int, broadcast: bool = False) -> Rows:
    """Returns x as rows: a view if its columns are adjacent or, with `broadcast`, one element expanded; else a copy.

    A single row gets the dense row stride: its own has no meaning, but another value would compile another kernel.
    """
    if x.is_contiguous():
        return Rows(x, n_cols, 1)
    rows = x.reshape(-1, n_cols)
    column = 1 if n_cols == 1 else rows.stride(1)
    if column != 1 and not (broadcast and column == 0):
        rows, column = rows.contiguous(), 1
    return Rows(rows, rows.stride(0) if rows.shape[0] > 1 else n_cols, column)


def copies(x: Tensor, n_cols: int, broadcast: bool = False) -> bool:
    """Decides whether x has to be copied to be read as rows."""
    if x.is_neg():
        return True
    try:
        rows = x.view(-1, n_cols)
    except RuntimeError:
        return True
    return n_cols > 1 and rows.stride(1) not in ((0, 1) if broadcast else (1,))


def lie_of(x: Tensor, n_cols: int, broadcast: bool = False) -> tuple[int, int]:
    """Returns the row and column stride with which x, or its copy, is read."""
    if copies(x, n_cols, broadcast):
        return n_cols, 1
    _, stride, column = as_rows(x, n_cols, broadcast)
    return stride, column


def vector_of(misaligned: int, extents: int, itemsizes: Sequence[int]) -> int:
    """Returns the widest access in columns: 16 bytes of the narrowest type, or less by addresses and extents, or'ed."""
    vector = vector_width(min(itemsizes), extents)
    return min(vector, max(1, (misaligned & -misaligned) // max(itemsizes))) if misaligned else vector


def rounded_to(spec: RowSpec, compute: torch.dtype) -> Any:
    """Returns the type that the kernels round x_hat to; None if it is not narrower than the compute type."""
    dtype = spec.x_hat_dtype
    return None if dtype is None or dtype.itemsize >= compute.itemsize else triton_dtype(dtype)


def given(types: Types) -> list[torch.dtype]:
    return [dtype for dtype in types if dtype is not None]


def names(types: Types) -> tuple[str, ...]:
    return tuple(name_of(dtype) for dtype in given(types))


def types_of(tensors: Sequence[Tensor | None]) -> Types:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def meeting(
    n_teams: int, slots: tuple[int, ...], n_counts: int, compute: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns (partials, counters): the workspace in which a row's peers exchange sums, `slots` for each team, and
    zeroed counters, `n_counts` for each team."""
    partials = torch.empty((n_teams, *slots), dtype=compute, device=device)
    return partials, torch.zeros(2 + n_counts * n_teams, dtype=torch.int32, device=device)


def like(x: Tensor, dtype: torch.dtype | None, exact: bool) -> dict[str, Any]:
    """Returns options for torch.empty_like that make a contiguous tensor of x's shape.

    They are empty if x is such a tensor itself: torch.empty_like then takes two thirds of the time.

    Args:
        dtype: None: x's.
        exact: x's strides are known.
    """
    if exact and dtype in (None, x.dtype) and x.is_contiguous():
        return {}
    return {"dtype": dtype, "memory_format": torch.contiguous_format}
