"""Cases that property tests draw: shapes, types, values, strides, and how launches are cut into programs.

Integers stay below 100: from longer ranges hypothesis also draws constants of whichever modules are imported, and a
derandomized run would not be the same on every worker.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import triton_norm
from support import spaces
from support.activations import KINKS
from support.channel_norms import ACTIVATIONS, SHARED
from support.gpus import with_numbers
from support.oracle import DTYPES, ErrorBound, Formula, Inputs, Moments, batch_norm_on_cpu, moments_about, widen
from support.row_norms import NORMS, Norm
from support.turns import taking_turns
from triton_norm import reference
from triton_norm.tuning import row_spaces
from triton_norm.tuning.configs import Space, config
from triton_norm.tuning.limits import INTERPRETED, Gpu
from triton_norm.tuning.row_spaces import RowWork

Shape = tuple[int, ...]
Type = torch.dtype | None
"""The type of a tensor, None if the tensor is missing."""

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
HARD = ("normal", "far", "constant", "outlier", "tiny", "huge")
EPSILONS = (1e-5, 1e-3, 1.0, 1e-12)  # beside the last fp16 can't hold the gradients of a constant
SPAN = 32  # columns of a program, where several share a row

ROWS = {
    "whole": {"interpreted_tile_elements": 512},
    "pieces": {"interpreted_tile_elements": 16, "whole_row_bytes": 128, "multiprocessors": 2},
    "peers": {"interpreted_tile_elements": 512, "multiprocessors": 6},
    "peers of two pieces": {"interpreted_tile_elements": 512, "multiprocessors": 6},
}
FOLDED = {"least_folded_samples": 2, "most_folded_columns": 128}
CHANNELS = {
    "whole": FOLDED | {"interpreted_tile_elements": 1024, "most_folded_columns": 512, "channels_last_lanes": 8},
    "splits": SHARED | FOLDED | {"interpreted_tile_elements": 256, "one_launch_bytes": 0},
    "waiting": SHARED | FOLDED | {"interpreted_tile_elements": 64},
    "holding": SHARED | FOLDED | {"interpreted_tile_elements": 512},
}
"""Numbers with which small inputs are cut up as large ones are on a GPU."""


def _spaces(pieces: int) -> dict[str, Any]:
    """Instead of `row_spaces`'s, by which interpreted rows are never shared."""

    def space(kernel: str, work: RowWork, span: int, **blocks: Any) -> Space:
        return spaces.only(kernel, config(4, BLOCK_N=SPAN, PEERS=max(1, work.width // span), **blocks))

    def forward(work: RowWork, gpu: Gpu) -> Space:
        return space("rows_forward_kernel", work, SPAN * pieces, BLOCK_M=1, PIECES=pieces, STAGES=0)

    def backward(work: RowWork, gpu: Gpu) -> Space:
        return space("rows_backward_kernel", work, SPAN, BLOCK_M=pieces, STAGES=1, HOLD_WEIGHT=False)

    return {"rows_forward": forward, "rows_backward": backward}


@contextlib.contextmanager
def cut(name: str, numbers: dict[str, dict[str, int]]) -> Iterator[None]:
    """Sets the numbers of that name where kernels are interpreted; a GPU keeps its own."""
    if not INTERPRETED:
        yield
        return
    finalise = spaces.only("rows_backward_finalise_kernel", config(4, BLOCK_M=4, BLOCK_N=32))
    patches = {"rows_backward_finalise": lambda gpu: finalise}
    if name.startswith("peers"):
        patches |= _spaces(2 if name.endswith("pieces") else 1)
    waits = name in ("waiting", "holding") or name.startswith("peers")
    with contextlib.ExitStack() as stack:
        for space, value in patches.items():
            stack.enter_context(mock.patch.object(row_spaces, space, value))
        stack.enter_context(with_numbers(**numbers[name], merged_elements=128))
        stack.enter_context(taking_turns() if waits else contextlib.nullcontext())
        yield


class Layout(NamedTuple):
    """Describes how a tensor is laid out in memory.

    Args:
        order: Axes, from the outermost in memory to the innermost.
        steps: Places in memory from one element of an axis to the next, for each axis.
        offset: Elements of memory before the first.
        expanded: Axes that have one element in memory.
    """

    order: Shape
    steps: Shape
    offset: int = 0
    expanded: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the values in this layout, of an expanded axis the first; NaN fills the gaps."""
        shape = tensor.shape
        for axis in self.expanded:
            tensor = tensor.narrow(axis, 0, min(1, shape[axis]))
        lengths = [tensor.shape[axis] * self.steps[axis] for axis in self.order]
        memory = tensor.new_full((self.offset + math.prod(lengths),), math.nan)[self.offset :].view(lengths)
        places = memory.permute([self.order.index(axis) for axis in range(tensor.dim())])
        return places[tuple(slice(None, None, step) for step in self.steps)].copy_(tensor).expand(shape)


def layouts(rank: int) -> st.SearchStrategy[Layout]:
    axes = tuple(range(rank))
    plain = (1,) * rank
    orders = st.one_of(st.just(axes), st.just((0, *axes[2:], *axes[1:2])), st.permutations(axes).map(tuple))
    steps = st.one_of(st.just(plain), st.tuples(*[st.sampled_from((1, 1, 2, 3))] * rank))
    expanded = st.sets(st.sampled_from(axes)).map(lambda chosen: tuple(sorted(chosen)))
    offsets = st.sampled_from((0, 0, 1, 2, 3, 4, 8))
    drawn = st.builds(Layout, orders, steps, offsets, st.one_of(st.just(()), expanded))
    return st.one_of(st.just(Layout(axes, plain)), drawn)


def types(of: torch.dtype) -> st.SearchStrategy[Type]:
    """Draws the input's type as often as all others, or none."""
    return st.sampled_from((of, of, of, None, None, *DTYPES))


def values(hard: str, shape: Shape, axes: Sequence[int], generator: torch.Generator, narrow: bool) -> Tensor:
    """`axes`: those normalized over; `narrow`: small enough for fp16, and with gradients that are."""
    noise = torch.randn(shape, generator=generator, dtype=F64)
    if hard == "far":
        return 300 + noise
    if hard == "constant":
        return 10 * noise.mean(axes, keepdim=True).expand(shape)
    if hard == "outlier":
        noise.view(-1)[:1] = 1000
        return noise
    if hard == "tiny":
        return noise * (1e-3 if narrow else 1e-12)
    return noise * (1e2 if narrow else 1e15) if hard == "huge" else 3 * noise + 2


def moments_of(x: Tensor, axes: Shape) -> Moments:
    """Returns the moments of x. Kernels add the mean of x − mean, with a first mean, and round the mean itself:
    the sizes of both are terms of its error."""
    moments = moments_about(x.mean(axes, keepdim=True), x, axes)
    return moments._replace(mean_terms=moments.mean_terms + (x - moments.mean).abs().mean(axes, keepdim=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: the types of its tensors, None for those that are missing."""

    shape: Shape
    x: torch.dtype
    weight: Type
    bias: Type
    eps: float
    hard: str
    seed: int
    cut: str
    x_layout: Layout
    dy_layout: Layout
    residual: Type
    residual_layout: Layout | None
    total: Type
    out: Type

    @property
    def axes(self) -> Shape:
        """Those normalized over."""
        raise NotImplementedError

    @property
    def parameter_shape(self) -> Shape:
        raise NotImplementedError

    def moments(self, x: Tensor) -> Moments:
        """Returns those that x, in fp64, is normalized by."""
        raise NotImplementedError

    def bound(self, inputs: Inputs) -> ErrorBound:
        """Returns the exact results and their bounds."""
        raise NotImplementedError

    def settled(self, inputs: Inputs) -> Inputs:
        """Returns the inputs with a dy of 0 where the derivative of an activation may be either side's."""
        return inputs

    def drawn(self, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        narrow = F16 in (self.x, self.weight, self.bias, self.residual, self.total, self.out)

        def noise(shape: Shape, dtype: Type, layout: Layout | None = None) -> Tensor | None:
            if dtype is None:
                return None
            tensor = torch.randn(shape, generator=generator, dtype=F64).to(device, dtype)
            return tensor if layout is None else layout.of(tensor)

        x = self.x_layout.of(values(self.hard, self.shape, self.axes, generator, narrow).to(device, self.x))
        weight, bias = (noise(self.parameter_shape, dtype) for dtype in (self.weight, self.bias))
        residual = noise(self.shape, self.residual, self.residual_layout)
        dy, dtotal = (noise(self.shape, dtype, self.dy_layout) for dtype in (self.out or self.x, self.total))
        return Inputs(x, residual, weight, bias, dy, dtotal)


@dataclasses.dataclass(frozen=True)
class Rows(Case):
    """A call of layer_norm or rms_norm."""

    norm: Norm
    n_axes: int
    offset: float
    x_hat: Type

    @property
    def axes(self) -> Shape:
        return tuple(range(len(self.shape) - self.n_axes, len(self.shape)))

    @property
    def parameter_shape(self) -> Shape:
        return self.shape[len(self.shape) - self.n_axes :]

    def drawn(self, device: str) -> Inputs:
        inputs = super().drawn(device)
        if not self.offset or inputs.weight is None:
            return inputs
        # Of one sign: a sum that cancels is as inexact as fp64 is in fp32.
        return inputs._replace(weight=inputs.weight.abs() * math.copysign(1.0, self.offset))

    def ours(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Any:
        options = {"weight_offset": self.offset, "x_hat_dtype": self.x_hat, "out_dtype": self.out}
        if residual is not None:
            total = None if self.total == self.residual else self.total
            options |= {"residual": residual, "residual_dtype": total}
        return self.norm.ours(self.parameter_shape, self.eps, **options)(x, weight, bias)

    def exact(self, x: Tensor, _: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return self.norm.theirs(self.parameter_shape, self.eps)(x, weight, bias)

    def moments(self, x: Tensor) -> Moments:
        if self.norm.has_bias:
            return moments_of(x, self.axes)
        return moments_about(torch.zeros((), dtype=F64), x, self.axes)

    def bound(self, inputs: Inputs) -> ErrorBound:
        summed = inputs.x if inputs.residual is None else reference.add(inputs.x, inputs.residual, self.total)
        weight = None if inputs.weight is None else widen(inputs.weight) + self.offset
        formula = Formula(
            self.exact,
            self.axes,
            self.parameter_shape,
            self.moments(widen(summed)),
            self.eps,
            F64 if F64 in (self.x, summed.dtype) else F32,
            centred=self.norm.has_bias,
            x_hat_dtype=self.x_hat,
        )
        return ErrorBound(formula, inputs._replace(x=summed, residual=None, weight=weight))


@dataclasses.dataclass(frozen=True)
class Channels(Case):
    """A call of batch_norm."""

    training: bool
    running: torch.dtype
    activation: str | None
    slope: float

    @property
    def axes(self) -> Shape:
        return (0, *range(2, len(self.shape)))

    @property
    def parameter_shape(self) -> Shape:
        return self.shape[1:2]

    def statistics(self, device: str) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, self.shape[1], generator=torch.Generator().manual_seed(self.seed + 100), dtype=F64)
        mean, var = noise[0], noise[1].abs() + 0.5
        return mean.to(device, self.running), var.to(device, self.running)

    def ours(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var = (None, None) if self.training else self.statistics(x.device.type)
        fused = {"residual": residual, "activation": self.activation, "negative_slope": self.slope}
        return triton_norm.batch_norm(x, mean, var, weight, bias, self.training, 0.1, self.eps, **fused)

    def exact(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var = (None, None) if self.training else (t.double() for t in self.statistics(x.device.type))
        z = batch_norm_on_cpu(x, (mean, var), weight, bias, self.training, self.eps)
        return reference.activate(z if residual is None else z + residual, self.activation, self.slope)

    def moments(self, x: Tensor) -> Moments:
        if self.training:
            return moments_of(x, self.axes)
        mean, var = (widen(tensor).view(1, -1, *(1 for _ in self.shape[2:])) for tensor in self.statistics("cpu"))
        return Moments(mean, var, mean.abs())

    def bound(self, inputs: Inputs) -> ErrorBound:
        formula = Formula(
            self.exact,
            self.axes,
            (1, self.shape[1], *(1 for _ in self.shape[2:])),
            self.moments(widen(inputs.x)),
            self.eps,
            F64 if self.x == F64 else F32,
            constant=not self.training,
            centred=self.training,
            activation=self.activation,
            slope=self.slope,
        )
        return ErrorBound(formula, inputs)

    def settled(self, inputs: Inputs) -> Inputs:
        if self.activation not in KINKS:
            return inputs
        near = self.bound(inputs).near_kinks().to(inputs.dy.device)
        return inputs._replace(dy=inputs.dy.masked_fill(near, 0.0)) if near.any() else inputs


@st.composite
def cases_of(
    draw: Any, shape: Shape, numbers: Any, fused: bool, strided: bool, dtypes: Any, hard: Any, own_total: bool
) -> dict[str, Any]:
    x, rank = draw(st.sampled_from(dtypes)), len(shape)
    plain = st.just(Layout(tuple(range(rank)), (1,) * rank))
    layout = layouts(rank) if strided else plain
    residual = draw(types(x)) if fused else None
    total = None if residual is None or not own_total else draw(types(x)) or residual
    out = draw(types(x)) if fused and own_total else None
    return {
        "shape": shape,
        "x": x,
        "weight": draw(types(x)),
        "bias": draw(types(x)),
        "eps": draw(st.sampled_from(EPSILONS[:3] if F16 in (x, residual, total) else EPSILONS)),
        "hard": draw(st.sampled_from(hard)),
        "seed": draw(st.integers(0, 99)),
        "cut": draw(st.sampled_from(tuple(numbers))),
        "x_layout": draw(layout),
        "dy_layout": draw(layout),
        "residual": residual,
        "residual_layout": None if residual is None else draw(layout),
        "total": total,
        "out": out,
    }


@st.composite
def rows(
    draw: Any,
    fused: bool = False,
    strided: bool = True,
    norms: Sequence[Norm] = NORMS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    hard: Sequence[str] = HARD,
) -> Rows:
    leading = draw(st.lists(st.integers(1, 4), max_size=3).filter(lambda lengths: math.prod(lengths) <= 6))
    normalized = draw(st.one_of(st.tuples(st.integers(1, 70)), st.tuples(st.integers(1, 4), st.integers(1, 9))))
    fields = draw(cases_of((*leading, *normalized), ROWS, fused, strided, dtypes, hard, own_total=True))
    norm, x_hat = draw(st.sampled_from(norms)), draw(types(fields["x"])) if fused else None
    offset = 0.0 if fields["weight"] is None or not fused else draw(st.sampled_from((0.0, 1.0, -0.5)))
    bias = fields["bias"] if norm.has_bias else None
    return Rows(**fields | {"bias": bias}, norm=norm, n_axes=len(normalized), offset=offset, x_hat=x_hat)


@st.composite
def channels(
    draw: Any,
    fused: bool = False,
    strided: bool = True,
    modes: Sequence[bool] = (True, False),
    dtypes: Sequence[torch.dtype] = DTYPES,
    hard: Sequence[str] = HARD,
) -> Channels:
    n_samples, n_channels = draw(st.integers(1, 6)), draw(st.sampled_from((*(1, 2, 3) * 3, 4, 5, 8, 9, 11)))
    positions = draw(st.lists(st.integers(1, 6), max_size=3).filter(lambda lengths: math.prod(lengths) <= 30))
    training = draw(st.sampled_from(modes))
    if training and n_samples * math.prod(positions) == 1:
        n_samples = 2
    shape = (n_samples, n_channels, *positions)
    fields = draw(cases_of(shape, CHANNELS, fused, strided, dtypes, hard, own_total=False))
    activation = draw(st.sampled_from(ACTIVATIONS)) if fused else None
    slope = draw(st.sampled_from((0.01, 0.3, 0.0, 2.0, -0.5))) if activation == "leaky_relu" else 0.01
    return Channels(
        **fields, training=training, running=draw(st.sampled_from(DTYPES)), activation=activation, slope=slope
    )
