"""Computes sums and moments of whole channels that the blocks of a cluster have in registers.

Nothing goes through memory: `tl.debug_barrier` is one block's own, and what one block stores is not yet another's to
load. Nor may values be gathered: Triton 3.9 compiles `tl.gather` to loads from the block's own shared memory. A folded
tile's channels are therefore told apart by masks, [1, FOLD, LANES], and values of its channels are [1, FOLD, 1].
"""

import triton
import triton.language as tl

from triton_norm.kernels.moments import Moments, divide, tile_sum


@triton.jit
def own_lanes(columns_per_channel, TILE: tl.constexpr):
    """Returns the mask [1, FOLD, LANES] of the lanes of each channel of a folded block."""
    first = tl.arange(0, TILE.FOLD)[None, :, None] * columns_per_channel
    lane = tl.arange(0, TILE.LANES)[None, None, :]
    return (lane >= first) & (lane < first + columns_per_channel)


@triton.jit
def channel_sum(tile, columns_per_channel, TILE: tl.constexpr, BLOCKS: tl.constexpr):
    """Returns the sums of a tile's channels: [1, 1], [1, LANES], or [1, FOLD, 1] if folded.

    Folded, each block adds up its own rows and columns first: the cluster then exchanges FOLD numbers, and not LANES.
    Axis 0 of three is that of the blocks, as the compiler divides a tile among them.
    """
    if TILE.FOLD and not TILE.WIDTH:
        rows = tl.sum(tl.reshape(tile, [BLOCKS, TILE.T // BLOCKS, TILE.LANES]), 1, keep_dims=True)
        of_blocks = tl.sum(tl.where(own_lanes(columns_per_channel, TILE), rows, 0.0), 2, keep_dims=True)
        total = tl.sum(of_blocks, 0, keep_dims=True)
    else:
        total = tile_sum(tile, TILE.AXIS)
    return total


@triton.jit
def to_lanes(values, columns_per_channel, TILE: tl.constexpr, BLOCKS: tl.constexpr):
    """Returns values of a tile's elements from those of its channels: [T, LANES] if folded, else they are the same."""
    if len(values.shape) == 3:
        each = tl.where(own_lanes(columns_per_channel, TILE), values, 0.0)
        lanes = tl.sum(tl.broadcast_to(each, [BLOCKS, TILE.FOLD, TILE.LANES]), 1, keep_dims=True)
        rows = tl.broadcast_to(lanes, [BLOCKS, TILE.T // BLOCKS, TILE.LANES])
        values = tl.reshape(rows, [TILE.T, TILE.LANES])
    return values


@triton.jit
def moments_of_tiles(tiles, masks, count, columns_per_channel, TILE: tl.constexpr, BLOCKS: tl.constexpr):
    """Returns the moments of the channels of several tiles together, and (mean, mean_lo) of their lanes.

    Means are computed as in `moments.centre`, in a loop: the compiler would otherwise have the elements minus the first
    mean in registers beside the elements.

    Args:
        tiles: tuple of tiles [T, LANES], 0 outside of their masks.
        count: [1, 1], elements of a channel, of the compute type.
    """
    COMPUTE: tl.constexpr = count.dtype
    SCALE: tl.constexpr = 1.0 / (len(tiles) * TILE.T * (TILE.LANES if TILE.AXIS is None or TILE.FOLD else 1))
    scaled_count = count * SCALE
    inverse = 1.0 / scaled_count
    first = tl.zeros([1, TILE.FOLD, 1] if TILE.FOLD else [1, 1 if TILE.AXIS is None else TILE.LANES], COMPUTE)
    correction = tl.zeros_like(first)
    for sweep in tl.range(0, 2, loop_unroll_factor=1):
        shift = to_lanes(first, columns_per_channel, TILE, BLOCKS)
        total = tl.zeros([TILE.T, TILE.LANES], COMPUTE)
        for place in tl.static_range(len(tiles)):
            total += tl.where(masks[place], tiles[place].to(COMPUTE) - shift, 0.0) * SCALE
        mean = divide(channel_sum(total, columns_per_channel, TILE, BLOCKS), scaled_count, inverse)
        first = tl.where(sweep == 0, mean, first)
        correction = tl.where(sweep == 0, 0.0, mean)
    shift = to_lanes(first, columns_per_channel, TILE, BLOCKS)
    rest = to_lanes(correction, columns_per_channel, TILE, BLOCKS)
    total = tl.zeros([TILE.T, TILE.LANES], COMPUTE)
    for place in tl.static_range(len(tiles)):
        centred = tl.where(masks[place], (tiles[place].to(COMPUTE) - shift) - rest, 0.0)
        total += centred * centred
    m2 = channel_sum(total, columns_per_channel, TILE, BLOCKS)
    mean = first + correction
    of_lanes = shift + rest
    return Moments(mean, (first - mean) + correction, m2), of_lanes, (shift - of_lanes) + rest
