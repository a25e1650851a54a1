"""torch.nn.functional's normalizations: check, decide between the kernels and torch, call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic
from torch.utils.checkpoint import _StopRecomputationError

from triton_norm import overrides, plans, reference, resolve
from triton_norm.activations import activate
from triton_norm.channels import function as channels
from triton_norm.dispatch import autocasts, goes_to_triton, is_fusible, override
from triton_norm.plain import HALVES, has_known_sizes, holds
from triton_norm.rows import operator as rows
from triton_norm.specs import BatchNormOptions, BatchNormSpec, BatchNormTensors, RowOptions, RowSpec, RowTensors


def _uniform(x: Tensor, *others: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == x.dtype for tensor in others)


_INT = {int}


def normalize_rows(
    function: str, tensors: tuple[Any, ...], options: tuple[Any, ...], instead: Callable[[Tensor], Any] | None = None
) -> Any:
    """Computes layer_norm or rms_norm.

    Args:
        tensors, options: RowTensors and RowOptions, or their fields: a warm call needs no names.
        instead: computes what the kernels can't serve; None: torch's functions do.
    """
    if is_compiling():
        call = resolve.check_rows(function, RowTensors._make(tensors), RowOptions._make(options))
    else:
        _, residual, weight, bias = tensors
        shape, eps, _, weight_offset, _, _ = options
        key = function, options, type(eps), type(weight_offset), residual is None, weight is None, bias is None
        call = plans.find(key, tensors)
        # 4.0 equals 4, but is no length.
        if call is None or (shape is not call.shape and {*map(type, shape)} != _INT):
            call = resolve.rows(key, function, RowTensors._make(tensors), RowOptions._make(options))
        if call.plan is not None and override.name != "torch":
            return rows.launch(tensors, call.plan)
    named = RowTensors._make(tensors)
    if goes_to_triton(call.reason):
        return rows.record(named, call.spec, is_fusible())
    if instead is not None:
        return instead(named.x)
    return _torch_normalize(function, named, RowOptions._make(options), call.spec)


def _torch_normalize(function: str, tensors: RowTensors, options: RowOptions, spec: RowSpec) -> Any:
    """Normalizes by torch's own function where that computes what is asked for."""
    x, residual, weight, bias = tensors
    shape = tuple(options.normalized_shape)
    if residual is not None:
        total = reference.add(x, residual, spec.total_dtype or residual.dtype)
        spec = spec._replace(out_dtype=spec.out_dtype or x.dtype, total_dtype=None)
        summed = RowTensors._make((total, None, weight, bias))
        return _torch_normalize(function, summed, options._replace(residual_dtype=None), spec), total
    autocast = autocasts(function, x)
    own_dtype = torch.float32 if autocast and x.dtype in HALVES else x.dtype
    plain = spec.weight_offset == 0.0 and spec.x_hat_dtype is None and spec.out_dtype in (None, own_dtype)
    if plain and (autocast or x.is_complex() or _uniform(x, weight, bias)):
        if spec.centred:
            return F.layer_norm(x, shape, weight, bias, spec.eps)
        return F.rms_norm(x, shape, weight, options.eps)
    return reference.normalize(x, shape, weight, bias, spec)


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
    tensors = input, residual, weight, bias
    own = residual_dtype, weight_offset, x_hat_dtype, out_dtype
    if has_torch_function_variadic(*tensors):
        instead = _taken(layer_norm, F.layer_norm, tensors, (residual, *own))
        if instead is not None:
            return instead(input, normalized_shape, weight=weight, bias=bias, eps=eps)
    return normalize_rows("layer_norm", tensors, (normalized_shape, eps, *own))


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
    tensors = input, residual, weight, None
    own = residual_dtype, weight_offset, x_hat_dtype, out_dtype
    if has_torch_function_variadic(*tensors):
        instead = _taken(rms_norm, F.rms_norm, tensors, (residual, *own))
        if instead is not None:
            return instead(input, normalized_shape, weight=weight, eps=eps)
    return normalize_rows("rms_norm", tensors, (normalized_shape, eps, *own))


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
        running_mean, running_var: of C elements and any of those types; None, both, only in training.
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
    tensors = input, residual, weight, bias, running_mean, running_var, num_batches_tracked
    options = training, momentum, eps, activation, negative_slope
    if has_torch_function_variadic(*tensors):
        return _taken_batch_norm(tensors, options)
    return normalize_channels(tensors, options)


