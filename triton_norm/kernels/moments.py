"""What both families share: sums, centring and merging of the moments of a 2-D tile.

A reduction keeps the tile's rank, so that its result broadcasts against the tile: AXIS is 1 for rows, 0 for a matrix
whose columns are channels, None for a tile that is one channel's alone.
"""

import triton
import triton.language as tl


@triton.jit
def to_float(count, COMPUTE: tl.constexpr):
    """A count, be it a run-time integer or one the compiler has specialised, as a [1, 1] tile of COMPUTE."""
    return tl.zeros([1, 1], COMPUTE) + count


@triton.jit
def tile_sum(tile, AXIS: tl.constexpr):
    """Sum over AXIS, or over the whole tile where AXIS is None; reduced axes stay with length 1."""
    if AXIS is None:
        total = tl.sum(tl.sum(tile, 1, keep_dims=True), 0, keep_dims=True)
    else:
        total = tl.sum(tile, AXIS, keep_dims=True)
    return total


@triton.jit
def centre(x, mask, inverse_count, AXIS: tl.constexpr):
    """(x − mean, mean) over AXIS, in x's type; x must be 0, and the result is 0, outside the mask.

    Terms are scaled before they are summed, so that no finite row overflows, and the mean of what is left is taken
    off again, so that a constant row centres to exactly 0 and a large mean leaves no rounding error of its own size.
    """
    mean = tile_sum(x * inverse_count, AXIS)
    centred = tl.where(mask, x - mean, 0.0)
    correction = tile_sum(centred * inverse_count, AXIS)
    return tl.where(mask, centred - correction, 0.0), mean + correction


@triton.jit
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """(mean, M2) of two disjoint sets together (Chan, Golub, LeVeque 1979); counts are floats, count_b is not 0."""
    share = count_b / (count_a + count_b)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + m2_b + delta * (delta * (count_a * share))
