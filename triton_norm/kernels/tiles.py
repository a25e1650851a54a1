"""Maps a channel's elements in [samples, channels, positions] to tiles, for every memory layout.

A channel's elements are split into groups. A tile is T groups of LANES elements that are adjacent in memory:

    flat      channels-first: a group is V positions of one channel. LANES = V, AXIS = None.
    last      channels-last: a group is a row, which is one position; its lanes are channels. AXIS = 0, FOLD = 0.
    folded    channels-first with few positions: a row is one sample, and a channel is `columns_per_channel` adjacent
              columns. AXIS = 0. A single channel would be misaligned, so a block covers up to FOLD whole channels.
              Column sums are folded into channel sums once, at the end.

              channel of each element, in memory order           of one group
    flat      0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2    0 0 0 0
    last      0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7    0 1 2 3 4 5 6 7
    folded    0 0 0 1 1 1 2 2 2 3 3 3 0 0 0 1 1 1 2 2 2 3 3 3    0 0 0 1 1 1 2 2 2 3 3 3

Names that end in _vecs are divided by V, the largest power of two that divides all strides and column counts. The
compiler can then prove that V elements share one access. A gradient that is one element expanded over a channel's lanes
has SPREAD = 0 and undivided strides. Per-channel values are [1, 1] or [1, LANES], and broadcast against the tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_norm.kernels.moments import Moments, merge_all, tile_sum


# Constants need a tuple of their own: beside run-time values they would become run-time values when compiled.
class Tile(NamedTuple):
    """Bundles a tile's constants.

    Args:
        T: groups in a tile.
        V: elements of an aligned access.
        LANES: elements of a group.
        AXIS: axis that sums over a channel reduce, see moments.py.
        FOLD, WIDTH: capacity of a folded block in channels, and in columns a channel; 0 in other layouts. In a cluster
            WIDTH is 0: see clusters.py.
    """

    T: int
    V: int
    LANES: int
    AXIS: int | None
    FOLD: int
    WIDTH: int


class Layout(NamedTuple):
    """Bundles the sizes that all tensors of a launch share.

    Args:
        n_groups: groups of each channel.
        n_column_vecs: columns of all channels, divided by V; the number of channels in the flat layout.
        block_vecs: columns of a block, divided by V.
        columns_per_channel: columns of a channel; more than 1 in the folded layout only.
        groups_per_sample: groups of a channel in one sample.
    """

    n_groups: tl.tensor
    n_column_vecs: tl.tensor
    block_vecs: tl.tensor
    columns_per_channel: tl.tensor
    groups_per_sample: tl.tensor


class Strides(NamedTuple):
    """Bundles a tensor's strides between samples, groups and channels, divided by V."""

    sample: tl.tensor
    group: tl.tensor
    channel: tl.tensor


class Channels(NamedTuple):
    """Bundles the indices [1, n] of some channels, the mask of those that exist, and the number of all channels."""

    index: tl.tensor
    in_range: tl.tensor
    n_channels: tl.tensor


class View(NamedTuple):
    """Bundles a block's part of a tensor: pointers [1, LANES] to the lanes of group 0, and the tensor's strides."""

    lanes: tl.tensor
    strides: Strides


@triton.jit
def lanes_of(block, layout, TILE: tl.constexpr):
    """Returns the columns of a block's lanes, and the lanes' channels: [1, 1] or [1, LANES]."""
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
    """Returns each channel of a block once: [1, FOLD] if folded, [1, FOLD, 1] in a cluster, else `lanes` unchanged."""
    if TILE.FOLD:
        within = tl.arange(0, TILE.FOLD)[None, :] if TILE.WIDTH else tl.arange(0, TILE.FOLD)[None, :, None]
        n_within = layout.block_vecs * TILE.V // layout.columns_per_channel
        index = block * n_within + within
        lanes = Channels(index, (within < n_within) & (index < lanes.n_channels), lanes.n_channels)
    return lanes


@triton.jit
def instance_offset(instance, instance_vecs, V: tl.constexpr):
    """Returns the offset of an instance whose stride is instance_vecs · V."""
    return instance.to(tl.int64) * instance_vecs * V


