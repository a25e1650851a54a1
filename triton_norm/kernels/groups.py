"""Computes GroupNorm of groups of which a program has several, and InstanceNorm's running statistics.

A group that a program has whole in registers is rows of adjacent elements: one row of channels and positions, or, if
channels are adjacent, a row for each position. Larger groups are read by channels.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_norm.kernels.activations import activate
from triton_norm.kernels.channels import factor_of, finalise_statistics, move_running
from triton_norm.kernels.moments import moments_of, tile_sum, to_float
from triton_norm.kernels.tiles import Channels, aligned, load_parameter
from triton_norm.kernels.windows import in_window, store_window


class Elements(NamedTuple):
    """Bundles where the elements of a program's groups are, as indices that broadcast to [M, T, V].

    Args:
        group, sample, within: [M, 1, 1]: a group's index, its sample, and its index in the sample.
        row, column: [1, T, 1]: the row of a group, and the place in it, divided by V.
        start: [M, 1, 1]: the group's first access in a row of its sample.
        first, end: [M, 1, 1]: the group's elements, from the start of its first access.
        in_range: [M, T, 1], mask of the accesses that exist.
    """

    group: tl.tensor
    sample: tl.tensor
    within: tl.tensor
    row: tl.tensor
    column: tl.tensor
    start: tl.tensor
    first: tl.tensor
    end: tl.tensor
    in_range: tl.tensor


@triton.jit
def elements_of(
    block,
    n_groups,
    groups_per_sample,
    n_rows,
    row_size,
    M: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Returns the elements of the M groups of a block, of n_rows · row_size accesses each, or elements if WINDOWS."""
    group = block * M + tl.arange(0, M)[:, None, None]
    exists = group < n_groups
    vec = tl.arange(0, T)[None, :, None]
    sample = group // groups_per_sample
    within = group - sample * groups_per_sample
    start = within.to(tl.int64) * row_size
    if WINDOWS:
        place = start
        start = place // V
        first = (place - start * V).to(tl.int32)
        end = first + row_size
        row = vec * 0
        column = vec
        in_range = exists & (vec * V < end)
    else:
        first = group * 0
        end = first + row_size * V
        row = vec // row_size
        column = vec % row_size
        in_range = exists & (vec < n_rows * row_size)
    return Elements(group, sample, within, row, column, start, first, end, in_range)


@triton.jit
def pointers_to(ptr, elements, sample_vecs, position_vecs, V: tl.constexpr):
    """Returns the pointers [M, T, V] to elements of a tensor whose samples and rows have these strides, times V."""
    group = elements.sample.to(tl.int64) * sample_vecs + elements.start
    element = elements.row.to(tl.int64) * position_vecs + elements.column
    return aligned(ptr + (group + element) * V + tl.arange(0, V)[None, None, :], V)


