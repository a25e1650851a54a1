"""Computes the gradients of GroupNorm of groups in registers, and combines the sums over the channels of samples."""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_norm.kernels.activations import activate_backward
from triton_norm.kernels.exchange import arrive, close, take_place, wait
from triton_norm.kernels.moments import tile_sum, to_float
from triton_norm.kernels.tiles import Channels, aligned, load_parameter, load_statistics
from triton_norm.kernels.windows import in_window, store_window


class Rows(NamedTuple):
    """Bundles where a program's channels are. All but `vec` are [n, 1, 1].

    Args:
        group, sample: the channel's group among those of all samples, and its sample; [1, 1, 1] in a cluster.
        index: the channel among those of its sample.
        exists: mask of the channels that exist.
        row: the channel's row of the sums over positions.
        start: the channel's first access in its sample.
        first, end: the channel's elements, from the start of its first access.
        vec: [1, W, 1], the accesses of a channel.
        in_range: [n, W, 1], mask of the accesses that exist.
    """

    group: tl.tensor
    sample: tl.tensor
    index: tl.tensor
    exists: tl.tensor
    row: tl.tensor
    start: tl.tensor
    first: tl.tensor
    end: tl.tensor
    vec: tl.tensor
    in_range: tl.tensor


@triton.jit
def rows_of(
    block,
    member,
    n_groups,
    groups_per_sample,
    per_group,
    n_chunks,
    channel_size,
    M: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    V: tl.constexpr,
    WINDOWS: tl.constexpr,
    CLUSTER: tl.constexpr,
):
    """Returns the channels of the M groups of a block, R of each, which are those of a member of the group's team.

    A member has one of n_chunks parts of each of its channels, and a cluster one whole group.
    """
    row = tl.arange(0, M * R)[:, None, None]
    if CLUSTER:
        group = block + tl.zeros([1, 1, 1], tl.int32)
        channel = row
    else:
        group = block * M + row // R
        channel = member // n_chunks * R + row % R
    chunk = member % n_chunks
    vec = chunk * W + tl.arange(0, W)[None, :, None]
    exists = (group < n_groups) & (channel < per_group)
    sample = group // groups_per_sample
    index = (group - sample * groups_per_sample) * per_group + channel
    if WINDOWS:
        place = index.to(tl.int64) * channel_size
        start = place // V
        first = (place - start * V).to(tl.int32)
        end = first + channel_size
        in_range = exists & (vec * V < end)
    else:
        start = index.to(tl.int64) * channel_size
        first = row * 0
        end = first + channel_size * V
        in_range = exists & (vec < channel_size)
    return Rows(group, sample, index, exists, sample * n_chunks + chunk, start, first, end, vec, in_range)


@triton.jit
def pointers_to(ptr, rows, sample_vecs, V: tl.constexpr):
    """Returns the pointers [n, W, V] to the elements of a tensor whose samples have this stride, times V."""
    channel = rows.sample.to(tl.int64) * sample_vecs + rows.start
    return aligned(ptr + (channel + rows.vec) * V + tl.arange(0, V)[None, None, :], V)


@triton.jit
def store(ptr, values, rows, sample_vecs, V: tl.constexpr, WINDOWS: tl.constexpr):
    """Stores the values [n, W, V] of channels in a dense tensor whose samples have this stride, times V."""
    pointers, values = pointers_to(ptr, rows, sample_vecs, V), values.to(ptr.dtype.element_ty)
    if WINDOWS:
        store_window(pointers, values, rows.vec, rows.first, rows.end, rows.in_range, V)
    else:
        tl.store(pointers, values, mask=rows.in_range)


