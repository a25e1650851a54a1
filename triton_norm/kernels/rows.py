"""Computes LayerNorm and RMSNorm of contiguous rows: y = (x − mean) · rstd · weight + bias, with mean = 0 for RMSNorm.

Column counts and row strides are passed divided by V, the largest power of two that divides them all, and are
multiplied back in the kernel. The compiler can then prove that V elements share one access.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_norm.kernels.exchange import Team, meet, take_place
from triton_norm.kernels.moments import Moments, merge, merge_all, moments_of, to_float


@triton.jit
def load_columns(parameter, cols, n_cols, OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns OFFSET + a parameter's columns, [1, BLOCK_N].

    Every program reads them, so they should stay in cache.

    Args:
        parameter: pointer to the parameter, or the columns themselves, if they are in registers.
    """
    columns = parameter
    if parameter.dtype.is_ptr():
        columns = tl.load(parameter + cols, mask=cols < n_cols, other=0.0, eviction_policy="evict_last")
    columns = columns.to(COMPUTE)
    if OFFSET != 0.0:
        columns += OFFSET
    return columns


class Axes(NamedTuple):
    """Bundles the lengths of the two inner axes along which rows are numbered; None, both, if there is one axis."""

    n_inner: tl.tensor
    n_middle: tl.tensor


class RowStrides(NamedTuple):
    """Bundles a tensor's strides between rows along each axis, divided by V; the two outer ones may be None."""

    inner: tl.tensor
    middle: tl.tensor
    outer: tl.tensor


@triton.jit
def row_offsets(rows, strides, axes, V: tl.constexpr):
    """Returns the offsets of these rows, int64."""
    if axes.n_inner is None:
        offsets = rows * strides.inner * V
    else:
        rest = rows // axes.n_inner
        outer = rest // axes.n_middle
        vecs = (rows - rest * axes.n_inner) * strides.inner
        vecs += (rest - outer * axes.n_middle) * strides.middle + outer * strides.outer
        offsets = vecs * V
    return offsets


@triton.jit
def at(rows_ptr, cols, V: tl.constexpr):
    """Returns pointers to columns of rows [BLOCK_M, 1], marked as aligned in runs of V for the compiler."""
    # The pointers are added here, because a hint on a function's argument is lost when the function is inlined.
    ITEMSIZE: tl.constexpr = rows_ptr.dtype.scalar.element_ty.primitive_bitwidth // 8
    ALIGNMENT: tl.constexpr = V * ITEMSIZE if V * ITEMSIZE < 16 else 16
    return tl.multiple_of(rows_ptr + cols, [1, ALIGNMENT])


@triton.jit
def load_summed(
    x_rows, residual_rows, total_rows, cols, mask, V: tl.constexpr, EVICTION: tl.constexpr, COMPUTE: tl.constexpr
):
    """Returns x; or with a residual x + residual, rounded once to total's type and stored."""
    x = tl.load(at(x_rows, cols, V), mask=mask, other=0.0, eviction_policy=EVICTION)
    if residual_rows is not None:
        residual = tl.load(at(residual_rows, cols, V), mask=mask, other=0.0, eviction_policy="evict_first")
        WIDE: tl.constexpr = tl.float64 if residual.dtype == tl.float64 else COMPUTE
        x = (x.to(WIDE) + residual.to(WIDE)).to(total_rows.dtype.element_ty)
        tl.store(at(total_rows, cols, V), x, mask=mask)
    return x


