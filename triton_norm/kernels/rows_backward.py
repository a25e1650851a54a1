"""Computes the gradients of LayerNorm and RMSNorm of contiguous rows; rows.py explains V and the _vecs arguments."""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_norm.kernels.exchange import Team, arrive, take_place, wait
from triton_norm.kernels.moments import tile_sum, to_float
from triton_norm.kernels.rows import Axes, RowStrides, at, rounded, row_offsets

TURNS = tl.constexpr(4)
"""A team's partials have this many slots, used as a ring. A program writes turn t only after every peer has read turn
t − 4 from that slot: it has collected turn t − 2, so every peer had published t − 2, and collected t − 4 before."""


class Sums(NamedTuple):
    """Bundles the row sums [BLOCK_M, 1] that dx depends on: Σ wdy and Σ wdy · x_hat."""

    wdy: tl.tensor
    wdy_x_hat: tl.tensor


class Waiting(NamedTuple):
    """Bundles the state of rows whose sums are still being exchanged; `x` may hold x_hat."""

    rows: tl.tensor
    dy: tl.tensor
    x: tl.tensor
    mean: tl.tensor
    rstd: tl.tensor


@triton.jit
def load_gradient(ptr, offsets, cols, mask, V: tl.constexpr, COLUMN_STRIDE: tl.constexpr):
    """Returns a tile of a gradient, row stride row_vecs · V; or row_vecs, if each row is one element, expanded."""
    if COLUMN_STRIDE == 1:
        gradient = tl.load(at(ptr + offsets, cols, V), mask=mask, other=0.0)
    else:
        gradient = tl.load(ptr + offsets + cols * 0, mask=mask, other=0.0)
    return gradient


@triton.jit
def normalized(x, mean, rstd, mask, CENTRED: tl.constexpr):
    """Returns x_hat in rstd's type, 0 outside the mask."""
    x_hat = x.to(rstd.dtype)
    if CENTRED:
        x_hat = tl.where(mask, x_hat - mean, 0.0)
    return x_hat * rstd


@triton.jit
def weighted(dy, weight_ptr, weight, cols, mask, OFFSET: tl.constexpr, HOLD_WEIGHT: tl.constexpr):
    """Returns dy · (weight + OFFSET). Loads the weight here unless HOLD_WEIGHT."""
    if weight_ptr is not None:
        if not HOLD_WEIGHT:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_last")
        weight = weight.to(dy.dtype)
        dy *= weight + OFFSET if OFFSET != 0.0 else weight
    return dy


@triton.jit
def sums_of(wdy, x_hat, CENTRED: tl.constexpr):
    """Returns the sums of a tile's rows. Σ wdy is 0 unless CENTRED."""
    sum_wdy_x_hat = tile_sum(wdy * x_hat, 1)
    return Sums(tile_sum(wdy, 1) if CENTRED else tl.zeros_like(sum_wdy_x_hat), sum_wdy_x_hat)


@triton.jit
def slots_of(team, turn, BLOCK_M: tl.constexpr, CENTRED: tl.constexpr):
    """Returns the pointer to a turn's slot of a team: [2 if CENTRED else 1, BLOCK_M, n_peers]."""
    KINDS: tl.constexpr = 2 if CENTRED else 1
    return team.partials_ptr + (team.index.to(tl.int64) * TURNS + turn % TURNS) * (KINDS * BLOCK_M) * team.n_members


@triton.jit
def publish(sums, team, turn, BLOCK_M: tl.constexpr, CENTRED: tl.constexpr):
    """Stores the sums over this program's span of a turn's rows, and arrives."""
    in_group = tl.arange(0, BLOCK_M)[:, None]
    n_peers = team.n_members
    base = slots_of(team, turn, BLOCK_M, CENTRED)
    tl.store(base + in_group * n_peers + team.member, sums.wdy_x_hat)
    if CENTRED:
        tl.store(base + (BLOCK_M + in_group) * n_peers + team.member, sums.wdy)
    arrive(team.sync_ptr, 2 * team.index + turn % 2)


