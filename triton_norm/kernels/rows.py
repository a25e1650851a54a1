"""LayerNorm over contiguous rows: y = (x − mean) · rstd · weight + bias.

Column counts and row strides come divided by V, the largest power of two that divides them all, and are multiplied back
here: the compiler then knows that addresses and masks change every V elements, and moves V elements an instruction.
"""

import triton
import triton.language as tl

from triton_norm.kernels.moments import centre, merge, tile_sum, to_float


@triton.jit
def load_columns(ptr, cols, n_cols, COMPUTE: tl.constexpr):
    """A parameter's columns as a row to broadcast, read once by every program and so kept in cache."""
    return tl.load(ptr + cols, mask=cols < n_cols, other=0.0, eviction_policy="evict_last").to(COMPUTE)


@triton.jit
def normalize(centred, rstd, weight_ptr, bias_ptr, cols, n_cols, COMPUTE: tl.constexpr):
    """centred · rstd · weight + bias; either parameter may be None."""
    y = centred * rstd
    if weight_ptr is not None:
        y = y * load_columns(weight_ptr, cols, n_cols, COMPUTE)
    if bias_ptr is not None:
        y = y + load_columns(bias_ptr, cols, n_cols, COMPUTE)
    return y


@triton.jit(do_not_specialize=["n_rows"])
def rows_forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    n_col_vecs,
    x_row_vecs,
    EPS: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """x [n_rows, n_cols] with rows x_row_vecs · V apart → y [n_rows, n_cols] contiguous, mean and rstd [n_rows].

    Grid: cdiv(n_rows, BLOCK_M); each program owns BLOCK_M rows. WHOLE_ROW: they stay in registers, 1R1W. Otherwise
    pieces of BLOCK_N columns are swept twice, backwards the second time so that it begins in cache.
    weight_ptr, bias_ptr, mean_ptr and rstd_ptr may be None.
    """
    n_cols = n_col_vecs * V
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    row_mask = rows < n_rows
    x_rows = x_ptr + rows * x_row_vecs * V
    y_rows = y_ptr + rows * n_cols
    block = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    total = to_float(n_cols, COMPUTE)
    if WHOLE_ROW:
        mask = row_mask & (block < n_cols)
        x = tl.load(x_rows + block, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        centred, mean, _ = centre(x, mask, total, 1)
        rstd = tl.rsqrt(tile_sum(centred * centred, 1) / total + EPS)
        y = normalize(centred, rstd, weight_ptr, bias_ptr, block, n_cols, COMPUTE)
        tl.store(y_rows + block, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        mean = tl.zeros([BLOCK_M, 1], COMPUTE)
        rest = tl.zeros([BLOCK_M, 1], COMPUTE)
        m2 = tl.zeros([BLOCK_M, 1], COMPUTE)
        for start in range(0, n_cols, BLOCK_N):
            cols = start + block
            mask = row_mask & (cols < n_cols)
            x = tl.load(x_rows + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(COMPUTE)
            count = to_float(tl.minimum(n_cols - start, BLOCK_N), COMPUTE)
            centred, piece_mean, piece_rest = centre(x, mask, count, 1)
            piece_m2 = tile_sum(centred * centred, 1)
            seen = to_float(start, COMPUTE)
            mean, rest, m2 = merge(seen, mean, rest, m2, count, piece_mean, piece_rest, piece_m2)
        rstd = tl.rsqrt(m2 / total + EPS)
        last = (n_cols - 1) // BLOCK_N * BLOCK_N
        for swept in range(0, n_cols, BLOCK_N):
            cols = last - swept + block
            mask = row_mask & (cols < n_cols)
            x = tl.load(x_rows + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
            y = normalize((x - mean) - rest, rstd, weight_ptr, bias_ptr, cols, n_cols, COMPUTE)
            tl.store(y_rows + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=row_mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)


@triton.jit
def load_x_hat(x_ptr, offsets, mask, mean, rstd, COMPUTE: tl.constexpr):
    """x_hat = (x − mean) · rstd, and 0 outside the mask whatever the mean."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    return tl.where(mask, x - mean, 0.0) * rstd


@triton.jit
def weigh(dy, weight_ptr, cols, n_cols, COMPUTE: tl.constexpr):
    """wdy = dy · weight, or dy where there is no weight."""
    wdy = dy
    if weight_ptr is not None:
        wdy = dy * load_columns(weight_ptr, cols, n_cols, COMPUTE)
    return wdy


@triton.jit
def input_gradient(wdy, x_hat, mean_wdy, mean_wdy_x_hat, rstd):
    return (wdy - mean_wdy - x_hat * mean_wdy_x_hat) * rstd


@triton.jit
def add_to_sums(sums_ptr, cols, added, mask, begun):
    """Adds a row of columns to this program's own sums in memory, which hold nothing before they are begun."""
    if sums_ptr is not None:
        if begun:
            added += tl.load(sums_ptr + cols, mask=mask, other=0.0)
        tl.store(sums_ptr + cols, added, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def rows_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_sums_ptr,
    dbias_sums_ptr,
    n_rows,
    n_col_vecs,
    dy_row_vecs,
    x_row_vecs,
    DY_COLUMN_STRIDE: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """dx = (wdy − mean(wdy) − x_hat · mean(wdy · x_hat)) · rstd with wdy = dy · weight, and each program's share of
    dweight = Σ dy · x_hat and dbias = Σ dy over the rows.

    dy and x [n_rows, n_cols] → dx [n_rows, n_cols] contiguous, dweight_sums and dbias_sums [n_programs, n_cols]. Rows
    of x lie x_row_vecs · V apart; of dy likewise, or dy_row_vecs where a row is one element, its column stride 0.
    Grid: at most a program for each group of BLOCK_M rows; each takes every n_programs-th group. WHOLE_ROW: rows and
    sums stay in registers, 2R1W. Otherwise a group is swept twice in pieces of BLOCK_N columns, backwards the second
    time so that it begins in cache, and the sums are kept in memory. weight_ptr, dx_ptr and the sums may be None.
    """
    n_cols = n_col_vecs * V
    DY_UNIT: tl.constexpr = V if DY_COLUMN_STRIDE == 1 else 1
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK_M
    step = tl.num_programs(0) * BLOCK_M
    in_group = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)  # [BLOCK_M, 1]
    block = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    inverse_total = 1.0 / to_float(n_cols, COMPUTE)
    if dweight_sums_ptr is not None:
        dweight_sums_ptr += program * n_cols
    if dbias_sums_ptr is not None:
        dbias_sums_ptr += program * n_cols
    if WHOLE_ROW:
        in_row = block < n_cols
        dweight = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        dbias = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        for group in tl.range(first, n_rows, step, num_stages=STAGES):
            rows = group + in_group
            mask = (rows < n_rows) & in_row
            mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
            dy = tl.load(dy_ptr + rows * dy_row_vecs * DY_UNIT + block * DY_COLUMN_STRIDE, mask=mask, other=0.0).to(
                COMPUTE
            )
            x_hat = load_x_hat(x_ptr, rows * x_row_vecs * V + block, mask, mean, rstd, COMPUTE)
            dweight += dy * x_hat
            dbias += dy
            if dx_ptr is not None:
                wdy = weigh(dy, weight_ptr, block, n_cols, COMPUTE)
                mean_wdy = tile_sum(wdy, 1) * inverse_total
                mean_wdy_x_hat = tile_sum(wdy * x_hat, 1) * inverse_total
                dx = input_gradient(wdy, x_hat, mean_wdy, mean_wdy_x_hat, rstd)
                tl.store(dx_ptr + rows * n_cols + block, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dweight_sums_ptr is not None:
            tl.store(dweight_sums_ptr + block, tile_sum(dweight, 0), mask=in_row)
        if dbias_sums_ptr is not None:
            tl.store(dbias_sums_ptr + block, tile_sum(dbias, 0), mask=in_row)
    else:
        last = (n_cols - 1) // BLOCK_N * BLOCK_N
        for group in range(first, n_rows, step):
            rows = group + in_group
            mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
            mean_wdy = tl.zeros([BLOCK_M, 1], COMPUTE)
            mean_wdy_x_hat = tl.zeros([BLOCK_M, 1], COMPUTE)
            if dx_ptr is not None:
                for start in range(0, n_cols, BLOCK_N):
                    cols = start + block
                    mask = (rows < n_rows) & (cols < n_cols)
                    dy = tl.load(
                        dy_ptr + rows * dy_row_vecs * DY_UNIT + cols * DY_COLUMN_STRIDE, mask=mask, other=0.0
                    ).to(COMPUTE)
                    x_hat = load_x_hat(x_ptr, rows * x_row_vecs * V + cols, mask, mean, rstd, COMPUTE)
                    wdy = weigh(dy, weight_ptr, cols, n_cols, COMPUTE)
                    mean_wdy += tile_sum(wdy, 1) * inverse_total
                    mean_wdy_x_hat += tile_sum(wdy * x_hat, 1) * inverse_total
            for swept in range(0, n_cols, BLOCK_N):
                cols = last - swept + block
                mask = (rows < n_rows) & (cols < n_cols)
                dy = tl.load(dy_ptr + rows * dy_row_vecs * DY_UNIT + cols * DY_COLUMN_STRIDE, mask=mask, other=0.0).to(
                    COMPUTE
                )
                x_hat = load_x_hat(x_ptr, rows * x_row_vecs * V + cols, mask, mean, rstd, COMPUTE)
                add_to_sums(dweight_sums_ptr, cols, tile_sum(dy * x_hat, 0), cols < n_cols, group > first)
                add_to_sums(dbias_sums_ptr, cols, tile_sum(dy, 0), cols < n_cols, group > first)
                if dx_ptr is not None:
                    wdy = weigh(dy, weight_ptr, cols, n_cols, COMPUTE)
                    dx = input_gradient(wdy, x_hat, mean_wdy, mean_wdy_x_hat, rstd)
                    tl.store(dx_ptr + rows * n_cols + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            tl.debug_barrier()  # the next group reads sums that other threads of this program have stored


@triton.jit(do_not_specialize=["n_sums"])
def rows_backward_finalise_kernel(
    dweight_sums_ptr,
    dbias_sums_ptr,
    dweight_ptr,
    dbias_ptr,
    n_sums,
    n_col_vecs,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """dweight and dbias [n_cols], rounded once, from the programs' sums [n_sums, n_cols] in fixed order.

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