@triton.jit
def of_instance(channels, instance, n_instances, PER_STATISTIC: tl.constexpr):
    """Returns where the statistics of an instance's channels are among those of all instances.

    PER_STATISTIC adjacent channels share theirs, as those of a GroupNorm's group do.
    """
    index = channels.index + instance * channels.n_channels
    return Channels(index // PER_STATISTIC, channels.in_range, n_instances * channels.n_channels // PER_STATISTIC)


@triton.jit
def parameters_of(start, group, columns, lanes, parameter_runs, layout, TILE: tl.constexpr, RUN: tl.constexpr):
    """Returns the channels from which the elements of a tile take weight and bias, if each block has whole groups.

    Their index is [1, LANES] if folded, where columns are channels, [T, 1] if RUN = V, and [T, V] if RUN = 1.

    Args:
        group: the tile's group in its sample.
        parameter_runs: adjacent elements of a channel, divided by RUN.
    """
    if TILE.FOLD:
        index = columns
    else:
        RUNS: tl.constexpr = TILE.V // RUN
        first_sample = start // layout.groups_per_sample
        within = (start - first_sample * layout.groups_per_sample).to(tl.int32) + tl.arange(0, TILE.T)[:, None]
        run = within % layout.groups_per_sample * RUNS + tl.arange(0, RUNS)[None, :]
        index = group * (layout.groups_per_sample * RUNS // parameter_runs) + run // parameter_runs
    return Channels(index, lanes.in_range, lanes.n_channels)


@triton.jit
def span(split, groups_per_split, n_groups, INDEX: tl.constexpr):
    """Returns the first group of a split, and the end of its range. INDEX is wide enough for n_groups + T."""
    first = split.to(INDEX) * groups_per_split
    return first, tl.minimum(first + groups_per_split, n_groups).to(INDEX)


@triton.jit
def view_of(ptr, strides, columns, channels, TILE: tl.constexpr, SPREAD: tl.constexpr = 1):
    """Returns the view of a tensor for a block with these columns and channels of its lanes."""
    if SPREAD == 0:
        lanes = ptr + channels.index.to(tl.int64) * strides.channel + tl.arange(0, TILE.LANES)[None, :] * 0
    elif TILE.AXIS is None:
        lanes = ptr + channels.index.to(tl.int64) * strides.channel * TILE.V + tl.arange(0, TILE.LANES)[None, :]
    else:
        lanes = ptr + columns
    return View(lanes, strides)


@triton.jit
def group_offsets(start, layout, strides, TILE: tl.constexpr, SPREAD: tl.constexpr = 1):
    """Returns the offsets [T, 1] of the groups from `start` on. Divisions within a tile are of 32 bits: faster."""
    UNIT: tl.constexpr = TILE.V if SPREAD else 1
    first_sample = start // layout.groups_per_sample
    group = (start - first_sample * layout.groups_per_sample).to(tl.int32) + tl.arange(0, TILE.T)[:, None]
    sample = (first_sample + group // layout.groups_per_sample).to(tl.int64)
    position = (group % layout.groups_per_sample).to(tl.int64)
    return sample * strides.sample * UNIT + position * strides.group * UNIT


@triton.jit
def aligned(pointers, V: tl.constexpr):
    """Returns pointers [T, LANES] or [M, T, LANES], marked as aligned in runs of V for the compiler."""
    ITEMSIZE: tl.constexpr = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
    ALIGNMENT: tl.constexpr = V * ITEMSIZE if V * ITEMSIZE < 16 else 16
    return tl.multiple_of(pointers, [1, ALIGNMENT] if len(pointers.shape) == 2 else [1, 1, ALIGNMENT])


@triton.jit
def tile_at(view, start, layout, TILE: tl.constexpr, SPREAD: tl.constexpr = 1):
    """Returns pointers [T, LANES] to the groups of a view from `start` on."""
    pointers = view.lanes + group_offsets(start, layout, view.strides, TILE, SPREAD)
    return aligned(pointers, TILE.V) if SPREAD else pointers


@triton.jit
def dense_strides(layout, TILE: tl.constexpr):
    """Returns the int64 strides of a dense tensor in this layout."""
    vecs = tl.full([], layout.n_column_vecs, tl.int64)
    groups = tl.full([], layout.groups_per_sample, tl.int64)
    if TILE.AXIS is None:
        group_vecs = tl.full([], 1, tl.int64)
    else:
        group_vecs = vecs
    return Strides(vecs * groups, group_vecs, groups)


@triton.jit
def load_parameter(ptr, channels, default: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns a parameter's value for each channel, or `default` if ptr is None."""
    if ptr is None:
        value = tl.full([1, 1], default, COMPUTE)
    else:
        value = tl.load(ptr + channels.index, mask=channels.in_range, other=default).to(COMPUTE)
    return value


@triton.jit
def load_statistics(statistics_ptr, mean_ptr, var_ptr, channels, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns (mean, mean_lo, rstd) of some channels.

    Args:
        statistics_ptr: [3, n_channels], or None. Loads bypass L1, since this launch may have written them.
        mean_ptr, var_ptr: [n_channels], used if statistics_ptr is None.
    """
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
    """Rearranges the values [1, LANES] of a block's columns to [WIDTH, FOLD], padded with 0."""
    channel = tl.arange(0, TILE.WIDTH * TILE.FOLD) % TILE.FOLD
    column = tl.arange(0, TILE.WIDTH * TILE.FOLD) // TILE.FOLD
    index = tl.minimum(channel * columns_per_channel + column, TILE.LANES - 1)
    gathered = tl.gather(tl.reshape(values, [TILE.LANES]), index, 0)
    return tl.reshape(tl.where(column < columns_per_channel, gathered, 0.0), [TILE.WIDTH, TILE.FOLD])


@triton.jit
def fold_moments(moments, count, columns_per_channel, TILE: tl.constexpr):
    """Returns the moments [1, FOLD] of a block's channels, merged from those of its columns, `count` elements each."""
    mean = by_channel(moments.mean, columns_per_channel, TILE)
    mean_lo = by_channel(moments.mean_lo, columns_per_channel, TILE)
    m2 = by_channel(moments.m2, columns_per_channel, TILE)
    counts = tl.where(tl.arange(0, TILE.WIDTH)[:, None] < columns_per_channel, count, 0.0)
    return merge_all(counts, Moments(mean, mean_lo, m2), count * columns_per_channel, 0)


@triton.jit
def fold_sum(values, columns_per_channel, TILE: tl.constexpr):
    """Returns the sums [1, FOLD] of a block's channels, from those of its columns."""
    return tile_sum(by_channel(values, columns_per_channel, TILE), 0)
