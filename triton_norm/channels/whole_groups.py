"""Prepares the launch of a GroupNorm of which a program has several groups, whole in registers."""

import functools
from typing import Any, NamedTuple

import torch

from triton_norm.channels.group_layout import Groups, Slices
from triton_norm.channels.layout import Placement, vector_of
from triton_norm.launch import Launch, Launcher
from triton_norm.library import name_of, triton_dtype
from triton_norm.specs import GroupNormSpec
from triton_norm.tuning import group_spaces
from triton_norm.tuning.configs import next_power_of_2
from triton_norm.tuning.group_spaces import WholeWork
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of
from triton_norm.tuning.memory import remembered


@functools.cache
def _kernel(name: str) -> Any:
    from triton_norm.kernels import groups, groups_backward

    return getattr(groups if name == "groups_forward_kernel" else groups_backward, name)


def _strides(slices: Slices | None, vector: int) -> tuple[int, int]:
    return (0, 0) if slices is None else (slices.sample_stride // vector, slices.position_stride // vector)


def _placements(groups: Groups) -> list[Placement]:
    return [Placement(*slices[:2], 1, *slices[2:]) for slices in filter(None, groups.slices)]


@remembered
def forward_launch(groups: Groups, spec: GroupNormSpec) -> Launch | None:
    """Returns the launch that computes all groups, or None if they are too large, or better read by columns."""
    n_samples, n_groups, per_group, n_positions = groups.shape
    in_rows = groups.kind == "last" and n_positions > 1
    rows, columns = (n_positions, per_group) if in_rows else (1, per_group * n_positions)
    strides = [stride for slices in filter(None, groups.slices) for stride in slices[: 1 + in_rows]]
    vector = vector_of(_placements(groups), columns, *strides)
    if in_rows and (per_group == 1 or (vector * groups.itemsize < VECTOR_BYTES and groups.by_group().kind == "folded")):
        return None
    per_parameter = 1 if groups.kind == "last" else n_positions
    run = 1 if per_parameter % vector else vector
    x_type, _ = groups.types
    work = WholeWork(
        next_power_of_2(rows * columns // vector),
        vector,
        run,
        types=tuple(name_of(dtype) for dtype in groups.types if dtype is not None),
        curved=spec.activation is not None,
    )
    gpu = gpu_of(groups.device)
    if not group_spaces.fits(work, gpu):
        return None
    x, residual = (_strides(slices, vector) for slices in groups.slices)
    geometry = n_groups, rows, columns // vector, per_parameter // run, n_groups * per_group
    launcher = Launcher(
        _kernel("groups_forward_kernel"),
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
        COMPUTE=triton_dtype(torch.float64 if x_type == torch.float64 else torch.float32),
    )
    return Launch(launcher, n_samples * n_groups)


class Gradient(NamedTuple):
    """Describes the launch of a backward that reads x and dy once.

    Args:
        n_members: programs that share a group. If several, they need 2 · n_members · n_groups partial results and
            2 + n_groups zeros.
    """

    launch: Launch
    n_members: int


@remembered
def gradient_launch(groups: Groups, spec: GroupNormSpec) -> Gradient | None:
    """Returns the launch that computes dx, dresidual and the sums over a sample's channels.

    None if a group does not fit into registers, or its positions don't lie side by side.
    """
    n_samples, n_groups, per_group, n_positions = groups.shape
    if groups.kind == "last" and n_positions > 1:
        return None
    strides = [slices.sample_stride for slices in filter(None, groups.slices)]
    vector = vector_of(_placements(groups), n_positions, *strides)
    x_type, dy_type, residual_type = groups.types
    types = tuple(name_of(dtype) for dtype in (dy_type, x_type, residual_type) if dtype is not None)
    gpu = gpu_of(groups.device)
    itemsize = sum(slices.itemsize for slices in groups.slices[:2] if slices is not None)
    curved = spec.activation is not None
    work = group_spaces.gradient_work((per_group, n_positions), vector, types, itemsize, curved, gpu)
    if work is None:
        return None
    x, dy, residual = (_strides(slices, vector)[0] for slices in groups.slices)
    n_members = work.members
    launcher = Launcher(
        _kernel("groups_fused_backward_kernel"),
        group_spaces.gradient(work, gpu),
        groups.device,
        lambda config, count: count * n_members if n_members > 1 else -(-count // config["M"]),
        (n_groups, per_group, n_members, n_positions // vector, x, dy, residual),
        ACTIVATION=spec.activation,
        SLOPE=spec.slope,
        PEERS=next_power_of_2(n_members),
        V=vector,
        R=work.channels,
        W=work.accesses,
        COMPUTE=triton_dtype(torch.float64 if x_type == torch.float64 else torch.float32),
    )
    return Gradient(Launch(launcher, n_samples * n_groups), n_members)
