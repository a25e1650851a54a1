"""Draws calls of group_norm, runs them by the kernels, and compares the results with fp64's."""

import math

import torch
from torch.nn import functional as F

import triton_norm
from support.activations import near_a_kink, reach
from support.oracle import ErrorBound, Formula, Inputs, compute_dtype, differentiated, moments_about
from triton_norm import reference

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid(x, layout):
    """Returns x in a layout: "first", "last", of "samples" with gaps between them, or "strided" in no dense order."""
    if layout == "last":
        return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    if layout == "samples":
        return torch.cat((x, x), 1)[:, : x.shape[1]]
    if layout == "strided":
        return x.mT.contiguous().mT
    return x.contiguous()


def checked(inputs, n_groups, activation=None, eps=1e-5):
    """Returns the results of a call, which it compares with fp64's."""
    x, residual, weight, bias, dy, _ = inputs
    options = {"activation": activation, "eps": eps}
    result = differentiated(
        lambda x, r, w, b: triton_norm.group_norm(x, n_groups, w, b, residual=r, **options), inputs.leaves(), (dy,)
    )
    n_samples, n_channels = x.shape[:2]
    shape = n_samples, n_groups, n_channels // n_groups, math.prod(x.shape[2:])

    def apart(tensor):
        return None if tensor is None else tensor.double().reshape(shape)

    def exact(x, r, w, b):
        centred = x - x.mean((2, 3), keepdim=True)
        z = centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + eps)
        z = z if w is None else z * w.reshape(1, *shape[1:3], 1)
        z = z if b is None else z + b.reshape(1, *shape[1:3], 1)
        return reference.activate(z if r is None else z + r, activation, 0.01)

    wide = apart(x.cpu())
    rounded = wide.mean((2, 3), keepdim=True)
    # In a group of few elements that cancel, the mean is small beside its error.
    terms = wide.abs().mean((2, 3), keepdim=True)
    moments = moments_about(rounded.to(compute_dtype(x)).double(), wide, (2, 3))
    moments = moments._replace(mean=rounded, mean_terms=terms)
    fused = {"activation": activation, "slope": 0.01}
    formula = Formula(exact, (2, 3), (1, *shape[1:3], 1), moments, eps, compute_dtype(x), **fused)
    bound = ErrorBound(formula, Inputs(wide, apart(residual), weight, bias, apart(dy)))
    if x.dtype == torch.float64:
        bound.growth *= 2  # the exact results are as inexact
    bound.check(
        result._replace(
            y=result.y.reshape(shape),
            dx=result.dx.reshape(shape),
            dresidual=None if residual is None else result.dresidual.reshape(shape),
        )
    )
    return result


def drawn(shape, device, dtype=torch.float32, layout="first", residual=False, affine=True, spread=3.0):
    x, added, dy = (laid(torch.randn(shape, device=device).to(dtype), layout) for _ in range(3))
    weight, bias = torch.randn(2, shape[1], device=device).to(dtype) if affine else (None, None)
    return Inputs(x * spread + 1, added if residual else None, weight, bias, dy)


def fitted(inputs, n_groups, activation):
    """Returns inputs for an activation: z's are on all sides of its kinks, and y has no gradient near them."""
    x, residual, weight, bias, dy, _ = inputs
    weight = weight * reach(activation)
    z = F.group_norm(x, n_groups, weight, bias)
    z = z if residual is None else z + residual
    return inputs._replace(weight=weight, dy=torch.where(near_a_kink(z, activation, 1e-3), 0.0, dy))


def elements_loaded(n_channels, n_positions):
    """Returns the elements of the accesses that read a sample's channels, of 8 bytes at least if sizes allow."""
    vector = math.gcd(n_positions, 8)
    if vector < 4:
        vector = min(math.gcd(n_channels * n_positions, 8), 1 << n_positions.bit_length() - 1)
    starts = range(0, n_channels * n_positions, n_positions)
    return sum(vector * (-(-(start + n_positions) // vector) - start // vector) for start in starts)
