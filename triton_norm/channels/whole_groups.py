"""Prepares the launches of a GroupNorm that keep groups in registers: a forward of several groups a program, and a
backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from triton_norm.channels.group_layout import Groups, Slices
from triton_norm.channels.launches import Launches, is_curved, kernel_of
from triton_norm.channels.layout import Placement, vector_of
from triton_norm.launch import Launch, Launcher
from triton_norm.library import name_of, triton_dtype
from triton_norm.specs import GroupNormSpec, Phase
from triton_norm.tuning import group_spaces
from triton_norm.tuning.configs import next_power_of_2
from triton_norm.tuning.group_spaces import WholeWork
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of, limits_in_force
from triton_norm.tuning.memory import remembered


def _strides(slices: Slices | None, vector: int) -> tuple[int, int]:
    """Returns the strides between samples and positions, divided by V unless the tensor is expanded."""
    if slices is None:
        return 0, 0
    unit = vector if slices.spread else 1
    return slices.sample_stride // unit, slices.position_stride // unit


def _spread(groups: Groups) -> list[Slices]:
    return [slices for slices in groups.slices if slices is not None and slices.spread]


def _placements(groups: Groups) -> list[Placement]:
    return [Placement._make(slices[:-1]) for slices in _spread(groups)]


def _vector_of(groups: Groups, length: int, n_parts: int, *strides: int) -> int:
    """Returns the elements of an access to parts of samples, of this length each. It divides the length, or those that
    do are narrow, and the parts are read as windows."""
    vector = vector_of(_placements(groups), length, *strides)
    if vector * groups.itemsize >= limits_in_force().narrow_access_bytes:
        return vector
    return min(vector_of(_placements(groups), n_parts * length, *strides), 1 << length.bit_length() - 1)


@remembered
def forward_launch(groups: Groups, spec: GroupNormSpec) -> Launch | None:
    """Returns the launch that computes all groups, or None if they are too large, or better read by columns."""
    n_samples, n_groups, per_group, n_positions = groups.shape
    in_rows = groups.kind == "last" and n_positions > 1
    rows, columns = (n_positions, per_group) if in_rows else (1, per_group * n_positions)
    strides = [slices.sample_stride for slices in _spread(groups)]
    if in_rows:
        strides += [slices.position_stride for slices in _spread(groups)]
    vector = (
        _vector_of(groups, columns, n_groups, *strides)
        if per_group == 1
        else vector_of(_placements(groups), columns, *strides)
    )
    windows = columns % vector > 0
    if in_rows and (per_group == 1 or (vector * groups.itemsize < VECTOR_BYTES and groups.by_group().kind == "folded")):
        return None
    per_parameter = 1 if groups.kind == "last" else n_positions
    run = 1 if per_parameter % vector and not windows else vector
    size = columns if windows else columns // vector
    x_type, _ = groups.types
    work = WholeWork(
        next_power_of_2(-(-(columns + vector - 1) // vector) if windows else rows * columns // vector),
        vector,
        run,
        types=tuple(name_of(dtype) for dtype in groups.types if dtype is not None),
        curved=spec.activation is not None,
        windows=windows,
    )
    gpu = gpu_of(groups.device)
    if not group_spaces.fits(work, gpu):
        return None
    x, residual = (_strides(slices, vector) for slices in groups.slices)
    geometry = n_groups, rows, size, size if windows else per_parameter // run, n_groups * per_group
    launcher = Launcher(
        kernel_of("groups_forward_kernel"),
        group_spaces.whole(work, gpu),
        groups.device,
        lambda config, count: -(-count // config["M"]),
        (*geometry, *x, *residual),
        EPS=spec.eps,
        ACTIVATION=spec.activation,
        SLOPE=spec.slope,
        V=vector,
        RUN=run,
        T=work.accesses,
        WINDOWS=windows,
        COMPUTE=triton_dtype(torch.float64 if x_type == torch.float64 else torch.float32),
    )
    return Launch(launcher, n_samples * n_groups)


class Gradient(NamedTuple):
    """Describes the launch of a backward that reads x and dy once.

    Args:
        n_rows: rows of the sums over a sample's channels that its programs leave.
        n_partials: elements of its workspace, 0 if no programs share a group.
        n_counts: zeros that it needs if programs share a group.
        n_means: elements of the groups' means that its programs leave for each other, if it is
            `channels_backward_kernel` on rows of groups; 0 if it is `groups_fused_backward_kernel`.
    """

    launch: Launch
    n_rows: int
    n_partials: int
    n_counts: int
    n_means: int = 0

    def __call__(self, tensors: Sequence[Any], results: Sequence[Any], workspace: Sequence[Any]) -> None:
        """Launches the kernel.

        Args:
            tensors: fields of GroupBackwardTensors.
            results: dx, dresidual, and the sums for dweight and dbias.
            workspace: partial results and zeros, or None.
        """
        dx, dresidual, *sums = results
        if not self.n_means:
            dy, x, residual, *parameters = tensors
            self.launch(dy, x, residual, dx, dresidual, *parameters, *sums, *workspace)
            return
        dy, x, residual, weight, bias, statistics = tensors
        means = statistics.new_empty(self.n_means)
        read = dy, x, residual, None, dx, dresidual, weight, bias, statistics, None, None
        self.launch(*read, *sums, means, *workspace)


@remembered
def gradient_launch(groups: Groups, spec: GroupNormSpec) -> Gradient | None:
    """Returns the launch that computes dx, dresidual and the sums over a sample's channels.

    None if a group does not fit into registers.
    """
    return _by_column(groups, spec) if _in_rows(groups) else _by_channel(groups, spec)


@remembered
def cluster_launch(groups: Groups, spec: GroupNormSpec) -> Gradient | None:
    """Returns the launch that computes the same by clusters, each with a whole group, or None if there is none."""
    return None if _in_rows(groups) else _by_channel(groups, spec, clusters=True)


def _in_rows(groups: Groups) -> bool:
    return groups.kind == "last" and groups.shape[-1] > 1


def _by_channel(groups: Groups, spec: GroupNormSpec, clusters: bool = False) -> Gradient | None:
    """Returns the launch of programs that have channels of a group, or parts of one, whose positions are adjacent."""
    n_samples, n_groups, per_group, n_positions = groups.shape
    x_slices, dy_slices, _ = groups.slices
    assert x_slices is not None and dy_slices is not None
    strides = [slices.sample_stride for slices in _spread(groups)]
    vector = _vector_of(groups, n_positions, n_groups * per_group, *strides)
    x_type, dy_type, residual_type = groups.types
    types = tuple(name_of(dtype) for dtype in (dy_type, x_type, residual_type) if dtype is not None)
    gpu = gpu_of(groups.device)
    curved = is_curved(spec.activation) if clusters else spec.activation is not None
    itemsize = x_slices.itemsize + dy_slices.itemsize
    planned = group_spaces.gradient_cluster if clusters else group_spaces.gradient_work
    work = planned((per_group, n_positions), vector, types, itemsize, curved, gpu)
    if work is None:
        return None
    x, dy, residual = (_strides(slices, vector)[0] for slices in groups.slices)
    dy_channel = None if dy_slices.spread else dy_slices.channel_stride
    n_members, size = work.members, n_positions if work.windows else n_positions // vector
    launcher = Launcher(
        kernel_of("groups_fused_backward_kernel"),
        group_spaces.gradient(work, gpu),
        groups.device,
        lambda config, count: count * n_members if n_members > 1 else -(-count // config["M"]),
        (n_groups, per_group, n_members, work.chunks, size, x, dy, dy_channel, residual),
        ACTIVATION=spec.activation,
        SLOPE=spec.slope,
        PEERS=next_power_of_2(n_members),
        V=vector,
        R=work.channels,
        W=work.accesses,
        WINDOWS=work.windows,
        CLUSTER=clusters,
        COMPUTE=triton_dtype(torch.float64 if x_type == torch.float64 else torch.float32),
    )
    teams, partials = n_samples * n_groups, 2 * n_members if n_members > 1 else 0
    return Gradient(Launch(launcher, teams), n_samples * work.chunks, partials * teams, 2 + teams)


def _by_column(groups: Groups, spec: GroupNormSpec) -> Gradient | None:
    """Returns the launch of programs that have rows of several groups, whose channels are adjacent."""
    read = groups.by_column()
    if read is None:
        return None
    x, dy, residual = read.placements
    assert x is not None and dy is not None
    streamed = 0 if residual is None else residual.itemsize
    launches = Launches("channels_backward_kernel", read, x.itemsize + dy.itemsize, streamed)
    if launches.phases(Phase.FUSED) != [Phase.FUSED]:
        return None
    x_type, dy_type, residual_type = groups.types
    step = launches.step(
        Phase.FUSED,
        (dy_type, x_type, residual_type),
        launches.scalars(),
        DY_SPREAD=int(launches.layout.spread(dy)),
        EPS=spec.eps,
        LOCAL=False,
        CONSTANT=False,
        BY_COLUMN=True,
        REDUCE=True,
        ACTIVATION=spec.activation,
        SLOPE=spec.slope,
    )
    n_samples, n_groups, *_ = groups.shape
    n_means = 2 * n_samples * n_groups
    return Gradient(
        step.launch, n_samples * max(1, step.partials), n_means * step.partials, step.n_counts, n_means=n_means
    )
