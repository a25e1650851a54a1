"""BatchNorm: the launches of a call, and its outputs."""

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import tuning
from triton_norm.ops.launch import INT32_END, INTERPRETED, Launcher, cache_bytes, multiprocessors, zeros
from triton_norm.ops.layout import Layout, Lie, as_readable, dense_like, empty_bits, kind_of, layout_of
from triton_norm.ops.library import contiguous, name_of, triton_dtype

BY_SIGN = ("relu", "leaky_relu")
"""Activations whose derivative follows from the side of 0 that they are taken on."""


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


def _types(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _per_channel(x: Tensor, kinds: int) -> Tensor:
    return x.new_empty((kinds, x.shape[1]), dtype=_compute_dtype(x))


def _partials(x: Tensor, step: Step, kinds: int) -> Tensor | None:
    """What each split of each channel leaves, so many kinds of it."""
    if not step.reduces or step.n_splits == 1:
        return None
    return x.new_empty((kinds, step.n_splits, x.shape[1]), dtype=_compute_dtype(x))


def _where(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What of a tensor's memory bears on how it is read."""
    return None if tensor is None else (tensor.stride(), tensor.data_ptr() % tuning.VECTOR_BYTES)


def _step(
    kernel: str,
    kind: str,
    layout: Layout,
    n_groups: int,
    plan: tuning.Plan,
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
    launcher = Launcher(
        _kernels()[kernel],
        tuning.channels(
            f"channels_{kernel}_kernel",
            "waits" if plan.tile else "reduces" if reduces else "applies",
            kind,
            layout.lanes,
            layout.vector,
            width,
            ", ".join(name_of(dtype) for dtype in swept if dtype is not None),
            plan.tile,
            held,
            INTERPRETED,
        ),
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
    shape: Sequence[int], kind: str, lies: Sequence[Lie | None], held: int, device: torch.device
) -> tuple[Layout, int, tuning.Plan]:
    """`held`: bytes of an element of what one launch would keep and read again, 0 where nothing waits."""
    layout = layout_of(shape, kind, *(lie for lie in lies if lie is not None))
    n_groups, sms = shape[0] * layout.groups_per_sample, multiprocessors(device)
    where = n_groups, layout.lanes, layout.n_blocks
    plan = tuning.plan_channels(kind, *where, held, sms, cache_bytes(device), INTERPRETED) if held else None
    return layout, n_groups, plan or tuning.plan_channels_apart(*where, sms)


Types = tuple[torch.dtype | None, ...]
"""Of all tensors that a kernel may be given, None for those that it isn't."""


@tuning.remembered
def _prepare_forward(
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
    held = x.itemsize if reduces and applies else 0
    layout, n_groups, plan = _layout_and_plan(shape, kind, (x, residual), held, device)
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


def saves_bits(residual: Tensor | None, options: Options) -> bool:
    """Whether a backward needs to be told on which side of 0 the activation was taken: it can't be computed again."""
    return residual is not None and options.activation in BY_SIGN


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    reduces: bool,
    applies: bool,
    saves: bool,
    local: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """y if it `applies`, and bits if it `saves` them; fills `statistics`, moving the running ones, if it `reduces`."""
    weight, bias = contiguous(weight), contiguous(bias)
    moved_mean, moved_var = contiguous(running_mean), contiguous(running_var)
    residual = residual if applies else None
    memory = options.prepared
    key = _where(x), _where(residual), reduces, applies, saves
    prepared = None if memory is None else memory.get(key)
    read = x
    if prepared is None:
        kind = kind_of(x)
        read, lie = as_readable(x, x, kind)
        added, residual_lie = (None, None) if residual is None else as_readable(residual, x, kind)
        given = weight, bias, statistics, moved_mean, moved_var, num_batches_tracked
        types = *_types(read, added, *given), torch.uint8 if saves else None
        what = tuple(x.shape), kind, lie, residual_lie, types, x.device, options._replace(prepared=None)
        prepared = _prepare_forward(dense_like(x).stride(), *what, reduces, applies, local)
        if memory is not None and read is x and added is residual:
            memory[key] = prepared
        residual = added
    y = x.new_empty_strided(x.shape, prepared.strides) if applies else None
    bits = empty_bits(x) if saves else None
    for step in prepared.steps:
        partials = _partials(x, step, kinds=3)
        counter = num_batches_tracked if step.reduces else None
        sync = zeros(2 + prepared.n_blocks, x.device) if partials is not None or counter is not None else None
        running = (moved_mean, moved_var) if step.reduces or statistics is None else (None, None)
        swept = (residual, y, bits, weight, bias) if step.applies else (None,) * 5
        step.launcher(step.integers, read, *swept, statistics, *running, counter, partials, sync)
    for running_now, moved in ((running_mean, moved_mean), (running_var, moved_var)):
        if reduces and running_now is not None and moved is not None and moved is not running_now:
            running_now.copy_(moved)
    return y, bits


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, the batch's statistics [3, C] if they are used, and if it `saves`, and has to, one bit an element."""
    statistics = _per_channel(x, 3) if options.batch else None
    parameters = residual, weight, bias, statistics, running_mean, running_var, num_batches_tracked
    y, bits = _forward(x, *parameters, options, options.batch, True, saves and saves_bits(residual, options))
    assert y is not None
    return y, statistics, bits


def local_statistics(x: Tensor, statistics: Tensor) -> None:
    """Fills statistics [3, C] with the mean, what rounding it has left, and M2 of this process's share of a batch."""
    _forward(x, None, None, None, statistics, None, None, None, Options(True, 0.0, 0.0), True, False, False, local=True)


def apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    options: Options,
    saves: bool,
) -> tuple[Tensor, Tensor | None]:
    """y and bits from statistics that are given."""
    saves = saves and saves_bits(residual, options)
    y, bits = _forward(x, residual, weight, bias, statistics, None, None, None, options, False, True, saves)
    assert y is not None
    return y, bits


@tuning.remembered
def _prepare_backward(
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
    held = x.itemsize + dy.itemsize if reduces and applies and not constant else 0
    layout, n_groups, plan = _layout_and_plan(shape, kind, (x, dy, residual), held, device)
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


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def gradients(
    x: Tensor,
    residual_dtype: torch.dtype | None,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """dx, dresidual where its type is given, dweight and dbias as `wanted` of x, weight and bias; without contents."""

    def like(parameter: Tensor | None, asked: bool) -> Tensor | None:
        if parameter is None or not asked:
            return None
        return torch.empty_like(parameter, memory_format=torch.contiguous_format)

    dx = dense_like(x) if wanted[0] else None
    dresidual = None if residual_dtype is None else dense_like(x, residual_dtype)
    return dx, dresidual, like(weight, wanted[1]), like(bias, wanted[2])


def backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: Options,
    residual_dtype: torch.dtype | None,
    wanted: Sequence[bool],
) -> Gradients:
    """What `gradients` says, with its contents; running statistics where the batch's were not used."""
    found = gradients(x, residual_dtype, weight, bias, wanted)
    dx, _, dweight, dbias = found
    uses_sums = options.batch and dx is not None
    reduces = uses_sums or dweight is not None or dbias is not None
    applies = dx is not None or residual_dtype is not None
    means = _per_channel(x, 2) if uses_sums else None
    given = residual, bits, weight, bias, statistics, running_mean, running_var
    _backward(dy, x, *given, *found, means, options, reduces, applies, constant=not uses_sums)
    return found


def local_sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    options: Options,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """dweight and dbias of this process's share of a batch, as `wanted`, and what `apply_gradient` needs the sum of
    over all processes, divided by the number of a channel's elements: [2, C]."""
    _, _, dweight, dbias = gradients(x, None, weight, bias, (False, *wanted[1:]))
    sums = _per_channel(x, 2)
    given = residual, bits, weight, bias, statistics, None, None
    _backward(dy, x, *given, None, None, dweight, dbias, sums, options, True, False, constant=False, local=True)
    return dweight, dbias, sums


def apply_gradient(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    means: Tensor,
    options: Options,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """dx, and dresidual where its type is given, from means that are given."""
    dx, dresidual, _, _ = gradients(x, residual_dtype, None, None, (True, False, False))
    given = residual, bits, weight, bias, statistics, None, None
    _backward(dy, x, *given, dx, dresidual, None, None, means, options, False, True, constant=False)
    assert dx is not None
    return dx, dresidual


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    means: Tensor | None,
    options: Options,
    reduces: bool,
    applies: bool,
    constant: bool,
    local: bool = False,
) -> None:
    """Fills the gradients that are there; means are between the two halves of the work."""
    if not (reduces or applies):
        return
    weight, bias = contiguous(weight), contiguous(bias)
    running = contiguous(running_mean), contiguous(running_var)
    residual = None if options.activation is None or bits is not None else residual
    types = _types(dy, x, residual, bits, dx, dresidual, weight, bias, statistics, *running, dweight, dbias, means)
    memory = options.prepared
    key = _where(dy), _where(x), _where(residual), types, reduces, applies, constant
    prepared = None if memory is None else memory.get(key)
    if prepared is None:
        kind = kind_of(x)
        read, x_lie = as_readable(x, x, kind)
        read_dy, dy_lie = as_readable(dy, x, kind, broadcast=True)
        added, residual_lie = (None, None) if residual is None else as_readable(residual, x, kind)
        what = tuple(x.shape), kind, x_lie, dy_lie, residual_lie, types, x.device, options._replace(prepared=None)
        prepared = _prepare_backward(*what, reduces, applies, constant, local)
        if memory is not None and read is x and read_dy is dy and added is residual:
            memory[key] = prepared
        x, dy, residual = read, read_dy, added
    for step in prepared.steps:
        partials = _partials(x, step, kinds=2)
        sync = None if partials is None else zeros(2 + prepared.n_blocks, x.device)
        stored = (dx, dresidual) if step.applies else (None, None)
        summed = (dweight, dbias) if step.reduces else (None, None)
        inputs = dy, x, residual, bits, *stored, weight, bias, statistics, *running
        step.launcher(step.integers, *inputs, *summed, means, partials, sync)
