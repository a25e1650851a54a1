"""Plans and launches GroupNorm. A group is a channel of one sample whose weight changes along it.

The forward of small groups is one launch whose programs have several of them (whole_groups.py). That of groups that fit
into the registers of several programs is one launch that reads them as a BatchNorm's channels, sample by sample, and
each element's weight and bias from its channel. Otherwise statistics are reduced by group, and results that depend
on the weight are computed by channel, with the statistics of its group. A sample's bits don't depend on the other
samples. The backward is divided in the same manner: by groups in registers, or by channels.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import activations, plans
from triton_norm.channels.group_layout import Groups, as_readable, copies, dtypes_of, groups_of, kind_of, shape_of
from triton_norm.channels.launches import Launches, Read, Step, Types
from triton_norm.channels.layout import dense_like, is_dense
from triton_norm.channels.whole_groups import Gradient, forward_launch, gradient_launch
from triton_norm.launch import Launch, Launcher, zeros
from triton_norm.library import contiguous
from triton_norm.reference import compute_dtype
from triton_norm.specs import GroupNormSpec, Inputs, Phase, Wanted
from triton_norm.tuning import group_spaces
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of
from triton_norm.tuning.memory import remembered

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The gradients are dx, dresidual, dweight and dbias."""


class GroupBackwardTensors(NamedTuple):
    """Holds the tensors that the backward reads.

    Args:
        dy, x, residual: [N, C, *]; residual is None unless it is needed to recompute z.
        weight, bias: [C], or None; bias is None unless it is needed to recompute z.
        statistics: [3, N · n_groups]: mean, mean_lo and rstd.
    """

    dy: Tensor
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor


def _forward_launches(read: Read, waits: bool, curved: bool) -> Launches:
    x, residual = read.placements
    assert x is not None
    # By columns an activation takes the registers of a residual: sm_80 and sm_100 spilled a few for SiLU.
    adds = residual is not None or (curved and waits and read.kind == "folded")
    return Launches("channels_forward_kernel", read, x.itemsize if waits else 0, adds=adds)


@remembered
def _forward_steps(groups: Groups, spec: GroupNormSpec) -> list[Step]:
    activations.check(spec.activation)
    _, _, per_group, _ = groups.shape
    by_channel, curved = groups.by_channel(), spec.activation is not None
    fused = _forward_launches(
        by_channel if per_group == 1 else groups.by_group(applies=True), waits=True, curved=curved
    )
    launches = [(fused, phase) for phase in fused.phases(Phase.FUSED)]
    if len(launches) > 1:
        launches = [
            (
                _forward_launches(by_channel if per_group == 1 else groups.by_group(), waits=False, curved=curved),
                Phase.REDUCE,
            ),
            (_forward_launches(by_channel, waits=False, curved=curved), Phase.APPLY),
        ]
    x_type, residual_type = groups.types
    return [
        made.step(
            phase,
            (x_type, residual_type) if phase.applies else (x_type,),
            (0.0, 0.0, *made.scalars(), made.parameter_runs),
            EPS=spec.eps,
            CUMULATIVE=False,
            LOCAL=False,
            STATISTICS=phase.reduces,
            RUN=made.run,
            ACTIVATION=spec.activation,
            SLOPE=spec.slope,
        )
        for made, phase in launches
    ]


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
        statistics = self._like.new_empty(3 * self._n_groups)
        added = 0 if residual is None else residual.data_ptr() % VECTOR_BYTES
        key = x.data_ptr() % VECTOR_BYTES, added, moments is None
        launches = self._launches.get(key)
        if launches is None:
            others = y, weight, bias, statistics, moments
            groups = groups_of(self._kind, self._spec.n_groups, (x, residual), others)
            launches = forward_launch(groups, self._spec) or _forward_steps(groups, self._spec)
            self._launches[key] = launches
        if isinstance(launches, Launch):
            launches(x, residual, y, weight, bias, statistics, moments)
            return y, statistics
        for step in launches:
            partials = sync = None
            if step.partials:
                partials = self._like.new_empty(3 * step.partials * self._n_groups)
                sync = zeros(step.n_counts, x.device)
            applied = (residual, y, None, weight, bias) if step.applies else (None,) * 5
            left = moments if step.reduces else None
            step.launch(x, *applied, statistics, left, None, None, None, partials, sync)
        return y, statistics


