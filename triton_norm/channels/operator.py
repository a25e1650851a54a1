"""Defines BatchNorm's `torch.library` operators, with fakes and derivatives."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans, reference
from triton_norm.activations import gradient_by_mask
from triton_norm.captures import is_intercepted
from triton_norm.channels.layout import dense_like, empty_bits, mask_of_bits
from triton_norm.channels.plan import (
    BackwardTensors,
    Gradients,
    backward_part,
    backward_plan_of,
    forward,
    gradients,
)
from triton_norm.library import Derivative, recorded
from triton_norm.saved import ForwardFacts, Needs, TensorMeta, bias_like, facts_of, needs_of, needs_torch, shaped
from triton_norm.specs import BatchNormSpec, BatchNormTensors, Epilogue, Formula, GradientDtypes, Inputs


class ForwardCall(NamedTuple):
    """Holds the arguments of the operator that normalizes by the batch's statistics.

    Args:
        bits_kind: layout of the bits for the backward; None: no bits.
        tracks: the batch's moments are needed to update running statistics.
    """

    inputs: Inputs
    bits_kind: str | None
    tracks: bool
    formula: Formula


class InferenceCall(NamedTuple):
    """Holds the arguments of the operator that normalizes by the running statistics."""

    inputs: Inputs
    running_mean: Tensor
    running_var: Tensor
    bits_kind: str | None
    formula: Formula


class BackwardCall(NamedTuple):
    """Holds the arguments of the backward's operator."""

    tensors: BackwardTensors
    gradient_dtypes: GradientDtypes
    bits_kind: str | None
    formula: Formula


class Saved(NamedTuple):
    """Holds the tensors that the forward saves for the backward.

    Bits replace the residual. Without bits, z is recomputed for the activation's gradient; only then is the bias
    needed. The statistics are the batch's; if they are None, the running ones were used.
    """

    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


