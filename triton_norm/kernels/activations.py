"""Implements activations behind a normalization, their derivatives, and the bits that some derivatives use.

triton_norm/activations.py lists the activations by name. Each function here fails to compile for an unknown name.
"""

import triton
import triton.language as tl

from triton_norm.kernels.exponentials import DENSITY_AT_ZERO, TANH_CUBIC, TANH_LINEAR, exp, normal, tanh_sigmoids

SIXTH = tl.constexpr(1.0 / 6.0)
THIRD = tl.constexpr(1.0 / 3.0)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Returns f(z), or z if ACTIVATION is None. SLOPE is leaky_relu's slope below 0."""
    if ACTIVATION is None:
        y = z
    elif ACTIVATION == "relu":
        y = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0.0, z, z * SLOPE)
    elif ACTIVATION == "relu6":
        y = tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACTIVATION == "hardswish":
        y = z * (tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * SIXTH)  # 6 · SIXTH is 1, and so y is z from 3 on
    elif ACTIVATION == "silu":
        y = z / (1.0 + exp(-z))
    elif ACTIVATION == "gelu":
        distribution, _ = normal(z)
        y = z * distribution
    elif ACTIVATION == "gelu_tanh":
        sigmoid, _ = tanh_sigmoids(z)
        y = z * sigmoid
    else:
        tl.static_assert(False, "unknown activation")
    return y


@triton.jit
def mask_of(z, ACTIVATION: tl.constexpr):
    """Returns the mask of f'(z) = 1, for gradients that depend on it alone. It has NaN, but for "leaky_relu", as in
    torch."""
    passing = z > 0.0
    if ACTIVATION == "relu":
        passing = passing | (z != z)
    elif ACTIVATION == "relu6":
        passing = (passing & (z < 6.0)) | (z != z)
    elif ACTIVATION != "leaky_relu":
        tl.static_assert(False, "the gradient of this activation needs more than a mask")
    return passing


@triton.jit
def gradient_by_mask(dy, passing, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Returns dy · f'(z), computed from the mask of f'(z) = 1."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        dz = tl.where(passing, dy, 0.0)
    elif ACTIVATION == "leaky_relu":
        dz = tl.where(passing, dy, dy * SLOPE)
    else:
        tl.static_assert(False, "the gradient of this activation needs more than a mask")
    return dz


@triton.jit
def activate_backward(dy, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Returns dy · f'(z)."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + exp(-z))
        dz = dy * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    elif ACTIVATION == "gelu":
        distribution, power = normal(z)
        dz = dy * (distribution + z * (power * DENSITY_AT_ZERO))
    elif ACTIVATION == "gelu_tanh":
        sigmoid, complement = tanh_sigmoids(z)
        minus_slope = TANH_LINEAR + 3.0 * TANH_CUBIC * tl.minimum(z * z, 1e30)  # of -2u, and finite: 0 · ∞ is NaN
        dz = dy * (sigmoid - sigmoid * complement * z * minus_slope)
    elif ACTIVATION == "hardswish":
        ramp = dy * ((z + 1.5) * THIRD)  # z / 3 + 0.5, which would cancel near -1.5
        dz = tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, ramp, dy))
    else:
        dz = gradient_by_mask(dy, mask_of(z, ACTIVATION), ACTIVATION, SLOPE)
    return dz


@triton.constexpr_function
def bits_per_byte(LANES, AXIS):
    """Returns the number of bits used of each byte: 8, or LANES if a row has fewer columns."""
    return 8 if AXIS is None or LANES >= 8 else LANES


@triton.jit
def bytes_of(ptr, start, end, block, layout, TILE: tl.constexpr):
    """Returns (pointers, mask) for the bytes that hold a tile's bits. Bits follow each other along a channel if AXIS is
    None, and along a row otherwise. No two programs write to the same byte."""
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
def pack(passing, PER_BYTE: tl.constexpr):
    """Packs booleans [T, LANES] into uint8, PER_BYTE bits in each."""
    N_BYTES: tl.constexpr = passing.shape[0] * passing.shape[1] // PER_BYTE
    bits = tl.reshape(passing.to(tl.int32), [N_BYTES, PER_BYTE]) << tl.arange(0, PER_BYTE)[None, :]
    return tl.sum(bits, 1).to(tl.uint8)


@triton.jit
def unpack(packed, T: tl.constexpr, LANES: tl.constexpr, PER_BYTE: tl.constexpr):
    """Returns the booleans [T, LANES] that `pack` has packed."""
    bits = packed.to(tl.int32)[:, None] >> tl.arange(0, PER_BYTE)[None, :]
    return tl.reshape(bits & 1, [T, LANES]) != 0
