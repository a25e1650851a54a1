"""BatchNorm over the channels of [samples, channels, positions]; tiles.py says how they become tiles.

A block of channels is shared by n_splits programs, each of which has the `groups_per_split` groups of a span. Whichever
of them comes last merges, in fixed order, what all have found: one launch normalizes, or one reduces and one applies.
"""

import triton
import triton.language as tl

from triton_norm.kernels.activations import activate, bits_per_byte, bytes_of, pack, side_of_zero
from triton_norm.kernels.exchange import arrive, close, take_place, wait
from triton_norm.kernels.moments import (
    Moments,
    centre,
    merge,
    merge_all,
    merge_places,
    moments_of,
    scaled_from,
    take_in,
    to_float,
)
from triton_norm.kernels.tiles import (
    aligned,
    channels_of,
    dense_strides,
    fold_moments,
    group_offsets,
    lanes_at,
    lanes_of,
    load_parameter,
    load_statistics,
    span,
)


@triton.jit
def merge_splits(
    partials_ptr, channels, mask, n_channels, n_splits, split_size, total, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr
):
    """Returns the moments [1, n] of whole channels from those of their splits, partials [3, n_splits, n_channels]; the
    last split may be shorter than split_size elements.
    """
    kind = n_splits.to(tl.int64) * n_channels
    none = tl.zeros(channels.shape, COMPUTE)
    moments = Moments(none, none, none)
    for start in range(0, n_splits, BLOCK_K):
        splits = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        there = (splits < n_splits) & mask
        slots = partials_ptr + splits * n_channels + channels
        mean = tl.load(slots, mask=there, other=0.0, cache_modifier=".cg")
        mean_lo = tl.load(slots + kind, mask=there, other=0.0, cache_modifier=".cg")
        m2 = tl.load(slots + 2 * kind, mask=there, other=0.0, cache_modifier=".cg")
        counts = tl.maximum(tl.minimum(total - splits * split_size, split_size), 0).to(COMPUTE)
        seen = to_float(start * split_size, COMPUTE)
        count = to_float(tl.minimum(total - start * split_size, BLOCK_K * split_size), COMPUTE)
        moments = merge(seen, moments, count, merge_all(counts, Moments(mean, mean_lo, m2), count, 0))
    return moments


