"""Defines the steps of BatchNorm over a distributed batch as `torch.library` operators, with fakes and derivatives.

shares.py has the steps in plain torch, and defines the packed statistics. An operator launches the kernels, or calls
those functions if `by_kernels` is false or a process's part is empty. The last operator has the derivative of the whole
call, including the statistics' dependence on x; the others have none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import shares
from triton_norm.captures import is_intercepted
from triton_norm.channels.operator import ComposedCall, composed_gradients, for_backward, outputs
from triton_norm.channels.plan import BackwardTensors, Part, backward_plan_of, forward_plan_of, gradients
from triton_norm.library import Derivative, operator, recorded
from triton_norm.reference import compute_dtype
from triton_norm.saved import check_restored, facts_of, needs_of, needs_torch, shaped
from triton_norm.specs import BatchNormSpec, BatchNormTensors, Epilogue, Formula, GradientDtypes, Inputs, Phase


class Saved(NamedTuple):
    """Holds the tensors saved for the backward; see `channels.operator.Saved` for bits, residual and bias."""

    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    merged: Tensor

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.x, self.residual, self.weight, self.bias)

    def before(self, dy: Tensor) -> BackwardTensors:
        statistics = _statistics(self.merged)
        return BackwardTensors(dy, self.x, self.residual, self.bits, self.weight, self.bias, statistics, None, None)


class ApplyCall(NamedTuple):
    """Holds the arguments of the operator that normalizes by the whole batch's statistics."""

    inputs: Inputs
    merged: Tensor
    bits_kind: str | None
    formula: Formula
    group_name: str
    by_kernels: bool


class SumsCall(NamedTuple):
    """Holds the arguments of the operator that reduces a process's part in the backward."""

    dy: Tensor
    saved: Saved
    dweight_dtype: torch.dtype | None
    dbias_dtype: torch.dtype | None
    bits_kind: str | None
    epilogue: Epilogue
    by_kernels: bool

    @property
    def gradient_dtypes(self) -> GradientDtypes:
        return GradientDtypes(None, None, self.dweight_dtype, self.dbias_dtype)


class GradientCall(NamedTuple):
    """Holds the arguments of the operator that computes dx from the sums of all processes."""

    dy: Tensor
    saved: Saved
    sums: Tensor
    dresidual_dtype: torch.dtype | None
    bits_kind: str | None
    epilogue: Epilogue
    by_kernels: bool

    @property
    def gradient_dtypes(self) -> GradientDtypes:
        return GradientDtypes(self.saved.x.dtype, self.dresidual_dtype, None, None)


def _spec(activation: str | None = None, slope: float = 0.0) -> BatchNormSpec:
    """Returns the spec of launches that read the statistics. rstd already contains eps."""
    return BatchNormSpec(True, 0.0, 0.0, activation, slope)


def _statistics(merged: Tensor) -> Tensor:
    return merged[:-1].contiguous().view(3, -1)


