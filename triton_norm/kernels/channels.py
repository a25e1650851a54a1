"""BatchNorm over the channels of [samples, channels, positions]; tiles.py says how either layout becomes tiles.

Every reduction is split: n_blocks blocks of channels, times the spans of `groups_per_split` groups that cover them, are
the grid of the kernels that sweep x; what the spans leave is merged, or summed, in fixed order by a finalise kernel.
"""

import triton
import triton.language as tl

from triton_norm.kernels.moments import centre, merge, tile_sum, to_float
from triton_norm.kernels.tiles import (
    channels_of,
    dense_strides,
    group_offsets,
    lanes_at,
    load_parameter,
    load_rstd,
    load_tile,
    span,
)


@triton.jit(do_not_specialize=["n_groups", "groups_per_split"])
def channels_statistics_kernel(
    x_ptr,
    means_ptr,
    rests_ptr,
    m2s_ptr,
    n_channel_vecs,
    n_blocks,
    n_groups,
    groups_per_split,
    groups_per_sample,
    x_sample_vecs,
    x_group_vecs,
    x_channel_vecs,
    V: tl.constexpr,
    LANES: tl.constexpr,
    AXIS: tl.constexpr,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Mean, as means + rests to twice the precision, and centred sum of squares m2s of each split of each channel.

    All [n_splits, n_channels]. 1R.
    """
    split = tl.program_id(0) // n_blocks
    channels = channels_of(tl.program_id(0) % n_blocks, LANES, AXIS)
    n_channels = n_channel_vecs if AXIS is None else n_channel_vecs * V
    in_range = channels < n_channels
    x_lanes = lanes_at(x_ptr, channels, x_channel_vecs, V, LANES, 1, AXIS)
    first, end = span(split, groups_per_split, n_groups)
    width: tl.constexpr = 1 if AXIS is None else LANES
    lanes_per_channel: tl.constexpr = LANES if AXIS is None else 1
    mean = tl.zeros([1, width], COMPUTE)
    rest = tl.zeros([1, width], COMPUTE)
    m2 = tl.zeros([1, width], COMPUTE)
    for start in range(first, end, T):
        mask = ((start + tl.arange(0, T))[:, None] < end) & in_range
        offsets = group_offsets(start, groups_per_sample, x_sample_vecs, x_group_vecs, V, 1, T)
        x = load_tile(x_lanes + offsets, mask, COMPUTE)
        seen = to_float((start - first) * lanes_per_channel, COMPUTE)
        count = to_float(tl.minimum(end - start, T) * lanes_per_channel, COMPUTE)
        centred, tile_mean, tile_rest = centre(x, mask, count, AXIS)
        tile_m2 = tile_sum(centred * centred, AXIS)
        mean, rest, m2 = merge(seen, mean, rest, m2, count, tile_mean, tile_rest, tile_m2)
    slots = split.to(tl.int64) * n_channels + channels
    tl.store(means_ptr + slots, mean, mask=in_range)
    tl.store(rests_ptr + slots, rest, mask=in_range)
    tl.store(m2s_ptr + slots, m2, mask=in_range)


@triton.jit
def merge_splits(
    means_ptr,
    rests_ptr,
    m2s_ptr,
    channels,
    in_range,
    n_channels,
    n_splits,
    split_size,
    total,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(mean, rest, M2) [1, BLOCK_C] of whole channels from those of their splits, the last of which may be shorter.

    Means are summed as differences from the first, so that equal ones merge to themselves exactly.
    """
    base = tl.load(means_ptr + channels, mask=in_range, other=0.0)
    shift = tl.zeros_like(base)
    for start in range(0, n_splits, BLOCK_K):
        splits = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        mask = (splits < n_splits) & in_range
        slots = splits * n_channels + channels
        share = tl.minimum(total - splits * split_size, split_size).to(COMPUTE) / to_float(total, COMPUTE)
        delta = tl.load(means_ptr + slots, mask=mask, other=0.0) - base
        delta += tl.load(rests_ptr + slots, mask=mask, other=0.0)
        shift += tile_sum(tl.where(mask, delta * share, 0.0), 0)
    mean = base + shift
    rest = (base - mean) + shift
    m2 = tl.zeros_like(base)
    for start in range(0, n_splits, BLOCK_K):
        splits = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        mask = (splits < n_splits) & in_range
        slots = splits * n_channels + channels
        count = tl.minimum(total - splits * split_size, split_size).to(COMPUTE)
        delta = tl.load(means_ptr + slots, mask=mask, other=0.0) - mean
        delta += tl.load(rests_ptr + slots, mask=mask, other=0.0) - rest
        m2s = tl.load(m2s_ptr + slots, mask=mask, other=0.0)
        m2 += tile_sum(tl.where(mask, m2s + delta * (delta * count), 0.0), 0)
    return mean, rest, m2


@triton.jit
def move_running(ptr, channels, mask, value, momentum, COMPUTE: tl.constexpr):
    """running = (1 − momentum) · running + momentum · value, in place."""
    running = tl.load(ptr + channels, mask=mask, other=0.0).to(COMPUTE)
    moved = (1.0 - momentum) * running + momentum * value
    tl.store(ptr + channels, moved.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_splits", "split_size", "total"])
def channels_finalise_statistics_kernel(
    means_ptr,
    rests_ptr,
    m2s_ptr,
    mean_ptr,
    rest_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    n_channels,
    n_splits,
    split_size,
    total,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """mean + rest and rstd [n_channels] from those of the splits, `total` elements a channel; moves running statistics.

    The running variance is the unbiased one. Its momentum is momentum + momentum_rest, two fp32 scalars that keep an
    fp64 module's precision; CUMULATIVE: 1 / num_batches_tracked, counted before the launch. Otherwise the first program
    counts. The running statistics, and the counter, may be None. Grid: cdiv(n_channels, BLOCK_C).
    """
    channels = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_range = channels < n_channels
    mean, rest, m2 = merge_splits(
        means_ptr,
        rests_ptr,
        m2s_ptr,
        channels,
        in_range,
        n_channels,
        n_splits,
        split_size,
        total,
        BLOCK_K,
        COMPUTE,
    )
    tl.store(mean_ptr + channels, mean, mask=in_range)
    tl.store(rest_ptr + channels, rest, mask=in_range)
    tl.store(rstd_ptr + channels, tl.rsqrt(m2 / to_float(total, COMPUTE) + EPS), mask=in_range)
    if running_mean_ptr is not None:
        if CUMULATIVE:
            factor = 1.0 / to_float(tl.load(num_batches_tracked_ptr), COMPUTE)
        else:
            factor = to_float(momentum, COMPUTE) + to_float(momentum_rest, COMPUTE)
        move_running(running_mean_ptr, channels, in_range, mean, factor, COMPUTE)
        move_running(running_var_ptr, channels, in_range, m2 / to_float(total - 1, COMPUTE), factor, COMPUTE)
    if num_batches_tracked_ptr is not None and not CUMULATIVE:
        if tl.program_id(0) == 0:
            tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)


@triton.jit(do_not_specialize=["n_groups", "groups_per_split"])
def channels_apply_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    rest_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    n_channel_vecs,
    n_blocks,
    n_groups,
    groups_per_split,
    groups_per_sample,
    x_sample_vecs,
    x_group_vecs,
    x_channel_vecs,
    EPS: tl.constexpr,
    FROM_VARIANCE: tl.constexpr,
    V: tl.constexpr,
    LANES: tl.constexpr,
    AXIS: tl.constexpr,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """y = (x − mean − rest) · rstd · weight + bias, y without gaps in x's layout. 1R1W.

    Sweeps in the reverse of the statistics' order, and so begins with what is still in cache.
    FROM_VARIANCE: rstd_ptr holds variances. rest_ptr, weight_ptr and bias_ptr may be None.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    split = program // n_blocks
    channels = channels_of(program % n_blocks, LANES, AXIS)
    n_channels = n_channel_vecs if AXIS is None else n_channel_vecs * V
    in_range = channels < n_channels
    y_sample_vecs, y_group_vecs, y_channel_vecs = dense_strides(n_channel_vecs, groups_per_sample, AXIS)
    x_lanes = lanes_at(x_ptr, channels, x_channel_vecs, V, LANES, 1, AXIS)
    y_lanes = lanes_at(y_ptr, channels, y_channel_vecs, V, LANES, 1, AXIS)
    mean = load_parameter(mean_ptr, channels, in_range, 0.0, COMPUTE)
    rest = load_parameter(rest_ptr, channels, in_range, 0.0, COMPUTE)
    scale = load_rstd(rstd_ptr, channels, in_range, EPS, FROM_VARIANCE, COMPUTE)
    scale *= load_parameter(weight_ptr, channels, in_range, 1.0, COMPUTE)
    bias = load_parameter(bias_ptr, channels, in_range, 0.0, COMPUTE)
    first, end = span(split, groups_per_split, n_groups)
    last = first + (end - 1 - first) // T * T
    for swept in range(0, end - first, T):
        start = last - swept
        mask = ((start + tl.arange(0, T))[:, None] < end) & in_range
        x_offsets = group_offsets(start, groups_per_sample, x_sample_vecs, x_group_vecs, V, 1, T)
        y_offsets = group_offsets(start, groups_per_sample, y_sample_vecs, y_group_vecs, V, 1, T)
        centred = (load_tile(x_lanes + x_offsets, mask, COMPUTE) - mean) - rest
        y = centred * scale + bias
        tl.store(y_lanes + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_groups", "groups_per_split"])
def channels_backward_reduce_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    sums_dy_ptr,
    sums_dy_centred_ptr,
    n_channel_vecs,
    n_blocks,
    n_groups,
    groups_per_split,
    groups_per_sample,
    dy_sample_vecs,
    dy_group_vecs,
    dy_channel_vecs,
    x_sample_vecs,
    x_group_vecs,
    x_channel_vecs,
    DY_LANE_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    FROM_VARIANCE: tl.constexpr,
    V: tl.constexpr,
    LANES: tl.constexpr,
    AXIS: tl.constexpr,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Σ dy and Σ dy · (x − mean) of each split of each channel, [n_splits, n_channels] both. 2R.

    Where dx_ptr is not None the statistics are constants, and dx = dy · rstd · weight is written in the same sweep:
    2R1W, and 1R1W where sums_dy_ptr is None and nothing is summed.
    """
    split = tl.program_id(0) // n_blocks
    channels = channels_of(tl.program_id(0) % n_blocks, LANES, AXIS)
    n_channels = n_channel_vecs if AXIS is None else n_channel_vecs * V
    in_range = channels < n_channels
    dy_lanes = lanes_at(dy_ptr, channels, dy_channel_vecs, V, LANES, DY_LANE_STRIDE, AXIS)
    x_lanes = lanes_at(x_ptr, channels, x_channel_vecs, V, LANES, 1, AXIS)
    dx_sample_vecs, dx_group_vecs, dx_channel_vecs = dense_strides(n_channel_vecs, groups_per_sample, AXIS)
    mean = load_parameter(mean_ptr, channels, in_range, 0.0, COMPUTE)
    scale = load_rstd(rstd_ptr, channels, in_range, EPS, FROM_VARIANCE, COMPUTE)
    scale *= load_parameter(weight_ptr, channels, in_range, 1.0, COMPUTE)
    first, end = span(split, groups_per_split, n_groups)
    width: tl.constexpr = 1 if AXIS is None else LANES
    sum_dy = tl.zeros([1, width], COMPUTE)
    sum_dy_centred = tl.zeros([1, width], COMPUTE)
    for start in range(first, end, T):
        mask = ((start + tl.arange(0, T))[:, None] < end) & in_range
        dy_offsets = group_offsets(start, groups_per_sample, dy_sample_vecs, dy_group_vecs, V, DY_LANE_STRIDE, T)
        dy = load_tile(dy_lanes + dy_offsets, mask, COMPUTE)
        if sums_dy_ptr is not None:
            x_offsets = group_offsets(start, groups_per_sample, x_sample_vecs, x_group_vecs, V, 1, T)
            centred = tl.where(mask, load_tile(x_lanes + x_offsets, mask, COMPUTE) - mean, 0.0)
            sum_dy += tile_sum(dy, AXIS)
            sum_dy_centred += tile_sum(dy * centred, AXIS)
        if dx_ptr is not None:
            dx_lanes = lanes_at(dx_ptr, channels, dx_channel_vecs, V, LANES, 1, AXIS)
            dx_offsets = group_offsets(start, groups_per_sample, dx_sample_vecs, dx_group_vecs, V, 1, T)
            tl.store(dx_lanes + dx_offsets, (dy * scale).to(dx_ptr.dtype.element_ty), mask=mask)
    if sums_dy_ptr is not None:
        tl.store(sums_dy_ptr + split.to(tl.int64) * n_channels + channels, sum_dy, mask=in_range)
        tl.store(sums_dy_centred_ptr + split.to(tl.int64) * n_channels + channels, sum_dy_centred, mask=in_range)


@triton.jit(do_not_specialize=["n_splits", "total"])
def channels_backward_finalise_kernel(
    sums_dy_ptr,
    sums_dy_centred_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    mean_dy_ptr,
    slope_ptr,
    n_channels,
    n_splits,
    total,
    EPS: tl.constexpr,
    FROM_VARIANCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """dweight = Σ dy · x_hat and dbias = Σ dy from the splits' sums; for training's dx, mean_dy = mean(dy) and
    slope = mean(dy · x_hat) · rstd. All [n_channels]; each may be None. Grid: cdiv(n_channels, BLOCK_C).
    """
    channels = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_range = channels < n_channels
    sum_dy = tl.zeros([1, BLOCK_C], COMPUTE)
    sum_dy_centred = tl.zeros([1, BLOCK_C], COMPUTE)
    for start in range(0, n_splits, BLOCK_K):
        splits = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        mask = (splits < n_splits) & in_range
        sum_dy += tile_sum(tl.load(sums_dy_ptr + splits * n_channels + channels, mask=mask, other=0.0), 0)
        sum_dy_centred += tile_sum(
            tl.load(sums_dy_centred_ptr + splits * n_channels + channels, mask=mask, other=0.0), 0
        )
    rstd = load_rstd(rstd_ptr, channels, in_range, EPS, FROM_VARIANCE, COMPUTE)
    dweight = sum_dy_centred * rstd
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channels, dweight.to(dweight_ptr.dtype.element_ty), mask=in_range)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channels, sum_dy.to(dbias_ptr.dtype.element_ty), mask=in_range)
    if mean_dy_ptr is not None:
        count = to_float(total, COMPUTE)
        tl.store(mean_dy_ptr + channels, sum_dy / count, mask=in_range)
        tl.store(slope_ptr + channels, dweight / count * rstd, mask=in_range)


@triton.jit(do_not_specialize=["n_groups", "groups_per_split"])
def channels_backward_apply_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    mean_dy_ptr,
    slope_ptr,
    n_channel_vecs,
    n_blocks,
    n_groups,
    groups_per_split,
    groups_per_sample,
    dy_sample_vecs,
    dy_group_vecs,
    dy_channel_vecs,
    x_sample_vecs,
    x_group_vecs,
    x_channel_vecs,
    DY_LANE_STRIDE: tl.constexpr,
    V: tl.constexpr,
    LANES: tl.constexpr,
    AXIS: tl.constexpr,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """dx = (dy − mean_dy − (x − mean) · slope) · rstd · weight, without gaps in x's layout. 2R1W.

    Sweeps in the reverse of the reduction's order, and so begins with what is still in cache.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    split = program // n_blocks
    channels = channels_of(program % n_blocks, LANES, AXIS)
    n_channels = n_channel_vecs if AXIS is None else n_channel_vecs * V
    in_range = channels < n_channels
    dx_sample_vecs, dx_group_vecs, dx_channel_vecs = dense_strides(n_channel_vecs, groups_per_sample, AXIS)
    dy_lanes = lanes_at(dy_ptr, channels, dy_channel_vecs, V, LANES, DY_LANE_STRIDE, AXIS)
    x_lanes = lanes_at(x_ptr, channels, x_channel_vecs, V, LANES, 1, AXIS)
    dx_lanes = lanes_at(dx_ptr, channels, dx_channel_vecs, V, LANES, 1, AXIS)
    mean = load_parameter(mean_ptr, channels, in_range, 0.0, COMPUTE)
    mean_dy = load_parameter(mean_dy_ptr, channels, in_range, 0.0, COMPUTE)
    slope = load_parameter(slope_ptr, channels, in_range, 0.0, COMPUTE)
    scale = load_parameter(rstd_ptr, channels, in_range, 1.0, COMPUTE)
    scale *= load_parameter(weight_ptr, channels, in_range, 1.0, COMPUTE)
    first, end = span(split, groups_per_split, n_groups)
    last = first + (end - 1 - first) // T * T
    for swept in range(0, end - first, T):
        start = last - swept
        mask = ((start + tl.arange(0, T))[:, None] < end) & in_range
        dy_offsets = group_offsets(start, groups_per_sample, dy_sample_vecs, dy_group_vecs, V, DY_LANE_STRIDE, T)
        x_offsets = group_offsets(start, groups_per_sample, x_sample_vecs, x_group_vecs, V, 1, T)
        dx_offsets = group_offsets(start, groups_per_sample, dx_sample_vecs, dx_group_vecs, V, 1, T)
        dy = load_tile(dy_lanes + dy_offsets, mask, COMPUTE)
        centred = load_tile(x_lanes + x_offsets, mask, COMPUTE) - mean
        dx = (dy - mean_dy - centred * slope) * scale
        tl.store(dx_lanes + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