@triton.jit
def move_running(ptr, channels, mask, value, momentum, COMPUTE: tl.constexpr):
    """running = (1 − momentum) · running + momentum · value, in place, in the wider of COMPUTE and running's type."""
    WIDE: tl.constexpr = tl.float64 if ptr.dtype.element_ty == tl.float64 else COMPUTE
    running, momentum = tl.load(ptr + channels, mask=mask, other=0.0).to(WIDE), momentum.to(WIDE)
    moved = (1.0 - momentum) * running + momentum * value
    tl.store(ptr + channels, moved.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def finalise_statistics(
    moments,
    statistics_ptr,
    moments_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    channels,
    mask,
    n_channels,
    total,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    LOCAL: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Stores the statistics of channels [1, n] with `total` elements each, and their moments where those are asked for,
    and moves the running ones; returns rstd."""
    rstd = tl.rsqrt(moments.m2 / to_float(total, COMPUTE) + EPS)
    tl.store(statistics_ptr + channels, moments.mean, mask=mask)
    tl.store(statistics_ptr + n_channels + channels, moments.mean_lo, mask=mask)
    tl.store(statistics_ptr + 2 * n_channels + channels, moments.m2 if LOCAL else rstd, mask=mask)
    if moments_ptr is not None:
        tl.store(moments_ptr + channels, moments.mean, mask=mask)
        tl.store(moments_ptr + n_channels + channels, moments.mean_lo, mask=mask)
        tl.store(moments_ptr + 2 * n_channels + channels, moments.m2, mask=mask)
    if running_mean_ptr is not None:
        if CUMULATIVE:
            factor = 1.0 / to_float(tl.load(num_batches_tracked_ptr) + 1, COMPUTE)
        else:
            factor = to_float(momentum, COMPUTE) + to_float(momentum_rest, COMPUTE)
        move_running(running_mean_ptr, channels, mask, moments.mean, factor, COMPUTE)
        move_running(running_var_ptr, channels, mask, moments.m2 / to_float(total - 1, COMPUTE), factor, COMPUTE)
    return rstd


@triton.jit(do_not_specialize=["n_groups", "groups_per_split", "momentum", "momentum_rest"])
def channels_forward_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    bits_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    moments_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    partials_ptr,
    sync_ptr,
    n_groups,
    groups_per_split,
    momentum,
    momentum_rest,
    n_column_vecs,
    block_vecs,
    columns_per_channel,
    groups_per_sample,
    x_sample_vecs,
    x_group_vecs,
    x_channel_vecs,
    residual_sample_vecs,
    residual_group_vecs,
    residual_channel_vecs,
    EPS: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    LOCAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    APPLY: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    V: tl.constexpr,
    LANES: tl.constexpr,
    AXIS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """STATISTICS: the batch's mean, what rounding it has left, and rstd (M2 if LOCAL), as statistics [3, n_channels],
    move the running ones; moments [3, n_channels], if any, are these with M2. APPLY: y = f(z), z = (x − mean) · rstd ·
    weight + bias + residual, y without gaps in x's layout, and one bit an element for z > 0. Both: in one launch, x's
    last tile staying in registers while the programs of a channel wait for each other. Without STATISTICS they are
    given, or else None, and the running ones are used.

    The running variance moves by the unbiased one; momentum is momentum + momentum_rest, two fp32 scalars that keep an
    fp64 module's precision, or CUMULATIVE, 1 / (num_batches_tracked + 1), which grows by one when all is done.
    Applying goes through x in the reverse of the statistics' order, and so begins with what is still in cache.
    Grid: n_blocks · n_splits. SHARED: n_splits > 1, the splits leave partials [3, n_splits, n_channels]; sync:
    2 + n_blocks. 1R, 1R1W, or both in one launch 1R1W of what fits in registers, the rest from cache.
    """
    TOGETHER: tl.constexpr = STATISTICS and APPLY
    IN_PLACES: tl.constexpr = AXIS == 0 and not FOLD and not TOGETHER  # sums down columns are dear: one at the end
    n_splits = tl.cdiv(n_groups, groups_per_split).to(tl.int32)
    n_blocks = tl.num_programs(0) // n_splits
    if TOGETHER and SHARED:
        block, split = take_place(sync_ptr, n_splits)
    else:
        program = tl.program_id(0) if STATISTICS else tl.num_programs(0) - 1 - tl.program_id(0)
        block = program % n_blocks
        split = program // n_blocks
    columns, lane_channels, in_range = lanes_of(
        block, block_vecs, n_column_vecs, columns_per_channel, V, LANES, AXIS, FOLD
    )
    n_channels = n_column_vecs if AXIS is None else n_column_vecs * V // columns_per_channel
    x_lanes = lanes_at(x_ptr, columns, lane_channels, x_channel_vecs, V, LANES, 1, AXIS)
    first, end = span(split, groups_per_split, n_groups, INDEX)
    last = first + (end - 1 - first) // T * T
    raw = tl.zeros([T, LANES], x_ptr.dtype.element_ty)
    if STATISTICS:
        lanes_per_channel: tl.constexpr = LANES if AXIS is None else 1
        wide: tl.constexpr = 1 if AXIS is None else LANES
        none = tl.zeros([1, wide], COMPUTE)
        moments = Moments(none, none, none)
        if IN_PLACES:
            mean = tl.zeros([T, LANES], COMPUTE)
            m2 = tl.zeros([T, LANES], COMPUTE)
            shift = none
        for start in range(first, end, T):
            mask = ((start + tl.arange(0, T))[:, None] < end) & in_range
            offsets = group_offsets(start, groups_per_sample, x_sample_vecs, x_group_vecs, V, 1, T)
            raw = tl.load(aligned(x_lanes + offsets, V, 1), mask=mask, other=0.0)
            seen = to_float(start - first, COMPUTE)
            count = to_float(tl.minimum(end - start, T), COMPUTE) * lanes_per_channel
            if IN_PLACES:
                if start == first:
                    _, shift, _ = centre(raw.to(COMPUTE), mask, count, AXIS)
                mean, m2 = take_in(scaled_from(raw.to(COMPUTE), shift), mask, T / (seen + T), mean, m2)
            else:
                _, of_tile = moments_of(raw.to(COMPUTE), mask, count, AXIS, CENTRED=True)
                moments = merge(seen * lanes_per_channel, moments, count, of_tile)
        if IN_PLACES:
            counts = tl.cdiv(tl.maximum(end - first - tl.arange(0, T)[:, None], 0), T)
            moments = merge_places(to_float(counts, COMPUTE), mean, m2, shift)
        per_group = V if AXIS is None else columns_per_channel
        if FOLD:
            rows = to_float(end - first, COMPUTE)
            moments = fold_moments(moments, rows, columns_per_channel, LANES, FOLD, WIDTH)
        channels, there = channels_of(block, block_vecs, n_column_vecs, columns_per_channel, V, LANES, AXIS, FOLD)
        total = n_groups.to(tl.int64) * per_group
        if SHARED:
            kind = n_splits.to(tl.int64) * n_channels
            slots = partials_ptr + split.to(tl.int64) * n_channels + channels
            tl.store(slots, moments.mean, mask=there)
            tl.store(slots + kind, moments.mean_lo, mask=there)
            tl.store(slots + 2 * kind, moments.m2, mask=there)
            comes_last = arrive(sync_ptr, block) == n_splits - 1
            if comes_last:
                split_size = groups_per_split.to(tl.int64) * per_group
                moments = merge_splits(
                    partials_ptr, channels, there, n_channels, n_splits, split_size, total, BLOCK_K, COMPUTE
                )
        else:
            comes_last: tl.constexpr = True
        if comes_last:
            rstd = finalise_statistics(
                moments,
                statistics_ptr,
                moments_ptr,
                running_mean_ptr,
                running_var_ptr,
                num_batches_tracked_ptr,
                channels,
                there,
                n_channels,
                total,
                momentum,
                momentum_rest,
                EPS,
                CUMULATIVE,
                LOCAL,
                COMPUTE,
            )
            tl.debug_barrier()
            if SHARED and APPLY:
                arrive(sync_ptr, block)
            elif SHARED or num_batches_tracked_ptr is not None:
                close(sync_ptr, block, n_blocks, num_batches_tracked_ptr)
        if SHARED and APPLY:
            wait(sync_ptr, block, n_splits + 1)
            if arrive(sync_ptr, block) == 2 * n_splits:
                close(sync_ptr, block, n_blocks, num_batches_tracked_ptr)
    if APPLY:
        if STATISTICS and not (SHARED or FOLD):
            mean = moments.mean
            mean_lo = moments.mean_lo
        else:
            mean, mean_lo, rstd = load_statistics(
                statistics_ptr, running_mean_ptr, running_var_ptr, lane_channels, in_range, n_channels, EPS, COMPUTE
            )
        scale = rstd * load_parameter(weight_ptr, lane_channels, in_range, 1.0, COMPUTE)
        bias = load_parameter(bias_ptr, lane_channels, in_range, 0.0, COMPUTE)
        y_sample_vecs, y_group_vecs, y_channel_vecs = dense_strides(n_column_vecs, groups_per_sample, AXIS)
        y_lanes = lanes_at(y_ptr, columns, lane_channels, y_channel_vecs, V, LANES, 1, AXIS)
        for swept in range(0, end - first, T):
            start = last - swept
            mask = ((start + tl.arange(0, T))[:, None] < end) & in_range
            if not TOGETHER or swept > 0:
                offsets = group_offsets(start, groups_per_sample, x_sample_vecs, x_group_vecs, V, 1, T)
                raw = tl.load(aligned(x_lanes + offsets, V, 1), mask=mask, other=0.0)
            z = ((raw.to(COMPUTE) - mean) - mean_lo) * scale + bias
            if residual_ptr is not None:
                residual_lanes = lanes_at(
                    residual_ptr, columns, lane_channels, residual_channel_vecs, V, LANES, 1, AXIS
                )
                offsets = group_offsets(start, groups_per_sample, residual_sample_vecs, residual_group_vecs, V, 1, T)
                z += tl.load(aligned(residual_lanes + offsets, V, 1), mask=mask, other=0.0).to(COMPUTE)
            if bits_ptr is not None:
                places, within = bytes_of(
                    bits_ptr, start, end, block, block_vecs, n_column_vecs, n_groups, V, LANES, AXIS, T
                )
                tl.store(places, pack(side_of_zero(z, ACTIVATION) & mask, bits_per_byte(LANES, AXIS)), mask=within)
            y = activate(z, ACTIVATION, SLOPE)
            offsets = group_offsets(start, groups_per_sample, y_sample_vecs, y_group_vecs, V, 1, T)
            tl.store(aligned(y_lanes + offsets, V, 1), y.to(y_ptr.dtype.element_ty), mask=mask)
