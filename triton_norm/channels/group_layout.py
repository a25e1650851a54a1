"""Maps the samples of a GroupNorm in memory to the groups and channels that launches read."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm.channels.launches import Instances, Read
from triton_norm.channels.layout import (
    MOST_CHANNELS,
    MOST_POSITIONS,
    MOST_SAMPLE_COLUMNS,
    Placement,
    channels_last,
    dense_like,
)
from triton_norm.library import Types, dtypes_of
from triton_norm.plain import collapsed_stride, holds
from triton_norm.tuning import channel_spaces
from triton_norm.tuning.limits import VECTOR_BYTES, limits_in_force


def beyond(shape: Sequence[int], n_groups: int) -> str | None:
    """Returns why groups of a tensor of this shape are too large or too many for the kernels to number, or None."""
    if holds(math.prod(shape[1:]) // n_groups > MOST_POSITIONS):
        return f"a group has more than {MOST_POSITIONS} elements"
    if holds(shape[0] * shape[1] > MOST_CHANNELS):
        return f"the samples have more than {MOST_CHANNELS} channels together"
    return None


def kind_of(x: Tensor) -> str:
    """Returns "last" if a position's channels are adjacent, or there is a single position, else "flat"."""
    return "last" if channels_last(x) and x.shape[1] > 1 else "flat"


class Slices(NamedTuple):
    """Describes a tensor as its samples.

    Args:
        sample_stride, channel_stride, position_stride: in elements.
        misaligned: the address modulo 16.
        spread: the elements of an access are adjacent; False for a gradient that is one element, expanded over the
            positions of a channel, or over the channels of a position in kind "last".
    """

    sample_stride: int
    channel_stride: int
    position_stride: int
    itemsize: int
    misaligned: int
    spread: bool = True


def slices_of(x: Tensor, kind: str, broadcast: bool = False) -> Slices | None:
    """Returns the strides with which x is read as samples in this layout, or None if it has to be copied.

    Args:
        broadcast: x may be expanded.
    """
    n_samples, n_channels, *positions = x.shape
    n_positions = math.prod(positions)
    position_stride = collapsed_stride(positions, x.stride()[2:])
    if x.is_neg() or position_stride is None:
        return None
    if n_positions == 1:
        position_stride = n_channels if kind == "last" else 1
    channel_stride = x.stride(1)
    dense = channel_stride == 1 if kind == "last" else position_stride == 1 and channel_stride == n_positions
    spread = (channel_stride if kind == "last" else position_stride) != 0
    if not (dense or (n_channels == 1 and (kind == "last" or position_stride == 1)) or (broadcast and not spread)):
        return None
    sample_stride = x.stride(0) if n_samples > 1 else n_channels * n_positions
    misaligned = x.data_ptr() % VECTOR_BYTES
    return Slices(sample_stride, channel_stride, position_stride, x.itemsize, misaligned, spread)


def copies(x: Tensor, kind: str, broadcast: bool = False) -> bool:
    return slices_of(x, kind, broadcast) is None


def as_readable(x: Tensor, kind: str, broadcast: bool = False) -> Tensor:
    """Returns x, or a copy if it can't be read in this layout."""
    return dense_like(x, x.dtype, kind).copy_(x) if copies(x, kind, broadcast) else x


class Groups(NamedTuple):
    """Describes the tensors of one shape that a launch reads.

    Args:
        shape: [n_samples, n_groups, channels of a group, positions].
        kind: "flat" or "last".
        slices: of x, dy in a backward, and the residual; None for a tensor that is None.
        types: their dtypes.
        others: dtypes of the kernel's other tensors, None for those that are None.
    """

    shape: tuple[int, int, int, int]
    kind: str
    slices: tuple[Slices | None, ...]
    types: Types
    others: Types
    device: torch.device

    @property
    def itemsize(self) -> int:
        (x, *_) = self.slices
        assert x is not None
        return x.itemsize

    def by_channel(self) -> Read:
        """Returns the launch's view of each sample as channels, with their groups' statistics."""
        _, n_groups, per_group, n_positions = self.shape
        shape = 1, n_groups * per_group, n_positions
        if self.kind == "last":
            return self._read(shape, "last", per_group, lambda slices: (0, int(slices.spread), slices.position_stride))
        return self._read(
            shape,
            "flat",
            per_group,
            lambda slices: (0, n_positions, 1) if slices.spread else (0, slices.channel_stride, 0),
        )

    def by_group(self, applies: bool = False) -> Read:
        """Returns the launch's view of each sample as groups; if it applies too, with their channels' parameters."""
        _, n_groups, per_group, n_positions = self.shape
        if self.kind == "flat":
            size, per_parameter = per_group * n_positions, n_positions if applies else None
            return self._read((1, n_groups, size), "flat", 1, lambda _: (0, size, 1), per_parameter)
        folds = channel_spaces.folds(n_positions, per_group, self.itemsize, limits_in_force())
        kind = "folded" if folds and n_groups * per_group < MOST_SAMPLE_COLUMNS else "flat"
        return self._in_rows(kind, 1 if applies else None)

    def by_column(self) -> Read | None:
        """Returns the launch's view of each sample as rows of groups, with parameters of their columns, or None if
        positions are adjacent, or a row of whole groups is too wide."""
        _, n_groups, per_group, n_positions = self.shape
        if self.kind == "flat" or n_positions == 1 or n_groups * per_group >= MOST_SAMPLE_COLUMNS:
            return None
        return self._in_rows("folded", 1) if channel_spaces.folds_groups(per_group, limits_in_force()) else None

    def _in_rows(self, kind: str, per_parameter: int | None) -> Read:
        _, n_groups, per_group, n_positions = self.shape

        def strides(slices: Slices) -> tuple[int, int, int]:
            return slices.position_stride, per_group * slices.spread, int(slices.spread)

        return self._read((n_positions, n_groups, per_group), kind, 1, strides, per_parameter)

    def _read(
        self,
        shape: tuple[int, int, int],
        kind: str,
        per_statistic: int,
        strides: Any,
        elements_per_parameter: int | None = None,
    ) -> Read:
        placements = tuple(
            None if slices is None else Placement._make((*strides(slices), slices.itemsize, slices.misaligned))
            for slices in self.slices
        )
        sample_strides = tuple(None if slices is None else slices.sample_stride for slices in self.slices)
        spread = tuple(slices is not None and slices.spread for slices in self.slices)
        n_samples, *_ = self.shape
        (x_type, *_) = self.types
        assert x_type is not None
        instances = Instances(n_samples, sample_strides, spread, per_statistic, elements_per_parameter)
        return Read(shape, kind, placements, x_type, self.types, self.others, self.device, instances)


def shape_of(x: Tensor, n_groups: int) -> tuple[int, int, int, int]:
    n_samples, n_channels, *positions = x.shape
    return n_samples, n_groups, n_channels // n_groups, math.prod(positions)


def groups_of(kind: str, n_groups: int, swept: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> Groups:
    x, *_ = swept
    assert x is not None
    slices = tuple(None if tensor is None else slices_of(tensor, kind, broadcast=True) for tensor in swept)
    return Groups(shape_of(x, n_groups), kind, slices, dtypes_of(swept), dtypes_of(others), x.device)
