"""Prepares the launches of a BatchNorm kernel, and divides the work among its programs."""

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from triton_norm import trials
from triton_norm.activations import has_mask
from triton_norm.channels.layout import Layout, Placement, layout_of
from triton_norm.launch import INT32_END, Launch, Launcher
from triton_norm.library import Types, name_of, triton_dtype
from triton_norm.specs import Phase
from triton_norm.tuning import channel_clusters, channel_spaces
from triton_norm.tuning.channel_spaces import BACKWARD, ChannelWork, Plan, SharedChannels
from triton_norm.tuning.configs import Space
from triton_norm.tuning.limits import gpu_of


class Instances(NamedTuple):
    """Describes how many times a launch does its work, each time on a slice of the tensors.

    Args:
        n_instances: number of slices: a GroupNorm's samples.
        strides: elements between slices, of each tensor in Read.placements, None for a tensor that is None.
        spread: False for each of these tensors that is one element, expanded over the lanes.
        channels_per_statistic: adjacent channels with common statistics.
        elements_per_parameter: adjacent elements of a group with a common weight and bias, if groups are read as
            channels; None if each channel has a weight and bias of its own.
    """

    n_instances: int
    strides: tuple[int | None, ...]
    spread: tuple[bool, ...]
    channels_per_statistic: int
    elements_per_parameter: int | None = None


class Read(NamedTuple):
    """Describes the tensors of a launch.

    Args:
        kind: "flat", "last" or "folded".
        placements: strides of the tensors of x's shape that it reads: forward x, residual; backward x, dy, residual.
        x: dtype of x.
        swept: dtypes of the tensors that it reads, in the kernel's order.
        others: dtypes of the kernel's other tensors, None for those that are None.
        instances: None for a BatchNorm, which processes whole tensors at once.
    """

    shape: tuple[int, ...]
    kind: str
    placements: tuple[Placement | None, ...]
    x: torch.dtype
    swept: Types
    others: Types
    device: torch.device
    instances: Instances | None = None


class Step(NamedTuple):
    """Describes one launch.

    Args:
        partials: number of splits whose partial results need workspace; 0 if there is a single split.
        n_counts: number of int32 zeros needed if programs wait or count.
        alone: one program has all of its channels, and leaves nothing for other launches or programs.
    """

    launch: Launch
    reduces: bool
    applies: bool
    partials: int
    n_counts: int
    alone: bool

    @property
    def space(self) -> Space:
        return self.launch.launcher.space


Way_co = TypeVar("Way_co", covariant=True)


@dataclass(frozen=True)
class Forms(Generic[Way_co]):
    """Holds two ways to launch one part of the work, and the space of the choice between them, None if there is one.

    Args:
        apart: the launches without clusters.
        clusters: the launch whose programs are clusters with whole channels or groups, if any.
    """

    apart: Way_co
    clusters: Way_co | None = None
    space: Space | None = None

    def chosen(self, device: torch.device, run: Callable[[Way_co], None]) -> Way_co:
        """Returns the way that is chosen. A search runs each of them many times."""
        if self.space is None or self.clusters is None:
            return self.apart
        ways = {channel_clusters.APART: self.apart, channel_clusters.CLUSTERS: self.clusters}
        runs = {way: functools.partial(run, ways[way]) for way in self.space.configs}
        return ways[trials.choose(self.space, kernel_of(self.space.kernel), device, runs)]


@functools.cache
def kernel_of(name: str) -> Any:
    """Returns the kernel of this name, of those that work on channels or groups."""
    from triton_norm.kernels import channels, channels_backward, groups, groups_backward

    kernels = (
        channels.channels_forward_kernel,
        channels_backward.channels_backward_kernel,
        groups.groups_forward_kernel,
        groups_backward.groups_fused_backward_kernel,
        groups_backward.groups_backward_kernel,
    )
    return {kernel.__name__: kernel for kernel in kernels}[name]