def _taken_batch_norm(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    input, residual, weight, bias, running_mean, running_var, counter = tensors
    training, momentum, eps, activation, negative_slope = options
    given = input, residual, weight, bias, running_mean, running_var
    instead = _taken(batch_norm, F.batch_norm, given, (counter, residual, activation, negative_slope))
    if instead is None:
        return normalize_channels(tensors, options)
    named = {"weight": weight, "bias": bias, "training": training, "momentum": momentum, "eps": eps}
    return instead(input, running_mean, running_var, **named)  # type: ignore[no-any-return]


def normalize_channels(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Computes batch_norm.

    Args:
        tensors, options: BatchNormTensors and BatchNormOptions, or their fields: a warm call needs no names.
    """
    if is_compiling():
        call = resolve.check_batch_norm(BatchNormTensors._make(tensors), BatchNormOptions._make(options))
    else:
        _, residual, weight, bias, running_mean, _, counter = tensors
        presence = residual is None, weight is None, bias is None, running_mean is None, counter is None
        key = options, *map(type, options), *presence
        call = plans.find(key, tensors)
        if call is None:
            call = resolve.batch_norm(key, BatchNormTensors._make(tensors), BatchNormOptions._make(options))
        if call.plan is not None and override.name != "torch":
            return channels.launch(tensors, call.plan)
    training, momentum, *_ = options
    *others, counter = tensors
    tensors = BatchNormTensors._make((*others, counter if training else None))
    # torch's own has no form for a momentum that depends on the counter.
    averages = training and momentum is None and counter is not None
    if goes_to_triton(call.reason, compiles_torch=None if averages else tensors.x):
        return channels.record(tensors, call.spec)
    return _torch_batch_norm(tensors, call.spec)


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


def _torch_batch_norm(tensors: BatchNormTensors, spec: BatchNormSpec) -> Tensor:
    """Normalizes by torch's own function, of wider tensors where it doesn't take these types or would round twice.

    The batch is counted first and the statistics are moved before y is computed: a checkpoint may end its second
    forward as soon as what it needs has been saved.
    """
    x, residual, weight, bias, running_mean, running_var, counter = tensors
    types = {tensor.dtype for tensor in (running_mean, running_var, weight, bias) if tensor is not None}
    fused = residual is not None or spec.activation is not None
    halves = x.dtype in HALVES
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)  # on CUDA torch's has no backward for a bias alone
    taken = (types <= {x.dtype} and not (fused and halves)) or (halves and types == {torch.float32} and not fused)
    momentum = reference.count(counter, spec.momentum)
    is_torchs = has_known_sizes(x) and isinstance(momentum, float)
    if taken and is_torchs and x.dim() <= 5:  # cuDNN takes no more axes
        parameters = weight, bias, spec.training, momentum, spec.eps
        y = _counted_batch_norm(counter, x, running_mean, running_var, *parameters)
        if residual is not None:
            y = y + residual.to(y.dtype)
        return activate(y, spec.activation, spec.slope)
    compute = reference.compute_dtype(x)
    if spec.training and running_mean is not None and running_var is not None:
        is_empty = holds(x.numel() == 0)
        if is_empty or not is_torchs or {running_mean.dtype, running_var.dtype} != {compute}:
            if not is_empty:
                reference.move_running_statistics(x, running_mean, running_var, momentum)
            running_mean = running_var = None  # in training they are not read
    running_mean, running_var, weight, bias, added = (
        None if tensor is None else tensor.to(compute) for tensor in (running_mean, running_var, weight, bias, residual)
    )
    wide = (x if x.dim() <= 5 else x.flatten(2)).to(compute)
    if has_known_sizes(x):
        moved_by = momentum if isinstance(momentum, float) else 0.0
        parameters = weight, bias, spec.training, moved_by, spec.eps
        z = _counted_batch_norm(counter, wide, running_mean, running_var, *parameters).view(x.shape)
    else:  # which torch's own asks for
        widened = BatchNormTensors._make((wide, None, weight, bias, running_mean, running_var, None))
        z = reference.batch_norm(widened, spec._replace(activation=None))
    return activate(z if added is None else z + added, spec.activation, spec.slope).to(x.dtype)