@triton.jit
def load_gradient(ptr, rows, sample_stride, channel_stride, V: tl.constexpr):
    """Returns dy, [n, W, V].

    Args:
        sample_stride, channel_stride: of a dy that is one element, expanded over a channel's positions. Otherwise the
            former is divided by V, and the latter is None.
    """
    if channel_stride is None:
        dy = tl.load(pointers_to(ptr, rows, sample_stride, V), mask=rows.in_range, other=0.0)
    else:
        channels = rows.sample.to(tl.int64) * sample_stride + rows.index.to(tl.int64) * channel_stride
        of_channels = tl.load(ptr + channels, mask=rows.exists, other=0.0)
        dy = tl.broadcast_to(tl.where(rows.in_range, of_channels, 0.0), [rows.exists.shape[0], rows.vec.shape[1], V])
    return dy


@triton.jit
def by_group(values, M: tl.constexpr, R: tl.constexpr, CLUSTER: tl.constexpr):
    """Returns the sums [M, 1] over the R channels of each group, of values [M · R, 1, 1]; [1, 1, 1] in a cluster.

    In a cluster a reshaped sum would bring all elements into another layout, through shared memory.
    """
    if CLUSTER:
        total = tl.sum(values, 0, keep_dims=True)
    else:
        total = tl.sum(tl.reshape(values, [M, R]), 1, keep_dims=True)
    return total


@triton.jit
def to_channels(values, M: tl.constexpr, R: tl.constexpr, CLUSTER: tl.constexpr):
    """Returns the values of groups, as `by_group` has them, for each of their channels: [M · R, 1, 1] or [1, 1, 1]."""
    if not CLUSTER:
        values = tl.reshape(tl.broadcast_to(values, [M, R]), [M * R, 1, 1])
    return values


@triton.jit
def sum_members(slots, n_members, n_groups, PEERS: tl.constexpr):
    """Returns the sum [1, 1] of what the members of a team have left in slots, n_groups apart, in fixed order."""
    member = tl.arange(0, PEERS)[None, :]
    left = tl.load(slots + member.to(tl.int64) * n_groups, mask=member < n_members, other=0.0, cache_modifier=".cg")
    return tile_sum(left, 1)


