"""Computes LayerNorm and RMSNorm of rows that are gated or modulated.

    total = x, or residual + residual_gate · x
    v = total · f(gate) if GATE_FIRST, else total
    z = (v − mean) · rstd · (weight + WEIGHT_OFFSET) + bias
    y = z · (scale + SCALE_OFFSET) + shift, and times f(gate) unless GATE_FIRST

The gate has x's shape. scale, shift and residual_gate have n_modulations rows: row r of x has number
r // n_tokens % n_modulations of them. rows.py explains V and the _vecs arguments.
"""

import triton
import triton.language as tl

from triton_norm.kernels.exponentials import exp
from triton_norm.kernels.moments import Moments, merge, moments_of, to_float
from triton_norm.kernels.rows import Axes, RowStrides, at, centred_on, normalize, rounded, row_offsets


@triton.jit
def sigmoid_of(z, GATE: tl.constexpr):
    """Returns the sigmoid that a gate's activation and its derivative are made of."""
    if GATE is None:
        sigmoid = z
    else:
        sigmoid = 1.0 / (1.0 + exp(-z))
    return sigmoid


@triton.jit
def gate_of(z, sigmoid, GATE: tl.constexpr):
    """Returns f(z)."""
    if GATE == "silu":
        gate = z * sigmoid
    elif GATE == "sigmoid" or GATE is None:
        gate = sigmoid
    else:
        tl.static_assert(False, "unknown activation of a gate")
    return gate


@triton.jit
def gate_backward(dgate, z, sigmoid, GATE: tl.constexpr):
    """Returns dgate · f'(z)."""
    if GATE == "silu":
        dgate *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif GATE == "sigmoid":
        dgate *= sigmoid * (1.0 - sigmoid)
    return dgate


