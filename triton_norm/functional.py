"""torch.nn.functional's normalizations: check, decide between the kernels and torch, call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic
from torch.utils.checkpoint import _StopRecomputationError

from triton_norm import asking, overrides, reference
from triton_norm.activations import activate
from triton_norm.dispatch import goes_to_triton, is_fusible
from triton_norm.ops import channels, rows
from triton_norm.ops.channel_plans import Options
from triton_norm.plain import has_known_sizes, holds

_HALVES = (torch.float16, torch.bfloat16)


def _uniform(x: Tensor, *others: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == x.dtype for tensor in others)


@functools.cache
def _cast_by_autocast(operator: str) -> bool:
    """Whether CUDA's autocast computes aten::operator in float32; it has always left the CPU's alone."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "AutocastCUDA"))


def _autocasts(operator: str, x: Tensor) -> bool:
    """Of CUDA's autocast, which is on."""
    return isinstance(x, Tensor) and x.is_cuda and _cast_by_autocast(operator)


def normalize(
    function: str, x: Tensor, arguments: asking.Arguments, instead: Callable[[Tensor], Any] | None = None
) -> Any:
    """layer_norm or rms_norm; `instead`, if any, computes what the kernels can't serve."""
    autocast = torch.is_autocast_enabled("cuda") and _autocasts(function, x)
    if autocast and arguments[-1] is None and x.dtype in _HALVES:
        arguments = (*arguments[:-1], torch.float32)  # autocast would cast the input; the kernel reads it as it is
    options, reason = asking.of_rows(function, x, arguments)
    if goes_to_triton(reason):
        return rows.normalize(x, arguments[4], arguments[1], arguments[2], options, is_fusible)
    if instead is not None:
        return instead(x)
    normalized_shape, weight, bias, eps, residual, residual_dtype, _, _, out_dtype = arguments
    shape = tuple(normalized_shape)
    if residual is None:
        return _torch_normalize(x, shape, weight, bias, eps, options, autocast)
    total = reference.add(x, residual, residual_dtype or residual.dtype)
    options = options._replace(out_dtype=out_dtype or x.dtype)
    return _torch_normalize(total, shape, weight, bias, eps, options, autocast), total


