"""BatchNorm: the launches that a call is made of, and how its programs share the work."""

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm.activations import check as check_activation
from triton_norm.activations import has_side
from triton_norm.ops.launch import INT32_END, Launcher
from triton_norm.ops.layout import Layout, Lie, layout_of
from triton_norm.ops.library import name_of, triton_dtype
from triton_norm.tuning import channel_spaces
from triton_norm.tuning.channel_spaces import ChannelWork, Plan, SharedChannels
from triton_norm.tuning.limits import gpu_of
from triton_norm.tuning.memory import remembered


class Options(NamedTuple):
    """What a call asks for besides its tensors. `batch`: statistics are the batch's, not the running ones; `momentum`
    None averages over batches; `slope` is leaky_relu's. `prepared` is what was made ready for calls whose tensors are
    of the kinds of this one's, None for a call that is not known to be of real tensors.
    """

    batch: bool
    momentum: float | None
    eps: float
    activation: str | None = None
    slope: float = 0.0
    prepared: dict[Any, "Prepared"] | None = None


class Step(NamedTuple):
    """One launch."""

    launcher: Launcher
    integers: tuple[int, int]  # groups of a channel, and of those the ones that a program has
    n_splits: int
    reduces: bool
    applies: bool


class Prepared(NamedTuple):
    """The launches of a call, and what follows from how its tensors lie; `strides`: of an output, without gaps."""

    steps: tuple[Step, ...]
    n_blocks: int
    strides: tuple[int, ...]


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import channels, channels_backward

    return {"forward": channels.channels_forward_kernel, "backward": channels_backward.channels_backward_kernel}


def in_two_floats(value: float) -> tuple[float, float]:
    """value as a sum of two fp32 numbers: a launch passes floats as fp32."""
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def saves_bits(residual: Tensor | None, options: Options) -> bool:
    """Returns whether the forward leaves bits for the backward, which then needs no residual."""
    return residual is not None and has_side(options.activation)


