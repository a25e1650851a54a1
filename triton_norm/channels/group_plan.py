"""Plans and launches GroupNorm's forward. A group is a channel of one sample whose weight changes along it.

The forward of small groups is one launch whose programs have several of them (whole_groups.py). That of groups that fit
into the registers of several programs is one launch that reads them as a BatchNorm's channels, sample by sample, and
each element's weight and bias from its channel. Otherwise statistics are reduced by group, and results that depend
on the weight are computed by channel, with the statistics of its group. A sample's bits don't depend on the other
samples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import activations, plans
from triton_norm.channels.group_layout import Groups, as_readable, copies, groups_of, kind_of, shape_of
from triton_norm.channels.launches import Forms, Launches, Read, Step
from triton_norm.channels.layout import dense_like, is_dense
from triton_norm.channels.whole_groups import forward_launch
from triton_norm.launch import Launch, zeros
from triton_norm.library import contiguous
from triton_norm.reference import compute_dtype
from triton_norm.specs import GroupNormSpec, Inputs, Phase
from triton_norm.tuning.channel_spaces import Plan
from triton_norm.tuning.limits import VECTOR_BYTES
from triton_norm.tuning.memory import remembered


def _forward_launches(read: Read, waits: bool, activation: str | None) -> Launches:
    x, residual = read.placements
    assert x is not None
    # By columns an activation takes the registers of a residual: sm_80 and sm_100 spilled a few for SiLU.
    adds = residual is not None or (activation is not None and waits and read.kind == "folded")
    return Launches("channels_forward_kernel", read, x.itemsize if waits else 0, adds=adds, activation=activation)


@remembered
def _forward_forms(groups: Groups, spec: GroupNormSpec) -> Forms[list[Step]]:
    activations.check(spec.activation)
    _, _, per_group, _ = groups.shape
    by_channel = groups.by_channel()
    whole = by_channel if per_group == 1 else groups.by_group(applies=True)
    fused = _forward_launches(whole, waits=True, activation=spec.activation)
    launches = [(fused, phase) for phase in fused.phases(Phase.FUSED)]
    if len(launches) > 1:
        reduced = by_channel if per_group == 1 else groups.by_group()
        launches = [
            (_forward_launches(reduced, waits=False, activation=spec.activation), Phase.REDUCE),
            (_forward_launches(by_channel, waits=False, activation=spec.activation), Phase.APPLY),
        ]
    x_type, residual_type = groups.types

    def step(made: Launches, phase: Phase, plan: Plan | None = None) -> Step:
        return made.step(
            phase,
            (x_type, residual_type) if phase.applies else (x_type,),
            (0.0, 0.0, *made.scalars(), made.parameter_runs),
            plan,
            EPS=spec.eps,
            CUMULATIVE=False,
            LOCAL=False,
            STATISTICS=phase.reduces,
            RUN=made.run,
            ACTIVATION=spec.activation,
            SLOPE=spec.slope,
        )

    apart = [step(made, phase) for made, phase in launches]
    return fused.with_clusters(apart, lambda plan: step(fused, Phase.FUSED, plan))


class GroupForwardPlan:
    """Runs the forward of all calls of one signature."""

    def __init__(self, spec: GroupNormSpec, tensors: Inputs) -> None:
        x, residual, *parameters = tensors
        self._spec, self._kind = spec, kind_of(x)
        self._like = x.new_empty(0, dtype=compute_dtype(x))
        n_samples, n_groups, _, _ = shape_of(x, spec.n_groups)
        self._n_groups = n_samples * n_groups
        self._y_dtype = x.dtype if spec.out_dtype is None else spec.out_dtype
        self._y_alike = self._y_dtype == x.dtype and is_dense(x, self._kind)
        swept = [tensor for tensor in (x, residual) if tensor is not None]
        are_contiguous = all(parameter is None or parameter.is_contiguous() for parameter in parameters)
        self._copies = not are_contiguous or any(copies(tensor, self._kind) for tensor in swept)
        self._launches: dict[Any, Launch | list[Step]] = {}

    def __call__(self, tensors: Sequence[Any], moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns y and the statistics [3 · n_samples · n_groups] of the groups.

        Args:
            tensors: fields of Inputs.
            moments: [3, n_samples · n_groups], filled with mean, mean_lo and M2; or None.
        """
        x, residual, weight, bias = tensors
        y = torch.empty_like(x) if self._y_alike else dense_like(x, self._y_dtype, self._kind)
        if self._copies:
            x, weight, bias = as_readable(x, self._kind), contiguous(weight), contiguous(bias)
            residual = None if residual is None else as_readable(residual, self._kind)
        tensors = x, residual, weight, bias
        statistics = self._like.new_empty(3 * self._n_groups)
        added = 0 if residual is None else residual.data_ptr() % VECTOR_BYTES
        key = x.data_ptr() % VECTOR_BYTES, added, moments is None
        launches = self._launches.get(key)
        if launches is None:
            others = y, weight, bias, statistics, moments
            groups = groups_of(self._kind, self._spec.n_groups, (x, residual), others)
            whole = forward_launch(groups, self._spec)
            if whole is None:
                forms = _forward_forms(groups, self._spec)
                launches = forms.chosen(x.device, lambda steps: self._run(steps, tensors, y, (statistics, moments)))
            else:
                launches = whole
            self._launches[key] = launches
        if isinstance(launches, Launch):
            launches(x, residual, y, weight, bias, statistics, moments)
        else:
            self._run(launches, tensors, y, (statistics, moments))
        return y, statistics

    def _run(
        self, steps: list[Step], tensors: Sequence[Any], y: Tensor, statistics: tuple[Tensor, Tensor | None]
    ) -> None:
        x, residual, weight, bias = tensors
        left, moments = statistics
        for step in steps:
            partials = sync = None
            if step.partials:
                partials = self._like.new_empty(3 * step.partials * self._n_groups)
                sync = zeros(step.n_counts, x.device)
            applied = (residual, y, None, weight, bias) if step.applies else (None,) * 5
            step.launch(x, *applied, left, moments if step.reduces else None, None, None, None, partials, sync)


def group_forward_plan_of(spec: GroupNormSpec, tensors: Inputs) -> GroupForwardPlan:
    """Returns the plan of forwards of this signature, creating it if necessary."""
    key = "group_norm", spec, *(tensor is None for tensor in tensors)
    plan: GroupForwardPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = GroupForwardPlan(spec, tensors)
        plans.keep(key, tensors, plan)
    return plan