def _moments(x: Tensor, by_kernels: bool) -> Tensor:
    if not (by_kernels and x.numel()):
        return shares.moments(x)
    n_channels = x.shape[1]
    packed = torch.full((3 * n_channels + 1,), x.numel() // n_channels, dtype=compute_dtype(x), device=x.device)
    tensors = BatchNormTensors(x)
    forward_plan_of(_spec(), Part(Phase.REDUCE, local=True), tensors)(tensors, packed[:-1].view(3, -1))
    return packed


def _fake_moments(x: Tensor, by_kernels: bool) -> Tensor:
    return x.new_empty(3 * x.shape[1] + 1, dtype=compute_dtype(x))


def _apply(call: ApplyCall) -> tuple[Tensor | None, Tensor | None]:
    inputs, epilogue = call.inputs, call.formula.epilogue
    if call.by_kernels and inputs.x.numel():
        tensors = BatchNormTensors(*inputs)
        plan = forward_plan_of(_spec(*epilogue), Part(Phase.APPLY, call.bits_kind), tensors)
        return plan(tensors, _statistics(call.merged))
    y, bits = _fake_apply(call)
    y.copy_(shares.apply(inputs, call.merged, epilogue))
    return y, bits


def _fake_apply(call: ApplyCall) -> tuple[Tensor, Tensor | None]:
    return outputs(call.inputs.x, call.bits_kind)


def _sums(call: SumsCall) -> tuple[Tensor | None, Tensor | None, Tensor]:
    x = call.saved.x
    if not (call.by_kernels and x.numel()):
        return shares.sums(call.dy, call.saved.inputs, call.saved.merged, call.gradient_dtypes, call.epilogue)
    tensors, sums = call.saved.before(call.dy), x.new_empty((2, x.shape[1]), dtype=compute_dtype(x))
    part = Part(Phase.REDUCE, call.bits_kind, local=True)
    _, _, dweight, dbias = backward_plan_of(_spec(*call.epilogue), call.gradient_dtypes, part, tensors)(tensors, sums)
    return dweight, dbias, sums.flatten()


def _fake_sums(call: SumsCall) -> tuple[Tensor | None, Tensor | None, Tensor]:
    _, _, dweight, dbias = gradients(call.saved.x, call.gradient_dtypes, None)
    return dweight, dbias, call.saved.merged.new_empty(2 * call.saved.x.shape[1])


def _gradient(call: GradientCall) -> tuple[Tensor | None, Tensor | None]:
    dy, saved = call.dy, call.saved
    if call.by_kernels and saved.x.numel():
        tensors, means = saved.before(dy), (call.sums / saved.merged[-1]).view(2, -1)
        part = Part(Phase.APPLY, call.bits_kind)
        dx, dresidual, _, _ = backward_plan_of(_spec(*call.epilogue), call.gradient_dtypes, part, tensors)(
            tensors, means
        )
        return dx, dresidual
    results = _fake_gradient(call)  # in the layout that the operator's fake promises
    values = shares.gradient(dy, saved.inputs, saved.merged, call.sums, call.dresidual_dtype, call.epilogue)
    for result, value in zip(results, values, strict=True):
        if result is not None and value is not None:
            result.copy_(value)
    return results


def _fake_gradient(call: GradientCall) -> tuple[Tensor | None, Tensor | None]:
    dx, dresidual, _, _ = gradients(call.saved.x, call.gradient_dtypes, call.bits_kind)
    return dx, dresidual


def total(sums: Tensor, group_name: str) -> Tensor:
    """Returns the sums over all processes of a group."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(sums, "sum", group_name))  # type: ignore[no-any-return]


class Total(torch.autograd.Function):
    """Computes `total`, differentiable to any order, in forward mode and in batches: its derivative is a `total`."""

    @staticmethod
    def forward(sums: Tensor, group_name: str) -> Tensor:
        result: Tensor = total_op(sums.contiguous(), group_name)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        _, ctx.group_name = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Total.apply(gradient, ctx.group_name), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return Total.apply(tangent, ctx.group_name)  # type: ignore[no-any-return, no-untyped-call]

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, None], sums: Tensor, group_name: str) -> tuple[Tensor, int | None]:
        return Total.apply(sums, group_name), axes[0]  # type: ignore[no-untyped-call]


def _setup_total(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    _, ctx.group_name = inputs


def _differentiate_total(ctx: Any, gradient: Tensor) -> tuple[Tensor]:
    result: Tensor = total_op(gradient.contiguous(), ctx.group_name)
    return (result,)


def _setup_apply(ctx: Any, call: ApplyCall, results: tuple[Tensor | None, ...]) -> int:
    _, bits = results
    saved = *for_backward(call.inputs, bits, call.formula.epilogue.activation), call.merged
    ctx.save_for_backward(*saved)
    ctx.facts = facts_of(None if is_intercepted() else saved, call.inputs)
    ctx.options = call.bits_kind, call.formula, call.group_name, call.by_kernels
    return 1


def _differentiate_apply(ctx: Any, dy: Tensor, *_: Any) -> Sequence[Tensor | None]:
    facts, (bits_kind, formula, group_name, by_kernels) = ctx.facts, ctx.options
    tensors, epilogue = ctx.saved_tensors, formula.epilogue
    check_restored(facts, Saved, tensors)
    saved = Saved(*tensors)
    needs = needs_of(ctx)
    if needs_torch((dy,), saved, intercepted=True):
        return _composed_gradients(ComposedCall(formula.spec(True), bits_kind, facts, needs), dy, saved, group_name)
    dweight_dtype = facts.weight.dtype if needs.weight and facts.weight else None
    dbias_dtype = facts.bias.dtype if needs.bias and facts.bias else None
    options = bits_kind, epilogue, by_kernels
    dweight, dbias, sums = _sums_op(SumsCall(dy, saved, dweight_dtype, dbias_dtype, *options))
    sums = total(sums, group_name)  # all processes take part, whichever gradients each needs
    dx = dresidual = None
    stored = facts.dresidual if needs.residual and epilogue.activation is not None else None
    if needs.x or stored is not None:
        dx, dresidual = _gradient_op(GradientCall(dy, saved, sums, stored, *options))
    if needs.residual and stored is None:
        dresidual = dy.to(facts.dresidual)
    return dx if needs.x else None, dresidual, shaped(dweight, facts.weight), shaped(dbias, facts.bias)


def _composed_gradients(call: ComposedCall, dy: Tensor, saved: Saved, group_name: str) -> list[Tensor | None]:
    def over_all(sums: Tensor) -> Tensor:
        return Total.apply(sums, group_name)  # type: ignore[no-any-return, no-untyped-call]

    def function(inputs: Inputs, activation: str | None) -> Tensor:
        formula = Formula(call.spec.eps, Epilogue(activation, call.spec.slope))
        return shares.batch_norm(inputs, saved.merged, over_all, formula)

    return composed_gradients(call, dy, saved, function)


def _undifferentiable(name: str) -> Derivative:
    """Returns a derivative that raises, for a backward's operator."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"triton_norm::{name} can't be differentiated: a backward of SyncBatchNorm was recorded as operators; for "
            "second derivatives record the forward alone"
        )

    return Derivative(lambda ctx, call, results: len(results), backward)


# One operator for both collectives: a batch of gradients would stack the first one's results before they are there.
total_op: Any = operator(
    "sync_batch_norm_total(Tensor sums, str group_name) -> Tensor",
    total,
    lambda sums, group_name: sums.new_empty(sums.shape),
    Derivative(_setup_total, _differentiate_total),
)
moments_op = operator("sync_batch_norm_moments(Tensor x, bool by_kernels) -> Tensor", _moments, _fake_moments)
apply_op = recorded(
    "sync_batch_norm_apply",
    ApplyCall,
    2,
    lambda call: (True, call.bits_kind is not None),
    _apply,
    _fake_apply,
    Derivative(_setup_apply, _differentiate_apply),
)
_sums_op = recorded(
    "sync_batch_norm_sums",
    SumsCall,
    3,
    lambda call: (call.dweight_dtype is not None, call.dbias_dtype is not None, True),
    _sums,
    _fake_sums,
    _undifferentiable("sync_batch_norm_sums"),
)
_gradient_op = recorded(
    "sync_batch_norm_gradient",
    GradientCall,
    2,
    lambda call: (True, call.dresidual_dtype is not None),
    _gradient,
    _fake_gradient,
    _undifferentiable("sync_batch_norm_gradient"),
)
