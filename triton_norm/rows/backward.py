"""Plans and launches the backward of LayerNorm and RMSNorm, and allocates its outputs and workspace."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans
from triton_norm.launch import Launch, Launcher
from triton_norm.library import contiguous, dtypes_of, triton_dtype
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
from triton_norm.specs import GradientDtypes, RowSpec
from triton_norm.tuning import row_spaces
from triton_norm.tuning.configs import vector_width
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of
from triton_norm.tuning.memory import remembered
from triton_norm.tuning.row_spaces import RowWork

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The gradients are dx, dresidual, dweight and dbias."""

UNLIMITED = 2**62  # rows


class RowBackwardTensors(NamedTuple):
    """Holds the tensors that the backward reads.

    Args:
        dy, dtotal: gradients of y and total, [*, n_cols].
        x: [*, n_cols]; total, if there is a residual.
        statistics: [2 · n_rows], mean and rstd; [n_rows], mean, if rstd is separate; [n_rows], rstd, without means.
        rstd: [n_rows], or None.
    """

    dy: Tensor
    dtotal: Tensor | None
    x: Tensor
    weight: Tensor | None
    statistics: Tensor
    rstd: Tensor | None = None


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import rows_backward

    return rows_backward


class RowGradients:
    """Allocates the gradients of backwards of one signature.

    Args:
        parameter_shape: shape of weight and bias.
        exact: strides are known; False while recording with symbolic sizes.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        gradient_dtypes: GradientDtypes,
        parameter_shape: Sequence[int],
        exact: bool = True,
    ) -> None:
        self.gradient_dtypes, self._shape = gradient_dtypes, tuple(parameter_shape)
        self._dx, self._dresidual = (
            empty_options(x, gradient_dtypes.dx_dtype, exact),
            empty_options(x, gradient_dtypes.dresidual_dtype, exact),
        )
        alike = None
        if exact and weight is not None and weight.shape == self._shape and weight.is_contiguous():
            alike = weight.dtype
        self._like_weight = gradient_dtypes.dweight_dtype == alike, gradient_dtypes.dbias_dtype == alike

    def __call__(self, x: Tensor, weight: Any) -> Gradients:
        """Returns dx and dresidual, contiguous, of x's shape, dweight and dbias; None for those that are not needed."""
        dx = dresidual = dweight = dbias = None
        dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype = self.gradient_dtypes
        dweight_alike, dbias_alike = self._like_weight
        if dx_dtype is not None:
            dx = torch.empty_like(x, **self._dx)
        if dresidual_dtype is not None:
            dresidual = torch.empty_like(x, **self._dresidual)
        if dweight_dtype is not None:
            dweight = torch.empty_like(weight) if dweight_alike else x.new_empty(self._shape, dtype=dweight_dtype)
        if dbias_dtype is not None:
            dbias = torch.empty_like(weight) if dbias_alike else x.new_empty(self._shape, dtype=dbias_dtype)
        return dx, dresidual, dweight, dbias


class _Types(NamedTuple):
    """Holds the dtypes of RowBackwardTensors, None for those that are None."""

    dy: torch.dtype
    dtotal: torch.dtype | None
    x: torch.dtype
    weight: torch.dtype | None
    statistics: torch.dtype
    rstd: torch.dtype | None