@triton.jit
def load_rows(rows_ptr, cols, mask, V: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns columns of rows [M, 1] that no other program reads, in COMPUTE."""
    return tl.load(at(rows_ptr, cols, V), mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)


@triton.jit
def load_modulation(rows_ptr, cols, mask, V: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns columns of a modulation's rows [M, 1], in COMPUTE. Many programs read them."""
    return tl.load(at(rows_ptr, cols, V), mask=mask, other=0.0, eviction_policy="evict_last").to(COMPUTE)


@triton.jit
def load_total(
    x_rows, residual_rows, residual_gate_rows, total_rows, cols, mask, V: tl.constexpr, COMPUTE: tl.constexpr
):
    """Returns x; or with a residual residual + residual_gate · x, rounded once to total's type and stored."""
    total = tl.load(at(x_rows, cols, V), mask=mask, other=0.0, eviction_policy="evict_first")
    if residual_rows is not None:
        WIDE: tl.constexpr = tl.float64 if residual_rows.dtype.scalar.element_ty == tl.float64 else COMPUTE
        wide = total.to(WIDE)
        if residual_gate_rows is not None:
            wide *= load_modulation(residual_gate_rows, cols, mask, V, WIDE)
        wide += load_rows(residual_rows, cols, mask, V, WIDE)
        total = wide.to(total_rows.dtype.scalar.element_ty)
        tl.store(at(total_rows, cols, V), total, mask=mask)
    return total


@triton.jit
def gated_first(
    total, gate_rows, cols, mask, GATE: tl.constexpr, GATE_FIRST: tl.constexpr, V: tl.constexpr, COMPUTE: tl.constexpr
):
    """Returns total · f(gate) if GATE_FIRST, else total; in COMPUTE."""
    v = total.to(COMPUTE)
    if GATE_FIRST:
        z = load_rows(gate_rows, cols, mask, V, COMPUTE)
        v *= gate_of(z, sigmoid_of(z, GATE), GATE)
    return v


@triton.jit
def modulate(y, scale_rows, shift_rows, cols, mask, SCALE_OFFSET: tl.constexpr, V: tl.constexpr):
    """Returns y · (scale + SCALE_OFFSET) + shift. Either may be None."""
    if scale_rows is not None:
        y *= load_modulation(scale_rows, cols, mask, V, y.dtype) + SCALE_OFFSET
    if shift_rows is not None:
        y += load_modulation(shift_rows, cols, mask, V, y.dtype)
    return y


@triton.jit
def gated_last(
    y, gate_rows, cols, mask, PRODUCT: tl.constexpr, GATE: tl.constexpr, GATE_FIRST: tl.constexpr, V: tl.constexpr
):
    """Returns y, rounded to PRODUCT, times f(gate); or y if GATE_FIRST or without a gate."""
    if gate_rows is not None and not GATE_FIRST:
        z = load_rows(gate_rows, cols, mask, V, y.dtype)
        y = rounded(y, PRODUCT) * gate_of(z, sigmoid_of(z, GATE), GATE)
    return y


@triton.jit(do_not_specialize=["n_rows", "n_inner", "n_middle", "n_tokens", "n_modulations"])
def modulated_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    residual_gate_ptr,
    y_ptr,
    total_ptr,
    statistics_ptr,
    n_rows,
    n_tokens,
    n_modulations,
    n_col_vecs,
    n_inner,
    n_middle,
    x_row_vecs,
    x_middle_vecs,
    x_outer_vecs,
    residual_row_vecs,
    residual_middle_vecs,
    residual_outer_vecs,
    gate_row_vecs,
    gate_middle_vecs,
    gate_outer_vecs,
    scale_vecs,
    shift_vecs,
    residual_gate_vecs,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    CENTRED: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    V: tl.constexpr,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes y for every row, and with a residual total, rounded to its type. The module has the formula.

    A program has whole rows in registers if WHOLE. Otherwise it has BLOCK_N columns at a time, first for the moments,
    and then, backwards, for y.

    Grid: cdiv(n_rows, BLOCK_M).
    Bytes: reads x, residual and gate, and writes y and total, once. Unless WHOLE, reads x, or total, and gate again.

    Args:
        x_ptr, residual_ptr, gate_ptr: [n_rows, n_cols], row strides *_vecs · V; the latter two may be None.
        weight_ptr, bias_ptr: [n_cols], or None.
        scale_ptr, shift_ptr, residual_gate_ptr: [n_modulations, n_cols], row strides *_vecs · V; or None.
        y_ptr, total_ptr: [n_rows, n_cols], contiguous; total is None without a residual.
        statistics_ptr: [2, n_rows], mean and rstd; [1, n_rows], rstd, unless CENTRED; or None.
        ROUNDED: type that x_hat is rounded to before it is scaled, or None.
        PRODUCT: type that y is rounded to before it is gated, or None.
        CENTRED: subtracts the mean: LayerNorm; otherwise RMSNorm.
        GATE: name of f; None: f(z) = z.
        COMPUTE: type of the arithmetic and of the statistics.
    """
    n_cols = n_col_vecs * V
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    row_mask = rows < n_rows
    cols = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    mask = row_mask & (cols < n_cols)
    numbers = rows // n_tokens % n_modulations
    axes = Axes(n_inner, n_middle)
    x_rows = x_ptr + row_offsets(rows, RowStrides(x_row_vecs, x_middle_vecs, x_outer_vecs), axes, V)
    y_rows = y_ptr + rows * n_cols
    swept_rows = x_rows
    residual_rows = residual_ptr
    residual_gate_rows = residual_gate_ptr
    total_rows = total_ptr
    gate_rows = gate_ptr
    scale_rows = scale_ptr
    shift_rows = shift_ptr
    if residual_ptr is not None:
        residual_strides = RowStrides(residual_row_vecs, residual_middle_vecs, residual_outer_vecs)
        residual_rows = residual_ptr + row_offsets(rows, residual_strides, axes, V)
        total_rows = total_ptr + rows * n_cols
        swept_rows = total_rows
    if residual_gate_ptr is not None:
        residual_gate_rows = residual_gate_ptr + numbers * residual_gate_vecs * V
    if gate_ptr is not None:
        gate_strides = RowStrides(gate_row_vecs, gate_middle_vecs, gate_outer_vecs)
        gate_rows = gate_ptr + row_offsets(rows, gate_strides, axes, V)
    if scale_ptr is not None:
        scale_rows = scale_ptr + numbers * scale_vecs * V
    if shift_ptr is not None:
        shift_rows = shift_ptr + numbers * shift_vecs * V
    total = load_total(x_rows, residual_rows, residual_gate_rows, total_rows, cols, mask, V, COMPUTE)
    v = gated_first(total, gate_rows, cols, mask, GATE, GATE_FIRST, V, COMPUTE)
    count = to_float(n_cols if WHOLE else tl.minimum(n_cols, BLOCK_N), COMPUTE)
    centred, moments = moments_of(v, mask, count, 1, CENTRED)
    if not WHOLE:
        for start in range(BLOCK_N, n_cols, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)[None, :]
            mask = row_mask & (cols < n_cols)
            total = load_total(x_rows, residual_rows, residual_gate_rows, total_rows, cols, mask, V, COMPUTE)
            v = gated_first(total, gate_rows, cols, mask, GATE, GATE_FIRST, V, COMPUTE)
            count = to_float(tl.minimum(n_cols - start, BLOCK_N), COMPUTE)
            _, of_piece = moments_of(v, mask, count, 1, CENTRED)
            if CENTRED:
                moments = merge(to_float(start, COMPUTE), moments, count, of_piece)
            else:
                moments = Moments(moments.mean, moments.mean_lo, moments.m2 + of_piece.m2)
    rstd = tl.rsqrt(moments.m2 / to_float(n_cols, COMPUTE) + EPS)
    if statistics_ptr is not None:
        if CENTRED:
            tl.store(statistics_ptr + rows, moments.mean, mask=row_mask)
        tl.store(statistics_ptr + (n_rows if CENTRED else 0) + rows, rstd, mask=row_mask)
    if WHOLE:
        y = normalize(centred, rstd, weight_ptr, bias_ptr, cols, n_cols, WEIGHT_OFFSET, ROUNDED)
        y = modulate(y, scale_rows, shift_rows, cols, mask, SCALE_OFFSET, V)
        y = gated_last(y, gate_rows, cols, mask, PRODUCT, GATE, GATE_FIRST, V)
        tl.store(at(y_rows, cols, V), y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        if residual_ptr is not None:
            tl.debug_barrier()  # total is read by other threads than have stored it
        last = (n_cols - 1) // BLOCK_N * BLOCK_N
        for back in range(0, last + 1, BLOCK_N):  # the last pieces are still in cache
            cols = last - back + tl.arange(0, BLOCK_N)[None, :]
            mask = row_mask & (cols < n_cols)
            total = tl.load(at(swept_rows, cols, V), mask=mask, other=0.0, eviction_policy="evict_first")
            v = gated_first(total, gate_rows, cols, mask, GATE, GATE_FIRST, V, COMPUTE)
            centred = centred_on(v, moments, CENTRED)
            y = normalize(centred, rstd, weight_ptr, bias_ptr, cols, n_cols, WEIGHT_OFFSET, ROUNDED)
            y = modulate(y, scale_rows, shift_rows, cols, mask, SCALE_OFFSET, V)
            y = gated_last(y, gate_rows, cols, mask, PRODUCT, GATE, GATE_FIRST, V)
            tl.store(at(y_rows, cols, V), y.to(y_ptr.dtype.element_ty), mask=mask)
