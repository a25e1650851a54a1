"""Defines LayerNorm's and RMSNorm's `torch.library` operators, with fakes and derivatives, and autograd function."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans, reference
from triton_norm.captures import is_intercepted
from triton_norm.library import Derivative, recorded
from triton_norm.plain import computed_in, is_distributed
from triton_norm.rows import fusible
from triton_norm.rows.backward import Gradients, RowBackwardTensors, RowGradients, backward_plan_of
from triton_norm.rows.layout import first_column_axis
from triton_norm.rows.plan import Outputs, RowOutputs, RowPlan, plan_of
from triton_norm.saved import (
    ForwardFacts,
    Needs,
    check_restored,
    facts_of,
    is_unsavable,
    needs_gradient,
    needs_of,
    needs_torch,
    shaped,
)
from triton_norm.specs import GradientDtypes, RowSpec, RowTensors


class ForwardCall(NamedTuple):
    """Holds the arguments of the forward's operators. saves: statistics are needed for a backward."""

    tensors: RowTensors
    saves: bool
    spec: RowSpec


class BackwardCall(NamedTuple):
    """Holds the arguments of the backward's operator."""

    tensors: RowBackwardTensors
    gradient_dtypes: GradientDtypes
    spec: RowSpec


class Saved(NamedTuple):
    """Holds the tensors that the forward saves for the backward.

    Args:
        x: total, if there is a residual.
        statistics: None if an operator was recorded without gradients; they are then recomputed.
        rstd: of the operator that Inductor decomposes; `statistics` are then the means alone.
    """

    x: Tensor
    weight: Tensor | None
    statistics: Tensor | None
    rstd: Tensor | None = None


def _forward(call: ForwardCall) -> Outputs:
    if call.tensors.x.numel() == 0:  # the number of rows was unknown while recording
        return _fake_forward(call)
    return plan_of(call.spec, call.tensors).forward(call.tensors, call.saves)


def _fake_forward(call: ForwardCall) -> Outputs:
    return RowOutputs(call.spec, call.tensors, exact=False)(call.tensors, call.saves)


def _present_forward(call: ForwardCall) -> list[bool]:
    return [True, call.tensors.residual is not None, call.saves]


def _with_separate_rstd(
    function: Callable[[ForwardCall], Outputs],
) -> Callable[[ForwardCall], tuple[Tensor | None, ...]]:
    """Returns the function with LayerNorm's mean and rstd as separate tensors, to save Inductor copies."""

    def compute(call: ForwardCall) -> tuple[Tensor | None, ...]:
        y, total, statistics = function(call)
        if statistics is None or not call.spec.centred:
            return y, total, statistics, None
        mean, rstd = statistics.view(2, -1)  # valid for a data-dependent number of rows, too
        return y, total, mean.clone(), rstd.clone()

    return compute


def _backward(call: BackwardCall) -> Gradients:
    if call.tensors.x.numel() == 0:
        result = _fake_backward(call)
        return tuple(None if gradient is None else gradient.zero_() for gradient in result)  # type: ignore[return-value]
    return backward_plan_of(call.spec, call.gradient_dtypes, call.tensors, (call.spec.n_cols,))(call.tensors)


def _fake_backward(call: BackwardCall) -> Gradients:
    _, _, x, weight, _, _ = call.tensors
    return RowGradients(x, weight, call.gradient_dtypes, (call.spec.n_cols,), exact=False)(x, weight)


def _composed(
    tensors: RowBackwardTensors, spec: RowSpec, gradient_dtypes: GradientDtypes, compute: torch.dtype
) -> Gradients:
    """Returns the gradients of the backward kernels, composed of torch's functions.

    Args:
        tensors: statistics are not read.
        compute: the type that the forward computed in.
    """
    dy, dtotal, x, weight, _, _ = tensors
    x, row = x.to(compute), (spec.n_cols,)
    # A DTensor is gathered where a sharded axis is joined with others.
    flat = (*x.shape[: first_column_axis(x.shape, spec.n_cols)], *row) if is_distributed(x) else (-1, *row)

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = reference.normalize(x.reshape(flat), row, weight, bias, spec._replace(out_dtype=dy.dtype))
        return y.reshape(x.shape)

    weight, bias = None if weight is None else weight.reshape(-1), None
    if gradient_dtypes.dbias_dtype is not None:  # no gradient depends on its values
        bias = x.new_zeros(row, dtype=gradient_dtypes.dbias_dtype, requires_grad=True)
    of_x = gradient_dtypes.dx_dtype is not None or gradient_dtypes.dresidual_dtype is not None
    needed = of_x, gradient_dtypes.dweight_dtype is not None, bias is not None
    dx, dweight, dbias = reference.gradients(function, (x, weight, bias), dy, needed)
    if dx is not None and dtotal is not None:
        dx = dx + dtotal
    return tuple(  # type: ignore[return-value]
        None if dtype is None or gradient is None else gradient.to(dtype)
        for gradient, dtype in zip((dx, dx, dweight, dbias), gradient_dtypes, strict=True)
    )


