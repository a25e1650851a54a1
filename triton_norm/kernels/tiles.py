"""Finds the elements of a channel in [samples, channels, positions], in any layout.

A channel's elements come in groups, and a tile is T groups of LANES elements that lie side by side:

    flat      a group is V positions of one channel; LANES = V, the tile is one channel's alone (AXIS = None)
    columns   a group is a row of a matrix, its lanes are columns (AXIS = 0)

Channels-last, a row is a position and a column is a channel (FOLD = 0). Channels-first with few positions, a row is a
sample, and a channel is `columns_per_channel` adjacent columns. One channel alone would be misaligned, so a block takes
up to FOLD whole channels, and what is summed by column is folded into channels once, at the end.

              channels of the elements in memory                 of a group
    flat      0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2    0 0 0 0
    last      0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7    0 1 2 3 4 5 6 7
    folded    0 0 0 1 1 1 2 2 2 3 3 3 0 0 0 1 1 1 2 2 2 3 3 3    0 0 0 1 1 1 2 2 2 3 3 3

Strides and column counts come divided by V, the largest power of two that divides them all: the compiler then knows
that V elements share one access. A gradient that is one element expanded over a channel's lanes has SPREAD = 0, and its
strides undivided. Values that belong to a lane's channel are [1, 1] or [1, LANES], and broadcast against the tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_norm.kernels.moments import Moments, merge_all, tile_sum


# Constants have a tuple of their own: in one that a compiled kernel assigns they would turn into run-time values.
class Tile(NamedTuple):
    """Names a tile's constants: T groups of LANES elements, each V of which are aligned; the AXIS that a channel's sums
    go over; and where a block is folded, for how many channels of how many columns at most it has room, else 0."""

    T: int
    V: int
    LANES: int
    AXIS: int | None
    FOLD: int
    WIDTH: int


class Layout(NamedTuple):
    """Names the sizes that all tensors of a launch share; _vecs are columns, of all channels and of a block's, divided
    by V. Flat, n_column_vecs is the number of channels."""

    n_groups: tl.tensor
    n_column_vecs: tl.tensor
    block_vecs: tl.tensor
    columns_per_channel: tl.tensor
    groups_per_sample: tl.tensor


class Strides(NamedTuple):
    """Names a tensor's strides, divided by V, from one sample, group or channel to the next."""

    sample: tl.tensor
    group: tl.tensor
    channel: tl.tensor


class Channels(NamedTuple):
    """Names the indices [1, n] of some channels, which of these there are, and the number of all channels."""

    index: tl.tensor
    in_range: tl.tensor
    n_channels: tl.tensor


class View(NamedTuple):
    """Names where a block's part of a tensor lies: pointers to the lanes of its group 0, [1, LANES], and strides."""

    lanes: tl.tensor
    strides: Strides


@triton.jit
def lanes_of(block, layout, TILE: tl.constexpr):
    """Returns the columns of a block's lanes, and their channels; [1, 1] or [1, LANES]."""
    if TILE.AXIS is None:
        index = tl.zeros([1, 1], tl.int32) + block
        columns = index
        in_range = index < layout.n_column_vecs
        n_channels = layout.n_column_vecs
    else:
        within = tl.arange(0, TILE.LANES)[None, :]
        columns = block * (layout.block_vecs * TILE.V) + within
        in_range = columns < layout.n_column_vecs * TILE.V
        if TILE.FOLD:
            in_range = in_range & (within < layout.block_vecs * TILE.V)
        index = columns // layout.columns_per_channel
        n_channels = layout.n_column_vecs * TILE.V // layout.columns_per_channel
    return columns, Channels(index, in_range, n_channels)


@triton.jit
def channels_of(block, lanes, layout, TILE: tl.constexpr):
    """Returns the channels of a block's lanes, each once: as they are, or [1, FOLD]."""
    if TILE.FOLD:
        within = tl.arange(0, TILE.FOLD)[None, :]
        n_within = layout.block_vecs * TILE.V // layout.columns_per_channel
        index = block * n_within + within
        lanes = Channels(index, (within < n_within) & (index < lanes.n_channels), lanes.n_channels)
    return lanes


@triton.jit
def span(split, groups_per_split, n_groups, INDEX: tl.constexpr):
    """Returns the first group of a split, and the one after its last; INDEX has room for all groups and a tile more."""
    first = split.to(INDEX) * groups_per_split
    return first, tl.minimum(first + groups_per_split, n_groups).to(INDEX)


@triton.jit
def view_of(ptr, strides, columns, channels, TILE: tl.constexpr, SPREAD: tl.constexpr = 1):
    """Returns the view of a tensor from a block whose lanes have these columns and channels."""
    if SPREAD == 0:
        lanes = ptr + channels.index.to(tl.int64) * strides.channel + tl.arange(0, TILE.LANES)[None, :] * 0
    elif TILE.AXIS is None:
        lanes = ptr + channels.index.to(tl.int64) * strides.channel * TILE.V + tl.arange(0, TILE.LANES)[None, :]
    else:
        lanes = ptr + columns
    return View(lanes, strides)


