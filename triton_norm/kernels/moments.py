"""Computes sums, means and moments of 2-D tiles, for the row kernels and the channel kernels.

A reduction keeps the tile's rank, so that its result broadcasts against the tile. AXIS is 1 to reduce each row, 0 to
reduce each column, and None if the whole tile belongs to one channel. A 3-D tile is a stack of 2-D tiles, each of a
channel of its own, with AXIS None.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Moments(NamedTuple):
    """Bundles the first two moments of sets of values.

    Args:
        mean, mean_lo: high and low part of the mean; mean + mean_lo has twice the precision of either.
        m2: sum of the squared deviations from the mean.
    """

    mean: tl.tensor
    mean_lo: tl.tensor
    m2: tl.tensor


@triton.jit
def to_float(count, COMPUTE: tl.constexpr):
    """Returns a count as a [1, 1] tile of COMPUTE. It may be a constant by specialisation, which has no `to`."""
    return tl.zeros([1, 1], COMPUTE) + count


@triton.jit
def tile_sum(tile, AXIS: tl.constexpr):
    """Returns the sum over AXIS, or over the last two axes if AXIS is None. Reduced axes keep length 1."""
    if AXIS is None:
        LAST: tl.constexpr = len(tile.shape) - 1
        total = tl.sum(tl.sum(tile, LAST, keep_dims=True), LAST - 1, keep_dims=True)
    else:
        total = tl.sum(tile, AXIS, keep_dims=True)
    return total


@triton.jit
def divide(a, b, inverse):
    """Returns a / b, correctly rounded but for rare cases, given inverse = 1 / b rounded."""
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


@triton.jit
def centre(x, mask, count, AXIS: tl.constexpr):
    """Returns (x − mean, mean, mean_lo) over AXIS.

    A first mean is subtracted, and then the mean of the remainder: a constant row centres to exactly 0, and a large
    mean adds no rounding error of its own magnitude. Terms are scaled by a power of two, so that no sum overflows.

    Args:
        x: [M, N], or [K, M, N] if AXIS is None, 0 outside the mask; so is the result.
        count: number of elements reduced.
    """
    LAST: tl.constexpr = len(x.shape) - 1
    SIZE: tl.constexpr = x.shape[LAST - 1] * x.shape[LAST] if AXIS is None else x.shape[AXIS]
    SCALE: tl.constexpr = 1.0 / SIZE
    scaled_count = count * SCALE
    inverse = 1.0 / scaled_count
    first = divide(tile_sum(x * SCALE, AXIS), scaled_count, inverse)
    centred = tl.where(mask, x - first, 0.0)
    correction = divide(tile_sum(centred * SCALE, AXIS), scaled_count, inverse)
    mean = first + correction
    return tl.where(mask, centred - correction, 0.0), mean, (first - mean) + correction


@triton.jit
def moments_of(x, mask, count, AXIS: tl.constexpr, CENTRED: tl.constexpr):
    """Returns (x − mean, moments) of a tile over AXIS, `count` elements each. The mean is 0 unless CENTRED."""
    if CENTRED:
        centred, mean, mean_lo = centre(x, mask, count, AXIS)
    else:
        centred = x
        mean = tl.zeros([x.shape[0], 1], x.dtype)
        mean_lo = mean
    return centred, Moments(mean, mean_lo, tile_sum(centred * centred, AXIS))


@triton.jit
def scaled_from(x, shift):
    """Returns (x − shift) / 4. The difference of two such values can't overflow."""
    return x * 0.25 - shift * 0.25


@triton.jit
def take_in(values, mask, inverse_count, mean, m2):
    """Returns (mean, m2) for each position of a tile after adding one more value there (Welford 1962).

    Args:
        mask: positions that receive a value.
        inverse_count: 1 / number of values at a position, including the new one.
    """
    delta = tl.where(mask, values - mean, 0.0)
    mean += delta * inverse_count
    return mean, m2 + delta * (values - mean)


@triton.jit
def merge(count_a, a, count_b, b):
    """Returns the moments of the union of two sets (Chan, Golub, LeVeque 1979); count_b is not 0."""
    fraction = count_b / (count_a + count_b)
    step = (b.mean - a.mean) * fraction
    mean = a.mean + step
    mean_lo = ((a.mean - mean) + step) + (a.mean_lo + (b.mean_lo - a.mean_lo) * fraction)
    delta = (b.mean - a.mean) + (b.mean_lo - a.mean_lo)
    return Moments(mean, mean_lo, a.m2 + b.m2 + delta * (delta * (count_a * fraction)))


@triton.jit
def merge_all(counts, sets, total, AXIS: tl.constexpr):
    """Returns the moments of the union of all sets along AXIS.

    Means are summed as differences from the first set's mean, so that equal means merge to themselves exactly.

    Args:
        counts: elements of each set; 0 for an empty set, whose moments are 0.
        sets: moments [n], merged to scalars, or [M, N], merged along AXIS, which keeps length 1.
        total: sum of the counts.
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
    """Returns the moments of a tile's columns, merged from the moments of its positions.

    As in `centre`, a first mean is subtracted, and then the mean of the remainder.

    Args:
        counts: [T, 1], number of values at the positions of each row.
        mean, m2: [T, LANES], moments of the values after `scaled_from`.
        shift: [1, LANES], the shift given to `scaled_from`.
    """
    fraction = counts / tl.sum(counts, 0, keep_dims=True)
    first = tl.sum(mean * fraction, 0, keep_dims=True)
    delta = tl.where(counts > 0, mean - first, 0.0)
    correction = tl.sum(delta * fraction, 0, keep_dims=True)
    delta = tl.where(counts > 0, delta - correction, 0.0)
    m2 = tl.sum(m2 + delta * (delta * counts), 0, keep_dims=True)
    step = 4.0 * (first + correction)
    moved = shift + step
    taken = moved - shift
    return Moments(moved, (shift - (moved - taken)) + (step - taken), 16.0 * m2)
