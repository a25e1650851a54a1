"""Runs GroupNorm by the kernels or their operators, with autograd."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans, reference
from triton_norm.captures import is_intercepted
from triton_norm.channels.group_backward import GroupBackwardTensors, group_backward_plan_of
from triton_norm.channels.group_layout import kind_of
from triton_norm.channels.group_plan import group_forward_plan_of
from triton_norm.channels.layout import dense_like
from triton_norm.channels.operator import ComposedCall, PassesDy, composed_gradients, gradient_dtypes_of
from triton_norm.channels.plan import Gradients, gradients
from triton_norm.channels.running import InstanceStatistics
from triton_norm.library import Derivative, recorded
from triton_norm.saved import (
    ForwardFacts,
    Needs,
    TensorMeta,
    check_restored,
    facts_of,
    is_unsavable,
    needs_gradient,
    needs_of,
    needs_torch,
    shaped,
)
from triton_norm.specs import GradientDtypes, GroupNormSpec, Inputs


class ForwardCall(NamedTuple):
    """Holds the arguments of the forward's operator.

    Args:
        has_moments: the groups' moments are needed to update running statistics.
    """

    inputs: Inputs
    has_moments: bool
    spec: GroupNormSpec


class BackwardCall(NamedTuple):
    """Holds the arguments of the backward's operator."""

    tensors: GroupBackwardTensors
    gradient_dtypes: GradientDtypes
    spec: GroupNormSpec


class Saved(NamedTuple):
    """Holds the tensors that the forward saves for the backward; residual and bias only to recompute z."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor

    @property
    def bits(self) -> None:
        """Returns None: no bits are saved, unlike a BatchNorm's."""


def _moments(x: Tensor, spec: GroupNormSpec) -> Tensor:
    return x.new_empty(3 * x.shape[0] * spec.n_groups, dtype=reference.compute_dtype(x))


def _forward(call: ForwardCall) -> tuple[Tensor | None, ...]:
    x, spec = call.inputs.x, call.spec
    if x.numel() == 0:  # the number of samples was unknown while recording
        y, *result = _fake_forward(call)
        return y, *(None if tensor is None else tensor.zero_() for tensor in result)
    moments = _moments(x, spec) if call.has_moments else None
    y, statistics = group_forward_plan_of(spec, call.inputs)(call.inputs, moments)
    return y, statistics, moments


def _fake_forward(call: ForwardCall) -> tuple[Tensor | None, ...]:
    x, spec = call.inputs.x, call.spec
    y = dense_like(x, spec.out_dtype or x.dtype, kind_of(x))
    return y, _moments(x, spec), _moments(x, spec) if call.has_moments else None


def _backward(call: BackwardCall) -> Gradients:
    if call.tensors.x.numel() == 0:
        result = _fake_backward(call)
        return tuple(None if gradient is None else gradient.zero_() for gradient in result)  # type: ignore[return-value]
    return group_backward_plan_of(call.spec, call.gradient_dtypes, call.tensors)(call.tensors)


def _fake_backward(call: BackwardCall) -> Gradients:
    return gradients(call.tensors.x, call.gradient_dtypes, kind_of(call.tensors.x))


def _composed_gradients(
    spec: GroupNormSpec, facts: ForwardFacts, needs: Needs, dy: Tensor, saved: Any
) -> list[Tensor | None]:
    """Returns the gradients of x, residual, weight and bias, composed of torch's functions."""

    def function(inputs: Inputs, activation: str | None) -> Tensor:
        return reference.group_norm(inputs, spec._replace(activation=activation, out_dtype=dy.dtype))

    return composed_gradients(ComposedCall(spec, None, facts, needs), dy, saved, function)


