"""Computes BatchNorm of a batch distributed over processes, in steps between the exchanges, in plain torch.

Statistics are packed into a vector [3C + 1]: mean, mean_lo, M2 (rstd once merged) of each channel, and the elements of
a channel. Computes in fp32, in fp64 for fp64 input, and rounds once at the end.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triton_norm import activations, reference
from triton_norm.activations import activate
from triton_norm.specs import Epilogue, Formula, GradientDtypes, Inputs


def _axes(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _by_channel(x: Tensor) -> tuple[int, ...]:
    """Returns the shape in which one value a channel broadcasts against x."""
    return (1, -1, *(1 for _ in x.shape[2:]))


def moments(x: Tensor) -> Tensor:
    """Returns the packed moments of this process's part of the batch; zeros if it is empty."""
    n_channels, compute = x.shape[1], reference.compute_dtype(x)
    if x.numel() == 0:
        return x.new_zeros(3 * n_channels + 1, dtype=compute)
    axes = _axes(x)
    wide = x.to(compute)
    mean = wide.mean(axes, keepdim=True)
    centred = wide - mean
    mean_lo = centred.mean(axes, keepdim=True)
    m2 = (centred - mean_lo).square().sum(axes)
    return torch.cat((mean.flatten(), mean_lo.flatten(), m2, mean.new_full((1,), x.numel() // n_channels)))


def merge(
    gathered: Tensor, running: Sequence[Tensor], counter: Sequence[Tensor], momentum: float | None, eps: float
) -> Tensor:
    """Returns the batch's packed statistics, from gathered [n_ranks, 3C + 1].

    Updates the running mean and variance, and counts, unless `running` and `counter` are empty. Means are summed as
    differences from the first, so that equal means merge to themselves exactly. One value a channel leaves the running
    variance unchanged, an empty batch both statistics.
    """
    counts = gathered[:, -1:]
    has_elements = counts > 0
    means, means_lo, m2s = gathered[:, :-1].unflatten(1, (3, -1)).unbind(1)
    total = counts.sum()
    divisor = total.clamp_min(1)
    base = means.index_select(0, has_elements.to(torch.int32).argmax(0))
    shift = (torch.where(has_elements, (means - base) + means_lo, 0.0) * (counts / divisor)).sum(0, keepdim=True)
    mean = base + shift
    mean_lo = (base - mean) + shift
    delta = torch.where(has_elements, (means - mean) + (means_lo - mean_lo), 0.0)
    m2 = (torch.where(has_elements, m2s, 0.0) + delta * (delta * counts)).sum(0)
    counted = [number + 1 for number in counter]
    moved = []
    if running:
        fraction = 1.0 / counted[0].to(gathered.dtype) if momentum is None else gathered.new_full((), momentum)
        unbiased = m2 / (total - 1).clamp_min(1)
        for statistic, batch, least in zip(running, (mean, unbiased), (1, 2), strict=True):
            wide = statistic.to(torch.promote_types(statistic.dtype, gathered.dtype))
            now = (1.0 - fraction) * wide + fraction * batch.view(statistic.shape)
            moved.append(torch.where(total >= least, now, wide))
    merged = torch.cat((mean.flatten(), mean_lo.flatten(), torch.rsqrt(m2 / divisor + eps), total.view(1)))
    for statistic_, now in zip((*running, *counter), (*moved, *counted), strict=True):
        statistic_.copy_(now)  # nothing can fail from here on
    return merged


def _statistics(x: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
    mean, mean_lo, rstd = merged[:-1].view(3, *_by_channel(x)).unbind()
    return (x.to(merged.dtype) - mean) - mean_lo, rstd


def _activated(x_hat: Tensor, inputs: Inputs) -> Tensor:
    _, residual, weight, bias = inputs
    z, shape = x_hat, _by_channel(x_hat)
    if weight is not None:
        z = z * weight.to(z.dtype).reshape(shape)
    if bias is not None:
        z = z + bias.to(z.dtype).reshape(shape)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return z


def apply(inputs: Inputs, merged: Tensor, epilogue: Epilogue) -> Tensor:
    centred, rstd = _statistics(inputs.x, merged)
    return activate(_activated(centred * rstd, inputs), *epilogue).to(inputs.x.dtype)


def _gradient_of_z(dy: Tensor, x_hat: Tensor, inputs: Inputs, epilogue: Epilogue) -> Tensor:
    z = x_hat if epilogue.activation is None else _activated(x_hat, inputs)
    return activations.gradient(dy.to(z.dtype), z, *epilogue)


def sums(
    dy: Tensor, inputs: Inputs, merged: Tensor, gradient_dtypes: GradientDtypes, epilogue: Epilogue
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Returns dweight and dbias [C] of this process's part, None if their dtype is, and (Σ dz, Σ dz · x_hat · rstd),
    [2C]. `gradient` needs the latter summed over all processes."""
    x = inputs.x
    centred, rstd = _statistics(x, merged)
    dz = _gradient_of_z(dy, centred * rstd, inputs, epilogue)
    dbias = dz.sum(_axes(x))
    dweight = (dz * centred).sum(_axes(x)) * rstd.flatten()
    typed = (
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in ((dweight, gradient_dtypes.dweight_dtype), (dbias, gradient_dtypes.dbias_dtype))
    )
    return *typed, torch.cat((dbias, dweight * rstd.flatten()))  # type: ignore[return-value]


def gradient(
    dy: Tensor,
    inputs: Inputs,
    merged: Tensor,
    sums: Tensor,
    dresidual_dtype: torch.dtype | None,
    epilogue: Epilogue,
) -> tuple[Tensor, Tensor | None]:
    """Returns dx, and dresidual if its dtype is given.

    Args:
        sums: [2C], summed over all processes.
    """
    x, _, weight, _ = inputs
    centred, rstd = _statistics(x, merged)
    dz = _gradient_of_z(dy, centred * rstd, inputs, epilogue)
    mean_dz, mean_slope = (sums / merged[-1]).view(2, *_by_channel(x)).unbind()
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype).reshape(_by_channel(x))
    dx = (-centred * mean_slope + (dz - mean_dz)) * scale  # centred comes first: the result has its layout
    return dx.to(x.dtype), None if dresidual_dtype is None else dz.to(dresidual_dtype)


def batch_norm(inputs: Inputs, merged: Tensor, over_all: Callable[[Tensor], Tensor], formula: Formula) -> Tensor:
    """Returns y, differentiable to any order, provided `over_all`, a sum over all processes, is.

    Statistics are recomputed, after the mean in `merged` is subtracted from x as a constant.
    """
    x = inputs.x
    axes, shape = _axes(x), _by_channel(x)
    centred, _ = _statistics(x, merged)
    centred = centred - (over_all(centred.sum(axes)) / merged[-1]).view(shape)
    var = over_all(centred.square().sum(axes)) / merged[-1]
    z = _activated(centred * torch.rsqrt(var + formula.eps).view(shape), inputs)
    return activate(z, *formula.epilogue).to(x.dtype)
