"""Plans and launches the forward of gated and modulated rows."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans
from triton_norm.launch import Launch, Launcher
from triton_norm.library import Types, contiguous, dtypes_of, triton_dtype
from triton_norm.plain import computed_in
from triton_norm.rows.layout import (
    RowLayout,
    first_column_axis,
    layout_of,
    names,
    narrower,
    present,
    readable,
    rounded_to,
    row_vecs,
    vector_of,
)
from triton_norm.rows.modulation import Numbering, numbering_of, row_stride
from triton_norm.rows.plan import Outputs, RowOutputs
from triton_norm.saved import is_unsavable
from triton_norm.specs import ModulatedSpec, ModulatedTensors, RowTensors
from triton_norm.tuning import modulated_spaces
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of
from triton_norm.tuning.memory import remembered
from triton_norm.tuning.modulated_spaces import ModulatedWork, most_columns


class Modulations(NamedTuple):
    """Describes how a call's modulations are read.

    Args:
        numbers: tell which row has which modulation.
        strides: elements between rows of scale, shift and residual_gate; 0 for None.
        copied: tells of each whether it has to be copied first.
        summed: several rows have one modulation, so that its gradient is a sum over them.
    """

    numbers: Numbering
    strides: tuple[int, int, int]
    copied: tuple[bool, bool, bool]
    summed: bool

    @property
    def extents(self) -> int:
        """The strides that an access of several columns has to divide, or'ed."""
        return functools.reduce(int.__or__, self.strides)

    def over(self, vector: int) -> tuple[int, ...]:
        return tuple(stride // vector for stride in self.strides)

    def readable(self, *modulations: Tensor | None) -> list[Tensor | None]:
        return [readable(own, copied) for own, copied in zip(modulations, self.copied, strict=True)]


def modulations_of(tensors: ModulatedTensors, numbers: Numbering, n_cols: int) -> Modulations:
    n_column_axes = tensors.x.dim() - first_column_axis(tensors.x.shape, n_cols)
    result = [row_stride(own, n_column_axes) for own in (tensors.scale, tensors.shift, tensors.residual_gate)]
    strides = tuple(n_cols if stride is None else stride for stride in result)
    copied = tuple(stride is None for stride in result)
    summed = numbers.n_modulations < tensors.x.numel() // n_cols
    return Modulations(numbers, strides, copied, summed)  # type: ignore[arg-type]


def constants_of(spec: ModulatedSpec, compute: torch.dtype, has_gate: bool, vector: int) -> dict[str, Any]:
    """Returns the constants that forward and backward share."""
    return {
        "WEIGHT_OFFSET": spec.rows.weight_offset,
        "SCALE_OFFSET": spec.scale_offset,
        "ROUNDED": rounded_to(spec.rows, compute),
        "PRODUCT": narrower(spec.product_dtype, compute),
        "CENTRED": spec.rows.centred,
        "GATE": spec.gate_activation,
        "GATE_FIRST": has_gate and spec.gate_first,
        "V": vector,
        "COMPUTE": triton_dtype(compute),
    }


def formula_of(spec: ModulatedSpec, fields: Sequence[str], types: Types) -> str:
    """Returns, for the key of a choice, the norm, the order of gate and norm, and the tensors that are not None."""
    names = [name for name, dtype in zip(fields, types, strict=True) if dtype is not None]
    norm = "centred" if spec.rows.centred else "uncentred"
    return f"{norm}, {'gate first, ' if spec.gate_first else ''}{' '.join(names)}"


@remembered
def _forward_launcher(
    spec: ModulatedSpec,
    types: Types,
    layout: RowLayout,
    modulations: Modulations,
    misaligned: int,
    device: torch.device,
) -> Launcher:
    """Returns the launcher of a forward for this layout of x, residual, gate and modulations.

    Args:
        types: of the fields of ModulatedTensors, y, total and statistics.
    """
    *inputs, y, total, _ = types
    x, residual, _, _, gate, scale, shift, residual_gate = inputs
    n_cols = spec.rows.n_cols
    assert x is not None and y is not None
    compute = computed_in(x, total)
    extents = n_cols | modulations.extents
    for strides in layout.strides:
        extents |= 0 if strides is None else strides.extents
    swept = x, residual, gate, y, total
    vector = vector_of(
        misaligned, extents, [dtype.itemsize for dtype in present((*swept, scale, shift, residual_gate))]
    )
    x_strides, residual_strides, gate_strides = layout.strides
    gpu = gpu_of(device)
    formula, span = formula_of(spec, ModulatedTensors._fields, tuple(inputs)), most_columns(compute.itemsize, gpu)
    work = ModulatedWork(n_cols, names(swept), formula, span)

    def n_programs(config: Mapping[str, Any], n_rows: int, n_tokens: int, n_modulations: int) -> int:
        programs: int = -(-n_rows // config["BLOCK_M"])
        return programs

    return Launcher(
        _kernel(),
        modulated_spaces.modulated_forward(work, gpu),
        device,
        n_programs,
        (
            *(n_cols // vector, layout.n_inner, layout.n_middle),
            *row_vecs(x_strides, vector),
            *row_vecs(residual_strides, vector),
            *row_vecs(gate_strides, vector),
            *modulations.over(vector),
        ),
        EPS=spec.rows.eps,
        WHOLE=work.is_whole,
        **constants_of(spec, compute, gate is not None, vector),
    )


@functools.cache
def _kernel() -> Any:
    from triton_norm.kernels import modulated

    return modulated.modulated_forward_kernel


def addresses_of(tensors: Sequence[Any], places: Sequence[int]) -> int:
    """Returns the addresses of the tensors in these places, or'ed, modulo 16."""
    result: int = 0
    for place in places:
        result |= tensors[place].data_ptr()
    return result % VECTOR_BYTES


def places_of(tensors: Sequence[Tensor | None], excluded: Sequence[int]) -> list[int]:
    """Returns the places of the tensors that are not None and not excluded."""
    return [place for place, tensor in enumerate(tensors) if tensor is not None and place not in excluded]


_PARAMETERS = ModulatedTensors._fields.index("weight"), ModulatedTensors._fields.index("bias")
"""These are read one element at a time where they are not aligned."""


class ModulatedPlan:
    """Runs the forward of all calls of one signature.

    Attributes:
        requires_grad: a tensor requires grad.
        saves_copies: autograd can save only a copy of a tensor.
        saving, facts: select the tensors to save, and tell what else the backward needs; set by the first forward with
            gradients.
    """

    def __init__(self, spec: ModulatedSpec, tensors: ModulatedTensors) -> None:
        x, residual, weight, bias, gate, *_ = tensors
        self.spec, self._n_rows = spec, x.numel() // spec.rows.n_cols
        self._outputs = RowOutputs(spec.rows, RowTensors(x, residual, None, None))
        self.requires_grad = any(tensor is not None and tensor.requires_grad for tensor in tensors)
        self.saves_copies = any(tensor is not None and is_unsavable(tensor) for tensor in tensors)
        self.saving: Any = None
        self.facts: Any = None
        self._layout = layout_of((x, residual, gate), spec.rows.n_cols, (False, False, False))
        self._modulations = modulations_of(tensors, numbering_of(tensors, spec), spec.rows.n_cols)
        are_contiguous = all(parameter is None or parameter.is_contiguous() for parameter in (weight, bias))
        self._copies = not are_contiguous or any(self._layout.copied) or any(self._modulations.copied)
        self._places = places_of(tensors, _PARAMETERS)
        self._launches: dict[tuple[bool, int], Launch] = {}

    def forward(self, tensors: Sequence[Any], saves: bool) -> Outputs:
        """Returns y, total if there is a residual, and statistics if `saves`.

        Args:
            tensors: fields of ModulatedTensors.
        """
        result = self._outputs(tensors, saves)
        if self._copies:
            tensors = self._readable(*tensors)
        aligned = self._launches.get((saves, 0))  # tells by itself whether the tensors are
        if aligned is None or not aligned.starts(*tensors, *result):
            key = saves, addresses_of(tensors, self._places)
            launch = self._launches.get(key) or self._prepare(key, (*tensors, *result))
            launch(*tensors, *result)
        return result

    def _readable(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        *modulations: Tensor | None,
    ) -> list[Tensor | None]:
        x_copied, residual_copied, gate_copied = self._layout.copied
        return [
            readable(x, x_copied),
            readable(residual, residual_copied),
            contiguous(weight),
            contiguous(bias),
            readable(gate, gate_copied),
            *self._modulations.readable(*modulations),
        ]

    def _prepare(self, key: tuple[bool, int], arguments: Sequence[Any]) -> Launch:
        (_, misaligned), (x, *_) = key, arguments
        launcher = _forward_launcher(
            self.spec, dtypes_of(arguments), self._layout, self._modulations, misaligned, x.device
        )
        launch = self._launches[key] = Launch(launcher, self._n_rows, *self._modulations.numbers)
        return launch


class Expanding(NamedTuple):
    """Stands in for the plan of calls whose modulations have to be expanded first: the expanded tensors' plan serves
    them."""

    spec: ModulatedSpec


def modulated_plan_of(spec: ModulatedSpec, tensors: ModulatedTensors) -> ModulatedPlan:
    """Returns the plan of calls of this signature, creating it if necessary."""
    key = spec, *(tensor is None for tensor in tensors)
    plan: ModulatedPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = ModulatedPlan(spec, tensors)
        plans.keep(key, tensors, plan)
    return plan
