"""The gradients of LayerNorm and RMSNorm over contiguous rows; rows.py says how columns and strides come."""

import triton
import triton.language as tl

from triton_norm.kernels.exchange import meet, take_place
from triton_norm.kernels.moments import tile_sum, to_float
from triton_norm.kernels.rows import at, rounded


@triton.jit
def load_gradient(ptr, rows, row_vecs, cols, mask, V: tl.constexpr, COLUMN_STRIDE: tl.constexpr, COMPUTE: tl.constexpr):
    """A tile of a gradient whose rows lie row_vecs · V apart, or row_vecs where a row is one element expanded."""
    if COLUMN_STRIDE == 1:
        gradient = tl.load(at(ptr + rows * row_vecs * V, cols, V), mask=mask, other=0.0)
    else:
        gradient = tl.load(ptr + rows * row_vecs + cols * 0, mask=mask, other=0.0)
    return gradient.to(COMPUTE)


@triton.jit
def exchange_sums(
    sum_wdy,
    sum_wdy_x_hat,
    partials_ptr,
    sync_ptr,
    team,
    peer,
    n_peers,
    turn,
    PEERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Row sums over all spans from those over each peer's own, the same bits in each of them.

    The slots of odd and even turns differ: a peer that is ahead by a turn overwrites none that is still to be read.
    """
    KINDS: tl.constexpr = 2 if CENTRED else 1
    in_group = tl.arange(0, BLOCK_M)[:, None]
    members = tl.arange(0, PEERS)
    there = members < n_peers
    base = partials_ptr + (team.to(tl.int64) * 2 + turn % 2) * (KINDS * BLOCK_M) * n_peers
    tl.store(base + in_group * n_peers + peer, sum_wdy_x_hat)
    if CENTRED:
        tl.store(base + (BLOCK_M + in_group) * n_peers + peer, sum_wdy)
    meet(sync_ptr, team, (turn + 1) * n_peers)
    for row in tl.static_range(BLOCK_M):
        here = in_group == row
        row_sum = tl.sum(tl.load(base + row * n_peers + members, mask=there, other=0.0, volatile=True), 0)
        sum_wdy_x_hat = tl.where(here, row_sum, sum_wdy_x_hat)
        if CENTRED:
            slots = base + (BLOCK_M + row) * n_peers + members
            row_sum = tl.sum(tl.load(slots, mask=there, other=0.0, volatile=True), 0)
            sum_wdy = tl.where(here, row_sum, sum_wdy)
    return sum_wdy, sum_wdy_x_hat


@triton.jit(do_not_specialize=["n_rows"])
def rows_backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    statistics_ptr,
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
    """dx = (wdy − mean(wdy) − x_hat · mean(wdy · x_hat)) · rstd + dtotal with wdy = dy · (weight + WEIGHT_OFFSET), and
    each team's share of dweight = Σ dy · x_hat and dbias = Σ dy over the rows. mean(wdy) is 0 unless CENTRED; dweight's
    x_hat is rounded to the type ROUNDED where that is not None, as the forward's was.

    dy, dtotal and x [n_rows, n_cols] → dx and dresidual, of equal values, [n_rows, n_cols] contiguous, dweight_sums and
    dbias_sums [n_teams, n_cols]. A team takes every n_teams-th group of BLOCK_M rows; its n_peers = cdiv(n_cols,
    BLOCK_N) programs, at most PEERS, own a span of columns each, keep their sums in registers, and exchange the rows'
    sums in partials [n_teams, 2, 2 or 1, BLOCK_M, n_peers]; sync is 2 + n_teams zeros. Grid: n_teams · n_peers. 2R1W.
    dtotal, weight, dx, dresidual and the sums may be None, and partials and sync where PEERS is 1 or dx is None.
    """
    KEPT: tl.constexpr = BLOCK_M if PEERS == 1 else 1
    n_cols = n_col_vecs * V
    if PEERS > 1:
        n_peers = tl.cdiv(n_cols, BLOCK_N)
        n_teams = tl.num_programs(0) // n_peers
        if dx_ptr is not None:
            team, peer = take_place(sync_ptr, n_peers)
        else:
            team = tl.program_id(0) // n_peers
            peer = tl.program_id(0) % n_peers
        cols = peer * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    else:
        n_teams = tl.num_programs(0)
        team = tl.program_id(0)
        cols = tl.arange(0, BLOCK_N)[None, :]
    col_mask = cols < n_cols
    first = team.to(tl.int64) * BLOCK_M
    step = n_teams.to(tl.int64) * BLOCK_M
    inverse_total = 1.0 / to_float(n_cols, COMPUTE)
    if HOLD_WEIGHT and weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0)
    dweight = tl.zeros([KEPT, BLOCK_N], COMPUTE)
    dbias = tl.zeros([KEPT, BLOCK_N], COMPUTE)
    for group in tl.range(first, n_rows, step, num_stages=STAGES):
        rows = group + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)  # [BLOCK_M, 1]
        row_mask = rows < n_rows
        mask = row_mask & col_mask
        dy = load_gradient(dy_ptr, rows, dy_row_vecs, cols, mask, V, DY_COLUMN_STRIDE, COMPUTE)
        if dx_ptr is not None or dweight_sums_ptr is not None:
            rstd = tl.load(statistics_ptr + (n_rows if CENTRED else 0) + rows, mask=row_mask, other=0.0)
            x_hat = tl.load(at(x_ptr + rows * x_row_vecs * V, cols, V), mask=mask, other=0.0).to(COMPUTE)
            if CENTRED:
                x_hat = tl.where(mask, x_hat - tl.load(statistics_ptr + rows, mask=row_mask, other=0.0), 0.0)
            x_hat *= rstd
        if dweight_sums_ptr is not None:
            dyx = dy * rounded(x_hat, ROUNDED)
            dweight += dyx if KEPT == BLOCK_M else tile_sum(dyx, 0)
        if dbias_sums_ptr is not None:
            dbias += dy if KEPT == BLOCK_M else tile_sum(dy, 0)
        if dx_ptr is not None:
            wdy = dy
            if weight_ptr is not None:
                if not HOLD_WEIGHT:
                    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0, eviction_policy="evict_last")
                wdy *= weight.to(COMPUTE) + WEIGHT_OFFSET
            sum_wdy_x_hat = tile_sum(wdy * x_hat, 1)
            sum_wdy = tile_sum(wdy, 1) if CENTRED else tl.zeros_like(sum_wdy_x_hat)
            if PEERS > 1:
                sum_wdy, sum_wdy_x_hat = exchange_sums(
                    sum_wdy,
                    sum_wdy_x_hat,
                    partials_ptr,
                    sync_ptr,
                    team,
                    peer,
                    n_peers,
                    ((group - first) // step).to(tl.int32),
                    PEERS,
                    BLOCK_M,
                    CENTRED,
                )
            dx = wdy - x_hat * (sum_wdy_x_hat * inverse_total)
            if CENTRED:
                dx -= sum_wdy * inverse_total
            dx *= rstd
            if dtotal_ptr is not None:
                dx += load_gradient(dtotal_ptr, rows, dtotal_row_vecs, cols, mask, V, DTOTAL_COLUMN_STRIDE, COMPUTE)
            tl.store(at(dx_ptr + rows * n_cols, cols, V), dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dresidual_ptr is not None:
                dresidual = dx.to(dresidual_ptr.dtype.element_ty)
                tl.store(at(dresidual_ptr + rows * n_cols, cols, V), dresidual, mask=mask)
    if dweight_sums_ptr is not None:
        tl.store(dweight_sums_ptr + team.to(tl.int64) * n_cols + cols, tile_sum(dweight, 0), mask=col_mask)
    if dbias_sums_ptr is not None:
        tl.store(dbias_sums_ptr + team.to(tl.int64) * n_cols + cols, tile_sum(dbias, 0), mask=col_mask)


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
    """dweight and dbias [n_cols], rounded once, from the teams' sums [n_sums, n_cols] in fixed order.

    Grid: cdiv(n_cols, BLOCK_N). Either pair of pointers may be None.
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
