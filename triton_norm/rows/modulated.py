"""Runs gated and modulated rows by the kernels or their operators, with autograd."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans, reference
from triton_norm.captures import is_intercepted
from triton_norm.library import Derivative, recorded
from triton_norm.plain import computed_in
from triton_norm.rows import fusible
from triton_norm.rows.modulated_backward import (
    BackwardCall,
    Gradients,
    ModulatedGradients,
    modulated_backward_plan_of,
)
from triton_norm.rows.modulated_composed import composed, through_total
from triton_norm.rows.modulated_launches import ModulatedBackwardTensors
from triton_norm.rows.modulated_plan import Expanding, ModulatedPlan, modulated_plan_of
from triton_norm.rows.modulation import Numbering, expanded, numbering_of
from triton_norm.rows.plan import Outputs, RowOutputs
from triton_norm.saved import TensorMeta, check_restored, is_unsavable, meta_of, needs_gradient, needs_torch
from triton_norm.specs import ModulatedGradientDtypes, ModulatedSpec, ModulatedTensors, RowTensors


class ForwardCall(NamedTuple):
    """Holds the arguments of the forward's operators. saves: statistics are needed for a backward."""

    tensors: ModulatedTensors
    saves: bool
    spec: ModulatedSpec


class Saved(NamedTuple):
    """Holds the tensors that the forward saves for the backward, as ModulatedBackwardTensors describes them.

    Statistics are None if an operator was recorded without gradients; they are then computed again.
    """

    total: Tensor
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual_gate: Tensor | None
    statistics: Tensor | None


class Facts(NamedTuple):
    """Holds facts of a forward that its backward needs; equal for calls of one signature.

    Args:
        saved: TensorMeta of each saved tensor; None while tracing.
        inputs: ModulatedTensors of each tensor's TensorMeta.
        numbers: tell which row has which modulation.
    """

    saved: tuple[TensorMeta | None, ...] | None
    inputs: Any
    numbers: Numbering

    @property
    def modulation_shapes(self) -> tuple[Any, ...]:
        """Returns the shapes of scale, shift and residual_gate."""
        modulations = self.inputs.scale, self.inputs.shift, self.inputs.residual_gate
        return tuple(None if meta is None else meta.shape for meta in modulations)


def facts_of(saved: Sequence[Tensor | None] | None, tensors: ModulatedTensors, spec: ModulatedSpec) -> Facts:
    metas = None if saved is None else tuple(map(meta_of, saved))
    return Facts(metas, ModulatedTensors._make(map(meta_of, tensors)), numbering_of(tensors, spec))


def _outputs(call: ForwardCall) -> Outputs:
    x, residual, *_ = call.tensors
    tensors = RowTensors(x, residual, None, None)
    return RowOutputs(call.spec.rows, tensors, exact=False)(tensors, call.saves)


def _forward(call: ForwardCall) -> Outputs:
    if call.tensors.x.numel() == 0:  # the number of rows was unknown while recording
        return _outputs(call)
    return modulated_plan_of(call.spec, call.tensors).forward(call.tensors, call.saves)


def _present_forward(call: ForwardCall) -> list[bool]:
    return [True, call.tensors.residual is not None, call.saves]


def _shapes(call: BackwardCall) -> list[tuple[int, int]]:
    """Returns the shapes in which the backward's operator returns the gradients of modulations."""
    return [(call.numbers.n_modulations, call.spec.rows.n_cols)] * 3


def _backward(call: BackwardCall) -> Gradients:
    if call.tensors.total.numel() == 0:
        return tuple(None if gradient is None else gradient.zero_() for gradient in _fake_backward(call))
    return modulated_backward_plan_of(call, _shapes(call))(call.tensors)


def _fake_backward(call: BackwardCall) -> Gradients:
    allocate = ModulatedGradients(call.tensors, call.gradient_dtypes, call.spec.rows.n_cols, _shapes(call), exact=False)
    return allocate(call.tensors)


def _gradient_dtypes(facts: Facts, needs: Sequence[bool]) -> ModulatedGradientDtypes:
    """Returns the gradients to compute. If x and residual have one dtype and one gradient, it is computed once."""
    dtypes = [meta.dtype if meta is not None and need else None for meta, need in zip(facts.inputs, needs, strict=True)]
    dx, dresidual, *inner = dtypes
    if facts.inputs.residual_gate is None:
        if dx is None:
            dx, dresidual = dresidual, None
        elif dx == dresidual:
            dresidual = None
    return ModulatedGradientDtypes._make((dx, dresidual, *inner))