@triton.jit(do_not_specialize=["n_groups"])
def groups_fused_backward_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    dx_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    dweight_sums_ptr,
    dbias_sums_ptr,
    partials_ptr,
    sync_ptr,
    n_groups,
    groups_per_sample,
    per_group,
    n_members,
    n_chunks,
    channel_size,
    x_sample_vecs,
    dy_sample_vecs,
    dy_channel_stride,
    residual_sample_vecs,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PEERS: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    WINDOWS: tl.constexpr,
    CLUSTER: tl.constexpr,
    COMPUTE: tl.constexpr,
    M: tl.constexpr,
):
    """Computes dx = (dz · weight − mean(dz · weight) − (x − mean) · mean(dz · weight · x_hat) · rstd) · rstd,
    dresidual = dz, and each sample's sums for dweight and dbias, from dz = dy · f'(z), as channels_backward_kernel.

    A program has M groups; a cluster has one, in the registers of its blocks. If PEERS > 1, n_members programs share a
    group, each with R of its channels, or with one of n_chunks parts of a channel. They leave each other their sums,
    and wait.

    Grid: cdiv(n_groups, M), or n_groups · n_members.
    Bytes: reads x, dy and residual once, and writes dx and dresidual once. With WINDOWS, neighbouring channels read
    the access that has elements of both.

    Args:
        dy_ptr, x_ptr, residual_ptr: samples of dense channels, with strides *_sample_vecs · V; residual may be None.
            Unless dy_channel_stride is None, dy is expanded over positions, and dy_sample_vecs is not multiplied.
        dx_ptr, dresidual_ptr: dense; dresidual may be None.
        weight_ptr, bias_ptr: [groups_per_sample · per_group], or None.
        statistics_ptr: [3, n_groups]: mean, mean_lo and rstd.
        dweight_sums_ptr, dbias_sums_ptr: [samples, n_chunks, channels], Σ dz · x_hat and Σ dz over positions; or None.
        partials_ptr: workspace [2, n_members, n_groups], used if PEERS > 1.
        sync_ptr: 2 + n_groups zeros, used if PEERS > 1.
        per_group: channels of a group.
        channel_size: positions of a channel, divided by V unless WINDOWS.
        PEERS: the least power of two that is not less than n_members.
        R: channels of a group, or of a member's part of it, padded to a power of two.
        W: accesses that read a channel, or a chunk of it, padded to a power of two.
        WINDOWS: positions are no multiple of V, and channels are read as windows; those of a sample are.
        CLUSTER: a program is a cluster of blocks. M, PEERS and n_chunks are then 1.
    """
    if PEERS > 1:
        block, member = take_place(sync_ptr, n_members)
    else:
        block = tl.program_id(0)
        member = block * 0
    rows = rows_of(
        block, member, n_groups, groups_per_sample, per_group, n_chunks, channel_size, M, R, W, V, WINDOWS, CLUSTER
    )
    mask = rows.in_range
    dz = load_gradient(dy_ptr, rows, dy_sample_vecs, dy_channel_stride, V).to(COMPUTE)
    x = tl.load(pointers_to(x_ptr, rows, x_sample_vecs, V), mask=mask, other=0.0).to(COMPUTE)
    own = mask
    if WINDOWS:
        own = mask & in_window(rows.vec, rows.first, rows.end, V)
    groups = Channels(rows.group, rows.group < n_groups if CLUSTER else rows.exists, n_groups)
    mean, mean_lo, rstd = load_statistics(statistics_ptr, None, None, groups, 0.0, COMPUTE)
    n_channels = groups_per_sample * per_group
    channels = Channels(rows.index, rows.exists, n_channels)
    weight = load_parameter(weight_ptr, channels, 1.0, COMPUTE)
    centred = tl.where(own, (x - mean) - mean_lo, 0.0)
    if ACTIVATION is not None:
        z = centred * (rstd * weight) + load_parameter(bias_ptr, channels, 0.0, COMPUTE)
        if residual_ptr is not None:
            residual = pointers_to(residual_ptr, rows, residual_sample_vecs, V)
            z += tl.load(residual, mask=mask, other=0.0).to(COMPUTE)
        dz = activate_backward(dz, z, ACTIVATION, SLOPE)
    if WINDOWS:
        dz = tl.where(own, dz, 0.0)
    sum_dz = tile_sum(dz, None)
    sum_dz_centred = tile_sum(dz * centred, None)
    slots = rows.row.to(tl.int64) * n_channels + rows.index
    if dweight_sums_ptr is not None:
        tl.store(dweight_sums_ptr + slots, sum_dz_centred * rstd, mask=rows.exists)
    if dbias_sums_ptr is not None:
        tl.store(dbias_sums_ptr + slots, sum_dz, mask=rows.exists)
    of_dz = by_group(sum_dz * weight, M, R, CLUSTER)
    of_dz_centred = by_group(sum_dz_centred * weight, M, R, CLUSTER)
    if PEERS > 1:
        team = partials_ptr + block + tl.zeros([1, 1], tl.int64)
        kind = n_members.to(tl.int64) * n_groups
        own = team + member.to(tl.int64) * n_groups
        tl.store(own, of_dz)
        tl.store(own + kind, of_dz_centred)
        arrive(sync_ptr, block)
        wait(sync_ptr, block, n_members)
        of_dz = sum_members(team, n_members, n_groups, PEERS)
        of_dz_centred = sum_members(team + kind, n_members, n_groups, PEERS)
        if arrive(sync_ptr, block) == 2 * n_members - 1:
            close(sync_ptr, block, n_groups, None)
    fraction = 1.0 / to_float(per_group * channel_size * (1 if WINDOWS else V), COMPUTE)
    mean_dz = to_channels(of_dz * fraction, M, R, CLUSTER)
    slope = to_channels(of_dz_centred * fraction, M, R, CLUSTER) * rstd * rstd
    dx = (dz * weight - mean_dz - centred * slope) * rstd
    sample_vecs = tl.full([], n_channels, tl.int64) * channel_size // (V if WINDOWS else 1)
    store(dx_ptr, dx, rows, sample_vecs, V, WINDOWS)
    if dresidual_ptr is not None:
        store(dresidual_ptr, dz, rows, sample_vecs, V, WINDOWS)


