"""Computes BatchNorm of the channels of [samples, channels, positions]; tiles.py explains the layouts.

n_splits programs share a block of channels; each processes a range of groups_per_split groups. The last to arrive
merges all partial results, in fixed order. A call is one fused launch, or a reducing launch and an applying one.
"""

import triton
import triton.language as tl

from triton_norm.kernels.activations import activate, bits_per_byte, bytes_of, mask_of, pack
from triton_norm.kernels.clusters import moments_of_tiles, to_lanes
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
    Layout,
    Strides,
    Tile,
    channels_of,
    dense_strides,
    fold_moments,
    instance_offset,
    lanes_of,
    load_parameter,
    load_statistics,
    of_instance,
    parameters_of,
    span,
    tile_at,
    view_of,
)


@triton.jit
def merge_splits(partials_ptr, channels, n_splits, split_size, total, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns the moments [1, n] of whole channels, `total` elements each, merged from those of their splits.

    Args:
        partials_ptr: [3, n_splits, n_channels]: mean, mean_lo and m2.
        split_size: elements of a channel in each split; the last may have fewer.
    """
    kind = n_splits.to(tl.int64) * channels.n_channels
    zero = tl.zeros(channels.index.shape, COMPUTE)
    moments = Moments(zero, zero, zero)
    for start in range(0, n_splits, BLOCK_K):
        splits = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        there = (splits < n_splits) & channels.in_range
        slots = partials_ptr + splits * channels.n_channels + channels.index
        mean = tl.load(slots, mask=there, other=0.0, cache_modifier=".cg")
        mean_lo = tl.load(slots + kind, mask=there, other=0.0, cache_modifier=".cg")
        m2 = tl.load(slots + 2 * kind, mask=there, other=0.0, cache_modifier=".cg")
        counts = tl.maximum(tl.minimum(total - splits * split_size, split_size), 0).to(COMPUTE)
        seen = to_float(start * split_size, COMPUTE)
        count = to_float(tl.minimum(total - start * split_size, BLOCK_K * split_size), COMPUTE)
        moments = merge(seen, moments, count, merge_all(counts, Moments(mean, mean_lo, m2), count, 0))
    return moments


@triton.jit
def factor_of(momentum, momentum_rest, num_batches_tracked_ptr, CUMULATIVE: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns the weight of the batch in the running statistics: the momentum, or 1 / (batches + 1) if CUMULATIVE."""
    if CUMULATIVE:
        factor = 1.0 / to_float(tl.load(num_batches_tracked_ptr) + 1, COMPUTE)
    else:
        factor = to_float(momentum, COMPUTE) + to_float(momentum_rest, COMPUTE)
    return factor


@triton.jit
def move_running(ptr, channels, value, factor):
    """Sets running to (1 − factor) · running + factor · value, in the wider type of running and value."""
    WIDE: tl.constexpr = tl.float64 if ptr.dtype.element_ty == tl.float64 else value.dtype
    running, factor = tl.load(ptr + channels.index, mask=channels.in_range, other=0.0).to(WIDE), factor.to(WIDE)
    moved = (1.0 - factor) * running + factor * value
    tl.store(ptr + channels.index, moved.to(ptr.dtype.element_ty), mask=channels.in_range)


@triton.jit
def finalise_statistics(moments, statistics_ptr, moments_ptr, channels, total, EPS: tl.constexpr, LOCAL: tl.constexpr):
    """Stores statistics [3, n_channels] of channels, `total` elements each, and moments unless None. Returns rstd."""
    index, mask, n_channels = channels.index, channels.in_range, channels.n_channels
    rstd = tl.rsqrt(moments.m2 / to_float(total, moments.m2.dtype) + EPS)
    tl.store(statistics_ptr + index, moments.mean, mask=mask)
    tl.store(statistics_ptr + n_channels + index, moments.mean_lo, mask=mask)
    tl.store(statistics_ptr + 2 * n_channels + index, moments.m2 if LOCAL else rstd, mask=mask)
    if moments_ptr is not None:
        tl.store(moments_ptr + index, moments.mean, mask=mask)
        tl.store(moments_ptr + n_channels + index, moments.mean_lo, mask=mask)
        tl.store(moments_ptr + 2 * n_channels + index, moments.m2, mask=mask)
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
    instance_blocks,
    x_instance_vecs,
    residual_instance_vecs,
    parameter_runs,
    EPS: tl.constexpr,
    PER_STATISTIC: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    LOCAL: tl.constexpr,
    STATISTICS: tl.constexpr,
    RUN: tl.constexpr,
    APPLY: tl.constexpr,
    SHARED: tl.constexpr,
    TILES: tl.constexpr,
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
    BLOCKS: tl.constexpr,
):
    """Computes y = f(z) with z = (x − mean) · rstd · weight + bias + residual, the statistics of the channels, or both.

    If STATISTICS, reduces x to the batch's statistics, and updates the running ones with the batch's mean and unbiased
    variance: running = (1 − factor) · running + factor · batch, where factor = momentum + momentum_rest, or
    1 / (num_batches_tracked + 1) if CUMULATIVE; num_batches_tracked is incremented last.

    If APPLY, computes y. Without STATISTICS it reads them from statistics_ptr, or the running ones if that is None. It
    sweeps x in the reverse of the reduction's order, to start with the data still in cache.

    If both, in one fused launch, the programs of a block wait for each other, with their last tile of x in registers.

    Grid: n_blocks · n_splits.
    Bytes: STATISTICS reads x once. APPLY reads x, from cache if fused, and residual once, and writes y and bits once.

    Args:
        x_ptr, residual_ptr: [samples, channels, positions], strides (*_sample_vecs, *_group_vecs, *_channel_vecs) · V.
        y_ptr: dense, in x's layout.
        bits_ptr: uint8, a bit for each element of y, set where z > 0; or None.
        weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr: [n_channels], or None.
        statistics_ptr: [3, n_channels]: mean, mean_lo, and rstd, or M2 if LOCAL.
        moments_ptr: [3, n_channels]: mean, mean_lo and M2; or None.
        num_batches_tracked_ptr: one integer, or None.
        partials_ptr: workspace [3, n_splits, n_channels], used if SHARED.
        sync_ptr: 2 + n_blocks zeros.
        momentum, momentum_rest: two fp32 scalars whose sum keeps the precision of an fp64 momentum.
        LOCAL: the batch is one process's part of a larger one.
        RUN: elements of an access with a common weight and bias, V or 1, in a launch whose channels are the groups of a
            GroupNorm; None if each channel has one of its own.
        parameter_runs: adjacent elements of a group with a common weight and bias, divided by RUN; None if RUN is.
        SHARED: n_splits > 1.
        INDEX: integer type of group indices.
        TILES: tiles of a cluster that has whole channels in registers, or 0. Then WIDTH is 0.
        T: groups in a tile.
        BLOCK_K: splits merged at a time.
        BLOCKS: blocks of a cluster, or 1.
    """
    TILE: tl.constexpr = Tile(T, V, LANES, AXIS, FOLD, WIDTH)
    TOGETHER: tl.constexpr = STATISTICS and APPLY
    IN_PLACES: tl.constexpr = AXIS == 0 and not FOLD and not TOGETHER  # column sums are slow: one, at the end
    FOLDED_IN_CLUSTER: tl.constexpr = TILES > 0 and FOLD > 0
    COUNTS_LAST: tl.constexpr = CUMULATIVE and num_batches_tracked_ptr is not None  # every program reads the count
    n_splits = tl.cdiv(n_groups, groups_per_split).to(tl.int32)
    n_blocks = tl.num_programs(0) // n_splits
    if TOGETHER and SHARED:
        block, split = take_place(sync_ptr, n_splits)
    else:
        program = tl.program_id(0) if STATISTICS else tl.num_programs(0) - 1 - tl.program_id(0)
        block = program % n_blocks
        split = program // n_blocks
    layout = Layout(n_groups, n_column_vecs, block_vecs, columns_per_channel, groups_per_sample)
    inside = block
    if instance_blocks is not None:
        instance = block // instance_blocks
        inside = block % instance_blocks
        x_ptr += instance_offset(instance, x_instance_vecs, V)
        if residual_ptr is not None:
            residual_ptr += instance_offset(instance, residual_instance_vecs, V)
    columns, lanes = lanes_of(inside, layout, TILE)
    x = view_of(x_ptr, Strides(x_sample_vecs, x_group_vecs, x_channel_vecs), columns, lanes, TILE)
    first, end = span(split, groups_per_split, n_groups, INDEX)
    last = first + (end - 1 - first) // T * T
    raw = tl.zeros([T, LANES], x_ptr.dtype.element_ty)
    if STATISTICS:
        lanes_per_channel: tl.constexpr = LANES if AXIS is None else 1
        wide: tl.constexpr = 1 if AXIS is None else LANES
        zero = tl.zeros([1, wide], COMPUTE)
        moments = Moments(zero, zero, zero)
        if IN_PLACES:
            mean = tl.zeros([T, LANES], COMPUTE)
            m2 = tl.zeros([T, LANES], COMPUTE)
            shift = zero
        if COUNTS_LAST and TILES and running_mean_ptr is not None:
            # Every block of a cluster has read the count before one of them arrives: the sums' barriers come first.
            factor = factor_of(momentum, momentum_rest, num_batches_tracked_ptr, CUMULATIVE, COMPUTE)
        if TILES:
            tiles = ()
            masks = ()
            for place in tl.static_range(TILES):
                mask = ((place * T + tl.arange(0, T))[:, None] < end) & lanes.in_range
                tiles += (tl.load(tile_at(x, place * T, layout, TILE), mask=mask, other=0.0),)
                masks += (mask,)
            count = to_float(end, COMPUTE) * (columns_per_channel if FOLD else lanes_per_channel)
            moments, mean, mean_lo = moments_of_tiles(tiles, masks, count, columns_per_channel, TILE, BLOCKS)
        else:
            for start in range(first, end, T):
                mask = ((start + tl.arange(0, T))[:, None] < end) & lanes.in_range
                raw = tl.load(tile_at(x, start, layout, TILE), mask=mask, other=0.0)
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
        if FOLD and WIDTH:
            rows = to_float(end - first, COMPUTE)
            moments = fold_moments(moments, rows, columns_per_channel, TILE)
        channels = channels_of(inside, lanes, layout, TILE)
        if instance_blocks is not None:
            channels = of_instance(channels, instance, n_blocks // instance_blocks, 1)
        total = n_groups.to(tl.int64) * per_group
        if SHARED:
            kind = n_splits.to(tl.int64) * channels.n_channels
            slots = partials_ptr + split.to(tl.int64) * channels.n_channels + channels.index
            tl.store(slots, moments.mean, mask=channels.in_range)
            tl.store(slots + kind, moments.mean_lo, mask=channels.in_range)
            tl.store(slots + 2 * kind, moments.m2, mask=channels.in_range)
            comes_last = arrive(sync_ptr, block) == n_splits - 1
            if comes_last:
                split_size = groups_per_split.to(tl.int64) * per_group
                moments = merge_splits(partials_ptr, channels, n_splits, split_size, total, BLOCK_K, COMPUTE)
        else:
            comes_last: tl.constexpr = True
        if comes_last:
            rstd = finalise_statistics(moments, statistics_ptr, moments_ptr, channels, total, EPS, LOCAL)
            if running_mean_ptr is not None:
                if not (COUNTS_LAST and TILES):
                    factor = factor_of(momentum, momentum_rest, num_batches_tracked_ptr, CUMULATIVE, COMPUTE)
                move_running(running_mean_ptr, channels, moments.mean, factor)
                move_running(running_var_ptr, channels, moments.m2 / to_float(total - 1, COMPUTE), factor)
            if SHARED or (FOLD and WIDTH) or COUNTS_LAST:
                tl.debug_barrier()
            if SHARED and APPLY:
                arrive(sync_ptr, block)
            elif SHARED or COUNTS_LAST:
                close(sync_ptr, block, n_blocks, num_batches_tracked_ptr)
            elif num_batches_tracked_ptr is not None:
                if block == 0:
                    tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)
        if SHARED and APPLY:
            wait(sync_ptr, block, n_splits + 1)
            if arrive(sync_ptr, block) == 2 * n_splits:
                close(sync_ptr, block, n_blocks, num_batches_tracked_ptr)
    if APPLY:
        if FOLDED_IN_CLUSTER:
            if RUN is None:
                scale = rstd * load_parameter(weight_ptr, channels, 1.0, COMPUTE)
                scale = to_lanes(scale, columns_per_channel, TILE, BLOCKS)
                bias = to_lanes(load_parameter(bias_ptr, channels, 0.0, COMPUTE), columns_per_channel, TILE, BLOCKS)
            else:
                rstd = to_lanes(rstd, columns_per_channel, TILE, BLOCKS)
        elif STATISTICS and not (SHARED or FOLD):
            mean = moments.mean
            mean_lo = moments.mean_lo
        else:
            normalized = lanes
            if instance_blocks is not None:
                normalized = of_instance(lanes, instance, n_blocks // instance_blocks, PER_STATISTIC)
            mean, mean_lo, rstd = load_statistics(
                statistics_ptr, running_mean_ptr, running_var_ptr, normalized, EPS, COMPUTE
            )
        if RUN is None and not FOLDED_IN_CLUSTER:
            scale = rstd * load_parameter(weight_ptr, lanes, 1.0, COMPUTE)
            bias = load_parameter(bias_ptr, lanes, 0.0, COMPUTE)
        y_strides = dense_strides(layout, TILE)
        if instance_blocks is not None:
            y_ptr += instance_offset(instance, y_strides.sample * (n_groups // groups_per_sample), V)
        y = view_of(y_ptr, y_strides, columns, lanes, TILE)
        for place in tl.static_range(TILES if TILES else 1):
            # A tile of several has a loop of its own: without one, an epilogue's registers for all tiles were spilled.
            for swept in range(place * T, tl.minimum(end, place * T + T) if TILES else end - first, T):
                start = last - swept
                mask = ((start + tl.arange(0, T))[:, None] < end) & lanes.in_range
                if TILES:
                    raw = tiles[TILES - 1 - place]
                elif not TOGETHER or swept > 0:
                    raw = tl.load(tile_at(x, start, layout, TILE), mask=mask, other=0.0)
                if RUN is not None:
                    own = parameters_of(start, inside, columns, lanes, parameter_runs, layout, TILE, RUN)
                    scale = rstd * load_parameter(weight_ptr, own, 1.0, COMPUTE)
                    bias = load_parameter(bias_ptr, own, 0.0, COMPUTE)
                z = ((raw.to(COMPUTE) - mean) - mean_lo) * scale + bias
                if residual_ptr is not None:
                    residual_strides = Strides(residual_sample_vecs, residual_group_vecs, residual_channel_vecs)
                    residual = view_of(residual_ptr, residual_strides, columns, lanes, TILE)
                    z += tl.load(tile_at(residual, start, layout, TILE), mask=mask, other=0.0).to(COMPUTE)
                if bits_ptr is not None:
                    places, within = bytes_of(bits_ptr, start, end, block, layout, TILE)
                    tl.store(places, pack(mask_of(z, ACTIVATION) & mask, bits_per_byte(LANES, AXIS)), mask=within)
                activated = activate(z, ACTIVATION, SLOPE)
                tl.store(tile_at(y, start, layout, TILE), activated.to(y_ptr.dtype.element_ty), mask=mask)
