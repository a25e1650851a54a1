"""Runs BatchNorm by the kernels or their operators, with autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import plans, reference
from triton_norm.activations import has_mask
from triton_norm.channels import operator
from triton_norm.channels.layout import kind_of
from triton_norm.channels.operator import Saved
from triton_norm.channels.plan import (
    ForwardPlan,
    forward_part,
    forward_plan_of,
)
from triton_norm.channels.running import counts, move_op
from triton_norm.saved import ForwardFacts, check_restored, facts_of, is_unsavable, needs_gradient
from triton_norm.specs import BatchNormSpec, BatchNormTensors, Epilogue, Formula, Inputs


def bits_kind_of(tensors: BatchNormTensors, spec: BatchNormSpec) -> str | None:
    """Returns the layout of the bits that the forward saves in place of the residual; None: no bits."""
    return kind_of(tensors.x) if tensors.residual is not None and has_mask(spec.activation) else None


class BatchNormPlan:
    """Runs the forwards of all calls of one signature, with and without gradients.

    Attributes:
        requires_grad: an input requires grad.
        saves_copies: autograd can save only a copy of x or residual.
        bits_kind: layout of the bits of a forward with gradients, or None.
        recomputes: the backward recomputes z, the activation's argument.
        facts: those of the forward, for the backward, set by the first forward with gradients.
    """

    def __init__(self, spec: BatchNormSpec, tensors: BatchNormTensors) -> None:
        x, residual, weight, bias, running_mean, _, counter = tensors
        inputs = Inputs(x, residual, weight, bias)
        self.spec = spec
        self.requires_grad = any(tensor is not None and tensor.requires_grad for tensor in inputs)
        self.bits_kind = bits_kind_of(tensors, spec)
        self.facts: ForwardFacts | None = None
        self.recomputes = spec.activation is not None and self.bits_kind is None
        self.saves_copies = savable(tensors, spec) is not tensors
        self._counts = not spec.training or counter is None or counts(x, counter)
        self._refuses = spec.training and counter is not None and counter.is_inference()
        self._moves_all = running_mean is not None and counter is not None
        self._n_statistics = 3 * x.shape[1]
        self._like = x.new_empty(0, dtype=reference.compute_dtype(x))
        self._forwards: dict[bool, ForwardPlan] = {}

    def forward(self, tensors: Sequence[Any], saves: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns y, the batch's statistics and bits; the latter two may be None."""
        if not self._counts:
            return self._counted_apart(BatchNormTensors._make(tensors), saves)
        statistics = None
        if self.spec.training:
            _, _, _, _, running_mean, running_var, counter = tensors
            if self._refuses:
                reference.check_writable(counter)  # torch updates inference statistics anywhere
            moved = running_mean, running_var, counter
            torch._C._increment_version(moved if self._moves_all else [one for one in moved if one is not None])
            statistics = self._like.new_empty(self._n_statistics)
        plan = self._forwards.get(saves)
        if plan is None:
            part = forward_part(self.spec, self.bits_kind if saves else None)
            plan = self._forwards[saves] = forward_plan_of(self.spec, part, BatchNormTensors._make(tensors))
        y, bits = plan(tensors, statistics)
        return y, statistics, bits  # type: ignore[return-value]

    def _counted_apart(self, tensors: BatchNormTensors, saves: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Runs `forward` for a counter that no kernel can increment."""
        spec, counter = self.spec, tensors.num_batches_tracked
        assert counter is not None
        if spec.momentum is None:  # to read the counter waits for the GPU
            spec = spec._replace(momentum=1.0 / float(counter + 1))
        uncounted = tensors._replace(num_batches_tracked=None)
        result = BatchNormPlan(spec, uncounted).forward(uncounted, saves)
        counter.add_(1)  # before a hook on saved tensors can raise
        return result


def savable(tensors: BatchNormTensors, spec: BatchNormSpec) -> BatchNormTensors:
    """Returns the tensors, with copies of those that autograd needs but can't save."""
    x, residual = tensors.x, tensors.residual
    if is_unsavable(x):
        tensors = tensors._replace(x=x.clone())
    if residual is not None and spec.activation is not None and is_unsavable(residual):
        tensors = tensors._replace(residual=residual.clone())
    return tensors


class BatchNormFunction(torch.autograd.Function):
    """Differentiates once by the kernels; `needs_torch` decides which backwards use `reference` instead."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        plan: BatchNormPlan,
    ) -> Tensor:
        tensors = x, residual, weight, bias, running_mean, running_var, num_batches_tracked
        y, statistics, bits = plan.forward(tensors, True)
        if statistics is not None:
            running_mean = running_var = None  # the backward uses the batch's
        again = (residual, bits, weight, bias) if plan.recomputes else (None, bits, weight, None)
        saved = x, *again, statistics, running_mean, running_var
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        if plan.facts is None:
            plan.facts = facts_of(saved, (x, residual, weight, bias))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved, needs = ctx.plan, ctx.saved_tensors, ctx.needs_input_grad
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            tensors = dy, *saved  # fields of BackwardTensors
            backward = plans.find((plan, needs), tensors)
            if backward is not None:
                return *backward(tensors), None, None, None, None
        check_restored(plan.facts, Saved, saved)
        ctx.facts, ctx.spec, ctx.bits_kind = plan.facts, plan.spec, plan.bits_kind
        result = operator.gradients_of(ctx, Saved(*saved), dy)
        return *result, None, None, None, None


# torch.autograd.Function.apply without its check for torch.func's transforms, which `dispatch` has made.
_apply: Any = super(torch.autograd.Function, BatchNormFunction).apply


def launch(tensors: tuple[Any, ...], plan: BatchNormPlan) -> Tensor:
    """Returns y by the kernels. In training, updates the running statistics, if any.

    Args:
        tensors: fields of BatchNormTensors.
    """
    if plan.requires_grad and torch.is_grad_enabled():
        if plan.saves_copies:
            # guards don't pass the copies, which affects the backward alone
            tensors = savable(BatchNormTensors._make(tensors), plan.spec)
        return _apply(*tensors, plan)  # type: ignore[no-any-return]
    y, _, _ = plan.forward(tensors, False)
    return y


def record(tensors: BatchNormTensors, spec: BatchNormSpec) -> Tensor:
    """Returns y by the operators that record the call. They save for the backward themselves."""
    counter = tensors.num_batches_tracked
    if counter is not None and not counts(tensors.x, counter):
        if spec.momentum is None:  # to read the counter waits for the GPU
            spec = spec._replace(momentum=1.0 / float(counter + 1))
        y = record(tensors._replace(num_batches_tracked=None), spec)
        counter.add_(1)
        return y
    x, residual, weight, bias, running_mean, running_var, _ = tensors
    bits_kind = None
    if needs_gradient((x, residual, weight, bias)):
        x, residual, *_ = savable(tensors, spec)
        bits_kind = bits_kind_of(tensors, spec)
    inputs = Inputs._make((x, residual, weight, bias))
    formula = Formula._make((spec.eps, Epilogue._make((spec.activation, spec.slope))))
    if not spec.training:
        call = operator.InferenceCall._make((inputs, running_mean, running_var, bits_kind, formula))
        y, _ = operator.inference_op(call)
        return y  # type: ignore[no-any-return]
    moved = [tensor for tensor in (running_mean, running_var) if tensor is not None]
    counted = [] if counter is None else [counter]
    tracks = len(moved) + len(counted) > 0
    y, _, moments, _ = operator.forward_op(operator.ForwardCall._make((inputs, bits_kind, tracks, formula)))
    if tracks:
        move_op(moments[None], moved, counted, spec.momentum, spec.eps, True)
    return y  # type: ignore[no-any-return]
