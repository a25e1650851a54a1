"""Combines the channel sums of a GroupNorm, sample by sample, to the means for dx, and to dweight and dbias."""

import triton
import triton.language as tl

from triton_norm.kernels.moments import tile_sum, to_float


@triton.jit
def sum_group(ptr, weight_ptr, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns Σ weight · value [1, 1] over the PER_GROUP channels of a group.

    Args:
        ptr, weight_ptr: the group's first value and weight; weight_ptr may be None.
    """
    COMPUTE: tl.constexpr = ptr.dtype.element_ty
    found = tl.zeros([1, BLOCK_C], COMPUTE)
    for start in range(0, PER_GROUP, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)[None, :]
        there = channels < PER_GROUP
        value = tl.load(ptr + channels, mask=there, other=0.0)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + channels, mask=there, other=0.0).to(COMPUTE)
        found += value
    return tile_sum(found, 1)


@triton.jit
def add_samples(ptr, sums_ptr, columns, n_samples, n_channels, BLOCK_K: tl.constexpr):
    """Stores the sums over samples of sums [n_samples, n_channels], for some columns [1, n], in fixed order."""
    COMPUTE: tl.constexpr = sums_ptr.dtype.element_ty
    there = columns < n_channels
    found = tl.zeros([BLOCK_K, columns.shape[1]], COMPUTE)
    for start in range(0, n_samples, BLOCK_K):
        samples = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        found += tl.load(sums_ptr + samples * n_channels + columns, mask=(samples < n_samples) & there, other=0.0)
    tl.store(ptr + columns, tile_sum(found, 0).to(ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["total", "n_samples", "n_means"])
def groups_backward_kernel(
    dweight_sums_ptr,
    dbias_sums_ptr,
    weight_ptr,
    statistics_ptr,
    means_ptr,
    dweight_ptr,
    dbias_ptr,
    total,
    n_samples,
    n_means,
    n_channels,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes the group means that dx depends on, and dweight and dbias, from sums over each sample's channels.

    Grid: n_means + cdiv(n_channels, BLOCK_C). The first n_means programs have a group each, the rest BLOCK_C channels.

    Args:
        dweight_sums_ptr, dbias_sums_ptr: [n_samples, n_channels], Σ dz · x_hat and Σ dz; or None.
        weight_ptr: [n_channels], or None.
        statistics_ptr: [3, n_means]: mean, mean_lo and rstd.
        means_ptr: [2, n_means], mean(weight · dz) and mean(weight · dz · x_hat) · rstd, of n_means = n_samples ·
            n_channels / PER_GROUP groups; None, and n_means 0, without dx.
        dweight_ptr, dbias_ptr: [n_channels], or None.
        total: elements of a group.
        PER_GROUP: channels of a group.
        BLOCK_K: samples added at a time.
    """
    program = tl.program_id(0)
    if program < n_means:
        if means_ptr is not None:
            first = program.to(tl.int64) * PER_GROUP
            weights_ptr = weight_ptr
            if weight_ptr is not None:
                weights_ptr = weight_ptr + program % (n_channels // PER_GROUP) * PER_GROUP
            share = 1.0 / to_float(total, means_ptr.dtype.element_ty)
            mean = sum_group(dbias_sums_ptr + first, weights_ptr, PER_GROUP, BLOCK_C) * share
            slope = sum_group(dweight_sums_ptr + first, weights_ptr, PER_GROUP, BLOCK_C) * share
            slots = means_ptr + program + tl.zeros([1, 1], tl.int32)
            tl.store(slots, mean)
            tl.store(slots + n_means, slope * tl.load(statistics_ptr + 2 * n_means + program))
    else:
        columns = (program - n_means) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        if dweight_ptr is not None:
            add_samples(dweight_ptr, dweight_sums_ptr, columns, n_samples, n_channels, BLOCK_K)
        if dbias_ptr is not None:
            add_samples(dbias_ptr, dbias_sums_ptr, columns, n_samples, n_channels, BLOCK_K)
