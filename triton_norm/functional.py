"""Implements torch.nn.functional's normalizations: checks arguments, chooses kernels or torch, and runs the call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic
from torch.utils.checkpoint import _StopRecomputationError

from triton_norm import plans, reference, resolve
from triton_norm.activations import activate
from triton_norm.channels import function as channels
from triton_norm.dispatch import autocasts, goes_to_triton, instead_of, is_fusible, override
from triton_norm.functional_modulated import LENGTH_TYPES, SILU, bundled, is_plain, normalize_modulated
from triton_norm.plain import HALVES, has_known_sizes, holds
from triton_norm.rows import operator as rows
from triton_norm.rows import sharded
from triton_norm.specs import BatchNormOptions, BatchNormSpec, BatchNormTensors, RowOptions, RowSpec, RowTensors


def _uniform(x: Tensor, *others: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == x.dtype for tensor in others)


def normalize_rows(
    function: str, tensors: tuple[Any, ...], options: tuple[Any, ...], instead: Callable[[Tensor], Any] | None = None
) -> Any:
    """Computes layer_norm or rms_norm.

    Args:
        tensors, options: fields of RowTensors and RowOptions, which a warm call does not name to save time.
        instead: computes y from x if the kernels can't serve the call; None: torch's functions.
    """
    if is_compiling():
        call = resolve.check_rows(function, RowTensors._make(tensors), RowOptions._make(options))
    else:
        _, residual, weight, bias = tensors
        shape, eps, _, weight_offset, _, _ = options
        key = function, options, type(eps), type(weight_offset), residual is None, weight is None, bias is None
        call = plans.find(key, tensors)
        if call is None or (shape is not call.shape and {*map(type, shape)} != LENGTH_TYPES):
            call = resolve.rows(key, function, RowTensors._make(tensors), RowOptions._make(options))
        if call.plan is not None and override.name != "torch":
            return rows.launch(tensors, call.plan)
    named = RowTensors._make(tensors)
    if goes_to_triton(call.reason):
        if call.sharding is not None:
            return sharded.normalize(named, call.sharding, is_fusible())
        return rows.record(named, call.spec, is_fusible())
    if instead is not None:
        return instead(named.x)
    return _torch_normalize(function, named, RowOptions._make(options), call.spec)


def _torch_normalize(function: str, tensors: RowTensors, options: RowOptions, spec: RowSpec) -> Any:
    """Normalizes by torch's own function if it supports the spec, otherwise by reference.py."""
    x, residual, weight, bias = tensors
    shape = tuple(options.normalized_shape)
    if residual is not None:
        dtype = spec.total_dtype or residual.dtype
        read = reference.add(x, residual, dtype)
        spec = spec._replace(out_dtype=spec.out_dtype or x.dtype, total_dtype=None)
        options = options._replace(residual_dtype=None, eps=spec.eps)  # RMSNorm's default goes by x's dtype
        summed = RowTensors._make((read, None, weight, bias))
        return _torch_normalize(function, summed, options, spec), read.to(dtype)
    autocast = autocasts(function, x)
    own_dtype = torch.float32 if autocast and x.dtype in HALVES else x.dtype
    plain = spec.weight_offset == 0.0 and spec.x_hat_dtype is None and spec.out_dtype in (None, own_dtype)
    if plain and (autocast or x.is_complex() or _uniform(x, weight, bias)):
        if spec.centred:
            return F.layer_norm(x, shape, weight, bias, spec.eps)
        return F.rms_norm(x, shape, weight, options.eps)
    return reference.normalize(x, shape, weight, bias, spec).contiguous()


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
    gate: Tensor | None = None,
    gate_activation: str | None = "silu",
    gate_first: bool = False,
    product_dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual_gate: Tensor | None = None,
    head_weight: Tensor | None = None,
) -> Any:
    r"""Computes y = (x − mean) / sqrt(var + eps) · (weight + weight_offset) + bias, as torch.nn.functional.layer_norm.

    mean and var = E[(x − mean)²], the biased variance, are taken for each sample, over the axes of `normalized_shape`.
    With `residual`, x is total = input + residual, rounded once to total's dtype, and (y, total) is returned. `scale`
    and `shift` turn y into y · (1 + scale) + shift, and `gate` multiplies that by f(gate).

    Args:
        input: [*, *normalized_shape], float32, float16, bfloat16 or float64, with any strides.
        normalized_shape: lengths of the trailing axes to normalize over.
        weight, bias: [*normalized_shape], any of these dtypes; None: 1 and 0.
        eps: added to the variance, under the root.
        residual: of input's shape, any of these dtypes; the gradients of y and total flow to it and to input.
        residual_dtype: dtype of total; None: residual's.
        weight_offset: added to the weight in float32: 1 for a weight that is stored as its distance from 1.
        x_hat_dtype: narrower dtype that x_hat = (x − mean) / sqrt(var + eps) is rounded to; None: no rounding.
        out_dtype: dtype of y; None: input's, or float32 under CUDA's autocast.
        gate, gate_activation: of input's shape; f: "silu", "sigmoid" or None.
        gate_first, product_dtype: multiplies x by f(gate), not y; narrower dtype that y is rounded to before f(gate).
        scale, shift, residual_gate: of input's shape; axes before normalized_shape may have length 1, and the last ones
            may be missing: [B, D] is for the samples of [B, T, D]. total = residual + residual_gate · input.
        head_weight: [H, *normalized_shape] for input [*, H, *normalized_shape], in place of weight.

    Returns: y, contiguous, of input's shape; with `residual` (y, total). A sample's bits don't depend on its batch.

    Raises:
        RuntimeError, NotImplementedError, TypeError: wrong shapes or devices, a wrong dtype, a wrong type.
        ValueError: an argument without the one that it needs, two that exclude each other, or an unknown f.

    Memory: saves x or total, 8 bytes a sample (float64: 16), gate and modulation. See docs/memory.md.
    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
    """
    tensors = input, residual, weight, bias
    options = normalized_shape, eps, residual_dtype, weight_offset, x_hat_dtype, out_dtype
    if gate is None and scale is None and shift is None and residual_gate is None and head_weight is None:
        plain = product_dtype is None and gate_first is False and gate_activation is SILU
        if plain and not has_torch_function_variadic(*tensors):
            return normalize_rows("layer_norm", tensors, options)
    modulated = *tensors, gate, scale, shift, residual_gate
    return _modulated(layer_norm, modulated, head_weight, options, (gate_activation, gate_first, product_dtype))


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
    gate: Tensor | None = None,
    gate_activation: str | None = "silu",
    gate_first: bool = False,
    product_dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual_gate: Tensor | None = None,
    head_weight: Tensor | None = None,
) -> Any:
    r"""Computes y = x / sqrt(E[x²] + eps) · (weight + weight_offset), as torch.nn.functional.rms_norm.

    E[x²] is taken for each sample, over the axes of `normalized_shape`. With `residual`, x is total = input + residual,
    rounded once to total's dtype, and (y, total) is returned.

    Args:
        input: [*, *normalized_shape], float32, float16, bfloat16 or float64, with any strides; complex goes to torch.
        normalized_shape: lengths of the trailing axes to normalize over.
        weight: [*normalized_shape], any of these dtypes; None: 1.
        eps: added under the root; None: the machine epsilon of float32, or float64 for float64 input.
        residual, residual_dtype, weight_offset, out_dtype, and those from gate on: as layer_norm's.
        x_hat_dtype: narrower dtype that x_hat = x / sqrt(E[x²] + eps) is rounded to; Hugging Face's Llama: input's.

    Returns:
        y, contiguous, of input's shape; with `residual` (y, total).

    Raises:
        RuntimeError, NotImplementedError, TypeError: as layer_norm.
        ValueError: as layer_norm, or input has no dimensions.

    Statistics are computed and saved in float32 (float64 for float64 input). A sample's bits don't depend on its batch.

    Memory: saves x or total and 4 bytes a sample (float64: 8) for the backward. Temporary memory: see docs/memory.md.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    tensors = input, residual, weight, None
    options = normalized_shape, eps, residual_dtype, weight_offset, x_hat_dtype, out_dtype
    if gate is None and scale is None and shift is None and residual_gate is None and head_weight is None:
        plain = product_dtype is None and gate_first is False and gate_activation is SILU
        if plain and not has_torch_function_variadic(*tensors):
            return normalize_rows("rms_norm", tensors, options)
    modulated = *tensors, gate, scale, shift, residual_gate
    return _modulated(rms_norm, modulated, head_weight, options, (gate_activation, gate_first, product_dtype))


def _modulated(
    function: Any, tensors: tuple[Any, ...], head_weight: Any, options: tuple[Any, ...], of_gate: tuple[Any, ...]
) -> Any:
    """Computes layer_norm or rms_norm with a gate or a modulation, or for a tensor that may override the call.

    Args:
        tensors, options: fields of ModulatedTensors and RowOptions.
        of_gate: gate_activation, gate_first and product_dtype.
    """
    name = function.__name__
    if has_torch_function_variadic(*tensors, head_weight):
        (x, residual, weight, bias, gate, *others), (shape, eps, *own) = tensors, options
        torch_function = F.layer_norm if function is layer_norm else F.rms_norm
        fused = residual, *own, gate, *of_gate, *others, head_weight
        instead = instead_of(function, torch_function, (*tensors, head_weight), fused)
        if instead is not None:
            named = {"weight": weight, "bias": bias} if function is layer_norm else {"weight": weight}
            return instead(x, shape, **named, eps=eps)
        if is_plain((gate, *others, head_weight), of_gate):
            return normalize_rows(name, (x, residual, weight, bias), options)
    if head_weight is None:
        return normalize_modulated(name, tensors, (options, *of_gate, False))
    x, residual, weight, bias, *modulation = tensors
    rows = x, residual, weight, bias
    return normalize_modulated(name, *bundled(name, rows, (*modulation, head_weight), options, of_gate))


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
    r"""Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual) for each channel.

    Without residual and activation f this is torch.nn.functional.batch_norm. In training, mean and var =
    E[(x − mean)²], the biased variance, are those of the batch, over every axis but the second. The running statistics
    are updated in place: running = (1 − momentum) · running + momentum · batch, with the batch's unbiased variance.
    Otherwise mean and var are the running statistics.

    Args:
        input: x, [N, C, *], float32, float16, bfloat16 or float64, channels-first or channels-last.
        running_mean, running_var: [C], any of these dtypes; both may be None in training.
        weight, bias: [C], any of these dtypes; None: 1 and 0.
        training: normalizes with the batch's statistics.
        momentum: weight of the batch in the running statistics; None: 1 / num_batches_tracked, an average.
        eps: added to the variance, under the root; positive in training.
        num_batches_tracked: an integer tensor of one element, incremented in training.
        residual: of input's shape, any of these dtypes; added before the activation.
        activation: f: "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh" (GELU by tanh) or None.
        negative_slope: slope of leaky_relu below 0.

    Returns:
        y, of input's shape, dtype and memory format.

    Raises:
        RuntimeError: shapes or devices don't match.
        NotImplementedError: a dtype is not supported.
        ValueError: in training, one value a channel, one of the running statistics without the other, or NaN for
            momentum; or a wrong eps.
        TypeError: an argument has the wrong type.

    Running statistics are unchanged after an error, unless a launch fails after the one that updates them. Statistics
    are computed and saved in float32; in float64 for float64 input.

    Memory: saves x, and in training 12 bytes a channel (float64: 24), for the backward. The activation's argument is
    recomputed from x; with a residual, one bit an element is saved ("silu", "hardswish", "gelu", "gelu_tanh": the
    residual). Temporary memory: see docs/memory.md.
    Source: Ioffe and Szegedy, "Batch Normalization" (2015).
    """
    tensors = input, residual, weight, bias, running_mean, running_var, num_batches_tracked
    options = training, momentum, eps, activation, negative_slope
    if has_torch_function_variadic(*tensors):
        return overridable_batch_norm(tensors, options)
    return normalize_channels(tensors, options)


def overridable_batch_norm(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Computes batch_norm, or calls the override by a mode or a tensor, if there is one; as normalize_channels."""
    input, residual, weight, bias, running_mean, running_var, counter = tensors
    training, momentum, eps, activation, negative_slope = options
    arguments = input, residual, weight, bias, running_mean, running_var
    instead = instead_of(batch_norm, F.batch_norm, arguments, (counter, residual, activation, negative_slope))
    if instead is None:
        return normalize_channels(tensors, options)
    named = {"weight": weight, "bias": bias, "training": training, "momentum": momentum, "eps": eps}
    return instead(input, running_mean, running_var, **named)  # type: ignore[no-any-return]