def _gradients(ctx: Any, saved: Saved, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, residual, weight and bias, in the shape and dtype of each."""
    facts: ForwardFacts = ctx.facts
    spec, needs = ctx.spec, needs_of(ctx)
    intercepted = facts.saved is None or is_intercepted()
    if needs_torch((dy,), saved, intercepted):
        return tuple(_composed_gradients(spec, facts, needs, dy, saved))
    gradient_dtypes = gradient_dtypes_of(facts, needs, spec.activation)
    tensors = GroupBackwardTensors(dy, *saved)
    passes = needs.residual and spec.activation is None
    if all(dtype is None for dtype in gradient_dtypes):
        result: Gradients = None, None, None, None
    elif intercepted:
        result = backward_op(BackwardCall(tensors, gradient_dtypes, spec))
    else:
        plan: Any = group_backward_plan_of(spec, gradient_dtypes, tensors)
        if all(parameter is None or len(parameter.shape) == 1 for parameter in (facts.weight, facts.bias)):
            assert facts.dresidual is not None or not passes
            plans.keep((ctx.plan, ctx.needs_input_grad), tensors, PassesDy(plan, facts.dresidual) if passes else plan)  # type: ignore[arg-type]
        result = plan(tensors)
    dx, dresidual, dweight, dbias = result
    if passes:
        assert facts.dresidual is not None
        dresidual = dy.to(facts.dresidual)
    return dx, dresidual, shaped(dweight, facts.weight), shaped(dbias, facts.bias)


def _for_backward(inputs: Sequence[Any], spec: GroupNormSpec, statistics: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the fields of Saved."""
    x, residual, weight, bias = inputs
    if spec.activation is None:
        residual = bias = None
    return x, residual, weight, bias, statistics


def _setup(ctx: Any, call: ForwardCall, results: tuple[Tensor | None, ...]) -> int:
    _, statistics, _ = results
    assert statistics is not None
    ctx.save_for_backward(*_for_backward(call.inputs, call.spec, statistics))
    ctx.facts, ctx.spec = facts_of(None, call.inputs), call.spec
    return 1


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> Sequence[Tensor | None]:
    return _gradients(ctx, Saved(*ctx.saved_tensors), dy)


def _setup_backward(ctx: Any, call: BackwardCall, results: tuple[Tensor | None, ...]) -> int:
    ctx.save_for_backward(*call.tensors)
    ctx.gradient_dtypes, ctx.spec = call.gradient_dtypes, call.spec
    return len(results)


def _differentiate_backward(ctx: Any, *results: Tensor) -> Sequence[Tensor | None]:
    read, gradient_dtypes, spec = GroupBackwardTensors(*ctx.saved_tensors), ctx.gradient_dtypes, ctx.spec
    needs = Needs._make(dtype is not None for dtype in gradient_dtypes)
    existing = [gradient for gradient, needed in zip(results, needs, strict=True) if needed]
    of_bias = (
        None
        if gradient_dtypes.dbias_dtype is None
        else TensorMeta(gradient_dtypes.dbias_dtype, torch.Size((read.x.shape[1],)), read.x.device)
    )
    facts = ForwardFacts(None, read.x.dtype, gradient_dtypes.dresidual_dtype, None, of_bias)

    def function(
        dy: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        x, residual, weight, bias = reference.differentiable(x, residual, weight, bias)
        result = _composed_gradients(spec, facts, needs, dy, Saved(x, residual, weight, bias, read.statistics))
        return tuple(
            gradient.to(dtype).view_as(like)
            for gradient, dtype, like in zip(result, gradient_dtypes, results, strict=True)
            if gradient is not None and dtype is not None
        )

    *inputs, _ = read
    needs_input = ctx.needs_input_grad[: len(inputs)]
    return reference.gradients(function, tuple(inputs), existing, needs_input, may_be_unused=True)


forward_op = recorded(
    "group_norm_forward",
    ForwardCall,
    3,
    lambda call: (True, True, call.has_moments),
    _forward,
    _fake_forward,
    Derivative(_setup, _differentiate),
)
backward_op = recorded(
    "group_norm_backward",
    BackwardCall,
    4,
    lambda call: [dtype is not None for dtype in call.gradient_dtypes],
    _backward,
    _fake_backward,
    Derivative(_setup_backward, _differentiate_backward),
)


class GroupNormPlan:
    """Runs the calls of one signature, and holds the facts that their backwards need.

    Attributes:
        requires_grad: a tensor requires grad.
        saves_copies: autograd can save only a copy of x or residual.
        facts: those of the forward, for the backward, set by the first forward with gradients.
        tracking: updates running statistics, if any.
    """

    def __init__(self, spec: GroupNormSpec, tensors: Inputs, tracking: InstanceStatistics | None = None) -> None:
        self.spec, self.forward, self.tracking = spec, group_forward_plan_of(spec, tensors), tracking
        self.requires_grad = any(tensor is not None and tensor.requires_grad for tensor in tensors)
        self.saves_copies = _savable(tensors, spec) is not tensors
        self.facts: ForwardFacts | None = None


def _savable(tensors: Inputs, spec: GroupNormSpec) -> Inputs:
    """Returns the tensors, with copies of those that autograd needs but can't save."""
    x, residual, _, _ = tensors
    if is_unsavable(x):
        tensors = tensors._replace(x=x.clone())
    if residual is not None and spec.activation is not None and is_unsavable(residual):
        tensors = tensors._replace(residual=residual.clone())
    return tensors


class GroupNormFunction(torch.autograd.Function):
    """Differentiates once by the kernels; `needs_torch` decides which backwards use `reference` instead."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        plan: GroupNormPlan,
        moments: Tensor | None,
    ) -> Tensor:
        inputs = x, residual, weight, bias
        y, statistics = plan.forward(inputs, moments)
        saved = _for_backward(inputs, plan.spec, statistics)
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        if plan.facts is None:
            plan.facts = facts_of(saved, inputs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved, needs = ctx.plan, ctx.saved_tensors, ctx.needs_input_grad
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            tensors = dy, *saved  # fields of GroupBackwardTensors
            backward = plans.find((plan, needs), tensors)
            if backward is not None:
                return *backward(tensors), None, None
        check_restored(plan.facts, Saved, saved)
        ctx.facts, ctx.spec = plan.facts, plan.spec
        return *_gradients(ctx, Saved(*saved), dy), None, None


# torch.autograd.Function.apply without its check for torch.func's transforms, which `dispatch` has made.
_apply: Any = super(torch.autograd.Function, GroupNormFunction).apply


def launch(tensors: tuple[Any, ...], plan: GroupNormPlan, moments: Tensor | None = None) -> Tensor:
    """Returns y by the kernels.

    Args:
        tensors: fields of Inputs.
        moments: [3, n_samples · n_groups], filled with mean, mean_lo and M2; or None.
    """
    if plan.requires_grad and torch.is_grad_enabled():
        if plan.saves_copies:
            tensors = _savable(Inputs._make(tensors), plan.spec)
        return _apply(*tensors, plan, moments)  # type: ignore[no-any-return]
    y, _ = plan.forward(tensors, moments)
    return y


def launch_tracking(tensors: tuple[Any, ...], plan: GroupNormPlan, *running: Tensor) -> Tensor:
    """Returns y by the kernels, and updates running_mean and running_var."""
    tracking = plan.tracking
    assert tracking is not None
    moments = tracking.moments(*running)
    y = launch(tensors, plan, moments)
    tracking.move(moments, *running)
    return y


def record(tensors: Inputs, spec: GroupNormSpec, moments: bool = False) -> Any:
    """Returns y, or (y, moments), by the operators that record the call."""
    if needs_gradient(tensors):
        tensors = _savable(tensors, spec)
    y, _, result = forward_op(ForwardCall._make((tensors, moments, spec)))
    return (y, result) if moments else y
