"""Plans and launches the backward of gated and modulated rows."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans
from triton_norm.launch import Launch, Launcher
from triton_norm.library import contiguous
from triton_norm.rows.layout import RowLayout, Types, given, layout_of, names, readable, types_of, vector_of
from triton_norm.rows.modulated_plan import (
    Modulations,
    addresses_of,
    constants_of,
    form_of,
    modulations_of,
    outer,
    places_of,
)
from triton_norm.rows.modulation import Modulation
from triton_norm.specs import ModulatedSpec, ModulatedTensors, ModulatedWanted
from triton_norm.tuning import modulated_spaces
from triton_norm.tuning.configs import vector_width
from triton_norm.tuning.limits import gpu_of
from triton_norm.tuning.memory import remembered
from triton_norm.tuning.modulated_spaces import ModulatedWork

Gradients = tuple[Tensor | None, ...]
"""The gradients are those of the fields of ModulatedTensors."""


class ModulatedBackwardTensors(NamedTuple):
    """Holds the tensors that the backward reads.

    Args:
        dy, dtotal: gradients of y and total, [*, *normalized_shape].
        total: [*, *normalized_shape]; x without a residual.
        x: [*, *normalized_shape]; None unless the gradient of residual_gate needs it.
        weight, bias: [*normalized_shape], or None; bias is None unless the gradient of gate or scale needs it.
        gate, scale, shift, residual_gate: as in ModulatedTensors; shift is None unless the gate's gradient needs it.
        statistics: [2 · n_rows], mean and rstd; [n_rows], rstd, without means.
    """

    dy: Tensor
    dtotal: Tensor | None
    total: Tensor
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual_gate: Tensor | None
    statistics: Tensor

    @property
    def inputs(self) -> ModulatedTensors:
        """Returns the forward's tensors, with total as x."""
        inner = self.weight, self.bias, self.gate, self.scale, self.shift, self.residual_gate
        return ModulatedTensors(self.total, None, *inner)


class BackwardCall(NamedTuple):
    """Holds the arguments of the backward's operator. numbers: tell which row has which modulation."""

    tensors: ModulatedBackwardTensors
    wanted: ModulatedWanted
    numbers: Modulation
    spec: ModulatedSpec


_PARAMETERS = ModulatedBackwardTensors._fields.index("weight"), ModulatedBackwardTensors._fields.index("bias")
"""These are read one element at a time where they are not aligned."""


class ModulatedGradients:
    """Allocates the gradients of backwards of one signature.

    Args:
        shapes: of scale, shift and residual_gate.
        exact: strides are known; False while recording with symbolic sizes.
    """

    def __init__(
        self,
        tensors: ModulatedBackwardTensors,
        wanted: ModulatedWanted,
        n_cols: int,
        shapes: Sequence[Any],
        exact: bool = True,
    ) -> None:
        of_rows, of_parameter = tensors.total.shape, torch.Size((n_cols,))
        every_shape = of_rows, of_rows, of_parameter, of_parameter, of_rows, *shapes
        self._nothing: list[Tensor | None] = [None] * len(wanted)
        # torch.empty_like takes two thirds of the time of new_empty: (place, place of a tensor that it is like).
        self._alike: list[tuple[int, int]] = []
        self._others: list[tuple[int, Any, torch.dtype]] = []
        for place, (dtype, shape) in enumerate(zip(wanted, every_shape, strict=True)):
            if dtype is not None:
                source = _alike(tensors, shape, dtype) if exact else None
                if source is None:
                    self._others.append((place, shape, dtype))
                else:
                    self._alike.append((place, source))

    def __call__(self, tensors: Sequence[Any]) -> Gradients:
        """Returns those that are wanted, contiguous, None for the others; dweight and dbias are [n_cols].

        Args:
            tensors: fields of ModulatedBackwardTensors.
        """
        found = self._nothing.copy()
        for place, source in self._alike:
            found[place] = torch.empty_like(tensors[source])
        for place, shape, dtype in self._others:
            _, _, total, *_ = tensors
            found[place] = total.new_empty(shape, dtype=dtype)
        return tuple(found)


def _alike(tensors: Sequence[Tensor | None], shape: Any, dtype: torch.dtype) -> int | None:
    """Returns the place of a contiguous tensor of this shape and type, or None."""
    for place, tensor in enumerate(tensors):
        if tensor is None or (tensor.shape, tensor.dtype) != (shape, dtype):
            continue
        if tensor.is_contiguous() and not tensor.is_neg():
            return place
    return None


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import modulated_backward

    return modulated_backward


class Sums(NamedTuple):
    """Tells which kinds of partial sums a backward computes.

    Args:
        x_hat: of dy · x_hat, for the gradients of weight and scale.
        dy: of dy, for those of bias and shift.
        residual_gate: of dtotal · x.
    """

    x_hat: bool
    dy: bool
    residual_gate: bool

    @property
    def places(self) -> dict[str, int | None]:
        """Returns the kernels' constants: the place of each kind, None for one that is not computed."""
        named = {f"{name.upper()}_SUMS": there for name, there in self._asdict().items()}
        places = itertools.count()
        return {name: next(places) if there else None for name, there in named.items()}