@triton.jit
def exchange_moments(moments, team, n_cols, SPAN: tl.constexpr, PEERS: tl.constexpr, CENTRED: tl.constexpr):
    """Returns the moments of a whole row, merged from the spans of a team's members; bitwise equal in each member."""
    KINDS: tl.constexpr = 3 if CENTRED else 1
    members = tl.arange(0, PEERS)
    n_peers = team.n_members
    there = members < n_peers
    base = team.partials_ptr + team.index.to(tl.int64) * n_peers * KINDS
    tl.store(base + team.member, tl.sum(moments.m2))
    if CENTRED:
        tl.store(base + n_peers + team.member, tl.sum(moments.mean))
        tl.store(base + 2 * n_peers + team.member, tl.sum(moments.mean_lo))
    meet(team.sync_ptr, team.index, n_peers)
    m2 = tl.load(base + members, mask=there, other=0.0, volatile=True)
    COMPUTE: tl.constexpr = m2.dtype
    if CENTRED:
        mean = tl.load(base + n_peers + members, mask=there, other=0.0, volatile=True)
        mean_lo = tl.load(base + 2 * n_peers + members, mask=there, other=0.0, volatile=True)
        counts = tl.where(there, tl.minimum(n_cols - members * SPAN, SPAN), 0).to(COMPUTE)
        of_row = merge_all(counts, Moments(mean, mean_lo, m2), n_cols.to(COMPUTE), 0)
        mean = to_float(of_row.mean, COMPUTE)
        mean_lo = to_float(of_row.mean_lo, COMPUTE)
        m2 = to_float(of_row.m2, COMPUTE)
    else:
        mean, mean_lo, m2 = moments.mean, moments.mean_lo, to_float(tl.sum(m2, 0), COMPUTE)
    return Moments(mean, mean_lo, m2)


@triton.jit
def rounded(x_hat, ROUNDED: tl.constexpr):
    """Returns x_hat rounded to the type ROUNDED, but in its own type; x_hat unchanged if ROUNDED is None."""
    if ROUNDED is not None:
        x_hat = x_hat.to(ROUNDED).to(x_hat.dtype)
    return x_hat


@triton.jit
def centred_on(x, moments, CENTRED: tl.constexpr):
    """Returns x − mean in the mean's type, or x if not CENTRED."""
    centred = x.to(moments.mean.dtype)
    if CENTRED:
        centred = (centred - moments.mean) - moments.mean_lo
    return centred


@triton.jit
def normalize(centred, rstd, weight, bias, cols, n_cols, WEIGHT_OFFSET: tl.constexpr, ROUNDED: tl.constexpr):
    """Returns x_hat · (weight + WEIGHT_OFFSET) + bias with x_hat = centred · rstd.

    Args:
        weight, bias: as in `load_columns`, or None.
    """
    y = rounded(centred * rstd, ROUNDED)
    if weight is not None:
        y *= load_columns(weight, cols, n_cols, WEIGHT_OFFSET, rstd.dtype)
    if bias is not None:
        y += load_columns(bias, cols, n_cols, 0.0, rstd.dtype)
    return y


class RowPointers(NamedTuple):
    """Bundles the tensors of `rows_forward_kernel`; weight and bias may be columns [1, BLOCK_N] in registers."""

    x: tl.tensor
    residual: tl.tensor
    y: tl.tensor
    total: tl.tensor
    weight: tl.tensor
    bias: tl.tensor
    statistics: tl.tensor
    partials: tl.tensor
    sync: tl.tensor


class RowLayout(NamedTuple):
    """Bundles the sizes of `rows_forward_kernel`, and the strides of x and residual."""

    n_rows: tl.tensor
    n_cols: tl.tensor
    axes: Axes
    x: RowStrides
    residual: RowStrides


class Norm(NamedTuple):
    """Bundles the constants of the formula, as `rows_forward_kernel` describes them."""

    EPS: float
    WEIGHT_OFFSET: float
    ROUNDED: tl.dtype | None
    CENTRED: bool
    COMPUTE: tl.dtype


class RowTile(NamedTuple):
    """Bundles the constants of a program's tile, as `rows_forward_kernel` describes them."""

    V: int
    BLOCK_M: int
    BLOCK_N: int
    PIECES: int
    PEERS: int