def _step(
    kernel: str,
    kind: str,
    layout: Layout,
    n_groups: int,
    plan: Plan,
    held: int,
    swept: Sequence[torch.dtype | None],
    wide: bool,
    device: torch.device,
    halves: tuple[bool, bool],
    scalars: Sequence[float],
    **constants: Any,
) -> Step:
    """A launch of `kernel`, "forward" or "backward", for the `halves` of its work: whether it reduces, and applies.
    `swept`: the types of what it goes through; `wide`: in fp64."""
    n_blocks, (reduces, applies) = layout.n_blocks, halves

    def n_programs(config: Any, n_groups: int, groups_per_split: int) -> int:
        return n_blocks * -(-n_groups // groups_per_split)

    n_splits = -(-n_groups // plan.groups_per_split)
    width = layout.fold or (1 if layout.axis is None else layout.lanes)
    work = ChannelWork(
        f"channels_{kernel}_kernel",
        "waits" if plan.tile else "reduces" if reduces else "applies",
        kind,
        layout.lanes,
        layout.vector,
        width,
        types=tuple(name_of(dtype) for dtype in swept if dtype is not None),
        held=plan.tile,
        held_bytes=held,
        adds=kernel == "forward" and len(swept) > 1 and swept[1] is not None,
    )
    launcher = Launcher(
        _kernels()[kernel],
        channel_spaces.channels(work, gpu_of(device)),
        device,
        n_programs,
        scalars,
        APPLY=applies,
        SHARED=reduces and n_splits > 1,
        V=layout.vector,
        LANES=layout.lanes,
        AXIS=layout.axis,
        FOLD=layout.fold,
        WIDTH=layout.width,
        INDEX=triton_dtype(torch.int32 if n_groups < INT32_END // 2 else torch.int64),
        COMPUTE=triton_dtype(torch.float64 if wide else torch.float32),
        **constants,
    )
    return Step(launcher, (n_groups, plan.groups_per_split), n_splits, reduces, applies)


def _layout_and_plan(
    shape: Sequence[int],
    kind: str,
    lies: Sequence[Lie | None],
    held: int,
    beside: float,
    adds: bool,
    device: torch.device,
) -> tuple[Layout, int, Plan]:
    """`held`: bytes of an element of what one launch would keep and read again, 0 where nothing waits; `beside`:
    of what it would read twice and not keep; `adds`: a residual."""
    gpu = gpu_of(device)
    layout = layout_of(shape, kind, *(lie for lie in lies if lie is not None))
    work = SharedChannels(
        kind,
        layout.lanes,
        layout.vector,
        n_groups=shape[0] * layout.groups_per_sample,
        elements_per_group=layout.elements_per_group,
        n_blocks=layout.n_blocks,
        held_bytes=held,
        beside_bytes=beside,
        adds=adds,
    )
    plan = channel_spaces.plan_channels(work, gpu) if held else None
    return layout, work.n_groups, plan or channel_spaces.plan_channels_apart(work, gpu)


Types = tuple[torch.dtype | None, ...]
"""Of all tensors that a kernel may be given, None for those that it isn't."""


@remembered
def prepare_forward(
    strides: tuple[int, ...],
    shape: tuple[int, ...],
    kind: str,
    x: Lie,
    residual: Lie | None,
    types: Types,
    device: torch.device,
    options: Options,
    reduces: bool,
    applies: bool,
    local: bool,
) -> Prepared:
    """The launches of a call, for the latest kinds of them. `types`: of x, the residual, and then the rest."""
    check_activation(options.activation)
    held = x.itemsize if reduces and applies else 0
    layout, n_groups, plan = _layout_and_plan(shape, kind, (x, residual), held, 0, residual is not None, device)
    scalars = *in_two_floats(options.momentum or 0.0), *layout.geometry, *layout.strides(x), *layout.strides(residual)
    both = [(True, True)] if plan.tile else [(reduces, False), (False, applies)]
    steps = [
        _step(
            "forward",
            kind,
            layout,
            n_groups,
            plan,
            held,
            types[: 2 if halves[1] else 1],
            types[0] == torch.float64,
            device,
            halves,
            scalars,
            EPS=options.eps,
            CUMULATIVE=options.momentum is None,
            LOCAL=local,
            STATISTICS=halves[0],
            ACTIVATION=options.activation,
            SLOPE=options.slope,
        )
        for halves in both
        if any(halves)
    ]
    return Prepared(tuple(steps), layout.n_blocks, strides)


@remembered
def prepare_backward(
    shape: tuple[int, ...],
    kind: str,
    x: Lie,
    dy: Lie,
    residual: Lie | None,
    types: Types,
    device: torch.device,
    options: Options,
    reduces: bool,
    applies: bool,
    constant: bool,
    local: bool,
) -> Prepared:
    """The launches of a call, for the latest kinds of them. `types`: of dy, x, the residual, and then the rest."""
    check_activation(options.activation)
    held = x.itemsize + dy.itemsize if reduces and applies and not constant else 0
    beside = (0 if residual is None else residual.itemsize) + (0 if types[3] is None else 1 / 8)  # bits
    layout, n_groups, plan = _layout_and_plan(shape, kind, (x, dy, residual), held, beside, False, device)
    scalars = *layout.geometry, *layout.strides(x), *layout.strides(dy), *layout.strides(residual)
    both = [(reduces, applies)] if plan.tile or constant else [(reduces, False), (False, applies)]
    steps = [
        _step(
            "backward",
            kind,
            layout,
            n_groups,
            plan,
            held,
            types[:3],
            types[1] == torch.float64,
            device,
            halves,
            scalars,
            DY_SPREAD=int(layout.spread(dy)),
            EPS=options.eps,
            LOCAL=local,
            CONSTANT=constant,
            REDUCE=halves[0],
            ACTIVATION=options.activation,
            SLOPE=options.slope,
        )
        for halves in both
        if any(halves)
    ]
    return Prepared(tuple(steps), layout.n_blocks, ())
