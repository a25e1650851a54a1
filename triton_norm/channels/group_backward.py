"""Plans and launches GroupNorm's backward, and allocates its outputs and workspace.

Where a group fits into registers, one launch reads x and dy once: by groups whose positions are adjacent, or by rows of
groups whose channels are. It leaves sums over each sample's channels, which a second, small launch adds up for dweight
and dbias. Otherwise results are computed by channel, in two launches and one between them for the groups' means.
Clusters that have whole groups may do either in one launch; the faster way is chosen by a trial.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import activations, plans
from triton_norm.channels.group_layout import Groups, as_readable, copies, groups_of, kind_of, shape_of
from triton_norm.channels.launches import Forms, Launches, Step, kernel_of
from triton_norm.channels.plan import Allocation, Gradients
from triton_norm.channels.whole_groups import Gradient, cluster_launch, gradient_launch
from triton_norm.launch import Launch, Launcher, zeros
from triton_norm.library import Types, contiguous, dtypes_of
from triton_norm.reference import compute_dtype
from triton_norm.specs import GradientDtypes, GroupNormSpec, Phase
from triton_norm.tuning import channel_clusters, group_spaces
from triton_norm.tuning.channel_spaces import Plan
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of
from triton_norm.tuning.memory import remembered


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


Way = Gradient | list[Step]
"""The launch that has groups in registers, or the steps by channel."""


@remembered
def _forms_by_channel(groups: Groups, spec: GroupNormSpec, phase: Phase, constant: bool) -> Forms[list[Step]]:
    activations.check(spec.activation)
    _, _, per_group, _ = groups.shape
    read = groups.by_channel()
    x, dy, residual = read.placements
    assert x is not None and dy is not None
    waits = phase is Phase.FUSED and per_group == 1 and not constant
    streamed = 0 if residual is None else residual.itemsize
    resident = x.itemsize + dy.itemsize if waits else 0
    launches = Launches("channels_backward_kernel", read, resident, streamed, activation=spec.activation)
    x_type, dy_type, residual_type = groups.types

    def step(one: Phase, plan: Plan | None = None) -> Step:
        return launches.step(
            one,
            (dy_type, x_type, residual_type),
            launches.scalars(),
            plan,
            DY_SPREAD=int(launches.layout.spread(dy)),
            EPS=spec.eps,
            LOCAL=False,
            CONSTANT=constant,
            BY_COLUMN=False,
            REDUCE=one.reduces,
            ACTIVATION=spec.activation,
            SLOPE=spec.slope,
        )

    by_group = phase is Phase.FUSED and per_group > 1 and not constant
    apart = [step(one) for one in ([Phase.REDUCE, Phase.APPLY] if by_group else launches.phases(phase, constant))]
    return launches.with_clusters(apart, lambda plan: step(Phase.FUSED, plan))


@remembered
def _forms(groups: Groups, spec: GroupNormSpec, phase: Phase, constant: bool) -> Forms[Way]:
    """Returns the ways to compute the gradients: in registers if a group fits, or else by channel; and by clusters, if
    one program does not have whole groups.

    Args:
        constant: dx is not computed.
    """
    whole = None if constant else gradient_launch(groups, spec)
    if whole is not None and not whole.n_partials:
        return Forms(whole)
    forms: Forms[Way] = _forms_by_channel(groups, spec, phase, constant) if whole is None else Forms(whole)
    clusters = None if constant or forms.clusters is not None else cluster_launch(groups, spec)
    if clusters is None:
        return forms
    space = clusters.launch.launcher.space
    portable = space.configs[0].num_ctas <= gpu_of(groups.device).most_blocks
    n_launches = len(forms.apart) if isinstance(forms.apart, list) else 1
    return Forms(forms.apart, clusters, channel_clusters.forms(space, n_launches, portable))


@remembered
def _combining_launcher(types: Types, n_channels: int, per_group: int, device: torch.device) -> Launcher:
    *_, dweight, dbias = types
    has_parameters = dweight is not None or dbias is not None

    def n_programs(config: Any, total: int, n_rows: int, n_means: int) -> int:
        return n_means + (-(-n_channels // config["BLOCK_C"]) if has_parameters else 0)

    space = group_spaces.groups_backward(gpu_of(device))
    return Launcher(kernel_of("groups_backward_kernel"), space, device, n_programs, (n_channels,), PER_GROUP=per_group)


class GroupBackwardPlan:
    """Runs the backward of all calls of one signature."""

    def __init__(self, spec: GroupNormSpec, gradient_dtypes: GradientDtypes, tensors: GroupBackwardTensors) -> None:
        dy, x, residual, *others = tensors
        self._spec, self._kind = spec, kind_of(x)
        self._shape, self._like = shape_of(x, spec.n_groups), x.new_empty(0, dtype=compute_dtype(x))
        self._n_channels = x.shape[1]
        self._allocate = Allocation(x, tensors.weight, gradient_dtypes, self._kind)
        self._constant = gradient_dtypes.dx_dtype is None
        reduces = (
            not self._constant or gradient_dtypes.dweight_dtype is not None or gradient_dtypes.dbias_dtype is not None
        )
        applies = not self._constant or gradient_dtypes.dresidual_dtype is not None
        self._phase = Phase.FUSED if reduces and applies else Phase.REDUCE if reduces else Phase.APPLY
        swept = [tensor for tensor in (x, residual) if tensor is not None]
        are_contiguous = all(tensor is None or tensor.is_contiguous() for tensor in others)
        are_read = not any(copies(tensor, self._kind) for tensor in swept) and not copies(dy, self._kind, True)
        self._copies = not (are_contiguous and are_read)
        self._launches: dict[Any, tuple[Way, Launch | None]] = {}

    def __call__(self, tensors: Sequence[Any]) -> Gradients:
        """Returns the gradients that are wanted.

        Args:
            tensors: fields of GroupBackwardTensors.
        """
        if self._copies:
            tensors = self._readable(GroupBackwardTensors._make(tensors))
        dy, x, residual, weight, *_ = tensors
        result = self._allocate(x, weight)
        added = 0 if residual is None else residual.data_ptr() % VECTOR_BYTES
        key = dy.data_ptr() % VECTOR_BYTES, x.data_ptr() % VECTOR_BYTES, added
        self._run(*(self._launches.get(key) or self._prepare(key, tensors, result)), tensors, result)
        return result

    def _run(self, way: Way, combine: Launch | None, tensors: Sequence[Any], result: Gradients) -> None:
        """Fills the gradients.

        Args:
            combine: the launch that combines the sums over channels, if any.
            tensors: fields of GroupBackwardTensors.
        """
        if isinstance(way, list):
            self._by_channel(way, combine, GroupBackwardTensors._make(tensors), result)
            return
        _, x, *_, statistics = tensors
        dx, dresidual, dweight, dbias = result
        dweight_sums = dbias_sums = partials = sync = None
        n_sums = way.n_rows * self._n_channels
        if dweight is not None:
            dweight_sums = self._like.new_empty(n_sums)
        if dbias is not None:
            dbias_sums = self._like.new_empty(n_sums)
        if way.n_partials:
            partials, sync = self._like.new_empty(way.n_partials), zeros(way.n_counts, x.device)
        way(tensors, (dx, dresidual, dweight_sums, dbias_sums), (partials, sync))
        if combine is not None:
            combine(dweight_sums, dbias_sums, None, statistics, None, dweight, dbias)

    def _readable(self, tensors: GroupBackwardTensors) -> GroupBackwardTensors:
        """Returns tensors that the kernels can read. A hook may have restored them with other strides."""
        dy, x, residual, *others = tensors
        added = None if residual is None else as_readable(residual, self._kind)
        swept = as_readable(dy, self._kind, broadcast=True), as_readable(x, self._kind), added
        return GroupBackwardTensors._make((*swept, *map(contiguous, others)))

    def _by_channel(
        self, steps: list[Step], combine: Launch | None, tensors: GroupBackwardTensors, result: Gradients
    ) -> None:
        """Fills the gradients by launches whose programs have a part of a channel."""
        dy, x, residual, weight, bias, statistics = tensors
        dx, dresidual, dweight, dbias = result
        n_samples, n_groups, per_group, _ = self._shape
        n_channels = n_samples * self._n_channels
        by_group = per_group > 1 and dx is not None
        means = None if dx is None else self._like.new_empty(2 * n_samples * n_groups)
        needed = dweight is not None or by_group, dbias is not None or by_group
        sums = [self._like.new_empty(n_channels) if one else None for one in needed]
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

    def _prepare(self, key: Any, tensors: Sequence[Any], result: Gradients) -> tuple[Way, Launch | None]:
        """Returns the launches, and the one that combines the sums over channels, if any."""
        dy, x, residual, *others = tensors
        groups = groups_of(self._kind, self._spec.n_groups, (x, dy, residual), (*others, *result))
        forms = _forms(groups, self._spec, self._phase, self._constant)
        read = GroupBackwardTensors._make(tensors)

        def combined(way: Way) -> tuple[Way, Launch | None]:
            return way, self._combining(way, read, result)

        clusters = None if forms.clusters is None else combined(forms.clusters)
        ways = Forms(combined(forms.apart), clusters, forms.space)
        self._launches[key] = launches = ways.chosen(x.device, lambda launches: self._run(*launches, read, result))
        return launches

    def _combining(self, way: Way, tensors: GroupBackwardTensors, result: Gradients) -> Launch | None:
        """Returns the launch that combines the sums over channels that these launches leave, if any."""
        dx, _, dweight, dbias = result
        n_samples, n_groups, per_group, n_positions = self._shape
        n_rows, n_means = n_samples, 0
        if not isinstance(way, list):
            n_rows = way.n_rows
        elif dx is not None and per_group > 1:
            n_means = n_samples * n_groups
        if not n_means and dweight is None and dbias is None:
            return None
        compute, weight = self._like.dtype, tensors.weight
        needs = dweight is not None or n_means > 0, dbias is not None or n_means > 0
        sums = [compute if one else None for one in needs]
        inputs = (None if weight is None else weight.dtype, compute) if n_means else (None, compute)
        types = *sums, *inputs, compute if n_means else None, *dtypes_of((dweight, dbias))
        launcher = _combining_launcher(types, self._n_channels, per_group, tensors.x.device)
        return Launch(launcher, per_group * n_positions, n_rows, n_means)


def group_backward_plan_of(
    spec: GroupNormSpec, gradient_dtypes: GradientDtypes, tensors: GroupBackwardTensors
) -> GroupBackwardPlan:
    """Returns the plan of backwards of this signature, creating it if necessary."""
    key = "group_norm", spec, gradient_dtypes, *(tensor is None for tensor in tensors)
    plan: GroupBackwardPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = GroupBackwardPlan(spec, gradient_dtypes, tensors)
        plans.keep(key, tensors, plan)
    return plan
