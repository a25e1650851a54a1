"""Computes the gradients of modulated.py's kernel, which has the formula."""

import triton
import triton.language as tl

from triton_norm.kernels.modulated import gate_backward, gate_of, load_modulation, load_rows, sigmoid_of
from triton_norm.kernels.moments import tile_sum, to_float
from triton_norm.kernels.rows import Axes, RowStrides, at, load_columns, rounded, row_offsets
from triton_norm.kernels.rows_backward import Sums, normalized, sums_of


@triton.jit
def store_sums(ptr, sums, row, cols, n_cols):
    """Stores the sum of a tile's rows as columns of one row of ptr [*, n_cols]."""
    tl.store(ptr + row.to(tl.int64) * n_cols + cols, tile_sum(sums, 0), mask=cols < n_cols)


@triton.jit
def load_row_sums(ptr, rows, n_rows, mask, CENTRED: tl.constexpr):
    """Returns the sums of these rows: ptr is [2, n_rows], Σ wdy · x_hat and Σ wdy; [1, n_rows] unless CENTRED."""
    wdy_x_hat = tl.load(ptr + rows, mask=mask, other=0.0)
    wdy = tl.load(ptr + n_rows + rows, mask=mask, other=0.0) if CENTRED else tl.zeros_like(wdy_x_hat)
    return Sums(wdy, wdy_x_hat)


