"""Computes e^x, and the exponentials of GELU, exactly far from 0 too: each result to a few units in its last place.

In fp32 the rounding error of an exponent is computed, and corrected for.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LO = tl.constexpr(1.925963033500e-8)  # the rounding error of LOG2_E in fp32
LN_2 = tl.constexpr(0.6931471805599453)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)  # 1 / √(2π)

FARTHEST = tl.constexpr(40.0)
"""A bound of |z|, at which the exponentials of both forms of GELU are 0 in fp64 and in fp32."""

CENTRE = tl.constexpr(4.0)
"""The |z| in the middle of the polynomials below."""

TAIL_FP32 = tl.constexpr(
    (
        *(-0.000131970723, 0.000179355571, 0.00156992185, -0.00351255643, -0.0075252708, 0.0604038313),
        *(-0.186523438, 0.387136906, -0.607896566, 0.755285144),
    )
)
"""Coefficients, the highest first, of the polynomial P of degree 9 in t = (a - CENTRE) / (a + CENTRE) for which
P(t) / (a + CENTRE) = Φ(-a) e^(a² / 2), with the least relative error for 0 ≤ a ≤ 14.5, by Remez's algorithm in 60
digits: 2^-26.8, before the coefficients are rounded."""

TAIL_FP64 = tl.constexpr(
    (
        *(-1.225738382338269e-09, -4.0254252660935605e-10, 1.4681796826917164e-08, 1.6280016197578594e-08),
        *(-7.723670840161874e-08, -1.5689206036099287e-07, 2.6410960194525143e-07, 1.02209653534925e-06),
        *(-6.251635161102991e-07, -5.9201287480215315e-06, 7.149373707069429e-07, 3.514460629448977e-05),
        *(-1.907831628839824e-06, -0.0002310949109323387, 0.0001333442462248763, 0.0016308184541441767),
        *(-0.0034796923613696026, -0.007540188966492828, 0.06039657489065419, -0.18652185795966364),
        *(0.3871374007422197, -0.6078966419718921, 0.7552851304157515),
    )
)
"""The coefficients of degree 22 for 0 ≤ a ≤ 40, in the same way: the relative error is 2^-55.4."""

TANH_LINEAR = tl.constexpr(-1.5957691216057308)  # -2 √(2/π)
TANH_LINEAR_HI = tl.constexpr(-1.5957679748535156)  # of 19 bits, so that differences from the sum p are exact
TANH_LINEAR_LO = tl.constexpr(-1.1467522150867598e-06)  # TANH_LINEAR - TANH_LINEAR_HI
TANH_CUBIC = tl.constexpr(-0.07135481627260025)  # -2 √(2/π) · 0.044715
TANH_CUBIC_LO = tl.constexpr(-2.3988323959931355e-09)  # the rounding error of TANH_CUBIC in fp32


@triton.jit
def exp(x):
    """Returns e^x. In fp32 it computes 2^t with t = x · log2(e), and corrects for the rounding error of t."""
    if x.dtype == tl.float64:
        power = tl.exp(x)
    else:
        t = x * LOG2_E
        left = tl.fma(x, LOG2_E, -t) + x * LOG2_E_LO
        power = tl.exp2(t)
        power += tl.where(tl.abs(left) < 1.0, left, 0.0) * LN_2 * tl.where(power < float("inf"), power, 0.0)
    return power


@triton.jit
def exp_of_sum(x, x_lo):
    """Returns e^(x + x_lo) in fp32, for a finite x of at most 0 and its rounding error."""
    t = x * LOG2_E
    left = tl.fma(x, LOG2_E, -t) + (x * LOG2_E_LO + x_lo * LOG2_E)
    power = tl.exp2(t)
    return power + power * (left * LN_2)


@triton.constexpr_function
def length_of(COEFFICIENTS):
    return len(COEFFICIENTS)


@triton.jit
def polynomial(t, COEFFICIENTS: tl.constexpr):
    """Returns Σ COEFFICIENTS[n - i] · t^i, of degree n."""
    total = t * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, length_of(COEFFICIENTS)):
        total = total * t + COEFFICIENTS[i]
    return total


@triton.jit
def normal(z):
    """Returns (Φ(z), e^(-z² / 2)), where Φ is the standard normal distribution: Φ(z) = (1 + erf(z / √2)) / 2.

    Below 0 Φ(z) is e^(-z² / 2) times a rational function, and nothing cancels. A NaN is dropped.
    """
    a = tl.minimum(tl.abs(z), FARTHEST)
    inverse = 1.0 / (a + CENTRE)
    if z.dtype == tl.float64:
        power = tl.exp(-0.5 * (a * a))
        tail = polynomial((a - CENTRE) * inverse, TAIL_FP64)
    else:
        inverse = tl.fma(tl.fma(-inverse, a + CENTRE, 1.0), inverse, inverse)  # a GPU's quotient is up to 2 ulp off
        square = a * a
        power = exp_of_sum(-0.5 * square, -0.5 * tl.fma(a, a, -square))
        tail = polynomial((a - CENTRE) * inverse, TAIL_FP32)
    tail *= inverse * power
    return tl.where(z < 0.0, tail, 1.0 - tail), power


@triton.jit
def tanh_sigmoids(z):
    """Returns (s(z), s(-z)), where s(z) = (1 + tanh u) / 2 = 1 / (1 + e^(-2u)) with u = √(2/π) (z + 0.044715 z³).

    The exponential is that of -2 |u|, and so the smaller one has no cancellation. A NaN is dropped.
    """
    a = tl.minimum(tl.abs(z), FARTHEST)
    square = a * a
    if z.dtype == tl.float64:
        power = tl.exp(a * (square * TANH_CUBIC + TANH_LINEAR))
    else:
        p = tl.fma(square, TANH_CUBIC, TANH_LINEAR_HI)
        p_lo = tl.fma(square, TANH_CUBIC, -(p - TANH_LINEAR_HI))
        p_lo += square * TANH_CUBIC_LO + (tl.fma(a, a, -square) * TANH_CUBIC + TANH_LINEAR_LO)
        x = a * p
        power = exp_of_sum(x, tl.fma(a, p, -x) + a * p_lo)
    larger = 1.0 / (1.0 + power)
    smaller = power * larger
    return tl.where(z < 0.0, smaller, larger), tl.where(z < 0.0, larger, smaller)