@triton.jit
def forward_of_group(group, peer, tensors, layout, NORM: tl.constexpr, TILE: tl.constexpr):
    """Normalizes a group of BLOCK_M rows, or if PEERS > 1 a span of a row. Constants are `rows_forward_kernel`'s."""
    V: tl.constexpr = TILE.V
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    PIECES: tl.constexpr = TILE.PIECES
    PEERS: tl.constexpr = TILE.PEERS
    CENTRED: tl.constexpr = NORM.CENTRED
    COMPUTE: tl.constexpr = NORM.COMPUTE
    SPAN: tl.constexpr = BLOCK_N * PIECES
    EVICTION: tl.constexpr = "evict_last" if PIECES > 1 and tensors.residual is None else "evict_first"
    n_rows = layout.n_rows
    n_cols = layout.n_cols
    begin = peer * SPAN
    rows = group.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    row_mask = rows < n_rows
    x_rows = tensors.x + row_offsets(rows, layout.x, layout.axes, V)
    y_rows = tensors.y + rows * n_cols
    residual_rows = tensors.residual
    total_rows = tensors.total
    if tensors.residual is not None:
        residual_rows = tensors.residual + row_offsets(rows, layout.residual, layout.axes, V)
        total_rows = tensors.total + rows * n_cols
    cols = begin + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    mask = row_mask & (cols < n_cols)
    x = load_summed(x_rows, residual_rows, total_rows, cols, mask, V, EVICTION, COMPUTE)
    count = to_float(tl.minimum(n_cols - begin, BLOCK_N), COMPUTE)
    centred, moments = moments_of(x.to(COMPUTE), mask, count, 1, CENTRED)
    if PIECES > 1:
        end = tl.minimum(begin + SPAN, n_cols)
        for start in range(begin + BLOCK_N, end, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)[None, :]
            mask = row_mask & (cols < n_cols)
            x = load_summed(x_rows, residual_rows, total_rows, cols, mask, V, EVICTION, COMPUTE)
            count = to_float(tl.minimum(end - start, BLOCK_N), COMPUTE)
            _, of_piece = moments_of(x.to(COMPUTE), mask, count, 1, CENTRED)
            if CENTRED:
                moments = merge(to_float(start - begin, COMPUTE), moments, count, of_piece)
            else:
                moments = Moments(moments.mean, moments.mean_lo, moments.m2 + of_piece.m2)
    if PEERS > 1:
        team = Team(group, peer, tl.cdiv(n_cols, SPAN), tensors.partials, tensors.sync)
        moments = exchange_moments(moments, team, n_cols, SPAN, PEERS, CENTRED)
        row_mask = rows < tl.where(peer == 0, n_rows, 0)
    rstd = tl.rsqrt(moments.m2 / to_float(n_cols, COMPUTE) + NORM.EPS)
    if PIECES > 1 or PEERS > 1:
        centred = centred_on(x, moments, CENTRED)
    y = normalize(centred, rstd, tensors.weight, tensors.bias, cols, n_cols, NORM.WEIGHT_OFFSET, NORM.ROUNDED)
    tl.store(at(y_rows, cols, V), y.to(tensors.y.dtype.element_ty), mask=mask)
    if PIECES > 1:
        swept_rows = x_rows
        if tensors.residual is not None:
            swept_rows = total_rows
            tl.debug_barrier()
        last = begin + (end - 1 - begin) // BLOCK_N * BLOCK_N
        for back in range(BLOCK_N, last - begin + 1, BLOCK_N):
            cols = last - back + tl.arange(0, BLOCK_N)[None, :]
            mask = (rows < n_rows) & (cols < n_cols)
            x = tl.load(at(swept_rows, cols, V), mask=mask, other=0.0, eviction_policy="evict_first")
            centred = centred_on(x, moments, CENTRED)
            y = normalize(centred, rstd, tensors.weight, tensors.bias, cols, n_cols, NORM.WEIGHT_OFFSET, NORM.ROUNDED)
            tl.store(at(y_rows, cols, V), y.to(tensors.y.dtype.element_ty), mask=mask)
    if tensors.statistics is not None:
        if CENTRED:
            tl.store(tensors.statistics + rows, moments.mean, mask=row_mask)
        tl.store(tensors.statistics + (n_rows if CENTRED else 0) + rows, rstd, mask=row_mask)


