"""Makes the launchers of the backward of gated and modulated rows."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm.launch import Launcher
from triton_norm.library import Types
from triton_norm.rows.layout import RowLayout, names, present, row_vecs, vector_of
from triton_norm.rows.modulated_plan import Modulations, constants_of, formula_of
from triton_norm.specs import ModulatedSpec, ModulatedTensors
from triton_norm.tuning import modulated_spaces
from triton_norm.tuning.configs import vector_width
from triton_norm.tuning.limits import gpu_of
from triton_norm.tuning.memory import remembered
from triton_norm.tuning.modulated_spaces import ModulatedWork, most_columns


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


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import modulated_backward

    return modulated_backward


@functools.cache
def _finalise_kernel() -> Any:
    from triton_norm.kernels import modulated_finalise

    return modulated_finalise.modulated_backward_finalise_kernel


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
        places = itertools.count()
        return {f"{kind.upper()}_SUMS": next(places) if computed else None for kind, computed in self._asdict().items()}


class LauncherKey(NamedTuple):
    """Holds the properties of a backward that its launchers depend on.

    Args:
        read: dtypes, as the fields of ModulatedBackwardTensors.
        written: dtypes of dx, dresidual and dgate.
        layout: of total, dy, dtotal, x and gate.
        misaligned: addresses, or'ed, modulo 16.
    """

    spec: ModulatedSpec
    read: Any
    written: Types
    layout: RowLayout
    modulations: Modulations
    sums: Sums
    misaligned: int
    device: torch.device

    @property
    def compute(self) -> torch.dtype:
        """Returns the type that is computed in."""
        compute: torch.dtype = self.read.statistics
        return compute

    @property
    def vector(self) -> int:
        """Returns the widest access, in columns."""
        extents = self.spec.rows.n_cols | self.modulations.extents
        for strides in self.layout.strides:
            extents |= 0 if strides is None else strides.extents
        read = self.read._replace(weight=None, bias=None, statistics=None)  # read element by element if they have to be
        return vector_of(self.misaligned, extents, [dtype.itemsize for dtype in present((*read, *self.written))])

    @property
    def work(self) -> ModulatedWork:
        read = self.read
        swept = names((read.dy, read.dtotal, read.total, read.x, read.gate))
        span = most_columns(self.compute.itemsize, gpu_of(self.device))
        formula = formula_of(self.spec, read._fields, read)
        return ModulatedWork(self.spec.rows.n_cols, swept, formula, span, sum(self.sums), self.modulations.summed)

    @property
    def constants(self) -> dict[str, Any]:
        return constants_of(self.spec, self.compute, self.read.gate is not None, self.vector)

    def n_pieces(self, config: Mapping[str, Any]) -> int:
        """Returns the number of pieces into which the columns are cut."""
        pieces: int = -(-self.spec.rows.n_cols // config["BLOCK_N"])
        return pieces

    def n_sums(self, config: Mapping[str, Any], n_rows: int, n_tokens: int, n_modulations: int) -> int:
        """Returns the number of programs of one piece, each of which leaves a row of partial sums of each kind."""
        n_cols, gpu = self.spec.rows.n_cols, gpu_of(self.device)
        if not self.modulations.summed:
            return modulated_spaces.modulated_backward_splits(config, n_rows, n_cols, False, gpu)
        n_members = n_rows // n_modulations
        return n_modulations * modulated_spaces.modulated_backward_splits(config, n_members, n_cols, True, gpu)

    def n_programs(self, config: Mapping[str, Any], *integers: int) -> int:
        return self.n_sums(config, *integers) * self.n_pieces(config)


@remembered
def backward_launcher(key: LauncherKey) -> Launcher:
    """Returns the launcher of a backward."""
    vector, layout = key.vector, key.layout
    total, dy, dtotal, x, gate = (row_vecs(strides, vector) for strides in layout.strides)
    return Launcher(
        _kernels().modulated_backward_kernel,
        modulated_spaces.modulated_backward(key.work, gpu_of(key.device)),
        key.device,
        key.n_programs,
        (
            *(key.spec.rows.n_cols // vector, layout.n_inner, layout.n_middle),
            *(*dy, *dtotal, *total, *x, *gate, *key.modulations.over(vector)),
        ),
        SUMMED=key.modulations.summed,
        **key.sums.places,
        **key.constants,
    )


@remembered
def row_sums_launcher(key: LauncherKey) -> Launcher:
    """Returns the launcher of the kernel that sums long rows before the backward."""
    vector, layout, constants = key.vector, key.layout, key.constants
    total, dy, _, _, gate = (row_vecs(strides, vector) for strides in layout.strides)
    scale_vecs, _, _ = key.modulations.over(vector)

    def n_programs(config: Mapping[str, Any], n_rows: int, n_tokens: int, n_modulations: int) -> int:
        programs: int = -(-n_rows // config["BLOCK_M"])
        return programs

    of_y = "ROUNDED", "PRODUCT"  # roundings pass the gradient unchanged
    return Launcher(
        _kernels().modulated_row_sums_kernel,
        modulated_spaces.modulated_row_sums(key.work, gpu_of(key.device)),
        key.device,
        n_programs,
        (
            *(key.spec.rows.n_cols // vector, layout.n_inner, layout.n_middle),
            *(*dy, *total, *gate, scale_vecs),
        ),
        **{name: value for name, value in constants.items() if name not in of_y},
    )


@remembered
def finalise_launcher(
    spec: ModulatedSpec, sums: Sums, compute: torch.dtype, scale_stride: int, has_parameters: bool, device: torch.device
) -> Launcher:
    """Returns the launcher of the kernel that finalises partial sums; scale_stride: elements between scale's rows."""
    n_cols = spec.rows.n_cols
    vector = vector_width(compute.itemsize, n_cols | scale_stride)

    def n_programs(config: Mapping[str, Any], n_sums: int, n_splits: int, n_summed: int) -> int:
        n_blocks: int = -(-n_cols // config["BLOCK_N"])
        return n_blocks * (n_summed + has_parameters)

    return Launcher(
        _finalise_kernel(),
        modulated_spaces.modulated_backward_finalise(gpu_of(device)),
        device,
        n_programs,
        (n_cols // vector, scale_stride // vector),
        WEIGHT_OFFSET=spec.rows.weight_offset,
        SCALE_OFFSET=spec.scale_offset,
        **sums.places,
        V=vector,
    )