def normalize_channels(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """Computes batch_norm.

    Args:
        tensors, options: fields of BatchNormTensors and BatchNormOptions.
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
    return normalize_resolved(tensors, call)


def normalize_resolved(tensors: tuple[Any, ...], call: resolve.Call) -> Tensor:
    """Computes a resolved call of batch_norm: by its plan, by operators or by torch's function."""
    if call.plan is not None and override.name != "torch":
        return channels.launch(tensors, call.plan)
    spec: BatchNormSpec = call.spec
    *others, counter = tensors
    named = BatchNormTensors._make((*others, counter if spec.training else None))
    # torch's own has no form for a momentum that depends on the counter.
    averages = spec.training and spec.momentum is None and counter is not None
    if goes_to_triton(call.reason, compiles_torch=None if averages else named.x):
        return channels.record(named, spec)
    return _torch_batch_norm(named, spec)


def _counted_batch_norm(counter: Tensor | None, x: Tensor, running_mean: Tensor | None, *rest: Any) -> Tensor:
    """Calls torch's batch_norm, after `reference.count`. Undoes the count if the call fails before the statistics move.

    A hook on saved tensors may raise before the update, when the input is saved, or after it. A checkpoint that has
    recomputed all it needs raises after it.
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
            if not counter.is_inference():  # inference tensors have no version
                torch._C._autograd._unsafe_set_version_counter((counter,), (counter._version - 2,))
        raise


def _torch_batch_norm(tensors: BatchNormTensors, spec: BatchNormSpec) -> Tensor:
    """Normalizes by torch's function, on wider tensors if it does not take these dtypes or would round twice.

    Counts the batch and updates the statistics before y is computed: a checkpoint may stop its recomputation as soon as
    it has the tensors it needs.
    """
    x, residual, weight, bias, running_mean, running_var, counter = tensors
    types = {tensor.dtype for tensor in (running_mean, running_var, weight, bias) if tensor is not None}
    fused = residual is not None or spec.activation is not None
    halves = x.dtype in HALVES
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)  # torch's has no backward for a bias alone on CUDA
    rounds_once = not (fused and halves)
    takes_dtypes = rounds_once and (types <= {x.dtype} or (halves and types == {torch.float32}))
    momentum = reference.count(counter, spec.momentum)
    takes_call = has_known_sizes(x) and isinstance(momentum, float)
    if takes_dtypes and takes_call and x.dim() <= 5:  # cuDNN takes at most 5 axes
        parameters = weight, bias, spec.training, momentum, spec.eps
        y = _counted_batch_norm(counter, x, running_mean, running_var, *parameters)
        if residual is not None:
            y = y + residual.to(y.dtype)
        return activate(y, spec.activation, spec.slope)
    compute = reference.compute_dtype(x)
    if spec.training and running_mean is not None and running_var is not None:
        is_empty = holds(x.numel() == 0)
        if is_empty or not takes_call or {running_mean.dtype, running_var.dtype} != {compute}:
            if not is_empty:
                reference.move_running_statistics(x, running_mean, running_var, momentum)
            running_mean = running_var = None  # not read in training
    running_mean, running_var, weight, bias, added = (
        None if tensor is None else tensor.to(compute) for tensor in (running_mean, running_var, weight, bias, residual)
    )
    wide = (x if x.dim() <= 5 else x.flatten(2)).to(compute)
    if has_known_sizes(x):
        moved_by = momentum if isinstance(momentum, float) else 0.0
        parameters = weight, bias, spec.training, moved_by, spec.eps
        z = _counted_batch_norm(counter, wide, running_mean, running_var, *parameters).view(x.shape)
    else:  # torch's function asks for the sizes
        widened = BatchNormTensors._make((wide, None, weight, bias, running_mean, running_var, None))
        z = reference.batch_norm(widened, spec._replace(activation=None))
    return activate(z if added is None else z + added, spec.activation, spec.slope).to(x.dtype)