def _torch_normalize(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    options: rows.Options,
    autocast: bool,
) -> Tensor:
    """torch's own function where it computes what is asked for."""
    own_dtype = torch.float32 if autocast and x.dtype in _HALVES else x.dtype
    plain = options.weight_offset == 0.0 and options.x_hat_dtype is None and options.out_dtype in (None, own_dtype)
    if plain and (autocast or x.is_complex() or _uniform(x, weight, bias)):
        if options.centred:
            return F.layer_norm(x, shape, weight, bias, options.eps)
        return F.rms_norm(x, shape, weight, eps)
    return reference.normalize(
        x,
        shape,
        weight,
        bias,
        options.eps,
        centred=options.centred,
        weight_offset=options.weight_offset,
        x_hat_dtype=options.x_hat_dtype,
        out_dtype=options.out_dtype,
    )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    x_hat_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    r"""y = (x − mean) / sqrt(var + eps) · (weight + weight_offset) + bias over the trailing axes, as
    torch.nn.functional.layer_norm.

    mean and var = E[(x − mean)²], the biased variance, are each sample's own, over the axes of `normalized_shape`.
    With `residual`, x is total = input + residual, rounded once to its own type, and (y, total) is returned.

    Args:
        input: of shape [*, *normalized_shape]; float32, float16, bfloat16 or float64, of any strides.
        normalized_shape: the lengths of the axes to normalize over.
        weight: of shape normalized_shape and any of those types, its own; None is 1.
        bias: likewise; None is 0.
        eps: added to the variance, under the root.
        residual: of input's shape and any of those types; both outputs' gradients flow to it and to input.
        residual_dtype: the type of total; None is the residual's.
        weight_offset: added to the weight in float32: 1 for a weight that is stored as its distance from 1.
        x_hat_dtype: a narrower type that x_hat, what the weight is applied to, is rounded to first; None: it is not.
        out_dtype: the type of y; None is input's (float32 where CUDA's autocast says so).

    Returns:
        y, contiguous, of input's shape; with `residual` also total, likewise.

    Raises:
        RuntimeError: shapes or devices don't match, or the input's type isn't one of the four (NotImplementedError).
        TypeError: an argument is of the wrong type.
        ValueError: residual_dtype without residual, or weight_offset without weight.

    Statistics are computed and saved in float32, in float64 for float64 input. A sample's result has the same bits
    whatever other samples are beside it. Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).

    The kernels keep x, or total, and 8 bytes a sample for the backward. Else a call takes memory only while it runs, of
    M samples of N elements, on a GPU of S multiprocessors: the backward 8 m N bytes, m at most M, 8 S and 16384 S / N;
    where P programs share a sample, P at most S / 3, the forward M (12 P + 4) + 8 and the backward m (32 P + 8) + 8
    bytes more. They may share those of more than 64 KiB, in the backward 32 KiB in float32. Twice as much is the first
    8, the 12 and the 32 in float64.
    """
    fused = residual, residual_dtype, weight_offset, x_hat_dtype, out_dtype
    if has_torch_function_variadic(input, weight, bias, residual):
        instead = _taken(layer_norm, F.layer_norm, (input, weight, bias, residual), fused)
        if instead is not None:
            return instead(input, normalized_shape, weight=weight, bias=bias, eps=eps)
    return normalize("layer_norm", input, (normalized_shape, weight, bias, eps, *fused))


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    x_hat_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    r"""y = x / sqrt(E[x²] + eps) · (weight + weight_offset) over the trailing axes, as torch.nn.functional.rms_norm.

    E[x²] is each sample's own, over the axes of `normalized_shape`. With `residual`, x is total = input + residual,
    rounded once to its own type, and (y, total) is returned.

    Args:
        input: of shape [*, *normalized_shape]; float32, float16, bfloat16 or float64, of any strides. Complex input
            goes to torch.
        normalized_shape: the lengths of the axes to normalize over.
        weight: of shape normalized_shape and any of those types, its own; None is 1.
        eps: added under the root; None is the machine epsilon of float32, of float64 for float64 input.
        residual: of input's shape and any of those types; both outputs' gradients flow to it and to input.
        residual_dtype: the type of total; None is the residual's.
        weight_offset: added to the weight in float32: 1 for a weight that is stored as its distance from 1.
        x_hat_dtype: a narrower type that x_hat, what the weight is applied to, is rounded to first; None: it is not.
        out_dtype: the type of y; None is input's (float32 where CUDA's autocast says so).

    Returns:
        y, contiguous, of input's shape; with `residual` also total, likewise.

    Raises:
        RuntimeError: shapes or devices don't match, or the input's type isn't served (NotImplementedError).
        TypeError: an argument is of the wrong type.
        ValueError: input of no dimensions, residual_dtype without residual, or weight_offset without weight.

    y is rounded once, after the weight; with input's type for x_hat_dtype also before it, as by Hugging Face's Llama.
    Mean squares are computed and saved in float32, in float64 for float64 input. A sample's result has the same bits
    whatever other samples are beside it. Memory is as of layer_norm, with 4 bytes a sample kept, and 4 m N.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    fused = residual, residual_dtype, weight_offset, x_hat_dtype, out_dtype
    if has_torch_function_variadic(input, weight, residual):
        instead = _taken(rms_norm, F.rms_norm, (input, weight, residual), fused)
        if instead is not None:
            return instead(input, normalized_shape, weight=weight, eps=eps)
    return normalize("rms_norm", input, (normalized_shape, weight, None, eps, *fused))


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
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""y = f((x − mean) / sqrt(var + eps) · weight + bias + residual), channel by channel, as
    torch.nn.functional.batch_norm where there is neither a residual nor an activation f.

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
        residual: of input's shape and any of those types; added before the activation.
        activation: f: "relu", "silu", "leaky_relu" or None. What it is applied to is never stored: for the backward it
            is computed again from x, or else, beside a residual, one bit an element is kept ("silu": the residual).
        negative_slope: of leaky_relu, below 0; as torch.nn.functional.leaky_relu.

    Returns:
        y, of input's shape, type and memory format.

    Raises:
        RuntimeError: shapes or devices don't match, or the input's type isn't one of the four (NotImplementedError).
        ValueError: one value per channel or only one of the running statistics, in training, or a wrong eps, or NaN to
        move running statistics by.
        TypeError: an argument is of the wrong type.

    A call that raises has moved nothing, unless a launch has failed after the one that moves all. Statistics are
    computed and saved in float32, in float64 for float64 input.
    Source: Ioffe and Szegedy, "Batch Normalization" (2015).

    The kernels keep x for the backward, in training 12 bytes a channel, and what is said of `activation`. Else a call
    takes memory only while it runs, in training where P programs share a channel: 12 C P bytes forward and 8 C (P + 1)
    backward, and 4 for each block of channels. On a GPU of S multiprocessors P is at most S / 3 in one launch; in two,
    16 S over the number of blocks, which are of one channel each, or of 32 where channels lie last. In float64 twice 8
    and 12.
    """
    tensors = running_mean, running_var, weight, bias
    if has_torch_function_variadic(input, *tensors, residual):
        own = num_batches_tracked, residual, activation, negative_slope
        instead = _taken(batch_norm, F.batch_norm, (input, *tensors, residual), own)
        if instead is not None:
            asked = {"weight": weight, "bias": bias, "training": training, "momentum": momentum, "eps": eps}
            return instead(input, running_mean, running_var, **asked)  # type: ignore[no-any-return]
    fused = residual, activation, negative_slope
    options, reason = asking.of_batch_norm(input, *tensors, training, momentum, eps, num_batches_tracked, *fused)
    counter = num_batches_tracked if training else None
    # torch's own has no form for a momentum that depends on the counter.
    if goes_to_triton(reason, compiles_torch=None if momentum is None and counter is not None else input):
        return channels.batch_norm(input, residual, weight, bias, running_mean, running_var, counter, options)
    return _torch_batch_norm(input, *tensors, counter, residual, options)