@remembered
def _backward_launcher(
    spec: RowSpec,
    gradient_dtypes: GradientDtypes,
    types: _Types,
    layout: RowLayout,
    misaligned: int,
    device: torch.device,
) -> Launcher:
    """Returns the launcher of a backward for this layout of x, dy and dtotal."""
    n_cols, gpu, compute = spec.n_cols, gpu_of(device), types.statistics
    x, dy, dtotal = layout.strides
    assert x is not None and dy is not None
    dy_spread = types.dy if dy.column else None
    dtotal_spread = types.dtotal if dtotal is not None and dtotal.column else None
    extents = n_cols | x.extents | dy.extents | (0 if dtotal is None else dtotal.extents)
    swept = dy_spread, dtotal_spread, types.x, gradient_dtypes.dx_dtype, gradient_dtypes.dresidual_dtype
    vector = vector_of(misaligned, extents, [dtype.itemsize for dtype in present(swept)])
    (x_row, *x_outer), (dy_row, *dy_outer) = row_vecs(x, vector), row_vecs(dy, vector)
    dtotal_row, *dtotal_outer = row_vecs(dtotal, vector)
    read = types.dy, types.dtotal, types.x
    stored = max(dtype.itemsize for dtype in present(read))
    work = RowWork(n_cols, names(read), stored, compute.itemsize)
    return Launcher(
        _kernels().rows_backward_kernel,
        row_spaces.rows_backward(work, gpu),
        device,
        functools.partial(row_spaces.rows_backward_programs, n_cols=n_cols, gpu=gpu),
        (
            *(n_cols // vector, dy_row, dtotal_row, x_row),
            *(layout.n_inner, layout.n_middle, *dy_outer, *dtotal_outer, *x_outer),
        ),
        DY_COLUMN_STRIDE=dy.column,
        DTOTAL_COLUMN_STRIDE=1 if dtotal is None else dtotal.column,
        WEIGHT_OFFSET=spec.weight_offset,
        ROUNDED=rounded_to(spec, compute),
        CENTRED=spec.centred,
        V=vector,
        COMPUTE=triton_dtype(compute),
    )


@remembered
def _finalise_launcher(
    gradient_dtypes: GradientDtypes, n_cols: int, compute: torch.dtype, device: torch.device
) -> Launcher:
    """Returns the launcher of the kernel that sums partial sums; its integer is their number."""
    vector = vector_width(compute.itemsize, n_cols)
    return Launcher(
        _kernels().rows_backward_finalise_kernel,
        row_spaces.rows_backward_finalise(gpu_of(device)),
        device,
        lambda config, n_sums: -(-n_cols // config["BLOCK_N"]),
        (n_cols // vector,),
        V=vector,
        COMPUTE=triton_dtype(compute),
    )


class _Backward:
    """Holds the launches of a backward for tensors of one alignment.

    Attributes:
        n_teams: upper bound of the teams, each of which leaves a row of partial sums.
        n_sums: elements of all these rows.
        slots: shape of a team's workspace for exchanged sums, or None if a program has whole rows.
    """

    def __init__(self, launcher: Launcher, n_rows: int, n_cols: int, device: torch.device) -> None:
        candidates = [config.keywords for config in launcher.candidates]
        gpu = gpu_of(device)
        most = max(row_spaces.rows_backward_teams(config, UNLIMITED, n_cols, gpu) for config in candidates)
        self.launch, self.n_teams = Launch(launcher, n_rows), min(most, n_rows)
        self.n_sums, peers = self.n_teams * n_cols, -(-n_cols // launcher.span)
        exchanged_rows = max(config["BLOCK_M"] for config in candidates)
        self.slots = (_kernels().TURNS.value, 2, exchanged_rows, peers) if peers > 1 else None
        self.finalise: Launch | None = None


class RowBackwardPlan:
    """Runs the backward of all calls of one signature."""

    def __init__(
        self,
        spec: RowSpec,
        gradient_dtypes: GradientDtypes,
        tensors: RowBackwardTensors,
        parameter_shape: Sequence[int],
    ) -> None:
        self._spec, self._gradients = spec, RowGradients(tensors.x, tensors.weight, gradient_dtypes, parameter_shape)
        self._n_rows = tensors.x.numel() // spec.n_cols
        dy, dtotal, x, *others = tensors
        self._layout = layout_of((x, dy, dtotal), spec.n_cols, (False, True, True))
        are_contiguous = all(tensor is None or tensor.is_contiguous() for tensor in others)
        self._copies = not are_contiguous or any(self._layout.copied)
        _, dy_strides, dtotal_strides = self._layout.strides
        self._dy_spreads = dy_strides is not None and bool(dy_strides.column)
        self._dtotal_spreads = dtotal_strides is not None and bool(dtotal_strides.column)
        self._made: dict[int, _Backward] = {}

    def _readable(self, tensors: Sequence[Any]) -> RowBackwardTensors:
        """Returns tensors that the kernels can read. A hook may have restored them with other strides."""
        dy, dtotal, x, weight, statistics, rstd = tensors
        x_copied, dy_copied, dtotal_copied = self._layout.copied
        of_rows = readable(dy, dy_copied), readable(dtotal, dtotal_copied), readable(x, x_copied)
        return RowBackwardTensors._make((*of_rows, contiguous(weight), statistics.contiguous(), contiguous(rstd)))

    def __call__(self, tensors: Sequence[Any]) -> Gradients:
        _, _, x, weight, _, _ = tensors
        result = dx, dresidual, dweight, dbias = self._gradients(x, weight)
        if self._copies:
            tensors = self._readable(tensors)
        dy, dtotal, x, weight, statistics, rstd = tensors
        addresses = x.data_ptr()
        if self._dy_spreads:
            addresses |= dy.data_ptr()
        if self._dtotal_spreads:
            addresses |= dtotal.data_ptr()
        made = self._made.get(addresses % VECTOR_BYTES) or self._make(tensors, addresses % VECTOR_BYTES)
        partials = sync = dweight_sums = dbias_sums = None
        if made.slots is not None and dx is not None:
            partials, sync = exchange_workspace(made.n_teams, made.slots, 2, statistics.dtype, statistics.device)
        if dweight is not None:
            dweight_sums = statistics.new_empty(made.n_sums)
        if dbias is not None:
            dbias_sums = statistics.new_empty(made.n_sums)
        made.launch(dy, dtotal, x, weight, statistics, rstd, dx, dresidual, dweight_sums, dbias_sums, partials, sync)
        if dweight is not None or dbias is not None:
            finalise = made.finalise or self._finalise(made, statistics)
            finalise(dweight_sums, dbias_sums, dweight, dbias)
        return result

    def _make(self, tensors: Sequence[Any], misaligned: int) -> _Backward:
        _, _, x, _, _, _ = tensors
        device, spec = x.device, self._spec
        types = _Types._make(dtypes_of(tensors))
        launcher = _backward_launcher(spec, self._gradients.gradient_dtypes, types, self._layout, misaligned, device)
        made = _Backward(launcher, self._n_rows, spec.n_cols, device)
        if launcher.config is not None:  # a search may choose a config that needs less workspace
            self._made[misaligned] = made
        return made

    def _finalise(self, made: _Backward, statistics: Tensor) -> Launch:
        """Returns the launch that sums the teams' partial sums; their number follows from the first launch's config."""
        config, device, n_cols = made.launch.launcher.config, statistics.device, self._spec.n_cols
        assert config is not None
        n_sums = row_spaces.rows_backward_teams(config.keywords, self._n_rows, n_cols, gpu_of(device))
        launcher = _finalise_launcher(self._gradients.gradient_dtypes, n_cols, statistics.dtype, device)
        made.finalise = Launch(launcher, n_sums)
        return made.finalise


def backward_plan_of(
    spec: RowSpec, gradient_dtypes: GradientDtypes, tensors: RowBackwardTensors, parameter_shape: Sequence[int]
) -> RowBackwardPlan:
    """Returns the plan of backwards of this signature, creating it if necessary."""
    _, dtotal, _, weight, _, rstd = tensors
    key = spec, gradient_dtypes, tuple(parameter_shape), dtotal is None, weight is None, rstd is None
    plan: RowBackwardPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = RowBackwardPlan(spec, gradient_dtypes, tensors, parameter_shape)
        plans.keep(key, tensors, plan)
    return plan
