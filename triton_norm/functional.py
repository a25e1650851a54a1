"""torch.nn.functional's normalizations: check, decide between the kernels and torch, call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_norm import checks, reference
from triton_norm.dispatch import Explanation, explanation, use_triton
from triton_norm.ops import channels, layout, rows

_HALVES = (torch.float16, torch.bfloat16)


def _uniform(x: Tensor, *others: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == x.dtype for tensor in others)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast computes layer_norm in float32: it does on CUDA, and leaves it alone on the CPU."""
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""y = (x − mean) / sqrt(var + eps) · weight + bias over the trailing axes, as torch.nn.functional.layer_norm.

    mean and var = E[(x − mean)²], the biased variance, are each sample's own, over the axes of `normalized_shape`.

    Args:
        input: x, of shape [*, *normalized_shape]; float32, float16, bfloat16 or float64, of any strides.
        normalized_shape: the lengths of the axes to normalize over.
        weight: of shape normalized_shape and any of those types, its own; None is 1.
        bias: likewise; None is 0.
        eps: added to the variance, under the root.

    Returns:
        y, contiguous, of input's shape and type (float32 where CUDA's autocast says so).

    Raises:
        RuntimeError: shapes or devices don't match, or the input's type isn't one of the four (NotImplementedError).
        TypeError: an argument is of the wrong type.

    Statistics are computed and saved in float32, in float64 for float64 input. A sample's result has the same bits
    whatever other samples are beside it. Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
    """
    shape = checks.layer_norm(input, normalized_shape, weight, bias, eps)
    if use_triton(input, weight, bias):
        return rows.layer_norm(input, shape, weight, bias, float(eps), _layer_norm_dtype(input))
    if _uniform(input, weight, bias) or _autocasts(input):
        return F.layer_norm(input, shape, weight, bias, eps)
    return reference.layer_norm(input, shape, weight, bias, eps)


def _layer_norm_dtype(x: Tensor) -> torch.dtype | None:
    """float32 where autocast would cast the input to it first; the kernel then reads x as it is."""
    return torch.float32 if _autocasts(x) and x.dtype in _HALVES else None


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""y = (x − mean) / sqrt(var + eps) · weight + bias, channel by channel, as torch.nn.functional.batch_norm.

    In training, mean and var = E[(x − mean)²], the biased variance, are the batch's, over every axis but the second,
    and the running statistics move in place, the variance with the unbiased one of the batch:
    running = (1 − momentum) · running + momentum · batch's. Otherwise mean and var are the running statistics.

    Args:
        input: x, of shape [N, C, *]; float32, float16, bfloat16 or float64, channels first or last.
        running_mean: of C elements and any of those types; None, with running_var, only in training.
        running_var: likewise.
        weight: of C elements and any of those types; None is 1.
        bias: likewise; None is 0.
        training: whether to normalize with the batch's statistics.
        momentum: the batch's share in the running statistics; None: 1 / num_batches_tracked, an average over batches.
        eps: added to the variance, under the root; positive in training.
        num_batches_tracked: an integer tensor of one element, counted up by one in training.

    Returns:
        y, of input's shape, type and memory format.

    Raises:
        RuntimeError: shapes or devices don't match, or the input's type isn't one of the four (NotImplementedError).
        ValueError: one value per channel in training, or one running statistic without the other.
        TypeError: an argument is of the wrong type.

    A call that raises has moved nothing. Statistics are computed and saved in float32, in float64 for float64 input.
    Source: Ioffe and Szegedy, "Batch Normalization" (2015).
    """
    checks.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if use_triton(input, running_mean, running_var, weight, bias):
        counter = num_batches_tracked if training else None
        if counter is not None and counter.device != input.device:
            momentum, counter = _count_elsewhere(counter, momentum), None
        share = None if momentum is None else float(momentum)
        return channels.batch_norm(
            input, running_mean, running_var, counter, weight, bias, bool(training), share, float(eps)
        )
    return _torch_batch_norm(
        input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps
    )


def _count_elsewhere(num_batches_tracked: Tensor, momentum: float | None) -> float:
    """Counts with torch; returns the momentum that the count gives where it is asked for, which waits for the GPU."""
    num_batches_tracked.add_(1)
    return 1.0 / float(num_batches_tracked) if momentum is None else momentum


def _torch_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    if training and num_batches_tracked is not None:
        momentum = _count_elsewhere(num_batches_tracked, momentum)
    elif momentum is None:
        momentum = 0.0
    types = {tensor.dtype for tensor in (running_mean, running_var, weight, bias) if tensor is not None}
    if types <= {x.dtype} or (x.dtype in _HALVES and types == {torch.float32}):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = reference.batch_norm(x, running_mean, running_var, weight, bias, training, eps)
    if training and running_mean is not None and running_var is not None and x.numel():
        reference.move_running_statistics(x, running_mean, running_var, momentum)
    return y


def explain_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Explanation:
    shape = checks.layer_norm(input, normalized_shape, weight, bias, eps)
    copied = ("the input: its rows are not contiguous, or not evenly spaced",)
    n_cols = torch.Size(shape).numel()
    copies = copied if input.numel() and rows.copies(input, n_cols) else ()
    return explanation("layer_norm", copies, input, weight, bias)


def explain_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
) -> Explanation:
    checks.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    copied = ("the input: neither its channels nor its positions lie side by side",)
    copies = copied if input.numel() and layout.copies(input) else ()
    return explanation("batch_norm", copies, input, running_mean, running_var, weight, bias)


def explain(target: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Where `target(*args, **kwargs)` would go, and why, and what it would have to copy; computes and moves nothing.

    `target` is layer_norm, batch_norm or one of this library's modules. Raises what the call itself would raise for its
    arguments, and TypeError for another target. A gradient is copied where its strides are unlike its input's and it is
    not one element expanded; that is only known in the backward.
    """
    if target is layer_norm:
        return explain_layer_norm(*args, **kwargs)
    if target is batch_norm:
        return explain_batch_norm(*args, **kwargs)
    explain_call = getattr(target, "explain_call", None)
    if explain_call is None:
        raise TypeError(f"explain(): expected a function or module of triton_norm, but got {target!r}")
    found: Explanation = explain_call(*args, **kwargs)
    return found