def _forward(call: ForwardCall) -> tuple[Tensor | None, ...]:
    x, moments, unpacked = call.inputs.x, None, None
    if x.numel() == 0:  # the number of samples was unknown while recording
        y, *others = _fake_forward(call)
        return y, *(None if tensor is None else tensor.zero_() for tensor in others)
    if call.tracks:
        n_channels, compute = x.shape[1], reference.compute_dtype(x)
        moments = torch.full((3 * n_channels + 1,), x.numel() // n_channels, dtype=compute, device=x.device)
        unpacked = moments[:-1].view(3, n_channels)
    y, statistics, bits = forward(call.formula.spec(True), BatchNormTensors(*call.inputs), call.bits_kind, unpacked)
    return y, statistics, moments, bits


def _fake_forward(call: ForwardCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x = call.inputs.x
    n_channels, compute = x.shape[1], reference.compute_dtype(x)
    moments = x.new_empty(3 * n_channels + 1, dtype=compute) if call.tracks else None
    y, bits = outputs(x, call.bits_kind)
    return y, x.new_empty(3, n_channels, dtype=compute), moments, bits


def _inference(call: InferenceCall) -> tuple[Tensor, Tensor | None]:
    if call.inputs.x.numel() == 0:
        return _fake_inference(call)
    tensors = BatchNormTensors(*call.inputs, call.running_mean, call.running_var)
    y, _, bits = forward(call.formula.spec(False), tensors, call.bits_kind)
    return y, bits


def _fake_inference(call: InferenceCall) -> tuple[Tensor, Tensor | None]:
    return outputs(call.inputs.x, call.bits_kind)


def outputs(x: Tensor, bits_kind: str | None) -> tuple[Tensor, Tensor | None]:
    """Allocates y and the bits, if any."""
    return dense_like(x, kind=bits_kind), None if bits_kind is None else empty_bits(x, bits_kind)


def _backward(call: BackwardCall) -> Gradients:
    tensors, gradient_dtypes = call.tensors, call.gradient_dtypes
    if tensors.x.numel() == 0:
        result = _fake_backward(call)
        return tuple(None if gradient is None else gradient.zero_() for gradient in result)  # type: ignore[return-value]
    spec = call.formula.spec(tensors.statistics is not None)
    part = backward_part(spec, gradient_dtypes, call.bits_kind)
    if part is None:
        return None, None, None, None
    return backward_plan_of(spec, gradient_dtypes, part, tensors)(tensors)


def _fake_backward(call: BackwardCall) -> Gradients:
    return gradients(call.tensors.x, call.gradient_dtypes, call.bits_kind)


class PassesDy(NamedTuple):
    """Runs a backward without activation, where dresidual is dy in the residual's dtype."""

    plan: Callable[[Sequence[Any]], Gradients]
    dtype: torch.dtype

    def __call__(self, tensors: Sequence[Any]) -> Gradients:
        dx, _, dweight, dbias = self.plan(tensors)
        dy, *_ = tensors
        return dx, dy.to(self.dtype), dweight, dbias


def _launched(ctx: Any, gradient_dtypes: GradientDtypes, tensors: BackwardTensors) -> Gradients:
    """Returns the gradients by the kernels, and caches the plan for backwards of `ctx.plan`."""
    spec, facts = ctx.spec, ctx.facts
    part = backward_part(spec, gradient_dtypes, ctx.bits_kind)
    if part is None:
        return None, None, None, None
    plan: Any = backward_plan_of(spec, gradient_dtypes, part, tensors)
    if all(parameter is None or len(parameter.shape) == 1 for parameter in (facts.weight, facts.bias)):
        passes = needs_of(ctx).residual and spec.activation is None
        plans.keep((ctx.plan, ctx.needs_input_grad), tensors, PassesDy(plan, facts.dresidual) if passes else plan)
    result: Gradients = plan(tensors)
    return result


class ComposedCall(NamedTuple):
    """Specifies a backward; `spec` has an activation and its slope."""

    spec: Any
    bits_kind: str | None
    facts: ForwardFacts
    needs: Needs


def composed_gradients(
    call: ComposedCall, dy: Tensor, saved: Any, function: Callable[..., Tensor]
) -> list[Tensor | None]:
    """Returns the gradients of x, residual, weight and bias, composed of torch's functions.

    Args:
        saved: a `Saved`, or another NamedTuple with x, residual, bits, weight and bias.
        function: (inputs, activation) → y.
    """
    spec, bits_kind, facts, (x_needs, residual_needs, *parameters_need) = call
    activation, bias = spec.activation, saved.bias
    if bias is None:
        bias = bias_like(saved.x, facts)
    if saved.bits is not None:
        assert bits_kind is not None
        dy = gradient_by_mask(dy, mask_of_bits(saved.bits, saved.x, bits_kind), activation, spec.slope)
        activation = None
    passes_dy = residual_needs and saved.residual is None
    result = reference.gradients(
        lambda *inputs: function(Inputs(*inputs), activation),
        (saved.x, saved.residual, saved.weight, bias),
        dy,
        (x_needs, residual_needs and not passes_dy, *parameters_need),
    )
    if passes_dy:
        assert facts.dresidual is not None
        result[1] = dy.to(facts.dresidual)
    return result


def _composed_gradients(call: ComposedCall, dy: Tensor, saved: Any) -> list[Tensor | None]:
    def function(inputs: Inputs, activation: str | None) -> Tensor:
        tensors = BatchNormTensors(*inputs, saved.running_mean, saved.running_var)
        return reference.batch_norm(tensors, call.spec._replace(activation=activation))

    return composed_gradients(call, dy, saved, function)


def for_backward(inputs: Inputs, bits: Tensor | None, activation: str | None) -> tuple[Tensor | None, ...]:
    """Returns the first five fields of `Saved`."""
    x, residual, weight, bias = inputs
    recomputes = activation is not None and bits is None
    return x, residual if recomputes else None, bits, weight, bias if recomputes else None


def gradient_dtypes_of(facts: ForwardFacts, needs: Needs, activation: str | None) -> GradientDtypes:
    """Returns the gradients to compute. Without an activation, dresidual is dy and needs no computation."""
    return GradientDtypes(
        facts.dx if needs.x else None,
        facts.dresidual if needs.residual and activation is not None else None,
        facts.weight.dtype if needs.weight and facts.weight else None,
        facts.bias.dtype if needs.bias and facts.bias else None,
    )


def gradients_of(ctx: Any, saved: Saved, dy: Tensor) -> Sequence[Tensor | None]:
    """Returns the gradients of x, residual, weight and bias, in the shape and dtype of each."""
    spec: BatchNormSpec = ctx.spec
    facts: ForwardFacts = ctx.facts
    needs = needs_of(ctx)
    intercepted = facts.saved is None or is_intercepted()
    if needs_torch((dy,), saved, intercepted):
        return _composed_gradients(ComposedCall(spec, ctx.bits_kind, facts, needs), dy, saved)
    gradient_dtypes, tensors = gradient_dtypes_of(facts, needs, spec.activation), BackwardTensors._make((dy, *saved))
    if intercepted:
        formula = Formula(spec.eps, Epilogue(spec.activation, spec.slope))
        result = backward_op(BackwardCall(tensors, gradient_dtypes, ctx.bits_kind, formula))
    else:
        result = _launched(ctx, gradient_dtypes, tensors)
    dx, dresidual, dweight, dbias = result
    if needs.residual and spec.activation is None:
        assert facts.dresidual is not None
        dresidual = dy.to(facts.dresidual)
    return dx, dresidual, shaped(dweight, facts.weight), shaped(dbias, facts.bias)


def _save(ctx: Any, inputs: Inputs, bits: Tensor | None, statistics: Tensor | None, call: Any) -> int:
    running = (None, None) if statistics is not None else (call.running_mean, call.running_var)
    ctx.save_for_backward(*for_backward(inputs, bits, call.formula.epilogue.activation), statistics, *running)
    ctx.facts, ctx.bits_kind = facts_of(None, inputs), call.bits_kind
    ctx.spec = call.formula.spec(statistics is not None)
    return 1


def _setup(ctx: Any, call: ForwardCall, results: tuple[Tensor | None, ...]) -> int:
    _, statistics, _, bits = results
    return _save(ctx, call.inputs, bits, statistics, call)


def _setup_inference(ctx: Any, call: InferenceCall, results: tuple[Tensor | None, ...]) -> int:
    if call.running_mean.requires_grad or call.running_var.requires_grad:
        raise RuntimeError("batch_norm(): not differentiable with respect to running_mean and running_var")
    _, bits = results
    return _save(ctx, call.inputs, bits, None, call)


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> Sequence[Tensor | None]:
    return gradients_of(ctx, Saved(*ctx.saved_tensors), dy)


def _setup_backward(ctx: Any, call: BackwardCall, results: tuple[Tensor | None, ...]) -> int:
    ctx.save_for_backward(*call.tensors._replace(statistics=None))
    ctx.gradient_dtypes, ctx.bits_kind = call.gradient_dtypes, call.bits_kind
    ctx.spec = call.formula.spec(call.tensors.statistics is not None)
    return len(results)


def _differentiate_backward(ctx: Any, *gradients: Tensor) -> Sequence[Tensor | None]:
    saved, gradient_dtypes = BackwardTensors(*ctx.saved_tensors), ctx.gradient_dtypes
    needs = Needs._make(dtype is not None for dtype in gradient_dtypes)
    existing = [gradient for gradient, needed in zip(gradients, needs, strict=True) if needed]
    n_channels = saved.x.shape[1]
    of_bias = (
        None
        if gradient_dtypes.dbias_dtype is None
        else TensorMeta(gradient_dtypes.dbias_dtype, torch.Size((n_channels,)), saved.x.device)
    )
    facts = ForwardFacts(None, saved.x.dtype, gradient_dtypes.dresidual_dtype, None, of_bias)

    def function(
        dy: Tensor, x: Tensor, residual: Tensor | None, bits: Any, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        x, residual, weight, bias = reference.differentiable(x, residual, weight, bias)
        again = saved._replace(x=x, residual=residual, weight=weight, bias=bias)
        result = _composed_gradients(ComposedCall(ctx.spec, ctx.bits_kind, facts, needs), dy, again)
        return tuple(
            gradient.to(dtype).view_as(like)
            for gradient, dtype, like in zip(result, gradient_dtypes, gradients, strict=True)
            if gradient is not None and dtype is not None
        )

    inputs = saved.dy, saved.x, saved.residual, saved.bits, saved.weight, saved.bias
    needs_input = ctx.needs_input_grad[: len(inputs)]
    return reference.gradients(function, inputs, existing, needs_input, may_be_unused=True)


forward_op = recorded(
    "batch_norm_forward",
    ForwardCall,
    4,
    lambda call: (True, True, call.tracks, call.bits_kind is not None),
    _forward,
    _fake_forward,
    Derivative(_setup, _differentiate),
)
inference_op = recorded(
    "batch_norm_inference",
    InferenceCall,
    2,
    lambda call: (True, call.bits_kind is not None),
    _inference,
    _fake_inference,
    Derivative(_setup_inference, _differentiate),
)
backward_op = recorded(
    "batch_norm_backward",
    BackwardCall,
    4,
    lambda call: [dtype is not None for dtype in call.gradient_dtypes],
    _backward,
    _fake_backward,
    Derivative(_setup_backward, _differentiate_backward),
)