def in_two_floats(value: float) -> tuple[float, float]:
    """Returns the value as a sum of two fp32 numbers, since a launch passes floats as fp32."""
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def is_curved(activation: str | None) -> bool:
    """Decides whether an activation's derivative is computed, and not one of two constants."""
    return activation is not None and not has_mask(activation)


class Launches:
    """Prepares the launches of one kernel for one layout; arguments as in tuning.channel_spaces.SharedChannels."""

    def __init__(
        self,
        kernel: str,
        read: Read,
        resident_bytes: int,
        streamed_bytes: float = 0.0,
        adds: bool = False,
        activation: str | None = None,
        in_clusters: bool = False,
    ) -> None:
        self._arguments = kernel, read, resident_bytes, streamed_bytes, adds, activation
        self._kernel, self._read, self._resident_bytes, self._adds = kernel, read, resident_bytes, adds
        self._curved = is_curved(activation)
        gpu = gpu_of(read.device)
        self._n_instances, per_parameter, instance_strides = 1, None, []
        if read.instances is not None:
            self._n_instances, per_parameter = read.instances.n_instances, read.instances.elements_per_parameter
            pairs = zip(read.instances.strides, read.instances.spread, strict=True)
            instance_strides = [stride for stride, spread in pairs if spread and stride is not None]
        most_columns = None
        if in_clusters:
            most_columns = gpu.limits.most_folded_cluster_columns
        elif per_parameter is not None:
            most_columns = gpu.limits.most_folded_group_columns
        self.layout: Layout = layout_of(
            read.shape,
            read.kind,
            *filter(None, read.placements),
            instance_strides=instance_strides,
            most_columns=most_columns,
        )
        self.run, self.parameter_runs = self.layout.runs(per_parameter)
        self._shared = SharedChannels(
            read.kind,
            self.layout.lanes,
            self.layout.vector,
            n_groups=read.shape[0] * self.layout.groups_per_sample,
            elements_per_group=self.layout.elements_per_group,
            n_blocks=self.layout.n_blocks,
            resident_bytes=resident_bytes,
            streamed_bytes=streamed_bytes,
            adds=adds,
            run=self._lanes_run(),
            curved=self._curved,
        )
        plan_fused = channel_spaces.plan_channels if read.instances is None else channel_spaces.plan_groups
        plan = plan_fused(self._shared, gpu) if resident_bytes else None
        self._plan: Plan = plan or channel_spaces.plan_channels_apart(self._shared, gpu)

    def _lanes_run(self) -> int | None:
        """Returns the elements of an access with a common weight and bias, or None if each channel has its own.

        Where each element has an access of its own, its weight is one more in registers that are scarce.
        """
        alone = self._read.instances is not None and self.layout.axis is None and self.layout.vector == 1
        return 1 if alone else self.run

    def phases(self, phase: Phase, constant: bool = False) -> list[Phase]:
        """Returns the phases to launch: two if both halves are needed and can't be fused."""
        if phase is Phase.FUSED and not (self._plan.tile or constant):
            return [Phase.REDUCE, Phase.APPLY]
        return [phase]

    def scalars(self) -> tuple[int | None, ...]:
        """Returns the kernel's integer arguments: the geometry of the layout, and the strides of each tensor."""
        strides = (stride for placement in self._read.placements for stride in self.layout.strides(placement))
        return *self.layout.geometry, *strides, *self._of_instances()

    def _of_instances(self) -> tuple[int | None, ...]:
        """Returns the blocks of an instance, and each tensor's stride between instances, divided by V."""
        instances = self._read.instances
        if instances is None:
            return (None,) * (1 + len(self._read.placements))
        pairs = zip(instances.strides, instances.spread, strict=True)
        vecs = ((stride or 0) // (self.layout.vector if spread else 1) for stride, spread in pairs)
        return self.layout.n_blocks, *vecs

    def _space(self, phase: Phase, plan: Plan, swept: Types) -> Space:
        layout, gpu = self.layout, gpu_of(self._read.device)
        fused = "clusters" if plan.tiles else "waits"
        work = ChannelWork(
            self._kernel,
            fused if plan.tile else "reduces" if phase.reduces else "applies",
            self._read.kind,
            layout.lanes,
            layout.vector,
            layout.fold or (1 if layout.axis is None else layout.lanes),
            types=tuple(name_of(dtype) for dtype in swept if dtype is not None),
            resident=plan.tile,
            resident_bytes=self._resident_bytes,
            adds=self._adds and phase.applies,
            run=self._shared.run,
            curved=self._shared.curved and (phase.applies or self._kernel == BACKWARD),
            tiles=plan.tiles,
            streams=plan.tiles > 0 and self._shared.streams,
        )
        return channel_clusters.clusters(work, gpu) if plan.tiles else channel_spaces.channels(work, gpu)

    def step(
        self, phase: Phase, swept: Types, scalars: Sequence[float | None], plan: Plan | None = None, **constants: Any
    ) -> Step:
        """Returns the launch of one phase.

        Args:
            swept: dtypes of the tensors of x's shape that it reads.
            scalars, constants: arguments of the kernel.
            plan: that of clusters; None: the plan without clusters.
        """
        plan = plan or self._plan
        layout, n_groups = self.layout, self._shared.n_groups
        instances, n_blocks = self._read.instances, self._n_instances * layout.n_blocks
        n_splits = -(-n_groups // plan.groups_per_split)
        if self._kernel != BACKWARD:
            constants["TILES"] = plan.tiles
        if not plan.tiles:
            constants["BLOCKS"] = 1  # that of clusters is their config's
        space, fold = self._space(phase, plan, swept), layout.fold
        if fold and plan.tiles:  # Triton 3.9 fails to compile a cluster of more blocks than there are channels
            fold = max(fold, *(config.num_ctas for config in space.configs))
        launcher = Launcher(
            kernel_of(self._kernel),
            space,
            self._read.device,
            functools.partial(_n_programs, n_blocks),
            scalars,
            PER_STATISTIC=None if instances is None else instances.channels_per_statistic,
            APPLY=phase.applies,
            SHARED=phase.reduces and n_splits > 1,
            V=layout.vector,
            LANES=layout.lanes,
            AXIS=layout.axis,
            FOLD=fold,
            WIDTH=0 if plan.tiles else layout.width,
            INDEX=triton_dtype(torch.int32 if n_groups < INT32_END // 2 else torch.int64),
            COMPUTE=triton_dtype(torch.float64 if self._read.x == torch.float64 else torch.float32),
            **constants,
        )
        partials = n_splits if phase.reduces and n_splits > 1 else 0
        launch = Launch(launcher, n_groups, plan.groups_per_split)
        alone = phase is Phase.FUSED and n_splits == 1 and (plan.tiles > 0 or not layout.fold)
        return Step(launch, phase.reduces, phase.applies, partials, 2 + n_blocks, alone)

    def of_clusters(self) -> "Launches":
        """Returns the launches of clusters, whose folded blocks are narrower."""
        narrower = self._read.kind == "folded" and gpu_of(self._read.device).most_blocks > 1
        return Launches(*self._arguments, in_clusters=True) if narrower else self

    def with_clusters(self, apart: list[Step], make: Callable[[Plan], Step]) -> Forms[list[Step]]:
        """Returns these steps, and the step of clusters that `make` prepares, if these launches have any."""
        is_group = self._read.instances is not None
        clusters = channel_clusters.plan_clusters(self._shared, self._kernel, is_group, gpu_of(self._read.device))
        if clusters is None:
            return Forms(apart)
        step = make(clusters.plan)
        return Forms(apart, [step], channel_clusters.forms(step.space, len(apart), clusters.portable))


def _n_programs(n_blocks: int, config: Any, n_groups: int, groups_per_split: int) -> int:
    return n_blocks * -(-n_groups // groups_per_split)