@remembered
def _backward_launcher(
    spec: ModulatedSpec,
    types: Types,
    layout: RowLayout,
    modulations: Modulations,
    sums: Sums,
    misaligned: int,
    device: torch.device,
) -> Launcher:
    """Returns the launcher of a backward for this layout of its tensors.

    Args:
        types: of the fields of ModulatedBackwardTensors, and of the gradients dx, dresidual and dgate.
        layout: of total, dy, dtotal, x and gate.
    """
    *read, dx, dresidual, dgate = types
    dy, dtotal, total, x, _, _, gate, scale, shift, residual_gate, compute = read
    n_cols, gpu = spec.rows.n_cols, gpu_of(device)
    assert compute is not None
    extents = n_cols | modulations.extents
    for strides in layout.strides:
        extents |= 0 if strides is None else strides.extents
    swept = dy, dtotal, total, x, gate
    itemsizes = [dtype.itemsize for dtype in given((*swept, scale, shift, residual_gate, dx, dresidual, dgate))]
    vector = vector_of(misaligned, extents, itemsizes)
    form = form_of(spec, ModulatedBackwardTensors._fields, tuple(read))
    work = ModulatedWork(n_cols, names(swept), form, sum(sums), modulations.summed)
    total_strides, dy_strides, dtotal_strides, x_strides, gate_strides = layout.strides
    return Launcher(
        _kernels().modulated_backward_kernel,
        modulated_spaces.modulated_backward(work, gpu),
        device,
        functools.partial(_n_programs, summed=modulations.summed, n_cols=n_cols, gpu=gpu),
        (
            *(n_cols // vector, layout.n_inner, layout.n_middle),
            *outer(dy_strides, vector),
            *outer(dtotal_strides, vector),
            *outer(total_strides, vector),
            *outer(x_strides, vector),
            *outer(gate_strides, vector),
            *modulations.over(vector),
        ),
        SUMMED=modulations.summed,
        **sums.places,
        **constants_of(spec, compute, gate is not None, vector),
    )


def _n_programs(
    config: Mapping[str, Any],
    n_rows: int,
    n_tokens: int,
    n_modulations: int,
    *,
    summed: bool,
    n_cols: int,
    gpu: Any,
) -> int:
    if not summed:
        return modulated_spaces.modulated_backward_splits(config, n_rows, n_cols, False, gpu)
    n_members = n_rows // n_modulations
    return n_modulations * modulated_spaces.modulated_backward_splits(config, n_members, n_cols, True, gpu)


@remembered
def _finalise_launcher(
    spec: ModulatedSpec, sums: Sums, compute: torch.dtype, scale_stride: int, has_parameters: bool, device: torch.device
) -> Launcher:
    """Returns the launcher of the kernel that finalises partial sums; scale_stride: elements between scale's rows."""
    n_cols = spec.rows.n_cols
    vector = vector_width(compute.itemsize, n_cols | scale_stride)

    def n_programs(config: Mapping[str, Any], n_sums: int, n_splits: int, n_summed: int) -> int:
        n_blocks: int = -(-n_cols // config["BLOCK_N"])
        return n_blocks * (n_summed + has_parameters)

    return Launcher(
        _kernels().modulated_backward_finalise_kernel,
        modulated_spaces.modulated_backward_finalise(gpu_of(device)),
        device,
        n_programs,
        (n_cols // vector, scale_stride // vector),
        WEIGHT_OFFSET=spec.rows.weight_offset,
        SCALE_OFFSET=spec.scale_offset,
        **sums.places,
        V=vector,
    )


class _Backward:
    """Holds the launches of a backward for tensors of one alignment.

    Args:
        integers: n_rows, n_tokens and n_modulations.
        n_kinds: number of kinds of partial sums.
        n_cols: elements of a row of sums, of which each program leaves one of each kind.
    """

    def __init__(self, launcher: Launcher, integers: tuple[int, int, int], n_kinds: int, n_cols: int) -> None:
        candidates = [config.keywords for config in launcher.candidates]
        self.launch, self.integers = Launch(launcher, *integers), integers
        self._n_sums = n_kinds * n_cols * max(launcher.n_programs(config, *integers) for config in candidates)
        self.finalise: Launch | None = None

    def sums(self, statistics: Tensor) -> Tensor | None:
        """Returns memory for the partial sums of all programs, or None if there are none."""
        return statistics.new_empty(self._n_sums) if self._n_sums else None


class ModulatedBackwardPlan:
    """Runs the backward of all calls of one signature."""

    def __init__(self, call: BackwardCall, shapes: Sequence[Any]) -> None:
        tensors, wanted, numbers, spec = call
        self._spec, self._wanted = spec, wanted
        self._gradients = ModulatedGradients(tensors, wanted, spec.rows.n_cols, shapes)
        self._n_rows = tensors.total.numel() // spec.rows.n_cols
        self._modulations = modulations_of(tensors.inputs, numbers, spec.rows.n_cols)
        of_rows = tensors.total, tensors.dy, tensors.dtotal, tensors.x, tensors.gate
        self._layout = layout_of(of_rows, spec.rows.n_cols, (False,) * len(of_rows))
        small = tensors.weight, tensors.bias, tensors.statistics
        are_contiguous = all(tensor is None or tensor.is_contiguous() for tensor in small)
        self._copies = not are_contiguous or any(self._layout.copied) or any(self._modulations.copied)
        self._places = places_of(tensors, _PARAMETERS)
        summed = self._modulations.summed
        self._sums = Sums(
            wanted.dweight_dtype is not None or (summed and wanted.dscale_dtype is not None),
            wanted.dbias_dtype is not None
            or (summed and wanted.dshift_dtype is not None)
            or (summed and wanted.dscale_dtype is not None and tensors.bias is not None),
            summed and wanted.dresidual_gate_dtype is not None,
        )
        self._made: dict[int, _Backward] = {}

    def _readable(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns tensors that the kernels can read. A hook may have restored them with other strides."""
        dy, dtotal, total, x, weight, bias, gate, *modulations, statistics = tensors
        of_rows = [
            readable(tensor, copied)
            for tensor, copied in zip((total, dy, dtotal, x, gate), self._layout.copied, strict=True)
        ]
        total, dy, dtotal, x, gate = of_rows
        modulations = self._modulations.readable(*modulations)
        return [
            *(dy, dtotal, total, x, contiguous(weight), contiguous(bias), gate, *modulations),
            statistics.contiguous(),
        ]

    def __call__(self, tensors: Sequence[Any]) -> Gradients:
        """Returns the gradients that are wanted.

        Args:
            tensors: fields of ModulatedBackwardTensors.
        """
        gradients = dx, dresidual, dweight, dbias, dgate, *of_modulations = self._gradients(tensors)
        if self._copies:
            tensors = self._readable(tensors)
        _, _, _, _, weight, bias, _, scale, _, _, statistics = tensors
        of_rows, summed = (dx, dresidual, dgate), self._modulations.summed
        stored = (None, None, None) if summed else of_modulations
        made, sums = self._made.get(0), None
        if made is not None:  # tells by itself whether the tensors are aligned
            sums = made.sums(statistics)
            if not made.launch.starts(*tensors, *of_rows, *stored, sums):
                made = None
        if made is None:
            made = self._made_for(tensors, of_rows)
            sums = made.sums(statistics)
            made.launch(*tensors, *of_rows, *stored, sums)
        if sums is not None:
            finalise = made.finalise or self._finalise(made, tensors)
            if summed:
                finalise(sums, weight, bias, scale, dweight, dbias, *of_modulations)
            else:
                finalise(sums, None, None, None, dweight, dbias, None, None, None)
        return gradients

    def _made_for(self, tensors: Sequence[Any], of_rows: Sequence[Tensor | None]) -> _Backward:
        """Returns the launches for the alignment of these tensors.

        Args:
            of_rows: dx, dresidual and dgate.
        """
        misaligned = addresses_of(tensors, self._places)
        made = self._made.get(misaligned)
        if made is None:
            (dy, *_), modulations = tensors, self._modulations
            types = types_of((*tensors, *of_rows))
            launcher = _backward_launcher(
                self._spec, types, self._layout, modulations, self._sums, misaligned, dy.device
            )
            integers = self._n_rows, *modulations.numbers
            made = self._made[misaligned] = _Backward(launcher, integers, sum(self._sums), self._spec.rows.n_cols)
        return made

    def _finalise(self, made: _Backward, tensors: Sequence[Any]) -> Launch:
        """Returns the launch that finalises the sums; their number follows from the first launch's config."""
        (*_, statistics), launcher, modulations = tensors, made.launch.launcher, self._modulations
        assert launcher.config is not None
        n_sums = launcher.n_programs(launcher.config.keywords, *made.integers)
        n_modulations = modulations.numbers.n_modulations if modulations.summed else 1
        *_, dscale, dshift, dresidual_gate = self._wanted
        stores = modulations.summed and any(dtype is not None for dtype in (dscale, dshift, dresidual_gate))
        has_parameters = self._wanted.dweight_dtype is not None or self._wanted.dbias_dtype is not None
        scale_stride, _, _ = modulations.strides
        finaliser = _finalise_launcher(
            self._spec, self._sums, statistics.dtype, scale_stride, has_parameters, statistics.device
        )
        made.finalise = Launch(finaliser, n_sums, n_sums // n_modulations, n_modulations if stores else 0)
        return made.finalise


def modulated_backward_plan_of(call: BackwardCall, shapes: Sequence[Any]) -> ModulatedBackwardPlan:
    """Returns the plan of backwards of this signature, creating it if necessary.

    Args:
        shapes: of the gradients of scale, shift and residual_gate.
    """
    tensors, *options = call
    key = *options, tuple(shapes), *(tensor is None for tensor in tensors)
    plan: ModulatedBackwardPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = ModulatedBackwardPlan(call, shapes)
        plans.keep(key, tensors, plan)
    return plan
