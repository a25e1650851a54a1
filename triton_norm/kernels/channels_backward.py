"""Computes the gradients of BatchNorm and its fused residual and activation; channels.py explains the splits."""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_norm.kernels.activations import activate_backward, bits_per_byte, bytes_of, gradient_by_mask, unpack
from triton_norm.kernels.clusters import channel_sum, to_lanes
from triton_norm.kernels.exchange import arrive, close, take_place, wait
from triton_norm.kernels.moments import tile_sum, to_float
from triton_norm.kernels.tiles import (
    Channels,
    Layout,
    Strides,
    Tile,
    aligned,
    channels_of,
    dense_strides,
    fold_sum,
    group_offsets,
    instance_offset,
    lanes_of,
    load_parameter,
    load_statistics,
    of_instance,
    span,
    tile_at,
    view_of,
)


class Sums(NamedTuple):
    """Bundles the sums of a channel: Σ dz and Σ dz · (x − mean)."""

    dz: tl.tensor
    dz_centred: tl.tensor


@triton.jit
def merge_sums(partials_ptr, channels, n_splits, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns the sums [1, n] of whole channels from those of their splits, [2, n_splits, n_channels]."""
    kind = n_splits.to(tl.int64) * channels.n_channels
    sum_dz = tl.zeros(channels.index.shape, COMPUTE)
    sum_dz_centred = tl.zeros(channels.index.shape, COMPUTE)
    for start in range(0, n_splits, BLOCK_K):
        splits = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        there = (splits < n_splits) & channels.in_range
        slots = partials_ptr + splits * channels.n_channels + channels.index
        sum_dz += tile_sum(tl.load(slots, mask=there, other=0.0, cache_modifier=".cg"), 0)
        sum_dz_centred += tile_sum(tl.load(slots + kind, mask=there, other=0.0, cache_modifier=".cg"), 0)
    return Sums(sum_dz, sum_dz_centred)


@triton.jit
def finalise_sums(sums, rstd, dweight_ptr, dbias_ptr, means_ptr, channels, total, LOCAL: tl.constexpr):
    """Stores dweight, dbias and means = (Σ dz, Σ dz · x_hat · rstd) / total, undivided if LOCAL, unless None."""
    COMPUTE: tl.constexpr = rstd.dtype
    index, mask = channels.index, channels.in_range
    dweight = sums.dz_centred * rstd
    if dweight_ptr is not None:
        tl.store(dweight_ptr + index, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + index, sums.dz.to(dbias_ptr.dtype.element_ty), mask=mask)
    if means_ptr is not None:
        fraction = to_float(1, COMPUTE) if LOCAL else 1.0 / to_float(total, COMPUTE)
        tl.store(means_ptr + index, sums.dz * fraction, mask=mask)
        tl.store(means_ptr + channels.n_channels + index, dweight * fraction * rstd, mask=mask)


@triton.jit
def store_columns(ptr, values, row, columns):
    """Stores the values [1, n] of some columns in one of the rows at ptr, unless that is None."""
    if ptr is not None:
        tl.store(ptr + row * columns.n_channels + columns.index, values, mask=columns.in_range)


@triton.jit(do_not_specialize=["n_groups", "groups_per_split"])
def channels_backward_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    bits_ptr,
    dx_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    running_mean_ptr,
    running_var_ptr,
    dweight_ptr,
    dbias_ptr,
    means_ptr,
    partials_ptr,
    sync_ptr,
    n_groups,
    groups_per_split,
    n_column_vecs,
    block_vecs,
    columns_per_channel,
    groups_per_sample,
    x_sample_vecs,
    x_group_vecs,
    x_channel_vecs,
    dy_sample_vecs,
    dy_group_vecs,
    dy_channel_vecs,
    residual_sample_vecs,
    residual_group_vecs,
    residual_channel_vecs,
    instance_blocks,
    x_instance_vecs,
    dy_instance_vecs,
    residual_instance_vecs,
    DY_SPREAD: tl.constexpr,
    EPS: tl.constexpr,
    PER_STATISTIC: tl.constexpr,
    LOCAL: tl.constexpr,
    CONSTANT: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    REDUCE: tl.constexpr,
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
    BLOCKS: tl.constexpr,
):
    """Computes dx, dresidual = dz, dweight = Σ dz · x_hat and dbias = Σ dz, from dz = dy · f'(z).

    f'(z) is computed from bits, if any; otherwise z is recomputed from x and residual.

    If REDUCE, computes dweight and dbias, and stores means for APPLY.

    If APPLY, computes dresidual and dx = (dz − mean(dz) − (x − mean) · mean(dz · x_hat) · rstd) · rstd · weight, or
    dx = dz · rstd · weight if the statistics are CONSTANT.

    If both, in one fused launch, the programs of a block wait for each other, unless CONSTANT, with their last tiles of
    x and dy in registers.

    Grid: n_blocks · n_splits.
    Bytes: REDUCE reads x and dy once. APPLY reads them, from cache if fused, and writes dx and dresidual once.

    Args:
        dy_ptr, x_ptr, residual_ptr: [samples, channels, positions], strides (*_sample_vecs, *_group_vecs,
            *_channel_vecs) · V, but dy's not multiplied if DY_SPREAD is 0; residual may be None.
        bits_ptr: bits written by the forward, or None.
        dx_ptr, dresidual_ptr: dense, in x's layout; or None.
        weight_ptr, bias_ptr, dweight_ptr, dbias_ptr, running_mean_ptr, running_var_ptr: [n_channels], or None.
        statistics_ptr: [3, n_channels]: mean, mean_lo and rstd; None to use the running ones.
        means_ptr: [2, n_channels], mean(dz) and mean(dz · x_hat) · rstd; None if APPLY does not need them, unused if
            both halves are one program's, unless that is one block with folded channels.
        partials_ptr: workspace [2, n_splits, n_channels], used if SHARED.
        sync_ptr: 2 + n_blocks zeros.
        DY_SPREAD: 0 if dy is one element expanded over a channel's lanes, else 1.
        BY_COLUMN: channels are groups of a GroupNorm, folded, and each column has a weight and a bias of its own. Then
            dweight_ptr and dbias_ptr are [instances, n_splits, columns], the sums of each program, or None. A split is
            one tile, which T has room for.
        LOCAL, SHARED, INDEX, T, BLOCK_K, BLOCKS: as in channels_forward_kernel. In a cluster WIDTH is 0.
    """
    TILE: tl.constexpr = Tile(T, V, LANES, AXIS, FOLD, WIDTH)
    TOGETHER: tl.constexpr = REDUCE and APPLY and not CONSTANT
    # A program computes the means that it needs itself.
    ALONE: tl.constexpr = TOGETHER and not (SHARED or (FOLD and WIDTH))
    FOLDED_IN_CLUSTER: tl.constexpr = ALONE and FOLD > 0
    NEEDS_Z: tl.constexpr = ACTIVATION is not None and bits_ptr is None
    WEIGHTED: tl.constexpr = BY_COLUMN or (PER_STATISTIC is not None and PER_STATISTIC > 1)
    NEEDS_X: tl.constexpr = REDUCE or not CONSTANT or NEEDS_Z
    n_splits = tl.cdiv(n_groups, groups_per_split).to(tl.int32)
    n_blocks = tl.num_programs(0) // n_splits
    if TOGETHER and SHARED:
        block, split = take_place(sync_ptr, n_splits)
    else:
        program = tl.program_id(0) if REDUCE else tl.num_programs(0) - 1 - tl.program_id(0)
        block = program % n_blocks
        split = program // n_blocks
    layout = Layout(n_groups, n_column_vecs, block_vecs, columns_per_channel, groups_per_sample)
    inside = block
    if instance_blocks is not None:
        instance = block // instance_blocks
        inside = block % instance_blocks
        x_ptr += instance_offset(instance, x_instance_vecs, V)
        dy_ptr += instance_offset(instance, dy_instance_vecs, V if DY_SPREAD else 1)
        if residual_ptr is not None:
            residual_ptr += instance_offset(instance, residual_instance_vecs, V)
    columns, lanes = lanes_of(inside, layout, TILE)
    dy_strides = Strides(dy_sample_vecs, dy_group_vecs, dy_channel_vecs)
    dy = view_of(dy_ptr, dy_strides, columns, lanes, TILE, DY_SPREAD)
    x = view_of(x_ptr, Strides(x_sample_vecs, x_group_vecs, x_channel_vecs), columns, lanes, TILE)
    parameters = lanes
    if FOLDED_IN_CLUSTER:
        parameters = channels_of(inside, lanes, layout, TILE)
    normalized = parameters
    if instance_blocks is not None:
        normalized = of_instance(parameters, instance, n_blocks // instance_blocks, PER_STATISTIC)
    mean, mean_lo, rstd = load_statistics(statistics_ptr, running_mean_ptr, running_var_ptr, normalized, EPS, COMPUTE)
    if BY_COLUMN:
        parameters = Channels(columns, lanes.in_range, n_column_vecs * V)
    weight = load_parameter(weight_ptr, parameters, 1.0, COMPUTE)
    scale = rstd * weight
    bias = load_parameter(bias_ptr, parameters, 0.0, COMPUTE)
    if FOLDED_IN_CLUSTER:
        mean = to_lanes(mean, columns_per_channel, TILE, BLOCKS)
        mean_lo = to_lanes(mean_lo, columns_per_channel, TILE, BLOCKS)
        scale = to_lanes(scale, columns_per_channel, TILE, BLOCKS)
        bias = to_lanes(bias, columns_per_channel, TILE, BLOCKS)
    mean_dz = tl.zeros([1, 1], COMPUTE)
    slope = tl.zeros([1, 1], COMPUTE)
    if APPLY and not CONSTANT and not REDUCE:
        mean_dz = load_parameter(means_ptr, normalized, 0.0, COMPUTE)
        slope = load_parameter(means_ptr + normalized.n_channels, normalized, 0.0, COMPUTE)
    first, end = span(split, groups_per_split, n_groups, INDEX)
    last = first + (end - 1 - first) // T * T
    IN_PLACES: tl.constexpr = AXIS == 0 and not TOGETHER
    SUMS: tl.constexpr = (1, FOLD, 1) if FOLDED_IN_CLUSTER else (T if IN_PLACES else 1, 1 if AXIS is None else LANES)
    sum_dz = tl.zeros(SUMS, COMPUTE)
    sum_dz_centred = tl.zeros_like(sum_dz)
    raw_dy = tl.zeros([T, LANES], dy_ptr.dtype.element_ty)
    raw_x = tl.zeros([T, LANES], x_ptr.dtype.element_ty)
    SWEEPS: tl.constexpr = 2 if TOGETHER else 1
    for sweep in tl.static_range(SWEEPS):
        for swept in range(0, T if BY_COLUMN else end - first, T):
            start = first + swept if REDUCE and sweep == 0 else last - swept
            mask = ((start + tl.arange(0, T))[:, None] < end) & lanes.in_range
            if sweep == 0 or swept > 0:
                raw_dy = tl.load(tile_at(dy, start, layout, TILE, DY_SPREAD), mask=mask, other=0.0)
                if NEEDS_X:
                    raw_x = tl.load(tile_at(x, start, layout, TILE), mask=mask, other=0.0)
            dz = raw_dy.to(COMPUTE)
            centred = tl.where(mask, (raw_x.to(COMPUTE) - mean) - mean_lo, 0.0)
            if ACTIVATION is not None:
                if bits_ptr is not None:
                    places, within = bytes_of(bits_ptr, start, end, block, layout, TILE)
                    packed = tl.load(places, mask=within, other=0)
                    passing = unpack(packed, T, LANES, bits_per_byte(LANES, AXIS))
                    dz = gradient_by_mask(dz, passing, ACTIVATION, SLOPE)
                else:
                    if BY_COLUMN:  # without scale, which would take registers
                        z = centred * rstd * weight + bias
                    else:
                        z = centred * scale + bias
                    if residual_ptr is not None:
                        residual_strides = Strides(residual_sample_vecs, residual_group_vecs, residual_channel_vecs)
                        residual = view_of(residual_ptr, residual_strides, columns, lanes, TILE)
                        z += tl.load(tile_at(residual, start, layout, TILE), mask=mask, other=0.0).to(COMPUTE)
                    dz = activate_backward(dz, z, ACTIVATION, SLOPE)
            if REDUCE and sweep == 0:
                if IN_PLACES:
                    sum_dz += dz
                    sum_dz_centred += dz * centred
                else:
                    sum_dz += channel_sum(dz, columns_per_channel, TILE, BLOCKS)
                    sum_dz_centred += channel_sum(dz * centred, columns_per_channel, TILE, BLOCKS)
            if APPLY and sweep == SWEEPS - 1:
                strides = dense_strides(layout, TILE)
                offsets = group_offsets(start, layout, strides, TILE)
                if instance_blocks is not None:
                    offsets += instance_offset(instance, strides.sample * (n_groups // groups_per_sample), V)
                if dx_ptr is not None:
                    dx_lanes = view_of(dx_ptr, strides, columns, lanes, TILE).lanes
                    if WEIGHTED:
                        dx = (dz * weight - mean_dz - centred * slope) * rstd
                    else:
                        dx = dz if CONSTANT else dz - mean_dz - centred * slope
                        dx *= scale
                    tl.store(aligned(dx_lanes + offsets, V), dx.to(dx_ptr.dtype.element_ty), mask=mask)
                if dresidual_ptr is not None:
                    dresidual_lanes = view_of(dresidual_ptr, strides, columns, lanes, TILE).lanes
                    dresidual = dz.to(dresidual_ptr.dtype.element_ty)
                    tl.store(aligned(dresidual_lanes + offsets, V), dresidual, mask=mask)
        if REDUCE and sweep == 0:
            if IN_PLACES:
                sum_dz = tile_sum(sum_dz, AXIS)
                sum_dz_centred = tile_sum(sum_dz_centred, AXIS)
            if BY_COLUMN:
                row = instance.to(tl.int64) * n_splits + split
                store_columns(dweight_ptr, sum_dz_centred * rstd, row, parameters)
                store_columns(dbias_ptr, sum_dz, row, parameters)
                sum_dz *= weight
                sum_dz_centred *= weight
            if FOLD and WIDTH:
                sum_dz = fold_sum(sum_dz, columns_per_channel, TILE)
                sum_dz_centred = fold_sum(sum_dz_centred, columns_per_channel, TILE)
            sums = Sums(sum_dz, sum_dz_centred)
            channels = channels_of(inside, lanes, layout, TILE)
            channel_rstd = rstd
            if FOLD and WIDTH:
                folded = channels
                if instance_blocks is not None:
                    folded = of_instance(channels, instance, n_blocks // instance_blocks, PER_STATISTIC)
                _, _, channel_rstd = load_statistics(
                    statistics_ptr, running_mean_ptr, running_var_ptr, folded, EPS, COMPUTE
                )
            if instance_blocks is not None:
                channels = of_instance(channels, instance, n_blocks // instance_blocks, 1)
            total = n_groups.to(tl.int64) * (V if AXIS is None else columns_per_channel)
            if SHARED:
                kind = n_splits.to(tl.int64) * channels.n_channels
                slots = partials_ptr + split.to(tl.int64) * channels.n_channels + channels.index
                tl.store(slots, sum_dz, mask=channels.in_range)
                tl.store(slots + kind, sum_dz_centred, mask=channels.in_range)
                comes_last = arrive(sync_ptr, block) == n_splits - 1
                if comes_last:
                    sums = merge_sums(partials_ptr, channels, n_splits, BLOCK_K, COMPUTE)
            else:
                comes_last: tl.constexpr = True
            if comes_last:
                left_ptr = None if ALONE else means_ptr
                if BY_COLUMN:
                    finalise_sums(sums, channel_rstd, None, None, left_ptr, channels, total, LOCAL)
                else:
                    finalise_sums(sums, channel_rstd, dweight_ptr, dbias_ptr, left_ptr, channels, total, LOCAL)
                if SHARED or (FOLD and WIDTH):
                    tl.debug_barrier()
                if SHARED and TOGETHER:
                    arrive(sync_ptr, block)
                elif SHARED:
                    close(sync_ptr, block, n_blocks, None)
            if SHARED and TOGETHER:
                wait(sync_ptr, block, n_splits + 1)
                if arrive(sync_ptr, block) == 2 * n_splits:
                    close(sync_ptr, block, n_blocks, None)
            if ALONE:
                fraction = 1.0 / to_float(total, COMPUTE)
                mean_dz = sums.dz * fraction
                slope = sums.dz_centred * rstd * fraction * rstd
                if FOLD:
                    mean_dz = to_lanes(mean_dz, columns_per_channel, TILE, BLOCKS)
                    slope = to_lanes(slope, columns_per_channel, TILE, BLOCKS)
            elif TOGETHER:
                mean_dz = tl.load(means_ptr + normalized.index, mask=lanes.in_range, other=0.0, cache_modifier=".cg")
                slopes = means_ptr + normalized.n_channels + normalized.index
                slope = tl.load(slopes, mask=lanes.in_range, other=0.0, cache_modifier=".cg")
