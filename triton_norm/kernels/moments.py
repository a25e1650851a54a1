"""Sums and centres a 2-D tile, and merges moments, for both families of kernels.

A reduction keeps the tile's rank, so that its result broadcasts against the tile: AXIS is 1 for rows, 0 for a matrix
whose columns are channels, None for a tile that is one channel's alone.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Moments(NamedTuple):
    """Names the moments of sets of values: mean + mean_lo is a set's mean to twice the precision, m2 the sum of the
    squared deviations from it."""

    mean: tl.tensor
    mean_lo: tl.tensor
    m2: tl.tensor


@triton.jit
def to_float(count, COMPUTE: tl.constexpr):
    """Returns a count, which the compiler may have specialised, as a [1, 1] tile of COMPUTE."""
    return tl.zeros([1, 1], COMPUTE) + count


@triton.jit
def tile_sum(tile, AXIS: tl.constexpr):
    """Returns the sum over AXIS, or over the whole tile where AXIS is None; reduced axes stay with length 1."""
    if AXIS is None:
        total = tl.sum(tl.sum(tile, 1, keep_dims=True), 0, keep_dims=True)
    else:
        total = tl.sum(tile, AXIS, keep_dims=True)
    return total


@triton.jit
def divide(a, b, inverse):
    """Returns a / b, correctly rounded but for rare cases, from a rounded inverse of b."""
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


@triton.jit
def centre(x, mask, count, AXIS: tl.constexpr):
    """Returns (x − mean, mean, mean_lo) over AXIS, of `count` elements; mean + mean_lo has twice the precision.

    x must be 0, and the result is 0, outside the mask. The mean of what a first mean leaves is taken off again: a
    constant row centres to exactly 0, and a large mean leaves no rounding error of its own size. Sums are of terms
    scaled by a power of two, which rounds nothing and lets no finite row overflow.
    """
    SIZE: tl.constexpr = x.shape[0] * x.shape[1] if AXIS is None else x.shape[AXIS]
    SCALE: tl.constexpr = 1.0 / SIZE
    share = count * SCALE
    inverse = 1.0 / share
    first = divide(tile_sum(x * SCALE, AXIS), share, inverse)
    centred = tl.where(mask, x - first, 0.0)
    correction = divide(tile_sum(centred * SCALE, AXIS), share, inverse)
    mean = first + correction
    return tl.where(mask, centred - correction, 0.0), mean, (first - mean) + correction


@triton.jit
def moments_of(x, mask, count, AXIS: tl.constexpr, CENTRED: tl.constexpr):
    """Returns (x − mean, moments) of a tile over AXIS, `count` elements each; rows that are not CENTRED have mean 0."""
    if CENTRED:
        centred, mean, mean_lo = centre(x, mask, count, AXIS)
    else:
        centred = x
        mean = tl.zeros([x.shape[0], 1], x.dtype)
        mean_lo = mean
    return centred, Moments(mean, mean_lo, tile_sum(centred * centred, AXIS))


@triton.jit
def scaled_from(x, shift):
    """Returns (x − shift) / 4: no difference of two of these overflows."""
    return x * 0.25 - shift * 0.25


@triton.jit
def take_in(values, mask, inverse_count, mean, m2):
    """Returns (mean, M2) of each place of a tile with one more value there (Welford 1962), where the mask is set; the
    inverse is of the number of values that are there then."""
    delta = tl.where(mask, values - mean, 0.0)
    mean += delta * inverse_count
    return mean, m2 + delta * (values - mean)


@triton.jit
def merge(count_a, a, count_b, b):
    """Returns the moments of two sets together (Chan, Golub, LeVeque 1979). Counts are floats, and count_b is not 0."""
    share = count_b / (count_a + count_b)
    step = (b.mean - a.mean) * share
    mean = a.mean + step
    mean_lo = ((a.mean - mean) + step) + (a.mean_lo + (b.mean_lo - a.mean_lo) * share)
    delta = (b.mean - a.mean) + (b.mean_lo - a.mean_lo)
    return Moments(mean, mean_lo, a.m2 + b.m2 + delta * (delta * (count_a * share)))


@triton.jit
def merge_all(counts, sets, total, AXIS: tl.constexpr):
    """Returns the moments of all the sets along an axis together, from those of each; a set of no elements has zeros.

    The moments of a vector of sets are scalars, of a tile the axis stays with length 1. Means are summed as differences
    from the first set's, so that equal ones merge to themselves exactly.
    """
    KEEP: tl.constexpr = len(sets.mean.shape) > 1
    index = tl.arange(0, sets.mean.shape[AXIS])
    if KEEP:
        index = tl.expand_dims(index, 1 - AXIS)
    base = tl.sum(tl.where(index == 0, sets.mean, 0.0), AXIS, keep_dims=KEEP)
    present = counts > 0
    delta = tl.where(present, (sets.mean - base) + sets.mean_lo, 0.0)
    shift = tl.sum(delta * (counts / total), AXIS, keep_dims=KEEP)
    mean = base + shift
    mean_lo = (base - mean) + shift
    delta = tl.where(present, (sets.mean - mean) + (sets.mean_lo - mean_lo), 0.0)
    return Moments(mean, mean_lo, tl.sum(sets.m2 + delta * (delta * counts), AXIS, keep_dims=KEEP))


@triton.jit
def merge_places(counts, mean, m2, shift):
    """Returns the moments of a tile's columns from those of its places, of `counts` [T, 1] values each.

    The values are as `scaled_from` the columns' shift leaves them. As in `centre`, the mean of what a first mean leaves
    is taken off.
    """
    share = counts / tl.sum(counts, 0, keep_dims=True)
    first = tl.sum(mean * share, 0, keep_dims=True)
    delta = tl.where(counts > 0, mean - first, 0.0)
    correction = tl.sum(delta * share, 0, keep_dims=True)
    delta = tl.where(counts > 0, delta - correction, 0.0)
    m2 = tl.sum(m2 + delta * (delta * counts), 0, keep_dims=True)
    step = 4.0 * (first + correction)
    moved = shift + step
    taken = moved - shift
    return Moments(moved, (shift - (moved - taken)) + (step - taken), 16.0 * m2)
