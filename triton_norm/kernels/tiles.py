"""Where the elements of a channel lie in [samples, channels, positions], in either layout.

A channel's elements come in groups, and a tile is T groups of LANES elements that lie side by side:

    channels-first  a group is V positions of one channel; LANES = V, the tile is one channel's alone (AXIS = None)
    channels-last   a group is one position; its lanes are LANES channels, a channel is a column (AXIS = 0)

Strides come divided by V, the largest power of two that divides them all: the compiler then knows that V elements share
one access. A gradient that is one element expanded over its lanes has LANE_STRIDE = 0 and its strides undivided.
Values that belong to a channel are [1, 1] channels-first and [1, LANES] channels-last, and broadcast against the tile.
"""

import triton
import triton.language as tl


@triton.jit
def channels_of(block, LANES: tl.constexpr, AXIS: tl.constexpr):
    """The channels of a block, int64: [1, 1] or [1, LANES]."""
    if AXIS is None:
        channels = tl.zeros([1, 1], tl.int64) + block
    else:
        channels = block.to(tl.int64) * LANES + tl.arange(0, LANES)[None, :]
    return channels


@triton.jit
def span(split, groups_per_split, n_groups):
    """First group of a split, and the one after its last; int64."""
    first = split.to(tl.int64) * groups_per_split
    return first, tl.minimum(first + groups_per_split, n_groups)


@triton.jit
def lanes_at(
    ptr, channels, channel_vecs, V: tl.constexpr, LANES: tl.constexpr, LANE_STRIDE: tl.constexpr, AXIS: tl.constexpr
):
    """Where the lanes of a tensor's group 0 lie: [1, LANES]."""
    if AXIS is None:
        unit: tl.constexpr = V if LANE_STRIDE == 1 else 1
        lanes = ptr + channels * channel_vecs * unit + tl.arange(0, LANES)[None, :] * LANE_STRIDE
    else:
        lanes = ptr + channels * LANE_STRIDE
    return lanes


@triton.jit
def group_offsets(
    start, groups_per_sample, sample_vecs, group_vecs, V: tl.constexpr, LANE_STRIDE: tl.constexpr, T: tl.constexpr
):
    """Offsets of the T groups from `start` on: [T, 1]. One 64-bit division a tile, 32-bit ones within it."""
    unit: tl.constexpr = V if LANE_STRIDE == 1 else 1
    first_sample = start // groups_per_sample
    group = (start - first_sample * groups_per_sample).to(tl.int32) + tl.arange(0, T)[:, None]
    sample = (first_sample + group // groups_per_sample).to(tl.int64)
    position = (group % groups_per_sample).to(tl.int64)
    return sample * sample_vecs * unit + position * group_vecs * unit


@triton.jit
def dense_strides(n_channel_vecs, groups_per_sample, AXIS: tl.constexpr):
    """(sample, group, channel) strides, divided by V, of a tensor without gaps in this layout; int64."""
    vecs = tl.full([], n_channel_vecs, tl.int64)
    groups = tl.full([], groups_per_sample, tl.int64)
    if AXIS is None:
        group_vecs = tl.full([], 1, tl.int64)
    else:
        group_vecs = vecs
    return vecs * groups, group_vecs, groups


@triton.jit
def load_tile(ptr, mask, COMPUTE: tl.constexpr):
    return tl.load(ptr, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def load_parameter(ptr, channels, mask, default: tl.constexpr, COMPUTE: tl.constexpr):
    """One value a channel, `default` where there is no such parameter."""
    if ptr is None:
        value = tl.full([1, 1], default, COMPUTE)
    else:
        value = tl.load(ptr + channels, mask=mask, other=default).to(COMPUTE)
    return value


@triton.jit
def load_rstd(ptr, channels, mask, EPS: tl.constexpr, FROM_VARIANCE: tl.constexpr, COMPUTE: tl.constexpr):
    """rstd as it was saved, or from a variance."""
    rstd = tl.load(ptr + channels, mask=mask, other=1.0).to(COMPUTE)
    if FROM_VARIANCE:
        rstd = tl.rsqrt(rstd + EPS)
    return rstd
