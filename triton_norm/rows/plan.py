"""Plans and launches the forward of LayerNorm and RMSNorm, and allocates its outputs and workspace."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans
from triton_norm.launch import Launch, Launcher
from triton_norm.library import contiguous, dtypes_of, name_of, triton_dtype
from triton_norm.plain import computed_in
from triton_norm.rows.layout import (
    RowLayout,
    empty_options,
    exchange_workspace,
    layout_of,
    names,
    present,
    readable,
    rounded_to,
    row_vecs,
    vector_of,
)
from triton_norm.saved import ForwardFacts, is_unsavable
from triton_norm.specs import RowSpec, RowTensors
from triton_norm.tuning import row_spaces
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of
from triton_norm.tuning.memory import remembered
from triton_norm.tuning.row_spaces import RowWork

Outputs = tuple[Tensor, Tensor | None, Tensor | None]
"""The outputs are y, total = x + residual, and statistics."""


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import rows

    return rows


class _ForwardTypes(NamedTuple):
    """Holds the dtypes of the forward kernel's tensors, None for those that are None."""

    x: torch.dtype
    residual: torch.dtype | None
    y: torch.dtype
    total: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None
    statistics: torch.dtype | None


@remembered
def _forward_launcher(
    spec: RowSpec, types: _ForwardTypes, layout: RowLayout, misaligned: int, device: torch.device
) -> Launcher:
    """Returns the launcher of a forward for this layout of x and residual."""
    n_cols, (x, residual) = spec.n_cols, layout.strides
    assert x is not None
    compute = computed_in(types.x, types.total)
    swept = types.x, types.residual, types.total
    itemsizes = [dtype.itemsize for dtype in present((*swept, types.y))]
    extents = n_cols | x.extents | (0 if residual is None else residual.extents)
    vector = vector_of(misaligned, extents, itemsizes)
    (x_row, *x_outer), (residual_row, *residual_outer) = row_vecs(x, vector), row_vecs(residual, vector)
    stored = max(dtype.itemsize for dtype in present(swept))
    work, gpu = RowWork(n_cols, names(swept), stored, compute.itemsize, name_of(types.y)), gpu_of(device)
    return Launcher(
        _kernels().rows_forward_kernel,
        row_spaces.rows_forward(work, gpu),
        device,
        lambda config, n_rows: row_spaces.rows_forward_programs(config, n_rows, n_cols, gpu),
        (n_cols // vector, x_row, residual_row, layout.n_inner, layout.n_middle, *x_outer, *residual_outer),
        EPS=spec.eps,
        WEIGHT_OFFSET=spec.weight_offset,
        ROUNDED=rounded_to(spec, compute),
        CENTRED=spec.centred,
        V=vector,
        COMPUTE=triton_dtype(compute),
    )


class RowOutputs:
    """Allocates the outputs of calls of one signature. exact: strides are known; False with symbolic sizes."""

    def __init__(self, spec: RowSpec, tensors: RowTensors, exact: bool = True) -> None:
        x, residual, _, _ = tensors
        self._y = empty_options(x, spec.out_dtype, exact)
        self._total = {} if residual is None else empty_options(residual, spec.total_dtype, exact)
        total_dtype = None if residual is None else spec.total_dtype or residual.dtype
        self.compute = computed_in(x.dtype, total_dtype)
        self._like = x.new_empty(0, dtype=self.compute)
        self._n_statistics = x.numel() // spec.n_cols * (2 if spec.centred else 1)

    def __call__(self, tensors: Sequence[Any], saves: bool) -> Outputs:
        """Returns y, total if there is a residual, and statistics if `saves`.

        Args:
            tensors: x, the residual, and others.
        """
        x, residual, *_ = tensors
        return (
            torch.empty_like(x, **self._y),
            None if residual is None else torch.empty_like(residual, **self._total),
            self._like.new_empty(self._n_statistics) if saves else None,
        )


class RowPlan:
    """Runs the forward of all calls of one signature.

    Attributes:
        requires_grad: a tensor requires grad.
        is_unsavable: autograd can save only a copy of x.
        facts: those of the forward, for the backward, set by the first forward with gradients.
    """

    def __init__(self, spec: RowSpec, tensors: RowTensors) -> None:
        x, residual, *parameters = tensors
        self.spec, self._n_rows, self._outputs = spec, x.numel() // spec.n_cols, RowOutputs(spec, tensors)
        self.requires_grad = any(tensor is not None and tensor.requires_grad for tensor in tensors)
        self.is_unsavable = residual is None and is_unsavable(x)
        self.facts: ForwardFacts | None = None
        self._layout = layout_of((x, residual), spec.n_cols, (False, False))
        are_contiguous = all(parameter is None or parameter.is_contiguous() for parameter in parameters)
        self._copies = not are_contiguous or any(self._layout.copied)
        self._launches: dict[tuple[bool, int], tuple[Launch, int]] = {}

    def forward(self, tensors: Sequence[Any], saves: bool) -> Outputs:
        result = y, total, statistics = self._outputs(tensors, saves)
        if self._copies:
            tensors = self._readable(*tensors)
        x, residual, weight, bias = tensors
        misaligned = x.data_ptr() if residual is None else x.data_ptr() | residual.data_ptr()
        key = saves, misaligned % VECTOR_BYTES
        arguments = x, residual, y, total, weight, bias, statistics
        launch, peers = self._launches.get(key) or self._prepare(key, arguments)
        partials = sync = None
        if peers > 1:
            partials, sync = exchange_workspace(self._n_rows, (3, peers), 1, self._outputs.compute, x.device)
        launch(*arguments, partials, sync)
        return result

    def _readable(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_copied, residual_copied = self._layout.copied
        return readable(x, x_copied), readable(residual, residual_copied), contiguous(weight), contiguous(bias)

    def _prepare(self, key: tuple[bool, int], arguments: Sequence[Any]) -> tuple[Launch, int]:
        """Returns the launch and the most programs that may share a row. Before a search these are those of any config,
        and the launch is not cached."""
        (_, misaligned), (x, *_) = key, arguments
        types = _ForwardTypes._make(dtypes_of(arguments))
        launcher = _forward_launcher(self.spec, types, self._layout, misaligned, x.device)
        result = Launch(launcher, self._n_rows), -(-self.spec.n_cols // launcher.span)
        if launcher.config is not None:
            self._launches[key] = result
        return result


def plan_of(spec: RowSpec, tensors: RowTensors) -> RowPlan:
    """Returns the plan of calls of this signature, creating it if necessary."""
    _, residual, weight, bias = tensors
    key = spec, residual is None, weight is None, bias is None
    plan: RowPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = RowPlan(spec, tensors)
        plans.keep(key, tensors, plan)
    return plan
