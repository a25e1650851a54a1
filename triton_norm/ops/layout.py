"""How [samples, channels, *positions] lies in memory, and the geometry of a sweep over it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from triton_norm import tuning

MOST_POSITIONS = 2**30
"""Of a sample: the kernels number them, and what a tile reaches past them, in 32 bits."""


class View(NamedTuple):
    """A tensor as [samples, channels, positions]; axes of length 1 have stride 0, a single sample that without gaps."""

    tensor: Tensor
    sample_stride: int
    channel_stride: int
    position_stride: int


def collapsed_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride with which these axes can be walked as one, 0 for a single element, or None."""
    inner, reach = 0, None
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length == 1:
            continue
        if reach is None:
            inner = stride
        elif stride != reach:
            return None
        reach = stride * length
    return inner


def _stride(x: Tensor, axis: int) -> int:
    return x.stride(axis) if x.shape[axis] > 1 else 0


def _view(x: Tensor) -> View | None:
    position_stride = collapsed_stride(x.shape[2:], x.stride()[2:])
    sample_stride = x.stride(0) if x.shape[0] > 1 else math.prod(x.shape[1:])
    return None if position_stride is None else View(x, sample_stride, _stride(x, 1), position_stride)


def channels_last(x: Tensor) -> bool:
    """Whether a position's channels lie side by side; where x has no second position, they are said to."""
    return math.prod(x.shape[2:]) == 1 or (x.shape[1] > 1 and x.stride(1) == 1)


def _reads(view: View | None, last: bool, broadcast: bool) -> bool:
    if view is None:
        return False
    lane_stride = view.channel_stride if last else view.position_stride
    lanes = view.tensor.shape[1] if last else 2
    return lanes == 1 or lane_stride == 1 or (broadcast and lane_stride == 0)


def copies(x: Tensor) -> bool:
    """Whether x has to be copied before it can be read."""
    return not _reads(_view(x), channels_last(x), broadcast=False)


def dense_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor without gaps in x's layout."""
    if not channels_last(x) or x.is_contiguous():
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    samples, channels, *positions = x.shape
    return torch.empty((samples, *positions, channels), dtype=dtype or x.dtype, device=x.device).movedim(-1, 1)


def as_view(x: Tensor, like: Tensor | None = None) -> View:
    """x, or a gradient of `like`'s shape, as a view that can be read in its own, or in `like`'s, layout.

    Copies only where the strides leave no other way. A gradient may be one element expanded.
    """
    template = x if like is None else like
    view = _view(x)
    if view is not None and _reads(view, channels_last(template), broadcast=like is not None):
        return view
    copied = _view(dense_like(template, x.dtype).copy_(x))
    assert copied is not None
    return copied


@dataclass(frozen=True)
class Sweep:
    """What the kernels of kernels/channels.py need to know of x, but for its strides."""

    channels_last: bool
    vector: int
    lanes: int
    n_channels: int
    n_blocks: int
    n_groups: int
    groups_per_sample: int
    groups_per_split: int

    @property
    def n_splits(self) -> int:
        return -(-self.n_groups // self.groups_per_split)

    @property
    def n_programs(self) -> int:
        return self.n_blocks * self.n_splits

    @property
    def elements_per_group(self) -> int:
        """Elements of one channel in a group."""
        return 1 if self.channels_last else self.vector

    @property
    def geometry(self) -> tuple[int, ...]:
        n_channel_vecs = self.n_channels // self.vector if self.channels_last else self.n_channels
        return n_channel_vecs, self.n_blocks, self.n_groups, self.groups_per_split, self.groups_per_sample

    def strides(self, view: View) -> tuple[int, int, int]:
        """(sample, group, channel) strides of a view, divided by V unless its lanes are one element expanded."""
        group_stride = view.position_stride * self.elements_per_group
        unit = self.vector if self.lane_stride(view) else 1
        channel_stride = 0 if self.channels_last else view.channel_stride
        return view.sample_stride // unit, group_stride // unit, channel_stride // unit

    def lane_stride(self, view: View) -> int:
        """0 where the view's lanes are one element expanded, otherwise 1."""
        lanes = self.n_channels if self.channels_last else self.groups_per_sample * self.vector
        return 1 if lanes == 1 or (view.channel_stride if self.channels_last else view.position_stride) else 0


def sweep(x: View, multiprocessors: int, *others: View) -> Sweep:
    """The geometry for reading x, and others in its layout, with the widest accesses that all of them allow."""
    n_samples, n_channels = x.tensor.shape[:2]
    last = channels_last(x.tensor)
    n_positions = x.tensor.numel() // (n_samples * n_channels)
    if n_positions > MOST_POSITIONS:
        raise NotImplementedError(f"batch_norm(): more than {MOST_POSITIONS} positions in input of {x.tensor.shape}")
    extents = [n_channels if last else n_positions]
    for view in (x, *others):
        if last and view.channel_stride:
            extents += [view.sample_stride, view.position_stride]
        elif not last and view.position_stride:
            extents += [view.sample_stride, view.channel_stride]
    vector = tuning.vector_width(min(view.tensor.itemsize for view in (x, *others)), *extents)
    lanes = tuning.channel_lanes(vector, n_channels, last)
    groups_per_sample = n_positions if last else n_positions // vector
    n_blocks = -(-n_channels // lanes) if last else n_channels
    n_groups = n_samples * groups_per_sample
    per_split = tuning.groups_per_split(n_groups, lanes, n_blocks, multiprocessors)
    return Sweep(last, vector, lanes, n_channels, n_blocks, n_groups, groups_per_sample, per_split)