@triton.jit
def sum_group(ptr, weight_ptr, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns Σ weight · value [1, 1] over the PER_GROUP channels of a group.

    Args:
        ptr, weight_ptr: the group's first value and weight; weight_ptr may be None.
    """
    COMPUTE: tl.constexpr = ptr.dtype.element_ty
    total = tl.zeros([1, BLOCK_C], COMPUTE)
    for start in range(0, PER_GROUP, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)[None, :]
        there = channels < PER_GROUP
        value = tl.load(ptr + channels, mask=there, other=0.0)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + channels, mask=there, other=0.0).to(COMPUTE)
        total += value
    return tile_sum(total, 1)


@triton.jit
def add_rows(ptr, sums_ptr, columns, n_rows, n_channels, BLOCK_K: tl.constexpr):
    """Stores the sums over the rows of sums [n_rows, n_channels], for some columns [1, n], in fixed order."""
    COMPUTE: tl.constexpr = sums_ptr.dtype.element_ty
    there = columns < n_channels
    total = tl.zeros([BLOCK_K, columns.shape[1]], COMPUTE)
    for start in range(0, n_rows, BLOCK_K):
        rows = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
        total += tl.load(sums_ptr + rows * n_channels + columns, mask=(rows < n_rows) & there, other=0.0)
    tl.store(ptr + columns, tile_sum(total, 0).to(ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["total", "n_rows", "n_means"])
def groups_backward_kernel(
    dweight_sums_ptr,
    dbias_sums_ptr,
    weight_ptr,
    statistics_ptr,
    means_ptr,
    dweight_ptr,
    dbias_ptr,
    total,
    n_rows,
    n_means,
    n_channels,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes the group means that dx depends on, and dweight and dbias, from sums over each sample's channels.

    Grid: n_means + cdiv(n_channels, BLOCK_C). The first n_means programs have a group each, the rest BLOCK_C channels.

    Args:
        dweight_sums_ptr, dbias_sums_ptr: [n_rows, n_channels], Σ dz · x_hat and Σ dz over a part of the positions of a
            sample, or over all of them if n_means > 0; or None.
        weight_ptr: [n_channels], or None.
        statistics_ptr: [3, n_means]: mean, mean_lo and rstd.
        means_ptr: [2, n_means], mean(weight · dz) and mean(weight · dz · x_hat) · rstd, of n_means = n_rows ·
            n_channels / PER_GROUP groups; None, and n_means 0, without dx.
        dweight_ptr, dbias_ptr: [n_channels], or None.
        total: elements of a group.
        PER_GROUP: channels of a group.
        BLOCK_K: rows added at a time.
    """
    program = tl.program_id(0)
    if program < n_means:
        if means_ptr is not None:
            first = program.to(tl.int64) * PER_GROUP
            weights_ptr = weight_ptr
            if weight_ptr is not None:
                weights_ptr = weight_ptr + program % (n_channels // PER_GROUP) * PER_GROUP
            fraction = 1.0 / to_float(total, means_ptr.dtype.element_ty)
            mean = sum_group(dbias_sums_ptr + first, weights_ptr, PER_GROUP, BLOCK_C) * fraction
            slope = sum_group(dweight_sums_ptr + first, weights_ptr, PER_GROUP, BLOCK_C) * fraction
            slots = means_ptr + program + tl.zeros([1, 1], tl.int32)
            tl.store(slots, mean)
            tl.store(slots + n_means, slope * tl.load(statistics_ptr + 2 * n_means + program))
    else:
        columns = (program - n_means) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        if dweight_ptr is not None:
            add_rows(dweight_ptr, dweight_sums_ptr, columns, n_rows, n_channels, BLOCK_K)
        if dbias_ptr is not None:
            add_rows(dbias_ptr, dbias_sums_ptr, columns, n_rows, n_channels, BLOCK_K)
