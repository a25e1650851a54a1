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
from triton_norm.kernels.moments import moments_of, to_float
from triton_norm.kernels.rows import Axes, RowStrides, at, normalize, rounded, row_offsets


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
def load_rows(ptr, offsets, cols, mask, V: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns a tile of rows that no other program reads, in COMPUTE."""
    return tl.load(at(ptr + offsets, cols, V), mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)


@triton.jit
def load_modulation(ptr, numbers, vecs, cols, mask, V: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns rows of a modulation by their numbers [M, 1], row stride vecs · V. Many programs read them."""
    return tl.load(at(ptr + numbers * vecs * V, cols, V), mask=mask, other=0.0, eviction_policy="evict_last").to(
        COMPUTE
    )


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes y for every row, and with a residual total, rounded to its type. The module has the formula.

    Grid: cdiv(n_rows, BLOCK_M). A program has whole rows in registers.
    Bytes: reads x, residual and gate, and writes y and total, once.

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
    x_rows = row_offsets(rows, RowStrides(x_row_vecs, x_middle_vecs, x_outer_vecs), axes, V)
    total = tl.load(at(x_ptr + x_rows, cols, V), mask=mask, other=0.0, eviction_policy="evict_first")
    if residual_ptr is not None:
        WIDE: tl.constexpr = tl.float64 if residual_ptr.dtype.element_ty == tl.float64 else COMPUTE
        residual_strides = RowStrides(residual_row_vecs, residual_middle_vecs, residual_outer_vecs)
        wide = total.to(WIDE)
        if residual_gate_ptr is not None:
            wide *= load_modulation(residual_gate_ptr, numbers, residual_gate_vecs, cols, mask, V, WIDE)
        wide += load_rows(residual_ptr, row_offsets(rows, residual_strides, axes, V), cols, mask, V, WIDE)
        total = wide.to(total_ptr.dtype.element_ty)
        tl.store(at(total_ptr + rows * n_cols, cols, V), total, mask=mask)
    v = total.to(COMPUTE)
    gate_rows = rows
    if gate_ptr is not None:
        gate_rows = row_offsets(rows, RowStrides(gate_row_vecs, gate_middle_vecs, gate_outer_vecs), axes, V)
    if GATE_FIRST:
        z = load_rows(gate_ptr, gate_rows, cols, mask, V, COMPUTE)
        v *= gate_of(z, sigmoid_of(z, GATE), GATE)
    centred, moments = moments_of(v, mask, to_float(n_cols, COMPUTE), 1, CENTRED)
    rstd = tl.rsqrt(moments.m2 / to_float(n_cols, COMPUTE) + EPS)
    y = normalize(centred, rstd, weight_ptr, bias_ptr, cols, n_cols, WEIGHT_OFFSET, ROUNDED)
    if scale_ptr is not None:
        y *= load_modulation(scale_ptr, numbers, scale_vecs, cols, mask, V, COMPUTE) + SCALE_OFFSET
    if shift_ptr is not None:
        y += load_modulation(shift_ptr, numbers, shift_vecs, cols, mask, V, COMPUTE)
    if gate_ptr is not None and not GATE_FIRST:
        z = load_rows(gate_ptr, gate_rows, cols, mask, V, COMPUTE)
        y = rounded(y, PRODUCT) * gate_of(z, sigmoid_of(z, GATE), GATE)
    tl.store(at(y_ptr + rows * n_cols, cols, V), y.to(y_ptr.dtype.element_ty), mask=mask)
    if statistics_ptr is not None:
        if CENTRED:
            tl.store(statistics_ptr + rows, moments.mean, mask=row_mask)
        tl.store(statistics_ptr + (n_rows if CENTRED else 0) + rows, rstd, mask=row_mask)