@triton.jit(do_not_specialize=["n_rows", "n_inner", "n_middle"])
def rows_forward_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    total_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    partials_ptr,
    sync_ptr,
    n_rows,
    n_col_vecs,
    x_row_vecs,
    residual_row_vecs,
    n_inner,
    n_middle,
    x_middle_vecs,
    x_outer_vecs,
    residual_middle_vecs,
    residual_outer_vecs,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    CENTRED: tl.constexpr,
    V: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
    PEERS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes y = x_hat · (weight + WEIGHT_OFFSET) + bias with x_hat = (x − mean) · rstd, for every row.

    With a residual, x is replaced by total = x + residual, rounded to total's type.

    A program reduces a span of PIECES · BLOCK_N columns, BLOCK_N at a time. The last piece stays in registers. The
    others are read again, backwards, so that they come from cache. If n_peers = cdiv(n_cols, PIECES · BLOCK_N) > 1,
    BLOCK_M is 1, and n_peers programs share a row and exchange their moments.

    With STAGES, a program has whole rows, and takes one group of BLOCK_M after another. It keeps weight and bias in
    registers, and loads the next rows while it sums these.

    Grid: cdiv(n_rows, BLOCK_M) · n_peers, or with STAGES as many programs as run at once.
    Bytes: reads x and residual, and writes y and total, once. If PIECES > 1, reads x, or total, again but for a piece.

    Args:
        x_ptr, residual_ptr: [n_rows, n_cols], row strides *_row_vecs · V; residual may be None.
        y_ptr, total_ptr: [n_rows, n_cols], contiguous; total is None without a residual.
        weight_ptr, bias_ptr: [n_cols], or None.
        statistics_ptr: [2, n_rows], mean and rstd; [1, n_rows], rstd, unless CENTRED; or None.
        partials_ptr: workspace [n_rows, 3 if CENTRED else 1, n_peers]; None if PEERS is 1.
        sync_ptr: 2 + n_rows zeros; None if PEERS is 1.
        ROUNDED: type that x_hat is rounded to before it is scaled, or None.
        CENTRED: subtracts the mean: LayerNorm; otherwise RMSNorm.
        COMPUTE: type of the arithmetic and of the statistics.
        PEERS: upper bound of n_peers, a power of two.
        STAGES: software pipeline stages of the loop over groups of rows; 0: a program has one group.
    """
    n_cols = n_col_vecs * V
    axes = Axes(n_inner, n_middle)
    x_strides = RowStrides(x_row_vecs, x_middle_vecs, x_outer_vecs)
    residual_strides = RowStrides(residual_row_vecs, residual_middle_vecs, residual_outer_vecs)
    layout = RowLayout(n_rows, n_cols, axes, x_strides, residual_strides)
    weight = weight_ptr
    bias = bias_ptr
    if STAGES:
        cols = tl.arange(0, BLOCK_N)[None, :]
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0)
    tensors = RowPointers(x_ptr, residual_ptr, y_ptr, total_ptr, weight, bias, statistics_ptr, partials_ptr, sync_ptr)
    NORM: tl.constexpr = Norm(EPS, WEIGHT_OFFSET, ROUNDED, CENTRED, COMPUTE)
    TILE: tl.constexpr = RowTile(V, BLOCK_M, BLOCK_N, PIECES, PEERS)
    if STAGES:
        n_groups = tl.cdiv(n_rows, BLOCK_M).to(tl.int64)
        for group in tl.range(tl.program_id(0), n_groups, tl.num_programs(0), num_stages=STAGES):
            # The interpreter's loops count in Python's integers.
            forward_of_group(tl.full([], group, tl.int64), 0, tensors, layout, NORM, TILE)
    elif PEERS > 1:
        group, peer = take_place(sync_ptr, tl.cdiv(n_cols, BLOCK_N * PIECES))
        forward_of_group(group, peer, tensors, layout, NORM, TILE)
    else:
        forward_of_group(tl.program_id(0), 0, tensors, layout, NORM, TILE)
