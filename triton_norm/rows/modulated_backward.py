"""Plans and runs the backward of gated and modulated rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import plans
from triton_norm.launch import Launch
from triton_norm.library import contiguous, dtypes_of
from triton_norm.rows.layout import layout_of, readable
from triton_norm.rows.modulated_launches import (
    LauncherKey,
    ModulatedBackwardTensors,
    Sums,
    backward_launcher,
    finalise_launcher,
    row_sums_launcher,
)
from triton_norm.rows.modulated_plan import addresses_of, modulations_of, places_of
from triton_norm.rows.modulation import Numbering
from triton_norm.specs import ModulatedGradientDtypes, ModulatedSpec

Gradients = tuple[Tensor | None, ...]
"""The gradients are those of the fields of ModulatedTensors."""


class BackwardCall(NamedTuple):
    """Holds the arguments of the backward's operator. numbers: tell which row has which modulation."""

    tensors: ModulatedBackwardTensors
    gradient_dtypes: ModulatedGradientDtypes
    numbers: Numbering
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
        gradient_dtypes: ModulatedGradientDtypes,
        n_cols: int,
        shapes: Sequence[Any],
        exact: bool = True,
    ) -> None:
        of_rows, of_parameter = tensors.total.shape, torch.Size((n_cols,))
        every_shape = of_rows, of_rows, of_parameter, of_parameter, of_rows, *shapes
        self._nothing: list[Tensor | None] = [None] * len(gradient_dtypes)
        # torch.empty_like takes two thirds of the time of new_empty: (place, place of a tensor that it is like).
        self._alike: list[tuple[int, int]] = []
        self._others: list[tuple[int, Any, torch.dtype]] = []
        for place, (dtype, shape) in enumerate(zip(gradient_dtypes, every_shape, strict=True)):
            if dtype is not None:
                source = _alike(tensors, shape, dtype) if exact else None
                if source is None:
                    self._others.append((place, shape, dtype))
                else:
                    self._alike.append((place, source))

    def __call__(self, tensors: Sequence[Any]) -> Gradients:
        """Returns the gradients that are needed, contiguous, None for the others; dweight and dbias are [n_cols].

        Args:
            tensors: fields of ModulatedBackwardTensors.
        """
        result = self._nothing.copy()
        for place, source in self._alike:
            result[place] = torch.empty_like(tensors[source])
        for place, shape, dtype in self._others:
            _, _, total, *_ = tensors
            result[place] = total.new_empty(shape, dtype=dtype)
        return tuple(result)


def _alike(tensors: Sequence[Tensor | None], shape: Any, dtype: torch.dtype) -> int | None:
    """Returns the place of a contiguous tensor of this shape and type, or None."""
    for place, tensor in enumerate(tensors):
        if tensor is None or (tensor.shape, tensor.dtype) != (shape, dtype):
            continue
        if tensor.is_contiguous() and not tensor.is_neg():
            return place
    return None


class _Backward:
    """Holds the launches of a backward for tensors of one alignment.

    Args:
        integers: n_rows, n_tokens and n_modulations.
    """

    def __init__(self, key: LauncherKey, integers: tuple[int, int, int]) -> None:
        launcher = backward_launcher(key)
        self.key, self.integers, self.launch = key, integers, Launch(launcher, *integers)
        most = max(key.n_sums(config.keywords, *integers) for config in launcher.candidates)
        self._n_sums = sum(key.sums) * key.spec.rows.n_cols * most
        self._row_sums = None if key.work.is_whole else Launch(row_sums_launcher(key), *integers)
        self.finalise: Launch | None = None

    def sums(self, statistics: Tensor) -> Tensor | None:
        """Returns memory for the partial sums of all programs, or None if there are none."""
        return statistics.new_empty(self._n_sums) if self._n_sums else None

    def row_sums(self, tensors: Sequence[Any]) -> Tensor | None:
        """Returns the sums of each row that dx depends on, or None if programs have whole rows.

        Args:
            tensors: fields of ModulatedBackwardTensors.
        """
        if self._row_sums is None:
            return None
        dy, _, total, _, weight, _, gate, scale, _, _, statistics = tensors
        result = torch.empty_like(statistics)
        self._row_sums(dy, total, weight, gate, scale, statistics, result)
        return result


class ModulatedBackwardPlan:
    """Runs the backward of all calls of one signature."""

    def __init__(self, call: BackwardCall, shapes: Sequence[Any]) -> None:
        tensors, gradient_dtypes, numbers, spec = call
        self._spec, self._gradient_dtypes = spec, gradient_dtypes
        self._gradients = ModulatedGradients(tensors, gradient_dtypes, spec.rows.n_cols, shapes)
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
            gradient_dtypes.dweight_dtype is not None or (summed and gradient_dtypes.dscale_dtype is not None),
            gradient_dtypes.dbias_dtype is not None
            or (summed and gradient_dtypes.dshift_dtype is not None)
            or (summed and gradient_dtypes.dscale_dtype is not None and tensors.bias is not None),
            summed and gradient_dtypes.dresidual_gate_dtype is not None,
        )
        self._made: dict[int, _Backward] = {}
        self._aligned: _Backward | None = None

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
        """Returns the gradients that are needed, None for the others.

        Args:
            tensors: fields of ModulatedBackwardTensors.
        """
        gradients = dx, dresidual, dweight, dbias, dgate, *of_modulations = self._gradients(tensors)
        if self._copies:
            tensors = self._readable(tensors)
        _, _, _, _, weight, bias, _, scale, _, _, statistics = tensors
        of_rows, summed = (dx, dresidual, dgate), self._modulations.summed
        stored = (None, None, None) if summed else of_modulations
        made, sums = self._aligned, None
        if made is not None:  # tells by itself whether the tensors are aligned
            sums = made.sums(statistics)
            if not made.launch.starts(*tensors, *of_rows, *stored, None, sums):
                made = None
        if made is None:
            made = self._made_for(tensors, of_rows)
            sums = made.sums(statistics)
            made.launch(*tensors, *of_rows, *stored, made.row_sums(tensors), sums)
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
            dy, *_ = tensors
            read, written = ModulatedBackwardTensors._make(dtypes_of(tensors)), dtypes_of(of_rows)
            own = self._layout, self._modulations, self._sums
            key = LauncherKey(self._spec, read, written, *own, misaligned, dy.device)
            made = self._made[misaligned] = _Backward(key, (self._n_rows, *self._modulations.numbers))
            if misaligned == 0 and key.work.is_whole:
                self._aligned = made
        return made

    def _finalise(self, made: _Backward, tensors: Sequence[Any]) -> Launch:
        """Returns the launch that finalises the sums; their number follows from the first launch's config."""
        (*_, statistics), launcher, modulations = tensors, made.launch.launcher, self._modulations
        assert launcher.config is not None
        n_sums = made.key.n_sums(launcher.config.keywords, *made.integers)
        n_modulations = modulations.numbers.n_modulations if modulations.summed else 1
        *_, dscale, dshift, dresidual_gate = self._gradient_dtypes
        stores = modulations.summed and any(dtype is not None for dtype in (dscale, dshift, dresidual_gate))
        has_parameters = (
            self._gradient_dtypes.dweight_dtype is not None or self._gradient_dtypes.dbias_dtype is not None
        )
        scale_stride, _, _ = modulations.strides
        finaliser = finalise_launcher(
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
