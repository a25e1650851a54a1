"""Computes the gradients of modulated.py's kernel, which has the formula."""

import triton
import triton.language as tl

from triton_norm.kernels.modulated import gate_backward, gate_of, load_modulation, load_rows, sigmoid_of
from triton_norm.kernels.moments import tile_sum, to_float
from triton_norm.kernels.rows import Axes, RowStrides, at, load_columns, rounded, row_offsets
from triton_norm.kernels.rows_backward import normalized, sums_of


@triton.jit
def sums_of_kind(ptr, KIND: tl.constexpr, n_cols):
    """Returns the address of this program's sums of one kind: ptr is [kinds, programs, n_cols]."""
    return ptr + (tl.num_programs(0).to(tl.int64) * KIND + tl.program_id(0)) * n_cols


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

    Grid: n_modulations · n_splits if SUMMED, otherwise n_splits.
    Bytes: reads dy, dtotal, total, gate and x, and writes dx, dresidual and dgate, once.

    Args:
        dy_ptr, dtotal_ptr, total_ptr, gate_ptr: [n_rows, n_cols], row strides *_vecs · V; dtotal and gate may be None.
        x_ptr: [n_rows, n_cols], read for residual_gate's gradient alone; or None.
        weight_ptr, bias_ptr: [n_cols], or None.
        scale_ptr, shift_ptr, residual_gate_ptr: [n_modulations, n_cols], row strides *_vecs · V; or None.
        statistics_ptr: [2, n_rows], mean and rstd; [1, n_rows], rstd, unless CENTRED.
        dx_ptr, dresidual_ptr, dgate_ptr: [n_rows, n_cols], contiguous; or None.
        dscale_ptr, dshift_ptr, dresidual_gate_ptr: [n_rows, n_cols], contiguous; None if SUMMED.
        sums_ptr: [kinds of sums, programs, n_cols] in COMPUTE, or None.
        X_HAT_SUMS, DY_SUMS, RESIDUAL_GATE_SUMS: places of the sums for the gradients of weight and scale, of bias and
            shift, and of residual_gate; None without them.
    """
    n_cols = n_col_vecs * V
    split = tl.program_id(0)
    n_splits = tl.num_programs(0)
    n_members = n_rows.to(tl.int64)
    if SUMMED:
        n_splits = n_splits // n_modulations
        modulation = (split // n_splits).to(tl.int64)
        split = split % n_splits
        n_members = n_members // n_modulations
    cols = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
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
        dy = load_rows(dy_ptr, dy_rows, cols, mask, V, COMPUTE)
        total_rows = row_offsets(rows, RowStrides(total_row_vecs, total_middle_vecs, total_outer_vecs), axes, V)
        total = load_rows(total_ptr, total_rows, cols, mask, V, COMPUTE)
        rstd = tl.load(statistics_ptr + (n_rows if CENTRED else 0) + rows, mask=row_mask, other=0.0)
        if CENTRED:
            mean = tl.load(statistics_ptr + rows, mask=row_mask, other=0.0)
        v = total
        if gate_ptr is not None:
            gate_strides = RowStrides(gate_row_vecs, gate_middle_vecs, gate_outer_vecs)
            z = load_rows(gate_ptr, row_offsets(rows, gate_strides, axes, V), cols, mask, V, COMPUTE)
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
            scale = load_modulation(scale_ptr, numbers, scale_vecs, cols, modulation_mask, V, COMPUTE) + SCALE_OFFSET
        if gate_ptr is not None and not GATE_FIRST:
            if dgate_ptr is not None:
                ungated = modulated
                if scale_ptr is not None:
                    ungated *= scale
                if shift_ptr is not None:
                    ungated += load_modulation(shift_ptr, numbers, shift_vecs, cols, modulation_mask, V, COMPUTE)
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
        sums = sums_of(wdy, x_hat, CENTRED)
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
            dtotal += load_rows(dtotal_ptr, row_offsets(rows, dtotal_strides, axes, V), cols, mask, V, COMPUTE)
        if dresidual_ptr is not None:
            tl.store(at(dresidual_ptr + out, cols, V), dtotal.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dresidual_gate_ptr is not None or RESIDUAL_GATE_SUMS is not None:
            x_rows = row_offsets(rows, RowStrides(x_row_vecs, x_middle_vecs, x_outer_vecs), axes, V)
            dresidual_gate = dtotal * load_rows(x_ptr, x_rows, cols, mask, V, COMPUTE)
            if SUMMED:
                residual_gate_sums += dresidual_gate
            else:
                stored = dresidual_gate.to(dresidual_gate_ptr.dtype.element_ty)
                tl.store(at(dresidual_gate_ptr + out, cols, V), stored, mask=mask)
        if dx_ptr is not None:
            if residual_gate_ptr is not None:
                dtotal *= load_modulation(
                    residual_gate_ptr, numbers, residual_gate_vecs, cols, modulation_mask, V, COMPUTE
                )
            tl.store(at(dx_ptr + out, cols, V), dtotal.to(dx_ptr.dtype.element_ty), mask=mask)
    if X_HAT_SUMS is not None:
        tl.store(sums_of_kind(sums_ptr, X_HAT_SUMS, n_cols) + cols, tile_sum(x_hat_sums, 0), mask=col_mask)
    if DY_SUMS is not None:
        tl.store(sums_of_kind(sums_ptr, DY_SUMS, n_cols) + cols, tile_sum(dy_sums, 0), mask=col_mask)
    if RESIDUAL_GATE_SUMS is not None:
        tl.store(
            sums_of_kind(sums_ptr, RESIDUAL_GATE_SUMS, n_cols) + cols, tile_sum(residual_gate_sums, 0), mask=col_mask
        )


@triton.jit
def add_sums(ptr, first, n_sums, cols, n_cols, BLOCK_M: tl.constexpr):
    """Returns the sum [1, BLOCK_N] of rows first to first + n_sums of ptr [*, n_cols], in fixed order."""
    total = tl.zeros([BLOCK_M, cols.shape[1]], ptr.dtype.element_ty)
    for start in range(0, n_sums, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (rows < n_sums) & (cols < n_cols)
        total += tl.load(ptr + (first + rows) * n_cols + cols, mask=mask, other=0.0)
    return tile_sum(total, 0)


@triton.jit
def add_modulated_sums(
    ptr,
    scale_ptr,
    scale_vecs,
    n_sums,
    n_splits,
    cols,
    n_cols,
    OFFSET: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Returns Σ (scale + OFFSET) · sum [1, BLOCK_N] over all n_sums rows of ptr, each times its modulation's scale."""
    COMPUTE: tl.constexpr = ptr.dtype.element_ty
    total = tl.zeros([BLOCK_M, cols.shape[1]], COMPUTE)
    for start in range(0, n_sums, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (rows < n_sums) & (cols < n_cols)
        value = tl.load(ptr + rows * n_cols + cols, mask=mask, other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + rows // n_splits * scale_vecs * V + cols, mask=mask, other=0.0)
            value *= scale.to(COMPUTE) + OFFSET
        total += value
    return tile_sum(total, 0)


@triton.jit(do_not_specialize=["n_sums", "n_splits", "n_summed"])
def modulated_backward_finalise_kernel(
    sums_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    dweight_ptr,
    dbias_ptr,
    dscale_ptr,
    dshift_ptr,
    dresidual_gate_ptr,
    n_sums,
    n_splits,
    n_summed,
    n_col_vecs,
    scale_vecs,
    WEIGHT_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    X_HAT_SUMS: tl.constexpr,
    DY_SUMS: tl.constexpr,
    RESIDUAL_GATE_SUMS: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes the gradients of modulations, weight and bias from partial sums, in fixed order, rounded once.

    Grid: cdiv(n_cols, BLOCK_N) · (n_summed, and 1 more for weight and bias).

    Args:
        sums_ptr: [kinds of sums, n_sums, n_cols], n_splits rows a modulation.
        weight_ptr, bias_ptr: [n_cols]; scale_ptr: [n_modulations, n_cols], row stride scale_vecs · V; or None. scale is
            None if the sums already contain it.
        dweight_ptr, dbias_ptr: [n_cols], or None.
        dscale_ptr, dshift_ptr, dresidual_gate_ptr: [n_summed, n_cols], contiguous; or None.
        n_summed: n_modulations, or 0 if no gradient of a modulation is computed here.
        X_HAT_SUMS, DY_SUMS, RESIDUAL_GATE_SUMS: places of kinds in sums_ptr, as in modulated_backward_kernel.
    """
    n_cols = n_col_vecs * V
    n_blocks = tl.cdiv(n_cols, BLOCK_N)
    modulation = tl.program_id(0) // n_blocks
    cols = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = cols < n_cols
    kind_size = n_sums.to(tl.int64) * n_cols
    if modulation < n_summed:
        first = modulation.to(tl.int64) * n_splits
        out = modulation.to(tl.int64) * n_cols + cols
        if dscale_ptr is not None:
            dscale = add_sums(sums_ptr + X_HAT_SUMS * kind_size, first, n_splits, cols, n_cols, BLOCK_M)
            if weight_ptr is not None:
                dscale *= load_columns(weight_ptr, cols, n_cols, WEIGHT_OFFSET, dscale.dtype)
            if bias_ptr is not None:
                dy = add_sums(sums_ptr + DY_SUMS * kind_size, first, n_splits, cols, n_cols, BLOCK_M)
                dscale += dy * load_columns(bias_ptr, cols, n_cols, 0.0, dscale.dtype)
            tl.store(dscale_ptr + out, dscale.to(dscale_ptr.dtype.element_ty), mask=mask)
        if dshift_ptr is not None:
            dshift = add_sums(sums_ptr + DY_SUMS * kind_size, first, n_splits, cols, n_cols, BLOCK_M)
            tl.store(dshift_ptr + out, dshift.to(dshift_ptr.dtype.element_ty), mask=mask)
        if dresidual_gate_ptr is not None:
            dresidual_gate = add_sums(sums_ptr + RESIDUAL_GATE_SUMS * kind_size, first, n_splits, cols, n_cols, BLOCK_M)
            tl.store(dresidual_gate_ptr + out, dresidual_gate.to(dresidual_gate_ptr.dtype.element_ty), mask=mask)
    else:
        if dweight_ptr is not None:
            x_hat_ptr = sums_ptr + X_HAT_SUMS * kind_size
            dweight = add_modulated_sums(
                x_hat_ptr, scale_ptr, scale_vecs, n_sums, n_splits, cols, n_cols, SCALE_OFFSET, V, BLOCK_M
            )
            tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dy_ptr = sums_ptr + DY_SUMS * kind_size
            dbias = add_modulated_sums(
                dy_ptr, scale_ptr, scale_vecs, n_sums, n_splits, cols, n_cols, SCALE_OFFSET, V, BLOCK_M
            )
            tl.store(dbias_ptr + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)