def _assigned(
    gradient_dtypes: ModulatedGradientDtypes, needs: Sequence[bool]
) -> Callable[[Sequence[Tensor | None]], Gradients]:
    """Returns a function from the computed gradients, followed by None, to those of ModulatedTensors' fields."""
    dx, dresidual, *inner = range(len(ModulatedTensors._fields))
    nothing = len(ModulatedTensors._fields)
    x_needs, residual_needs, *_ = needs
    of_residual = dx if gradient_dtypes.dresidual_dtype is None else dresidual
    return operator.itemgetter(dx if x_needs else nothing, of_residual if residual_needs else nothing, *inner)


def _shaped(gradients: Gradients, facts: Facts) -> Gradients:
    """Returns the gradients in the shapes of their inputs."""
    return tuple(
        gradient if gradient is None or meta is None or gradient.shape == meta.shape else gradient.view(meta.shape)
        for gradient, meta in zip(gradients, facts.inputs, strict=True)
    )


def _gradients(ctx: Any, saved: Saved, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the fields of ModulatedTensors."""
    facts, spec = ctx.facts, ctx.spec
    needs = ctx.needs_input_grad[: len(ModulatedTensors._fields)]
    if not any(needs):
        return (None,) * len(needs)
    gradient_dtypes, shapes = _gradient_dtypes(facts, needs), facts.modulation_shapes
    intercepted = facts.saved is None or is_intercepted()
    assign = _assigned(gradient_dtypes, needs)
    if dy is None:  # y was not used
        return _shaped(assign((*through_total(dtotal, (dy, dtotal, *saved), spec, gradient_dtypes), None)), facts)
    if needs_torch((dy, dtotal), saved, intercepted):
        (dtype, *_), *_ = facts.inputs
        compute = computed_in(dtype, saved.total.dtype)
        return _shaped(assign((*composed((dy, dtotal, *saved), spec, gradient_dtypes, shapes, compute), None)), facts)
    statistics = saved.statistics
    if statistics is None:
        inner = saved.weight, saved.bias, saved.gate, saved.scale, saved.shift
        again = ModulatedTensors._make((saved.total, None, *inner, None))
        _, _, statistics = forward_op(ForwardCall(again, True, spec))
    tensors = ModulatedBackwardTensors._make((dy, dtotal, *saved[:-1], statistics))
    call = BackwardCall(tensors, gradient_dtypes, facts.numbers, spec)
    if intercepted:
        return _shaped(assign((*backward_op(call), None)), facts)
    plan = modulated_backward_plan_of(call, shapes)
    if all(meta is None or len(meta.shape) == 1 for meta in (facts.inputs.weight, facts.inputs.bias)):
        plans.keep((ctx.plan, ctx.needs_input_grad, dtotal is None), tensors, (plan, assign))
    return _shaped(assign((*plan(tensors), None)), facts)


def _saving(tensors: Sequence[Tensor | None], spec: ModulatedSpec) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Returns a function from the fields of ModulatedTensors and of Outputs, followed by None, to those of Saved."""
    named = ModulatedTensors._make(tensors)
    gated_last = named.gate is not None and not spec.gate_first
    names = (
        "x" if named.residual is None else "total",
        "x" if named.residual_gate is not None and named.residual_gate.requires_grad else "nothing",
        "weight",
        "bias" if gated_last or named.scale is not None else "nothing",
        *("gate", "scale", "shift" if gated_last else "nothing", "residual_gate"),
        "statistics",
    )
    every_name = *ModulatedTensors._fields, "y", "total", "statistics", "nothing"
    return operator.itemgetter(*map(every_name.index, names))


def _total_needs(needs: Sequence[bool]) -> bool:
    """Decides whether total has a gradient, given which fields of ModulatedTensors need one."""
    needed = ModulatedTensors._make(needs[: len(ModulatedTensors._fields)])
    return bool(needed.x or needed.residual or needed.residual_gate)


def _setup(ctx: Any, call: ForwardCall, results: Any) -> int:
    ctx.save_for_backward(*_saving(call.tensors, call.spec)((*call.tensors, *results, None)))
    ctx.facts, ctx.spec = facts_of(None, call.tensors, call.spec), call.spec
    ctx.set_materialize_grads(False)
    return 2 if call.tensors.residual is not None and _total_needs(ctx.needs_input_grad) else 1


def _differentiate(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, Saved(*ctx.saved_tensors), dy, None if ctx.facts.inputs.residual is None else dtotal)


def _setup_backward(ctx: Any, call: BackwardCall, results: tuple[Tensor | None, ...]) -> int:
    ctx.save_for_backward(*call.tensors)
    ctx.call = call._replace(tensors=None)  # type: ignore[arg-type]
    return len(results)


def _differentiate_backward(ctx: Any, *results: Tensor) -> Sequence[Tensor | None]:
    call, saved = ctx.call, ModulatedBackwardTensors(*ctx.saved_tensors)
    existing = [gradient for gradient, dtype in zip(results, call.gradient_dtypes, strict=True) if dtype is not None]
    shapes = [None if own is None else own.shape for own in (saved.scale, saved.shift, saved.residual_gate)]

    def function(dy: Tensor, dtotal: Tensor | None, *read: Tensor | None) -> tuple[Tensor, ...]:
        tensors = dy, dtotal, *reference.differentiable(*read), saved.statistics
        result = composed(tensors, call.spec, call.gradient_dtypes, shapes, saved.statistics.dtype)
        return tuple(
            gradient.view_as(like) for gradient, like in zip(result, results, strict=True) if gradient is not None
        )

    *inputs, _ = saved
    needs = ctx.needs_input_grad[: len(inputs)]
    return reference.gradients(function, tuple(inputs), existing, needs, may_be_unused=True)


_derivative = Derivative(_setup, _differentiate)
forward_op = recorded("modulated_rows_forward", ForwardCall, 3, _present_forward, _forward, _outputs, _derivative)
fusible_op = recorded(
    fusible.MODULATED,
    ForwardCall,
    3,
    _present_forward,
    _forward,
    fusible.registering(_outputs, fusible.MODULATED),
    _derivative,
)
backward_op = recorded(
    "modulated_rows_backward",
    BackwardCall,
    8,
    lambda call: [dtype is not None for dtype in call.gradient_dtypes],
    _backward,
    _fake_backward,
    Derivative(_setup_backward, _differentiate_backward),
)


class ModulatedFunction(torch.autograd.Function):
    """Differentiates once by the kernels; `needs_torch` decides which backwards use `reference` instead."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual_gate: Tensor | None,
        plan: ModulatedPlan,
    ) -> Any:
        tensors = x, residual, weight, bias, gate, scale, shift, residual_gate
        results = y, total, _ = plan.forward(tensors, True)
        saving = plan.saving or _saving(tensors, plan.spec)
        saved = saving((*tensors, *results, None))
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        if plan.facts is None:
            plan.saving, plan.facts = saving, facts_of(saved, ModulatedTensors._make(tensors), plan.spec)
        if total is None:
            return y
        if not _total_needs(ctx.needs_input_grad):
            ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        if not (torch.compiler.is_compiling() or dy is None or torch.is_grad_enabled()):
            tensors = dy, dtotal, *saved  # fields of ModulatedBackwardTensors
            result = plans.find((plan, ctx.needs_input_grad, dtotal is None), tensors)
            if result is not None:
                backward, assign = result
                return *assign((*backward(tensors), None)), None
        check_restored(plan.facts, Saved, saved)
        ctx.facts, ctx.spec = plan.facts, plan.spec
        return *_gradients(ctx, Saved(*saved), dy, dtotal), None


# torch.autograd.Function.apply without its check for torch.func's transforms, which `dispatch` has made.
_apply: Any = super(torch.autograd.Function, ModulatedFunction).apply


def _savable(tensors: ModulatedTensors) -> ModulatedTensors:
    """Returns the tensors, with copies of those that autograd can't save."""
    return ModulatedTensors._make(
        tensor.clone() if tensor is not None and is_unsavable(tensor) else tensor for tensor in tensors
    )


def record(tensors: ModulatedTensors, spec: ModulatedSpec, is_fusible: bool) -> Any:
    """Returns y, or (y, total) with a residual, by an operator; is_fusible: by the one that Inductor decomposes."""
    saves = needs_gradient(tensors)
    if saves:
        tensors = _savable(tensors)
    y, total, _ = (fusible_op if is_fusible else forward_op)(ForwardCall._make((tensors, saves, spec)))
    return y if total is None else (y, total)


def launch(tensors: Sequence[Any], plan: ModulatedPlan | Expanding) -> Any:
    """Returns y, or (y, total) with a residual, by the kernels. Stores no statistics without gradients.

    Args:
        tensors: fields of ModulatedTensors.
    """
    if isinstance(plan, Expanding):
        tensors = expanded(ModulatedTensors._make(tensors), plan.spec)
        plan = modulated_plan_of(plan.spec, tensors)
    if plan.requires_grad and torch.is_grad_enabled():
        if plan.saves_copies:
            tensors = _savable(ModulatedTensors._make(tensors))
        return _apply(*tensors, plan)
    y, total, _ = plan.forward(tensors, False)
    return y if total is None else (y, total)