def _taken(
    function: Any, torch_function: Callable[..., Any], tensors: tuple[Any, ...], fused: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """Returns what to call instead of `function`, where a mode or an argument takes the call by the protocol of
    `__torch_function__`. Raises where backend "triton" was asked for, which nothing else may serve.

    Args:
        fused: the keyword-only arguments of `function`, in order.
    """
    options = dict(zip(function.__kwdefaults__, fused, strict=True))
    found = overrides.taker(function, torch_function, tensors, options)
    if found is None:
        return None
    who, instead = found
    goes_to_triton(who)
    return instead


def _counted_batch_norm(counter: Tensor | None, x: Tensor, running_mean: Tensor | None, *rest: Any) -> Tensor:
    """Calls torch's batch_norm behind `reference.count`; takes the count back where it fails and has moved nothing.

    A hook on saved tensors may raise before the statistics move, when the input is saved, and after it. A checkpoint
    that has what it needs does so after it.
    """
    if counter is None or running_mean is None or torch.compiler.is_compiling():
        return F.batch_norm(x, running_mean, *rest)
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    before = running_mean.clone() if hooked else running_mean
    try:
        return F.batch_norm(x, running_mean, *rest)
    except _StopRecomputationError:
        raise
    except Exception:
        if torch.equal(before, running_mean):
            counter.sub_(1)
            if not counter.is_inference():  # which have no version
                torch._C._autograd._unsafe_set_version_counter((counter,), (counter._version - 2,))
        raise


def _torch_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    counter: Tensor | None,
    residual: Tensor | None,
    options: Options,
) -> Tensor:
    """Normalizes by torch's own function, of wider tensors where it doesn't take these types or would round twice.

    The batch is counted first and the statistics are moved before y is computed: a checkpoint may end its second
    forward as soon as what it needs has been saved.
    """
    types = {tensor.dtype for tensor in (running_mean, running_var, weight, bias) if tensor is not None}
    fused = residual is not None or options.activation is not None
    halves = x.dtype in _HALVES
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)  # on CUDA torch's has no backward for a bias alone
    taken = (types <= {x.dtype} and not (fused and halves)) or (halves and types == {torch.float32} and not fused)
    momentum = reference.count(counter, options.momentum)
    is_torchs = has_known_sizes(x) and isinstance(momentum, float)
    if taken and is_torchs and x.dim() <= 5:  # cuDNN takes no more axes
        parameters = weight, bias, options.batch, momentum, options.eps
        y = _counted_batch_norm(counter, x, running_mean, running_var, *parameters)
        if residual is not None:
            y = y + residual.to(y.dtype)
        return activate(y, options.activation, options.slope)
    compute = reference.compute_dtype(x)
    if options.batch and running_mean is not None and running_var is not None:
        is_empty = holds(x.numel() == 0)
        if is_empty or not is_torchs or {running_mean.dtype, running_var.dtype} != {compute}:
            if not is_empty:
                reference.move_running_statistics(x, running_mean, running_var, momentum)
            running_mean = running_var = None  # in training they are not read
    running_mean, running_var, weight, bias, added = (
        None if tensor is None else tensor.to(compute) for tensor in (running_mean, running_var, weight, bias, residual)
    )
    wide = (x if x.dim() <= 5 else x.flatten(2)).to(compute)
    given = wide, running_mean, running_var, weight, bias, options.batch
    if has_known_sizes(x):
        moved_by = momentum if isinstance(momentum, float) else 0.0
        z = _counted_batch_norm(counter, *given, moved_by, options.eps).view(x.shape)
    else:  # which torch's own asks for
        z = reference.batch_norm(*given, options.eps)
    return activate(z if added is None else z + added, options.activation, options.slope).to(x.dtype)
