"""Activations behind a normalization, their derivatives, and one bit an element that says which side of 0 it was on.

triton_norm/activations.py has the table of them; each function here raises at compile time for a name it does not know.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LO = tl.constexpr(1.925963033500e-8)  # what LOG2_E loses when it is rounded to fp32
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    """Returns e^x; in fp32 from 2^t, with what rounding t has left out put back."""
    if x.dtype == tl.float64:
        power = tl.exp(x)
    else:
        t = x * LOG2_E
        left = tl.fma(x, LOG2_E, -t) + x * LOG2_E_LO
        power = tl.exp2(t)
        power += tl.where(tl.abs(left) < 1.0, left, 0.0) * LN_2 * tl.where(power < float("inf"), power, 0.0)
    return power


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Returns f(z), and z itself where ACTIVATION is None; SLOPE is leaky_relu's below 0."""
    if ACTIVATION is None:
        y = z
    elif ACTIVATION == "relu":
        y = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0.0, z, z * SLOPE)
    elif ACTIVATION == "silu":
        y = z / (1.0 + exp(-z))
    else:
        tl.static_assert(False, "unknown activation")
    return y


@triton.jit
def side_of_zero(z, ACTIVATION: tl.constexpr):
    """Returns whether z is positive, for an activation whose gradient needs no more; NaN is to "relu", as in torch."""
    positive = z > 0.0
    if ACTIVATION == "relu":
        positive = positive | (z != z)
    elif ACTIVATION != "leaky_relu":
        tl.static_assert(False, "the gradient of this activation needs more than the side of 0")
    return positive


@triton.jit
def gradient_by_side(dy, positive, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Returns dy · f'(z) from the side of 0 that z is on."""
    if ACTIVATION == "relu":
        dz = tl.where(positive, dy, 0.0)
    elif ACTIVATION == "leaky_relu":
        dz = tl.where(positive, dy, dy * SLOPE)
    else:
        tl.static_assert(False, "the gradient of this activation needs more than the side of 0")
    return dz


@triton.jit
def activate_backward(dy, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Returns dy · f'(z)."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + exp(-z))
        dz = dy * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    else:
        dz = gradient_by_side(dy, side_of_zero(z, ACTIVATION), ACTIVATION, SLOPE)
    return dz


@triton.constexpr_function
def bits_per_byte(LANES, AXIS):
    """Returns eight, or the number of a row's columns if it has fewer."""
    return 8 if AXIS is None or LANES >= 8 else LANES


@triton.jit
def bytes_of(ptr, start, end, block, layout, TILE: tl.constexpr):
    """Returns (pointers, mask) of the bytes with a tile's bits: a channel's elements follow each other, or a row's
    columns do. No two programs share a byte."""
    PER_BYTE: tl.constexpr = bits_per_byte(TILE.LANES, TILE.AXIS)
    byte = tl.arange(0, TILE.T * TILE.LANES // PER_BYTE)
    if TILE.AXIS is None:
        per_channel = (layout.n_groups.to(tl.int64) * TILE.V + 7) // 8
        first = start.to(tl.int64) * TILE.V // 8
        pointers = ptr + block.to(tl.int64) * per_channel + first + byte
        mask = (first + byte) * 8 < end.to(tl.int64) * TILE.V
    else:
        BYTES: tl.constexpr = TILE.LANES // PER_BYTE
        row = start.to(tl.int64) + byte // BYTES
        within = byte % BYTES
        column = block * (layout.block_vecs * TILE.V) + within * PER_BYTE
        per_row = tl.cdiv(layout.n_column_vecs * TILE.V, PER_BYTE)
        pointers = ptr + row * per_row + column // PER_BYTE
        mask = (row < end) & (within * PER_BYTE < layout.block_vecs * TILE.V) & (column < layout.n_column_vecs * TILE.V)
    return pointers, mask


@triton.jit
def pack(positive, PER_BYTE: tl.constexpr):
    """Returns booleans [T, LANES] as bytes, PER_BYTE of them each."""
    N_BYTES: tl.constexpr = positive.shape[0] * positive.shape[1] // PER_BYTE
    bits = tl.reshape(positive.to(tl.int32), [N_BYTES, PER_BYTE]) << tl.arange(0, PER_BYTE)[None, :]
    return tl.sum(bits, 1).to(tl.uint8)


@triton.jit
def unpack(packed, T: tl.constexpr, LANES: tl.constexpr, PER_BYTE: tl.constexpr):
    """Returns the booleans [T, LANES] that `pack` has packed."""
    bits = packed.to(tl.int32)[:, None] >> tl.arange(0, PER_BYTE)[None, :]
    return tl.reshape(bits & 1, [T, LANES]) != 0