@triton.jit(do_not_specialize=["n_rows", "n_inner", "n_middle", "n_tokens", "n_modulations"])
def modulated_backward_kernel(
    dy_ptr,
    dtotal_ptr,
    total_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    residual_gate_ptr,
    statistics_ptr,
    dx_ptr,
    dresidual_ptr,
    dgate_ptr,
    dscale_ptr,
    dshift_ptr,
    dresidual_gate_ptr,
    row_sums_ptr,
    sums_ptr,
    n_rows,
    n_tokens,
    n_modulations,
    n_col_vecs,
    n_inner,
    n_middle,
    dy_row_vecs,
    dy_middle_vecs,
    dy_outer_vecs,
    dtotal_row_vecs,
    dtotal_middle_vecs,
    dtotal_outer_vecs,
    total_row_vecs,
    total_middle_vecs,
    total_outer_vecs,
    x_row_vecs,
    x_middle_vecs,
    x_outer_vecs,
    gate_row_vecs,
    gate_middle_vecs,
    gate_outer_vecs,
    scale_vecs,
    shift_vecs,
    residual_gate_vecs,
    WEIGHT_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    CENTRED: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    SUMMED: tl.constexpr,
    X_HAT_SUMS: tl.constexpr,
    DY_SUMS: tl.constexpr,
    RESIDUAL_GATE_SUMS: tl.constexpr,
    V: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes the gradients of every row, and partial sums for the gradients of weight, bias and modulations.

    If SUMMED, n_splits programs share the rows of one modulation, and sum dy · x_hat and dy over them, before scale and
    weight. Otherwise n_splits programs share all rows, each row has a modulation of its own, or none, whose gradient is
    stored row by row, and the sums are those for weight and bias. dy is here the gradient of y before the gate.

    Programs have whole rows, or with row sums from modulated_row_sums_kernel BLOCK_N columns of them.

    Grid: n_modulations · n_splits if SUMMED, otherwise n_splits; times cdiv(n_cols, BLOCK_N) with row sums.
    Bytes: reads dy, dtotal, total, gate and x, and writes dx, dresidual and dgate, once.

    Args:
        dy_ptr, dtotal_ptr, total_ptr, gate_ptr: [n_rows, n_cols], row strides *_vecs · V; dtotal and gate may be None.
        x_ptr: [n_rows, n_cols], read for residual_gate's gradient alone; or None.
        weight_ptr, bias_ptr: [n_cols], or None.
        scale_ptr, shift_ptr, residual_gate_ptr: [n_modulations, n_cols], row strides *_vecs · V; or None.
        statistics_ptr: [2, n_rows], mean and rstd; [1, n_rows], rstd, unless CENTRED.
        dx_ptr, dresidual_ptr, dgate_ptr: [n_rows, n_cols], contiguous; or None.
        dscale_ptr, dshift_ptr, dresidual_gate_ptr: [n_rows, n_cols], contiguous; None if SUMMED.
        row_sums_ptr: [2, n_rows], Σ wdy · x_hat and Σ wdy; [1, n_rows] unless CENTRED; None for whole rows.
        sums_ptr: [kinds of sums, grid without pieces, n_cols] in COMPUTE, or None.
        X_HAT_SUMS, DY_SUMS, RESIDUAL_GATE_SUMS: places of the sums for the gradients of weight and scale, of bias and
            shift, and of residual_gate; None without them.
    """
    n_cols = n_col_vecs * V
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    if row_sums_ptr is not None:
        n_pieces = tl.cdiv(n_cols, BLOCK_N)
        cols += program % n_pieces * BLOCK_N
        program = program // n_pieces
        n_programs = n_programs // n_pieces
    split = program
    n_splits = n_programs
    n_members = n_rows.to(tl.int64)
    if SUMMED:
        n_splits = n_splits // n_modulations
        modulation = (split // n_splits).to(tl.int64)
        split = split % n_splits
        n_members = n_members // n_modulations
    col_mask = cols < n_cols
    axes = Axes(n_inner, n_middle)
    inverse_total = 1.0 / to_float(n_cols, COMPUTE)
    x_hat_sums = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    dy_sums = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    residual_gate_sums = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    mean = tl.zeros([BLOCK_M, 1], COMPUTE)
    for first in range(split.to(tl.int64) * BLOCK_M, n_members, n_splits.to(tl.int64) * BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)  # [BLOCK_M, 1]
        row_mask = rows < n_members
        mask = row_mask & col_mask
        numbers = rows
        modulation_mask = mask
        if SUMMED:
            rows = (rows // n_tokens * n_modulations + modulation) * n_tokens + rows % n_tokens
            numbers = modulation
            modulation_mask = col_mask
        out = rows * n_cols
        dy_rows = row_offsets(rows, RowStrides(dy_row_vecs, dy_middle_vecs, dy_outer_vecs), axes, V)
        dy = load_rows(dy_ptr + dy_rows, cols, mask, V, COMPUTE)
        total_rows = row_offsets(rows, RowStrides(total_row_vecs, total_middle_vecs, total_outer_vecs), axes, V)
        total = load_rows(total_ptr + total_rows, cols, mask, V, COMPUTE)
        rstd = tl.load(statistics_ptr + (n_rows if CENTRED else 0) + rows, mask=row_mask, other=0.0)
        if CENTRED:
            mean = tl.load(statistics_ptr + rows, mask=row_mask, other=0.0)
        v = total
        if gate_ptr is not None:
            gate_strides = RowStrides(gate_row_vecs, gate_middle_vecs, gate_outer_vecs)
            z = load_rows(gate_ptr + row_offsets(rows, gate_strides, axes, V), cols, mask, V, COMPUTE)
            sigmoid = sigmoid_of(z, GATE)
            if GATE_FIRST:
                v = total * gate_of(z, sigmoid, GATE)
        x_hat = normalized(v, mean, rstd, mask, CENTRED)
        scaled = rounded(x_hat, ROUNDED)
        modulated = scaled
        if weight_ptr is not None:
            weight = load_columns(weight_ptr, cols, n_cols, WEIGHT_OFFSET, COMPUTE)
            modulated *= weight
        if bias_ptr is not None:
            modulated += load_columns(bias_ptr, cols, n_cols, 0.0, COMPUTE)
        if scale_ptr is not None:
            scale_rows = scale_ptr + numbers * scale_vecs * V
            scale = load_modulation(scale_rows, cols, modulation_mask, V, COMPUTE) + SCALE_OFFSET
        if gate_ptr is not None and not GATE_FIRST:
            if dgate_ptr is not None:
                ungated = modulated
                if scale_ptr is not None:
                    ungated *= scale
                if shift_ptr is not None:
                    shift_rows = shift_ptr + numbers * shift_vecs * V
                    ungated += load_modulation(shift_rows, cols, modulation_mask, V, COMPUTE)
                dgate = gate_backward(dy * rounded(ungated, PRODUCT), z, sigmoid, GATE)
                tl.store(at(dgate_ptr + out, cols, V), dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
            dy *= gate_of(z, sigmoid, GATE)
        if dshift_ptr is not None:
            tl.store(at(dshift_ptr + out, cols, V), dy.to(dshift_ptr.dtype.element_ty), mask=mask)
        if dscale_ptr is not None:
            tl.store(at(dscale_ptr + out, cols, V), (dy * modulated).to(dscale_ptr.dtype.element_ty), mask=mask)
        wdy = dy
        if scale_ptr is not None:
            wdy *= scale
        summed = dy if SUMMED else wdy
        if X_HAT_SUMS is not None:
            x_hat_sums += summed * scaled
        if DY_SUMS is not None:
            dy_sums += summed
        if weight_ptr is not None:
            wdy *= weight
        if row_sums_ptr is None:
            sums = sums_of(wdy, x_hat, CENTRED)
        else:
            sums = load_row_sums(row_sums_ptr, rows, n_rows, row_mask, CENTRED)
        dtotal = wdy - x_hat * (sums.wdy_x_hat * inverse_total)
        if CENTRED:
            dtotal -= sums.wdy * inverse_total
        dtotal *= rstd
        if GATE_FIRST:
            if dgate_ptr is not None:
                dgate = gate_backward(dtotal * total, z, sigmoid, GATE)
                tl.store(at(dgate_ptr + out, cols, V), dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
            dtotal *= gate_of(z, sigmoid, GATE)
        if dtotal_ptr is not None:
            dtotal_strides = RowStrides(dtotal_row_vecs, dtotal_middle_vecs, dtotal_outer_vecs)
            dtotal += load_rows(dtotal_ptr + row_offsets(rows, dtotal_strides, axes, V), cols, mask, V, COMPUTE)
        if dresidual_ptr is not None:
            tl.store(at(dresidual_ptr + out, cols, V), dtotal.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dresidual_gate_ptr is not None or RESIDUAL_GATE_SUMS is not None:
            x_rows = row_offsets(rows, RowStrides(x_row_vecs, x_middle_vecs, x_outer_vecs), axes, V)
            dresidual_gate = dtotal * load_rows(x_ptr + x_rows, cols, mask, V, COMPUTE)
            if SUMMED:
                residual_gate_sums += dresidual_gate
            else:
                stored = dresidual_gate.to(dresidual_gate_ptr.dtype.element_ty)
                tl.store(at(dresidual_gate_ptr + out, cols, V), stored, mask=mask)
        if dx_ptr is not None:
            if residual_gate_ptr is not None:
                residual_gate_rows = residual_gate_ptr + numbers * residual_gate_vecs * V
                dtotal *= load_modulation(residual_gate_rows, cols, modulation_mask, V, COMPUTE)
            tl.store(at(dx_ptr + out, cols, V), dtotal.to(dx_ptr.dtype.element_ty), mask=mask)
    if X_HAT_SUMS is not None:
        store_sums(sums_ptr, x_hat_sums, X_HAT_SUMS * n_programs + program, cols, n_cols)
    if DY_SUMS is not None:
        store_sums(sums_ptr, dy_sums, DY_SUMS * n_programs + program, cols, n_cols)
    if RESIDUAL_GATE_SUMS is not None:
        store_sums(sums_ptr, residual_gate_sums, RESIDUAL_GATE_SUMS * n_programs + program, cols, n_cols)


@triton.jit(do_not_specialize=["n_rows", "n_inner", "n_middle", "n_tokens", "n_modulations"])
def modulated_row_sums_kernel(
    dy_ptr,
    total_ptr,
    weight_ptr,
    gate_ptr,
    scale_ptr,
    statistics_ptr,
    row_sums_ptr,
    n_rows,
    n_tokens,
    n_modulations,
    n_col_vecs,
    n_inner,
    n_middle,
    dy_row_vecs,
    dy_middle_vecs,
    dy_outer_vecs,
    total_row_vecs,
    total_middle_vecs,
    total_outer_vecs,
    gate_row_vecs,
    gate_middle_vecs,
    gate_outer_vecs,
    scale_vecs,
    WEIGHT_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    V: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes the sums that dx of long rows depends on: Σ wdy · x_hat, and Σ wdy if CENTRED.

    Grid: cdiv(n_rows, BLOCK_M). A program has BLOCK_N columns at a time.
    Bytes: reads dy, total and gate once.

    Args:
        row_sums_ptr: [2, n_rows], Σ wdy · x_hat and Σ wdy; [1, n_rows] unless CENTRED.
        the others: as those of modulated_backward_kernel.
    """
    n_cols = n_col_vecs * V
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    row_mask = rows < n_rows
    numbers = rows // n_tokens % n_modulations
    axes = Axes(n_inner, n_middle)
    dy_rows = dy_ptr + row_offsets(rows, RowStrides(dy_row_vecs, dy_middle_vecs, dy_outer_vecs), axes, V)
    total_rows = total_ptr + row_offsets(rows, RowStrides(total_row_vecs, total_middle_vecs, total_outer_vecs), axes, V)
    rstd = tl.load(statistics_ptr + (n_rows if CENTRED else 0) + rows, mask=row_mask, other=0.0)
    mean = tl.load(statistics_ptr + rows, mask=row_mask, other=0.0) if CENTRED else tl.zeros_like(rstd)
    wdy_sums = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    wdy_x_hat_sums = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
        mask = row_mask & (cols < n_cols)
        wdy = load_rows(dy_rows, cols, mask, V, COMPUTE)
        v = load_rows(total_rows, cols, mask, V, COMPUTE)
        if gate_ptr is not None:
            gate_strides = RowStrides(gate_row_vecs, gate_middle_vecs, gate_outer_vecs)
            z = load_rows(gate_ptr + row_offsets(rows, gate_strides, axes, V), cols, mask, V, COMPUTE)
            gate = gate_of(z, sigmoid_of(z, GATE), GATE)
            if GATE_FIRST:
                v *= gate
            else:
                wdy *= gate
        if scale_ptr is not None:
            wdy *= load_modulation(scale_ptr + numbers * scale_vecs * V, cols, mask, V, COMPUTE) + SCALE_OFFSET
        if weight_ptr is not None:
            wdy *= load_columns(weight_ptr, cols, n_cols, WEIGHT_OFFSET, COMPUTE)
        wdy_sums += wdy
        wdy_x_hat_sums += wdy * normalized(v, mean, rstd, mask, CENTRED)
    tl.store(row_sums_ptr + rows, tile_sum(wdy_x_hat_sums, 1), mask=row_mask)
    if CENTRED:
        tl.store(row_sums_ptr + n_rows + rows, tile_sum(wdy_sums, 1), mask=row_mask)