@remembered
def _backward_steps(groups: Groups, spec: GroupNormSpec, phase: Phase, constant: bool) -> list[Step]:
    activations.check(spec.activation)
    _, _, per_group, _ = groups.shape
    read = groups.by_channel()
    x, dy, residual = read.placements
    assert x is not None and dy is not None
    waits = phase is Phase.FUSED and per_group == 1 and not constant
    streamed = 0 if residual is None else residual.itemsize
    launches = Launches("channels_backward_kernel", read, x.itemsize + dy.itemsize if waits else 0, streamed)
    apart = phase is Phase.FUSED and per_group > 1 and not constant
    x_type, dy_type, residual_type = groups.types
    return [
        launches.step(
            one,
            (dy_type, x_type, residual_type),
            launches.scalars(),
            DY_SPREAD=1,
            EPS=spec.eps,
            LOCAL=False,
            CONSTANT=constant,
            REDUCE=one.reduces,
            ACTIVATION=spec.activation,
            SLOPE=spec.slope,
        )
        for one in ([Phase.REDUCE, Phase.APPLY] if apart else launches.phases(phase, constant))
    ]


@functools.cache
def _combining_kernel() -> Any:
    from triton_norm.kernels import groups_backward

    return groups_backward.groups_backward_kernel


@remembered
def _combining_launcher(types: Types, n_channels: int, per_group: int, device: torch.device) -> Launcher:
    *_, dweight, dbias = types
    has_parameters = dweight is not None or dbias is not None

    def n_programs(config: Any, total: int, n_samples: int, n_means: int) -> int:
        return n_means + (-(-n_channels // config["BLOCK_C"]) if has_parameters else 0)

    space = group_spaces.groups_backward(gpu_of(device))
    return Launcher(_combining_kernel(), space, device, n_programs, (n_channels,), PER_GROUP=per_group)


class GroupBackwardPlan:
    """Runs the backward of all calls of one signature."""

    def __init__(self, spec: GroupNormSpec, wanted: Wanted, tensors: GroupBackwardTensors) -> None:
        dy, x, residual, *others = tensors
        self._spec, self._wanted, self._kind = spec, wanted, kind_of(x)
        self._shape, self._like = shape_of(x, spec.n_groups), x.new_empty(0, dtype=compute_dtype(x))
        self._constant = wanted.dx_dtype is None
        reduces = not self._constant or wanted.dweight_dtype is not None or wanted.dbias_dtype is not None
        applies = not self._constant or wanted.dresidual_dtype is not None
        self._phase = Phase.FUSED if reduces and applies else Phase.REDUCE if reduces else Phase.APPLY
        swept = [tensor for tensor in (dy, x, residual) if tensor is not None]
        are_contiguous = all(tensor is None or tensor.is_contiguous() for tensor in others)
        self._copies = not are_contiguous or any(copies(tensor, self._kind) for tensor in swept)
        self._launches: dict[Any, tuple[Gradient | list[Step], Launch | None]] = {}

    def __call__(self, tensors: Sequence[Any]) -> Gradients:
        """Returns the gradients that are wanted.

        Args:
            tensors: fields of GroupBackwardTensors.
        """
        dy, x, residual, weight, bias, statistics = tensors
        found = gradients(x, self._wanted, self._kind)
        if self._copies:
            dy, x, weight = as_readable(dy, self._kind), as_readable(x, self._kind), contiguous(weight)
            residual = None if residual is None else as_readable(residual, self._kind)
            bias, statistics = contiguous(bias), statistics.contiguous()
        added = 0 if residual is None else residual.data_ptr() % VECTOR_BYTES
        key = dy.data_ptr() % VECTOR_BYTES, x.data_ptr() % VECTOR_BYTES, added
        launches, combine = self._launches.get(key) or self._prepare(
            key, (x, dy, residual), (weight, bias, statistics), found
        )
        tensors = GroupBackwardTensors(dy, x, residual, weight, bias, statistics)
        if isinstance(launches, Gradient):
            self._in_registers(launches, combine, tensors, found)
        else:
            self._by_channel(launches, combine, tensors, found)
        return found

    def _sums(self, *needed: bool) -> list[Tensor | None]:
        """Allocates sums of dweight and dbias over the channels of each sample, where needed."""
        n_samples, n_groups, per_group, _ = self._shape
        n_channels = n_samples * n_groups * per_group
        return [self._like.new_empty(n_channels) if one else None for one in needed]

    def _in_registers(
        self, gradient: Gradient, combine: Launch | None, tensors: GroupBackwardTensors, found: Gradients
    ) -> None:
        """Fills the gradients by one launch, which reads x and dy once, and one for dweight and dbias."""
        dx, dresidual, dweight, dbias = found
        n_samples, n_groups, _, _ = self._shape
        sums = self._sums(dweight is not None, dbias is not None)
        partials = sync = None
        if gradient.n_members > 1:
            partials = self._like.new_empty(2 * gradient.n_members * n_samples * n_groups)
            sync = zeros(2 + n_samples * n_groups, tensors.x.device)
        dy, x, residual, *parameters = tensors
        gradient.launch(dy, x, residual, dx, dresidual, *parameters, *sums, partials, sync)
        if combine is not None:
            combine(*sums, None, tensors.statistics, None, dweight, dbias)

    def _by_channel(
        self, steps: list[Step], combine: Launch | None, tensors: GroupBackwardTensors, found: Gradients
    ) -> None:
        """Fills the gradients by launches whose programs have a part of a channel."""
        dy, x, residual, weight, bias, statistics = tensors
        dx, dresidual, dweight, dbias = found
        n_samples, n_groups, per_group, _ = self._shape
        n_channels = n_samples * n_groups * per_group
        by_group = per_group > 1 and dx is not None
        means = None if dx is None else self._like.new_empty(2 * n_samples * n_groups)
        sums = self._sums(dweight is not None or by_group, dbias is not None or by_group)
        combined = *sums, weight if by_group else None, statistics, means if by_group else None, dweight, dbias
        for step in steps:
            if step.applies and not step.reduces and combine is not None and by_group:
                combine(*combined)
            partials = sync = None
            if step.partials:
                partials = self._like.new_empty(2 * step.partials * n_channels)
                sync = zeros(step.n_counts, x.device)
            stored = (dx, dresidual) if step.applies else (None, None)
            summed = sums if step.reduces else (None, None)
            taken = None if step.reduces and by_group else means
            running = None, None
            step.launch(
                dy, x, residual, None, *stored, weight, bias, statistics, *running, *summed, taken, partials, sync
            )
        if combine is not None and not by_group:
            combine(*combined)

    def _prepare(
        self, key: Any, swept: Sequence[Tensor | None], others: Sequence[Tensor | None], found: Gradients
    ) -> tuple[Gradient | list[Step], Launch | None]:
        """Returns the launches, and the one that combines the sums over channels, if any.

        Args:
            others: weight, bias and statistics.
        """
        dx, _, dweight, dbias = found
        groups = groups_of(self._kind, self._spec.n_groups, swept, (*others, *found))
        launches: Gradient | list[Step] | None = None if dx is None else gradient_launch(groups, self._spec)
        n_samples, n_groups, per_group, n_positions = self._shape
        n_means = 0 if dx is None or launches is not None or per_group == 1 else n_samples * n_groups
        if launches is None:
            launches = _backward_steps(groups, self._spec, self._phase, self._constant)
        combine = None
        if n_means or dweight is not None or dbias is not None:
            weight, _, _ = others
            compute = self._like.dtype
            needs = (dweight is not None or n_means > 0, dbias is not None or n_means > 0)
            sums = [compute if one else None for one in needs]
            read = (None if weight is None else weight.dtype, compute) if n_means else (None, compute)
            types = *sums, *read, compute if n_means else None, *dtypes_of((dweight, dbias))
            launcher = _combining_launcher(types, n_groups * per_group, per_group, groups.device)
            combine = Launch(launcher, per_group * n_positions, n_samples, n_means)
        self._launches[key] = launches, combine
        return launches, combine


def gradients(x: Tensor, wanted: Wanted, kind: str) -> Gradients:
    """Allocates dx and dresidual, in the layout `kind`, and dweight and dbias [C], where wanted."""
    dx, dresidual = (
        None if dtype is None else dense_like(x, dtype, kind) for dtype in (wanted.dx_dtype, wanted.dresidual_dtype)
    )
    dweight, dbias = (
        None if dtype is None else x.new_empty(x.shape[1], dtype=dtype)
        for dtype in (wanted.dweight_dtype, wanted.dbias_dtype)
    )
    return dx, dresidual, dweight, dbias


def group_forward_plan_of(spec: GroupNormSpec, tensors: Inputs) -> GroupForwardPlan:
    """Returns the plan of forwards of this signature, creating it if necessary."""
    key = "group_norm", spec, *(tensor is None for tensor in tensors)
    plan: GroupForwardPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = GroupForwardPlan(spec, tensors)
        plans.keep(key, tensors, plan)
    return plan


def group_backward_plan_of(spec: GroupNormSpec, wanted: Wanted, tensors: GroupBackwardTensors) -> GroupBackwardPlan:
    """Returns the plan of backwards of this signature, creating it if necessary."""
    key = "group_norm", spec, wanted, *(tensor is None for tensor in tensors)
    plan: GroupBackwardPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = GroupBackwardPlan(spec, wanted, tensors)
        plans.keep(key, tensors, plan)
    return plan