@triton.jit
def channels_in(elements, row_size, parameter_runs, n_channels, V: tl.constexpr, RUN: tl.constexpr):
    """Returns the channels of elements, [M, T, 1] if RUN = V, or [M, T, V] if RUN = 1; see `parameters_of`."""
    RUNS: tl.constexpr = V // RUN
    run = elements.column * RUNS + tl.arange(0, RUNS)[None, None, :]
    index = elements.within * (row_size * RUNS // parameter_runs) + run // parameter_runs
    return Channels(index, elements.in_range, n_channels)


@triton.jit(do_not_specialize=["n_groups"])
def groups_forward_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    moments_ptr,
    n_groups,
    groups_per_sample,
    n_rows,
    row_size,
    parameter_runs,
    n_channels,
    x_sample_vecs,
    x_row_vecs,
    residual_sample_vecs,
    residual_row_vecs,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    V: tl.constexpr,
    RUN: tl.constexpr,
    T: tl.constexpr,
    WINDOWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    M: tl.constexpr,
):
    """Computes y = f((x − mean) · rstd · weight + bias + residual), and the statistics of the groups.

    Grid: cdiv(n_groups, M). A program has M groups.
    Bytes: reads x and residual once, and writes y once. With WINDOWS, neighbouring groups read the access that has
    elements of both.

    Args:
        x_ptr, residual_ptr: n_groups / groups_per_sample samples, whose strides are *_sample_vecs · V; residual may be
            None. A group is n_rows rows of row_size · V elements, with strides *_row_vecs · V.
        y_ptr: dense, in x's layout.
        weight_ptr, bias_ptr: [n_channels], or None.
        statistics_ptr: [3, n_groups]: mean, mean_lo and rstd.
        moments_ptr: [3, n_groups]: mean, mean_lo and M2; or None.
        parameter_runs, RUN: as in channels_forward_kernel.
        T: accesses of V elements that hold a group.
        WINDOWS: groups are single channels of row_size elements, no multiple of V; a sample's elements are.
    """
    elements = elements_of(tl.program_id(0), n_groups, groups_per_sample, n_rows, row_size, M, T, V, WINDOWS)
    mask = elements.in_range
    x = tl.load(pointers_to(x_ptr, elements, x_sample_vecs, x_row_vecs, V), mask=mask, other=0.0)
    own = mask
    if WINDOWS:
        own = mask & in_window(elements.column, elements.first, elements.end, V)
        x = tl.where(own, x, 0.0)
    total = n_rows * row_size * (1 if WINDOWS else V)
    centred, moments = moments_of(x.to(COMPUTE), own, to_float(total, COMPUTE), None, CENTRED=True)
    groups = Channels(elements.group, elements.group < n_groups, n_groups)
    rstd = finalise_statistics(moments, statistics_ptr, moments_ptr, groups, total, EPS, LOCAL=False)
    channels = channels_in(elements, row_size, parameter_runs, n_channels, V, RUN)
    scale = rstd * load_parameter(weight_ptr, channels, 1.0, COMPUTE)
    z = centred * scale + load_parameter(bias_ptr, channels, 0.0, COMPUTE)
    if residual_ptr is not None:
        residual = pointers_to(residual_ptr, elements, residual_sample_vecs, residual_row_vecs, V)
        z += tl.load(residual, mask=mask, other=0.0).to(COMPUTE)
    y_row_vecs = tl.full([], row_size, tl.int64) * groups_per_sample // (V if WINDOWS else 1)
    pointers = pointers_to(y_ptr, elements, y_row_vecs * n_rows, y_row_vecs, V)
    y = activate(z, ACTIVATION, SLOPE).to(y_ptr.dtype.element_ty)
    if WINDOWS:
        store_window(pointers, y, elements.column, elements.first, elements.end, mask, V)
    else:
        tl.store(pointers, y, mask=mask)


@triton.jit(do_not_specialize=["n_positions", "n_channels", "n_samples", "momentum", "momentum_rest"])
def move_by_samples_kernel(
    moments_ptr,
    running_mean_ptr,
    running_var_ptr,
    n_positions,
    n_channels,
    n_samples,
    momentum,
    momentum_rest,
    COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Updates InstanceNorm's running statistics: running = (1 − factor) · running + factor · batch.

    batch is the mean over the samples of each sample's mean, or of its unbiased variance. Means are summed as
    differences from the first sample's, so that equal means have this mean exactly. The order of the sum is fixed.

    Grid: cdiv(n_channels, BLOCK_C).

    Args:
        moments_ptr: [3, n_samples, n_channels]: mean, mean_lo and M2 over n_positions.
        running_mean_ptr, running_var_ptr: [n_channels].
        momentum, momentum_rest: as in channels_forward_kernel.
        BLOCK_K, BLOCK_C: samples and channels of a tile.
    """
    index = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    channels = Channels(index, index < n_channels, n_channels)
    kind = n_samples.to(tl.int64) * n_channels
    first = tl.load(moments_ptr + index, mask=channels.in_range, other=0.0)
    shift = tl.zeros([BLOCK_K, BLOCK_C], COMPUTE)
    m2 = tl.zeros([BLOCK_K, BLOCK_C], COMPUTE)
    for start in range(0, n_samples, BLOCK_K):
        samples = start + tl.arange(0, BLOCK_K)[:, None]
        there = (samples < n_samples) & channels.in_range
        slots = moments_ptr + samples.to(tl.int64) * n_channels + index
        delta = tl.load(slots, mask=there, other=0.0) - first + tl.load(slots + kind, mask=there, other=0.0)
        shift += tl.where(there, delta, 0.0)
        m2 += tl.load(slots + 2 * kind, mask=there, other=0.0)
    mean = first + tile_sum(shift, 0) / to_float(n_samples, COMPUTE)
    var = tile_sum(m2, 0) / to_float(n_samples, COMPUTE) / to_float(n_positions - 1, COMPUTE)
    factor = factor_of(momentum, momentum_rest, None, False, COMPUTE)
    move_running(running_mean_ptr, channels, mean, factor)
    move_running(running_var_ptr, channels, var, factor)