def _gradient_dtypes(facts: ForwardFacts, needs: Needs) -> GradientDtypes:
    """Returns the gradients to compute. If x and residual have one dtype, theirs is computed once."""
    twice = needs.x and needs.residual and facts.dresidual != facts.dx
    return GradientDtypes(
        facts.dx if needs.x else facts.dresidual if needs.residual else None,
        facts.dresidual if twice else None,
        facts.weight.dtype if needs.weight and facts.weight else None,
        facts.bias.dtype if needs.bias and facts.bias else None,
    )


def _assigned(
    gradient_dtypes: GradientDtypes, needs: Needs
) -> Callable[[Sequence[Tensor | None]], tuple[Tensor | None, ...]]:
    """Returns a function from the computed gradients, followed by None, to those of x, residual, weight and bias."""
    dx, dresidual, dweight, dbias, nothing = range(5)
    of_residual = dx if gradient_dtypes.dresidual_dtype is None else dresidual
    return operator.itemgetter(dx if needs.x else nothing, of_residual if needs.residual else nothing, dweight, dbias)


def _gradients(ctx: Any, saved: Saved, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, residual, weight and bias, in the shape and dtype of each."""
    facts: ForwardFacts = ctx.facts
    spec, needs = ctx.spec, needs_of(ctx)
    gradient_dtypes = _gradient_dtypes(facts, needs)
    intercepted = facts.saved is None or is_intercepted()
    result: Gradients
    if dy is None:
        of_rows = (gradient_dtypes.dx_dtype, gradient_dtypes.dresidual_dtype)
        dx, dresidual = (None if dtotal is None or dtype is None else dtotal.to(dtype) for dtype in of_rows)
        result = dx, dresidual, None, None
    elif needs_torch((dy, dtotal), saved, intercepted):
        read = RowBackwardTensors(dy, dtotal, saved.x, saved.weight, saved.x)
        result = _composed(read, spec, gradient_dtypes, computed_in(facts.dx, saved.x.dtype))
    else:
        statistics = saved.statistics
        if statistics is None:
            again = RowTensors(saved.x, None, None, None)
            _, _, statistics = forward_op(ForwardCall(again, True, spec))
        tensors = RowBackwardTensors(dy, dtotal, saved.x, saved.weight, statistics, saved.rstd)
        if intercepted:
            result = backward_op(BackwardCall(tensors, gradient_dtypes, spec))
        else:
            shape = facts.parameter_shape or (spec.n_cols,)
            plan = backward_plan_of(spec, gradient_dtypes, tensors, shape)
            key = ctx.plan, ctx.needs_input_grad, dtotal is None
            plans.keep(key, tensors, (plan, _assigned(gradient_dtypes, needs)))
            result = plan(tensors)
    dx, dresidual, dweight, dbias = _assigned(gradient_dtypes, needs)((*result, None))
    return dx, dresidual, shaped(dweight, facts.weight), shaped(dbias, facts.bias)


def _setup(ctx: Any, call: ForwardCall, results: tuple[Tensor | None, ...]) -> int:
    _, total, *statistics = results
    x, _, weight, _ = call.tensors
    ctx.save_for_backward(x if total is None else total, weight, *statistics)
    ctx.facts, ctx.spec = facts_of(None, call.tensors), call.spec
    ctx.set_materialize_grads(False)
    needs = needs_of(ctx)
    return 2 if total is not None and (needs.x or needs.residual) else 1


def _differentiate(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, Saved(*ctx.saved_tensors), dy, None if ctx.facts.dresidual is None else dtotal)


class _SavedTwice(NamedTuple):
    """Holds the tensors that the derivative of the backward reads."""

    dy: Tensor
    dtotal: Tensor | None
    x: Tensor
    weight: Tensor | None


def _setup_backward(ctx: Any, call: BackwardCall, results: tuple[Tensor | None, ...]) -> int:
    dy, dtotal, x, weight, _, _ = call.tensors
    ctx.save_for_backward(dy, dtotal, x, weight)
    ctx.gradient_dtypes, ctx.spec, ctx.compute = call.gradient_dtypes, call.spec, call.tensors.statistics.dtype
    return len(results)


def _differentiate_backward(ctx: Any, *gradients: Tensor) -> list[Tensor | None]:
    saved = _SavedTwice(*ctx.saved_tensors)
    existing = [gradient for gradient, dtype in zip(gradients, ctx.gradient_dtypes, strict=True) if dtype is not None]

    def function(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        x, weight = reference.differentiable(x, weight)
        read = RowBackwardTensors(dy, dtotal, x, weight, x)
        result = _composed(read, ctx.spec, ctx.gradient_dtypes, ctx.compute)
        return tuple(gradient for gradient in result if gradient is not None)

    dy_needs, dtotal_needs, x_needs, weight_needs, *_ = ctx.needs_input_grad
    needs = dy_needs, dtotal_needs, x_needs, weight_needs
    return reference.gradients(function, saved, existing, needs, may_be_unused=True)


_forward_derivative = Derivative(_setup, _differentiate)
forward_op = recorded("rows_forward", ForwardCall, 3, _present_forward, _forward, _fake_forward, _forward_derivative)
fusible_op = recorded(
    fusible.NAME,
    ForwardCall,
    4,
    lambda call: [*_present_forward(call), call.saves and call.spec.centred],
    _with_separate_rstd(_forward),
    fusible.registering(_with_separate_rstd(_fake_forward), fusible.NAME),
    _forward_derivative,
)
backward_op = recorded(
    "rows_backward",
    BackwardCall,
    4,
    lambda call: [dtype is not None for dtype in call.gradient_dtypes],
    _backward,
    _fake_backward,
    Derivative(_setup_backward, _differentiate_backward),
)


class RecordedPlan:
    """Runs the forward by its operator. Stands in for a RowPlan, whose launches no tool sees."""

    def __init__(self, spec: RowSpec, tensors: Sequence[Any]) -> None:
        self.spec, self.facts = spec, facts_of(None, tensors)

    def forward(self, tensors: Sequence[Any], saves: bool) -> Outputs:
        result: Outputs = forward_op(ForwardCall(RowTensors._make(tensors), saves, self.spec))
        return result


def recorded_gradients(
    ctx: Any, saved: Sequence[Any], dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, residual, weight and bias by the operator.

    Args:
        ctx: holds a RecordedPlan, and needs_input_grad.
        saved: fields of Saved.
    """
    ctx.facts, ctx.spec = ctx.plan.facts, ctx.plan.spec
    return _gradients(ctx, Saved._make((*saved, None)), dy, dtotal)


class RowsFunction(torch.autograd.Function):
    """Differentiates once by the kernels; `needs_torch` decides which backwards use `reference` instead."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, plan: RowPlan
    ) -> Any:
        inputs = x, residual, weight, bias
        y, total, statistics = plan.forward(inputs, True)
        saved = x if total is None else total, weight, statistics
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        if plan.facts is None:
            plan.facts = facts_of(saved, inputs)
        if total is None:
            return y
        x_needs, residual_needs, *_ = ctx.needs_input_grad
        if not (x_needs or residual_needs):
            ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        if not (torch.compiler.is_compiling() or dy is None or torch.is_grad_enabled()):
            tensors = dy, dtotal, *saved, None  # fields of RowBackwardTensors
            result = plans.find((plan, ctx.needs_input_grad, dtotal is None), tensors)
            if result is not None:
                backward, assign = result
                return *assign((*backward(tensors), None)), None
        check_restored(plan.facts, Saved, saved)
        ctx.facts, ctx.spec = plan.facts, plan.spec
        return *_gradients(ctx, Saved(*saved), dy, dtotal), None


# torch.autograd.Function.apply without its check for torch.func's transforms, which `dispatch` has made.
_apply: Any = super(torch.autograd.Function, RowsFunction).apply


def record(tensors: RowTensors, spec: RowSpec, is_fusible: bool) -> Any:
    """Returns y, or (y, total) with a residual, by an operator; is_fusible: by the one that Inductor decomposes."""
    saves = needs_gradient(tensors)
    if saves and tensors.residual is None and is_unsavable(tensors.x):
        tensors = tensors._replace(x=tensors.x.clone())
    y, total, *_ = (fusible_op if is_fusible else forward_op)(ForwardCall._make((tensors, saves, spec)))
    return y if total is None else (y, total)


def launch(tensors: tuple[Any, ...], plan: RowPlan) -> Any:
    """Returns y, or (y, total) with a residual, by the kernels. Stores no statistics without gradients.

    Args:
        tensors: fields of RowTensors.
    """
    if plan.requires_grad and torch.is_grad_enabled():
        if plan.is_unsavable:
            x, *others = tensors
            tensors = x.clone(), *others  # guards don't pass the copy, which affects the backward alone
        return _apply(*tensors, plan)
    y, total, _ = plan.forward(tensors, False)
    return y if total is None else (y, total)
