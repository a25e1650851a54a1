"""Computes the gradients that are sums over rows from the partial sums of modulated_backward.py's kernel."""

import triton
import triton.language as tl

from triton_norm.kernels.moments import tile_sum
from triton_norm.kernels.rows import load_columns


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
