"""Plans and launches the backward of gated and modulated rows."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans
from triton_norm.launch import Launch, Launcher
from triton_norm.library import contiguous
from triton_norm.rows.layout import RowLayout, Types, given, layout_of, like, names, readable, types_of, vector_of
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
        x: [*, *normalized_shape]; None without a residual_gate.
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
        self, total: Tensor, wanted: ModulatedWanted, n_cols: int, shapes: Sequence[Any], exact: bool = True
    ) -> None:
        of_rows = wanted.dx_dtype, wanted.dresidual_dtype, wanted.dgate_dtype
        self._wanted, self._n_cols, self._shapes = wanted, n_cols, tuple(shapes)
        self._dx, self._dresidual, self._dgate = (like(total, dtype, exact) for dtype in of_rows)

    def __call__(self, total: Tensor) -> Gradients:
        """Returns those that are wanted, contiguous, None for the others; dweight and dbias are [n_cols]."""
        dx, dresidual, dweight, dbias, dgate, dscale, dshift, dresidual_gate = self._wanted
        scale_shape, shift_shape, residual_gate_shape = self._shapes
        return (
            None if dx is None else torch.empty_like(total, **self._dx),
            None if dresidual is None else torch.empty_like(total, **self._dresidual),
            None if dweight is None else total.new_empty(self._n_cols, dtype=dweight),
            None if dbias is None else total.new_empty(self._n_cols, dtype=dbias),
            None if dgate is None else torch.empty_like(total, **self._dgate),
            None if dscale is None else total.new_empty(scale_shape, dtype=dscale),
            None if dshift is None else total.new_empty(shift_shape, dtype=dshift),
            None if dresidual_gate is None else total.new_empty(residual_gate_shape, dtype=dresidual_gate),
        )


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import modulated_backward

    return modulated_backward


@remembered
def _backward_launcher(
    spec: ModulatedSpec,
    types: Types,
    layout: RowLayout,
    modulations: Modulations,
    n_sums: int,
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
    work = ModulatedWork(n_cols, names(swept), form, n_sums, modulations.summed)
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
    spec: ModulatedSpec, compute: torch.dtype, scale_stride: int, has_parameters: bool, device: torch.device
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
        V=vector,
    )


class _Sums(NamedTuple):
    """Tells which partial sums a backward computes."""

    x_hat: bool
    dy: bool
    residual_gate: bool


class _Backward:
    """Holds the launches of a backward for tensors of one alignment.

    Attributes:
        n_sums: elements of partial sums of one kind, of which each program leaves a row; an upper bound.
    """

    def __init__(self, launcher: Launcher, integers: tuple[int, int, int], n_cols: int) -> None:
        candidates = [config.keywords for config in launcher.candidates]
        self.launch, self.integers = Launch(launcher, *integers), integers
        self.n_sums = n_cols * max(launcher.n_programs(config, *integers) for config in candidates)
        self.finalise: Launch | None = None


class ModulatedBackwardPlan:
    """Runs the backward of all calls of one signature."""

    def __init__(self, call: BackwardCall, shapes: Sequence[Any]) -> None:
        tensors, wanted, numbers, spec = call
        self._spec, self._wanted = spec, wanted
        self._gradients = ModulatedGradients(tensors.total, wanted, spec.rows.n_cols, shapes)
        self._n_rows = tensors.total.numel() // spec.rows.n_cols
        self._modulations = modulations_of(tensors.inputs, numbers, spec.rows.n_cols)
        of_rows = tensors.total, tensors.dy, tensors.dtotal, tensors.x, tensors.gate
        self._layout = layout_of(of_rows, spec.rows.n_cols, (False,) * len(of_rows))
        small = tensors.weight, tensors.bias, tensors.statistics
        are_contiguous = all(tensor is None or tensor.is_contiguous() for tensor in small)
        self._copies = not are_contiguous or any(self._layout.copied) or any(self._modulations.copied)
        self._places = places_of(tensors, _PARAMETERS)
        summed = self._modulations.summed
        self._sums = _Sums(
            wanted.dweight_dtype is not None or (summed and wanted.dscale_dtype is not None),
            wanted.dbias_dtype is not None
            or (summed and wanted.dshift_dtype is not None)
            or (summed and wanted.dscale_dtype is not None and tensors.bias is not None),
            summed and wanted.dresidual_gate_dtype is not None,
        )
        self._finalises = any(self._sums)
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
        _, _, total, _, _, _, _, _, _, _, _ = tensors
        found = dx, dresidual, dweight, dbias, dgate, dscale, dshift, dresidual_gate = self._gradients(total)
        if self._copies:
            tensors = self._readable(tensors)
        misaligned = addresses_of(tensors, self._places)
        made = self._made.get(misaligned) or self._make((*tensors, dx, dresidual, dgate), misaligned)
        _, _, _, _, weight, bias, _, scale, _, _, statistics = tensors
        of_x_hat, of_dy, of_residual_gate = self._sums
        x_hat_sums = statistics.new_empty(made.n_sums) if of_x_hat else None
        dy_sums = statistics.new_empty(made.n_sums) if of_dy else None
        residual_gate_sums = statistics.new_empty(made.n_sums) if of_residual_gate else None
        sums = x_hat_sums, dy_sums, residual_gate_sums
        if self._modulations.summed:
            made.launch(*tensors, dx, dresidual, dgate, None, None, None, *sums)
            if self._finalises:
                finalise = made.finalise or self._finalise(made, tensors)
                finalise(*sums, weight, bias, scale, dweight, dbias, dscale, dshift, dresidual_gate)
            return found
        made.launch(*tensors, dx, dresidual, dgate, dscale, dshift, dresidual_gate, *sums)
        if self._finalises:
            finalise = made.finalise or self._finalise(made, tensors)
            finalise(*sums, None, None, None, dweight, dbias, None, None, None)
        return found

    def _make(self, arguments: Sequence[Any], misaligned: int) -> _Backward:
        (dy, *_), modulations = arguments, self._modulations
        launcher = _backward_launcher(
            self._spec, types_of(arguments), self._layout, modulations, sum(self._sums), misaligned, dy.device
        )
        made = self._made[misaligned] = _Backward(
            launcher, (self._n_rows, *modulations.numbers), self._spec.rows.n_cols
        )
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
        finaliser = _finalise_launcher(self._spec, statistics.dtype, scale_stride, has_parameters, statistics.device)
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
