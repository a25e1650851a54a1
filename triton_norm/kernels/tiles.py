"""Where the elements of a channel lie in [samples, channels, positions], in any layout.

A channel's elements come in groups, and a tile is T groups of LANES elements that lie side by side:

    flat      a group is V positions of one channel; LANES = V, the tile is one channel's alone (AXIS = None)
    columns   a group is a row of a matrix, its lanes are columns (AXIS = 0)

Channels-last, a row is a position and a column is a channel (FOLD = 0). Channels-first with few positions, a row is a
sample and a channel is `columns_per_channel` adjacent columns, so many that only all of them together are aligned: a
block has up to FOLD whole channels, and what is summed by column is folded into channels once, at the end.

Strides and column counts come divided by V, the largest power of two that divides them all: the compiler then knows
that V elements share one access. A gradient that is one element expanded over a channel's lanes has SPREAD = 0, and its
strides undivided. Values that belong to a lane's channel are [1, 1] or [1, LANES], and broadcast against the tile.
"""

import triton
import triton.language as tl

from triton_norm.kernels.moments import Moments, merge_all, tile_sum


@triton.jit
def lanes_of(
    block,
    block_vecs,
    n_column_vecs,
    columns_per_channel,
    V: tl.constexpr,
    LANES: tl.constexpr,
    AXIS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """(columns, channels, in_range) of a block's lanes, [1, 1] or [1, LANES]; flat, the columns mean nothing."""
    if AXIS is None:
        channels = tl.zeros([1, 1], tl.int32) + block
        columns = channels
        in_range = channels < n_column_vecs
    else:
        within = tl.arange(0, LANES)[None, :]
        columns = block * (block_vecs * V) + within
        in_range = columns < n_column_vecs * V
        if FOLD:
            in_range = in_range & (within < block_vecs * V)
        channels = columns // columns_per_channel
    return columns, channels, in_range


@triton.jit
def channels_of(
    block,
    block_vecs,
    n_column_vecs,
    columns_per_channel,
    V: tl.constexpr,
    LANES: tl.constexpr,
    AXIS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """(channels, in_range) of a block, each channel once: [1, 1], [1, LANES] or [1, FOLD]."""
    if FOLD:
        within = tl.arange(0, FOLD)[None, :]
        n_within = block_vecs * V // columns_per_channel
        channels = block * n_within + within
        in_range = (within < n_within) & (channels < n_column_vecs * V // columns_per_channel)
    else:
        _, channels, in_range = lanes_of(block, block_vecs, n_column_vecs, columns_per_channel, V, LANES, AXIS, FOLD)
    return channels, in_range


@triton.jit
def span(split, groups_per_split, n_groups, INDEX: tl.constexpr):
    """First group of a split, and the one after its last; INDEX is int32 where all groups and a tile more fit in it."""
    first = split.to(INDEX) * groups_per_split
    return first, tl.minimum(first + groups_per_split, n_groups).to(INDEX)


@triton.jit
def lanes_at(
    ptr,
    columns,
    channels,
    channel_vecs,
    V: tl.constexpr,
    LANES: tl.constexpr,
    SPREAD: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Where the lanes of a tensor's group 0 lie: [1, LANES]."""
    if SPREAD == 0:
        lanes = ptr + channels.to(tl.int64) * channel_vecs + tl.arange(0, LANES)[None, :] * 0
    elif AXIS is None:
        lanes = ptr + channels.to(tl.int64) * channel_vecs * V + tl.arange(0, LANES)[None, :]
    else:
        lanes = ptr + columns
    return lanes


@triton.jit
def group_offsets(
    start, groups_per_sample, sample_vecs, group_vecs, V: tl.constexpr, SPREAD: tl.constexpr, T: tl.constexpr
):
    """Offsets of the T groups from `start` on: [T, 1]. Within a tile divisions are of 32 bits."""
    unit: tl.constexpr = V if SPREAD else 1
    first_sample = start // groups_per_sample
    group = (start - first_sample * groups_per_sample).to(tl.int32) + tl.arange(0, T)[:, None]
    sample = (first_sample + group // groups_per_sample).to(tl.int64)
    position = (group % groups_per_sample).to(tl.int64)
    return sample * sample_vecs * unit + position * group_vecs * unit


@triton.jit
def aligned(pointers, V: tl.constexpr, SPREAD: tl.constexpr):
    """Pointers [T, LANES], each V of which the launch knows to be aligned, whatever lies in their base's last bits."""
    ITEMSIZE: tl.constexpr = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
    ALIGNMENT: tl.constexpr = V * ITEMSIZE if V * ITEMSIZE < 16 else 16
    return tl.multiple_of(pointers, [1, ALIGNMENT]) if SPREAD else pointers


@triton.jit
def dense_strides(n_column_vecs, groups_per_sample, AXIS: tl.constexpr):
    """(sample, group, channel) strides, divided by V, of a tensor without gaps in this layout; int64."""
    vecs = tl.full([], n_column_vecs, tl.int64)
    groups = tl.full([], groups_per_sample, tl.int64)
    if AXIS is None:
        group_vecs = tl.full([], 1, tl.int64)
    else:
        group_vecs = vecs
    return vecs * groups, group_vecs, groups


@triton.jit
def load_parameter(ptr, channels, mask, default: tl.constexpr, COMPUTE: tl.constexpr):
    """One value a channel, `default` where there is no such parameter."""
    if ptr is None:
        value = tl.full([1, 1], default, COMPUTE)
    else:
        value = tl.load(ptr + channels, mask=mask, other=default).to(COMPUTE)
    return value


@triton.jit
def load_statistics(
    statistics_ptr,
    running_mean_ptr,
    running_var_ptr,
    channels,
    mask,
    n_channels,
    EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(mean, mean_lo, rstd) from statistics [3, n_channels], perhaps of this very launch, or from running ones."""
    if statistics_ptr is None:
        mean = tl.load(running_mean_ptr + channels, mask=mask, other=0.0).to(COMPUTE)
        mean_lo = tl.zeros([1, 1], COMPUTE)
        rstd = tl.rsqrt(tl.load(running_var_ptr + channels, mask=mask, other=1.0).to(COMPUTE) + EPS)
    else:
        mean = tl.load(statistics_ptr + channels, mask=mask, other=0.0, cache_modifier=".cg")
        mean_lo = tl.load(statistics_ptr + n_channels + channels, mask=mask, other=0.0, cache_modifier=".cg")
        rstd = tl.load(statistics_ptr + 2 * n_channels + channels, mask=mask, other=1.0, cache_modifier=".cg")
    return mean, mean_lo, rstd


@triton.jit
def by_channel(values, columns_per_channel, LANES: tl.constexpr, FOLD: tl.constexpr, WIDTH: tl.constexpr):
    """[1, LANES] values of a block's columns as [WIDTH, FOLD], a channel a column, with 0 past a channel's own."""
    channel = tl.arange(0, WIDTH * FOLD) % FOLD
    column = tl.arange(0, WIDTH * FOLD) // FOLD
    index = tl.minimum(channel * columns_per_channel + column, LANES - 1)
    gathered = tl.gather(tl.reshape(values, [LANES]), index, 0)
    return tl.reshape(tl.where(column < columns_per_channel, gathered, 0.0), [WIDTH, FOLD])


@triton.jit
def fold_moments(moments, count, columns_per_channel, LANES: tl.constexpr, FOLD: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the moments [1, FOLD] of a block's channels from those of its columns, `count` elements each."""
    mean = by_channel(moments.mean, columns_per_channel, LANES, FOLD, WIDTH)
    mean_lo = by_channel(moments.mean_lo, columns_per_channel, LANES, FOLD, WIDTH)
    m2 = by_channel(moments.m2, columns_per_channel, LANES, FOLD, WIDTH)
    counts = tl.where(tl.arange(0, WIDTH)[:, None] < columns_per_channel, count, 0.0)
    return merge_all(counts, Moments(mean, mean_lo, m2), count * columns_per_channel, 0)


@triton.jit
def fold_sum(values, columns_per_channel, LANES: tl.constexpr, FOLD: tl.constexpr, WIDTH: tl.constexpr):
    """[1, FOLD] sums of a block's channels from those of its columns."""
    return tile_sum(by_channel(values, columns_per_channel, LANES, FOLD, WIDTH), 0)
