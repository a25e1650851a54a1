"""Merges the BatchNorm statistics of a batch that is distributed over processes (ranks)."""

import triton
import triton.language as tl

from triton_norm.kernels.channels import factor_of, move_running
from triton_norm.kernels.exchange import close
from triton_norm.kernels.moments import tile_sum
from triton_norm.kernels.tiles import Channels


@triton.jit
def shares_of(gathered_ptr, start, channels, n_ranks, BLOCK_K: tl.constexpr):
    """Returns (pointers [BLOCK_K, n], mask, counts [BLOCK_K, 1]) for the ranks from `start` on, without empty ones."""
    ranks = start + tl.arange(0, BLOCK_K)[:, None]
    packed = gathered_ptr + ranks.to(tl.int64) * (3 * channels.n_channels + 1)
    counts = tl.load(packed + 3 * channels.n_channels, mask=ranks < n_ranks, other=0.0)
    return packed + channels.index, (counts > 0.0) & channels.in_range, counts


@triton.jit
def first_and_total(gathered_ptr, n_channels, n_ranks, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns the first rank that is not empty, and the elements of a channel over all ranks: [1, 1] each."""
    first = tl.zeros([1, 1], tl.int32) + (n_ranks - 1)
    total = tl.zeros([1, 1], COMPUTE)
    for start in range(0, n_ranks, BLOCK_K):
        ranks = start + tl.arange(0, BLOCK_K)[:, None]
        slots = gathered_ptr + ranks.to(tl.int64) * (3 * n_channels + 1) + 3 * n_channels
        counts = tl.load(slots, mask=ranks < n_ranks, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(counts > 0.0, ranks, n_ranks), 0, keep_dims=True))
        total += tile_sum(counts, 0)
    return first, total


@triton.jit(do_not_specialize=["n_channels", "n_ranks", "momentum", "momentum_rest"])
def merge_ranks_kernel(
    gathered_ptr,
    merged_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    sync_ptr,
    n_channels,
    n_ranks,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges the moments of n_ranks ranks, and updates the running statistics and the batch counter.

    Means are summed as differences from the first, so that equal means merge to themselves exactly. A channel with one
    value has no unbiased variance: running_var keeps its value. An empty batch changes neither running statistic.

    Grid: cdiv(n_channels, BLOCK_C).
    Bytes: reads gathered mean and mean_lo twice, and M2 once.

    Args:
        gathered_ptr: [n_ranks, 3 · n_channels + 1]: mean, mean_lo and M2 by channel, and the elements of a channel.
        merged_ptr: [3 · n_channels + 1], of the whole batch, with rstd in place of M2.
        running_mean_ptr, running_var_ptr: [n_channels], or None.
        num_batches_tracked_ptr: one integer, or None.
        sync_ptr: 2 + n_blocks zeros; None without num_batches_tracked.
        momentum, momentum_rest, CUMULATIVE: as in channels_forward_kernel.
        BLOCK_K, BLOCK_C: ranks and channels of a tile.
    """
    block = tl.program_id(0)
    index = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = index < n_channels
    channels = Channels(index, mask, n_channels)
    first, total = first_and_total(gathered_ptr, n_channels, n_ranks, BLOCK_K, COMPUTE)
    divisor = tl.maximum(total, 1.0)
    base = tl.load(gathered_ptr + first.to(tl.int64) * (3 * n_channels + 1) + index, mask=mask, other=0.0)
    shift = tl.zeros_like(base)
    for start in range(0, n_ranks, BLOCK_K):
        slots, there, counts = shares_of(gathered_ptr, start, channels, n_ranks, BLOCK_K)
        delta = tl.load(slots, mask=there, other=0.0) - base
        delta += tl.load(slots + n_channels, mask=there, other=0.0)
        shift += tile_sum(tl.where(there, delta * (counts / divisor), 0.0), 0)
    mean = base + shift
    mean_lo = (base - mean) + shift
    m2 = tl.zeros_like(base)
    for start in range(0, n_ranks, BLOCK_K):
        slots, there, counts = shares_of(gathered_ptr, start, channels, n_ranks, BLOCK_K)
        delta = tl.load(slots, mask=there, other=0.0) - mean
        delta += tl.load(slots + n_channels, mask=there, other=0.0) - mean_lo
        m2s = tl.load(slots + 2 * n_channels, mask=there, other=0.0)
        m2 += tile_sum(tl.where(there, m2s + delta * (delta * counts), 0.0), 0)
    tl.store(merged_ptr + index, mean, mask=mask)
    tl.store(merged_ptr + n_channels + index, mean_lo, mask=mask)
    tl.store(merged_ptr + 2 * n_channels + index, tl.rsqrt(m2 / divisor + EPS), mask=mask)
    place = tl.zeros([1, 1], tl.int32) + block
    tl.store(merged_ptr + 3 * n_channels + place, total, mask=place == 0)
    if running_mean_ptr is not None:
        factor = factor_of(momentum, momentum_rest, num_batches_tracked_ptr, CUMULATIVE, COMPUTE)
        unbiased = m2 / tl.maximum(total - 1.0, 1.0)
        move_running(running_mean_ptr, Channels(index, mask & (total > 0.0), n_channels), mean, factor)
        move_running(running_var_ptr, Channels(index, mask & (total > 1.0), n_channels), unbiased, factor)
    if num_batches_tracked_ptr is not None:
        tl.debug_barrier()
        close(sync_ptr, block, tl.num_programs(0), num_batches_tracked_ptr)