@triton.jit
def group_offsets(start, layout, strides, TILE: tl.constexpr, SPREAD: tl.constexpr = 1):
    """Returns the offsets [T, 1] of the groups from `start` on. Within a tile divisions are of 32 bits."""
    UNIT: tl.constexpr = TILE.V if SPREAD else 1
    first_sample = start // layout.groups_per_sample
    group = (start - first_sample * layout.groups_per_sample).to(tl.int32) + tl.arange(0, TILE.T)[:, None]
    sample = (first_sample + group // layout.groups_per_sample).to(tl.int64)
    position = (group % layout.groups_per_sample).to(tl.int64)
    return sample * strides.sample * UNIT + position * strides.group * UNIT


@triton.jit
def aligned(pointers, V: tl.constexpr):
    """Returns pointers [T, LANES] of which each V are known to be aligned, whatever lies in their base's last bits."""
    ITEMSIZE: tl.constexpr = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
    ALIGNMENT: tl.constexpr = V * ITEMSIZE if V * ITEMSIZE < 16 else 16
    return tl.multiple_of(pointers, [1, ALIGNMENT])


@triton.jit
def tile_at(view, start, layout, TILE: tl.constexpr, SPREAD: tl.constexpr = 1):
    """Returns pointers [T, LANES] to the groups of a view from `start` on."""
    pointers = view.lanes + group_offsets(start, layout, view.strides, TILE, SPREAD)
    return aligned(pointers, TILE.V) if SPREAD else pointers


@triton.jit
def dense_strides(layout, TILE: tl.constexpr):
    """Returns the strides of a tensor without gaps in this layout, of int64."""
    vecs = tl.full([], layout.n_column_vecs, tl.int64)
    groups = tl.full([], layout.groups_per_sample, tl.int64)
    if TILE.AXIS is None:
        group_vecs = tl.full([], 1, tl.int64)
    else:
        group_vecs = vecs
    return Strides(vecs * groups, group_vecs, groups)


@triton.jit
def load_parameter(ptr, channels, default: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns one value a channel, `default` where there is no such parameter."""
    if ptr is None:
        value = tl.full([1, 1], default, COMPUTE)
    else:
        value = tl.load(ptr + channels.index, mask=channels.in_range, other=default).to(COMPUTE)
    return value


@triton.jit
def load_statistics(statistics_ptr, mean_ptr, var_ptr, channels, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns (mean, mean_lo, rstd) from statistics [3, n_channels], perhaps this very launch's, or if that is
    None from a mean and a variance."""
    index, mask = channels.index, channels.in_range
    if statistics_ptr is None:
        mean = tl.load(mean_ptr + index, mask=mask, other=0.0).to(COMPUTE)
        mean_lo = tl.zeros([1, 1], COMPUTE)
        rstd = tl.rsqrt(tl.load(var_ptr + index, mask=mask, other=1.0).to(COMPUTE) + EPS)
    else:
        n_channels = channels.n_channels
        mean = tl.load(statistics_ptr + index, mask=mask, other=0.0, cache_modifier=".cg")
        mean_lo = tl.load(statistics_ptr + n_channels + index, mask=mask, other=0.0, cache_modifier=".cg")
        rstd = tl.load(statistics_ptr + 2 * n_channels + index, mask=mask, other=1.0, cache_modifier=".cg")
    return mean, mean_lo, rstd


@triton.jit
def by_channel(values, columns_per_channel, TILE: tl.constexpr):
    """Returns the values [1, LANES] of a block's columns as [WIDTH, FOLD], with 0 past a channel's own columns."""
    channel = tl.arange(0, TILE.WIDTH * TILE.FOLD) % TILE.FOLD
    column = tl.arange(0, TILE.WIDTH * TILE.FOLD) // TILE.FOLD
    index = tl.minimum(channel * columns_per_channel + column, TILE.LANES - 1)
    gathered = tl.gather(tl.reshape(values, [TILE.LANES]), index, 0)
    return tl.reshape(tl.where(column < columns_per_channel, gathered, 0.0), [TILE.WIDTH, TILE.FOLD])


@triton.jit
def fold_moments(moments, count, columns_per_channel, TILE: tl.constexpr):
    """Returns the moments [1, FOLD] of a block's channels from those of its columns, `count` elements each."""
    mean = by_channel(moments.mean, columns_per_channel, TILE)
    mean_lo = by_channel(moments.mean_lo, columns_per_channel, TILE)
    m2 = by_channel(moments.m2, columns_per_channel, TILE)
    counts = tl.where(tl.arange(0, TILE.WIDTH)[:, None] < columns_per_channel, count, 0.0)
    return merge_all(counts, Moments(mean, mean_lo, m2), count * columns_per_channel, 0)


@triton.jit
def fold_sum(values, columns_per_channel, TILE: tl.constexpr):
    """Returns [1, FOLD] sums of a block's channels from those of its columns."""
    return tile_sum(by_channel(values, columns_per_channel, TILE), 0)