@triton.jit
def collect(like, team, turn, PEERS: tl.constexpr, BLOCK_M: tl.constexpr, CENTRED: tl.constexpr):
    """Waits for the previous turn. Returns its row sums, shaped like `like`; bitwise equal in each peer."""
    in_group = tl.arange(0, BLOCK_M)[:, None]
    members = tl.arange(0, PEERS)
    n_peers = team.n_members
    there = members < tl.where(turn > 0, n_peers, 0)
    base = slots_of(team, turn + (TURNS - 1), BLOCK_M, CENTRED)
    wait(team.sync_ptr, 2 * team.index + (turn + 1) % 2, (turn + 1) // 2 * n_peers)
    sum_wdy = tl.zeros_like(like)
    sum_wdy_x_hat = tl.zeros_like(like)
    for row in tl.static_range(BLOCK_M):
        here = in_group == row
        row_sum = tl.sum(tl.load(base + row * n_peers + members, mask=there, other=0.0, volatile=True), 0)
        sum_wdy_x_hat = tl.where(here, row_sum, sum_wdy_x_hat)
        if CENTRED:
            slots = base + (BLOCK_M + row) * n_peers + members
            row_sum = tl.sum(tl.load(slots, mask=there, other=0.0, volatile=True), 0)
            sum_wdy = tl.where(here, row_sum, sum_wdy)
    return Sums(sum_wdy, sum_wdy_x_hat)


@triton.jit(do_not_specialize=["n_rows", "n_inner", "n_middle"])
def rows_backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    statistics_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_sums_ptr,
    dbias_sums_ptr,
    partials_ptr,
    sync_ptr,
    n_rows,
    n_col_vecs,
    dy_row_vecs,
    dtotal_row_vecs,
    x_row_vecs,
    n_inner,
    n_middle,
    dy_middle_vecs,
    dy_outer_vecs,
    dtotal_middle_vecs,
    dtotal_outer_vecs,
    x_middle_vecs,
    x_outer_vecs,
    DY_COLUMN_STRIDE: tl.constexpr,
    DTOTAL_COLUMN_STRIDE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    CENTRED: tl.constexpr,
    V: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PEERS: tl.constexpr,
    STAGES: tl.constexpr,
    HOLD_WEIGHT: tl.constexpr,
):
    """Computes dx = (wdy − mean(wdy) − x_hat · mean(wdy · x_hat)) · rstd + dtotal, and sums of dweight and dbias.

    wdy = dy · (weight + WEIGHT_OFFSET), and mean(wdy) is 0 unless CENTRED. Over the rows, dbias = Σ dy and dweight =
    Σ dy · x_hat, with x_hat rounded to the type ROUNDED as in the forward.

    A team takes every n_teams-th group of BLOCK_M rows. Each of its n_peers = cdiv(n_cols, BLOCK_N) programs owns a
    span of columns, and accumulates dweight and dbias of that span in registers. Peers exchange the row sums: they
    publish those of the next rows before they wait for those of the previous ones. Odd and even turns have separate
    arrival counters. Rows are added to dweight and dbias after the wait: x and dy alone are then in registers while
    they wait. The compiler would sink an earlier addition below the wait anyway, and keep x_hat and wdy in registers.

    Grid: n_teams · n_peers.
    Bytes: reads x, dy and dtotal, and writes dx and dresidual, once.

    Args:
        dy_ptr, dtotal_ptr, x_ptr: [n_rows, n_cols], row strides *_row_vecs · V; dtotal may be None.
        weight_ptr: [n_cols], or None.
        statistics_ptr: [2, n_rows], mean and rstd, or [1, n_rows], rstd, unless CENTRED.
        rstd_ptr: [n_rows], used instead of the rstd in statistics; or None.
        dx_ptr, dresidual_ptr: [n_rows, n_cols], contiguous, equal but for their types; or None.
        dweight_sums_ptr, dbias_sums_ptr: [n_teams, n_cols] in COMPUTE, or None.
        partials_ptr: workspace [n_teams, TURNS, 2 if CENTRED else 1, BLOCK_M, n_peers], or None.
        sync_ptr: 2 + 2 · n_teams zeros. Both are None if PEERS is 1 or dx is None.
        DY_COLUMN_STRIDE, DTOTAL_COLUMN_STRIDE: 1, or 0 if each row is one element, expanded.
        PEERS: upper bound of n_peers, a power of two.
        STAGES: software pipeline stages of the loop over rows.
        HOLD_WEIGHT: keeps the weight in registers; otherwise it is loaded for each group of rows.
    """
    SUM_M: tl.constexpr = BLOCK_M if PEERS == 1 else 1
    EXCHANGED: tl.constexpr = PEERS > 1 and dx_ptr is not None
    KEEPS_X_HAT: tl.constexpr = x_ptr.dtype.element_ty == COMPUTE  # x_hat takes no more registers than x
    NEEDS_X: tl.constexpr = dx_ptr is not None or dweight_sums_ptr is not None
    axes = Axes(n_inner, n_middle)
    n_cols = n_col_vecs * V
    n_teams = tl.num_programs(0)
    team_index = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    if PEERS > 1:
        n_peers = tl.cdiv(n_cols, BLOCK_N)
        n_teams = n_teams // n_peers
        if EXCHANGED:
            team_index, peer = take_place(sync_ptr, n_peers)
        else:
            peer = team_index % n_peers
            team_index = team_index // n_peers
        cols += peer * BLOCK_N
    col_mask = cols < n_cols
    first = team_index.to(tl.int64) * BLOCK_M
    step = n_teams.to(tl.int64) * BLOCK_M
    end = n_rows.to(tl.int64)
    inverse_total = 1.0 / to_float(n_cols, COMPUTE)
    weight = weight_ptr
    if HOLD_WEIGHT and weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0)
    dweight = tl.zeros([SUM_M, BLOCK_N], COMPUTE)
    dbias = tl.zeros([SUM_M, BLOCK_N], COMPUTE)
    mean = tl.zeros([BLOCK_M, 1], COMPUTE)
    if EXCHANGED:
        team = Team(team_index, peer, n_peers, partials_ptr, sync_ptr)
        end += step
        turn = 0
        no_rows = tl.zeros([BLOCK_M, 1], tl.int64) + n_rows
        no_dy = tl.zeros([BLOCK_M, BLOCK_N], dy_ptr.dtype.element_ty)
        no_x = tl.zeros([BLOCK_M, BLOCK_N], x_ptr.dtype.element_ty)
        last = Waiting(no_rows, no_dy, no_x, mean, mean)
    for group in tl.range(first, end, step, num_stages=STAGES):
        rows = group + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)  # [BLOCK_M, 1]
        row_mask = rows < n_rows
        mask = row_mask & col_mask
        dy_strides = RowStrides(dy_row_vecs, dy_middle_vecs, dy_outer_vecs)
        dy_rows = row_offsets(rows, dy_strides, axes, V if DY_COLUMN_STRIDE else 1)
        dy = load_gradient(dy_ptr, dy_rows, cols, mask, V, DY_COLUMN_STRIDE)
        if NEEDS_X:
            if rstd_ptr is not None:
                rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
            else:
                rstd = tl.load(statistics_ptr + (n_rows if CENTRED else 0) + rows, mask=row_mask, other=0.0)
            x_rows = row_offsets(rows, RowStrides(x_row_vecs, x_middle_vecs, x_outer_vecs), axes, V)
            x = tl.load(at(x_ptr + x_rows, cols, V), mask=mask, other=0.0)
            if CENTRED:
                mean = tl.load(statistics_ptr + rows, mask=row_mask, other=0.0)
        if EXCHANGED:
            x_hat = normalized(x, mean, rstd, mask, CENTRED)
            wdy = weighted(dy.to(COMPUTE), weight_ptr, weight, cols, col_mask, WEIGHT_OFFSET, HOLD_WEIGHT)
            publish(sums_of(wdy, x_hat, CENTRED), team, turn, BLOCK_M, CENTRED)
            sums = collect(last.rstd, team, turn, PEERS, BLOCK_M, CENTRED)
            these = Waiting(rows, dy, x_hat if KEEPS_X_HAT else x, mean, rstd)
            rows, dy, x, mean, rstd = last
            last = these
            mask = (rows < n_rows) & col_mask
            turn += 1
        dy = dy.to(COMPUTE)
        if EXCHANGED and KEEPS_X_HAT:
            x_hat = x
        elif NEEDS_X:
            x_hat = normalized(x, mean, rstd, mask, CENTRED)
        if dweight_sums_ptr is not None:
            dyx = dy * rounded(x_hat, ROUNDED)
            dweight += dyx if SUM_M == BLOCK_M else tile_sum(dyx, 0)
        if dbias_sums_ptr is not None:
            dbias += dy if SUM_M == BLOCK_M else tile_sum(dy, 0)
        if dx_ptr is not None:
            wdy = weighted(dy, weight_ptr, weight, cols, col_mask, WEIGHT_OFFSET, HOLD_WEIGHT)
            if not EXCHANGED:
                sums = sums_of(wdy, x_hat, CENTRED)
            dx = wdy - x_hat * (sums.wdy_x_hat * inverse_total)
            if CENTRED:
                dx -= sums.wdy * inverse_total
            dx *= rstd
            if dtotal_ptr is not None:
                dtotal_strides = RowStrides(dtotal_row_vecs, dtotal_middle_vecs, dtotal_outer_vecs)
                dtotal_rows = row_offsets(rows, dtotal_strides, axes, V if DTOTAL_COLUMN_STRIDE else 1)
                dx += load_gradient(dtotal_ptr, dtotal_rows, cols, mask, V, DTOTAL_COLUMN_STRIDE).to(COMPUTE)
            tl.store(at(dx_ptr + rows * n_cols, cols, V), dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dresidual_ptr is not None:
                dresidual = dx.to(dresidual_ptr.dtype.element_ty)
                tl.store(at(dresidual_ptr + rows * n_cols, cols, V), dresidual, mask=mask)
    if dweight_sums_ptr is not None:
        tl.store(dweight_sums_ptr + team_index.to(tl.int64) * n_cols + cols, tile_sum(dweight, 0), mask=col_mask)
    if dbias_sums_ptr is not None:
        tl.store(dbias_sums_ptr + team_index.to(tl.int64) * n_cols + cols, tile_sum(dbias, 0), mask=col_mask)


@triton.jit(do_not_specialize=["n_sums"])
def rows_backward_finalise_kernel(
    dweight_sums_ptr,
    dbias_sums_ptr,
    dweight_ptr,
    dbias_ptr,
    n_sums,
    n_col_vecs,
    V: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes dweight and dbias as the sums over n_sums partial sums, in fixed order, rounded once.

    Grid: cdiv(n_cols, BLOCK_N).

    Args:
        dweight_sums_ptr, dbias_sums_ptr: [n_sums, n_cols], or None.
        dweight_ptr, dbias_ptr: [n_cols], or None.
    """
    n_cols = n_col_vecs * V
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    column_mask = cols < n_cols
    dweight = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    for start in range(0, n_sums, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (rows < n_sums) & column_mask
        if dweight_ptr is not None:
            dweight += tl.load(dweight_sums_ptr + rows * n_cols + cols, mask=mask, other=0.0)
        if dbias_ptr is not None:
            dbias += tl.load(dbias_sums_ptr + rows * n_cols + cols, mask=mask, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + cols, tile_sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=column_mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, tile_sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=column_mask)
