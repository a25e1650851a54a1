"""Plans and launches BatchNorm's forward and backward, and allocates their outputs and workspace."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import activations, plans
from triton_norm.channels.launches import Forms, Launches, Read, Step, in_two_floats
from triton_norm.channels.layout import as_readable, dense_like, empty_bits, is_dense, kind_of, reads
from triton_norm.channels.running import copy_back
from triton_norm.launch import zeros
from triton_norm.library import Types, contiguous, dtypes_of
from triton_norm.reference import compute_dtype
from triton_norm.specs import BatchNormSpec, BatchNormTensors, GradientDtypes, Phase
from triton_norm.tuning.channel_spaces import Plan
from triton_norm.tuning.limits import VECTOR_BYTES
from triton_norm.tuning.memory import remembered

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The gradients are dx, dresidual, dweight and dbias."""


class Part(NamedTuple):
    """Describes the part of the work that a call needs.

    Args:
        phase: FUSED: both halves, in one launch or two.
        bits_kind: layout of the activation's bits; None: no bits.
        local: x is one process's part of the batch, and sums stay undivided.
        constant: the statistics don't depend on x; backward only.
    """

    phase: Phase
    bits_kind: str | None = None
    local: bool = False
    constant: bool = False


class BackwardTensors(NamedTuple):
    """Holds the tensors that the backward reads.

    Args:
        dy, x, residual: [N, C, *]; `operator.Saved` tells when residual is needed.
        bits: uint8, one bit for each element of x, or None.
        weight, bias, running_mean, running_var: [C], or None.
        statistics: [3, C]; None: the running ones are used.
    """

    dy: Tensor
    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


_NOTHING_SWEPT = (None,) * 5


@remembered
def _forward_forms(read: Read, spec: BatchNormSpec, part: Part) -> Forms[list[Step]]:
    activations.check(spec.activation)
    x, residual = read.placements
    assert x is not None
    launches = Launches(
        "channels_forward_kernel",
        read,
        x.itemsize if part.phase is Phase.FUSED else 0,
        adds=residual is not None,
        activation=spec.activation,
    )
    momentum = in_two_floats(spec.momentum or 0.0)

    def step(made: Launches, phase: Phase, plan: Plan | None = None) -> Step:
        return made.step(
            phase,
            read.swept if phase.applies else (read.x,),
            (*momentum, *made.scalars(), made.parameter_runs),
            plan,
            EPS=spec.eps,
            CUMULATIVE=spec.momentum is None,
            LOCAL=part.local,
            STATISTICS=phase.reduces,
            RUN=made.run,
            ACTIVATION=spec.activation,
            SLOPE=spec.slope,
        )

    apart = [step(launches, phase) for phase in launches.phases(part.phase)]
    clusters = launches.of_clusters()
    return clusters.with_clusters(apart, lambda plan: step(clusters, Phase.FUSED, plan))


class ForwardPlan:
    """Runs the forward of all calls of one signature that need one part of the work."""

    def __init__(self, spec: BatchNormSpec, part: Part, tensors: BatchNormTensors) -> None:
        x, residual, *of_channels, _ = tensors
        self._spec, self._part, self._kind = spec, part, part.bits_kind or kind_of(x)
        self._shape, self._applies = tuple(x.shape), part.phase.applies
        self._like = x.new_empty(0, dtype=compute_dtype(x))
        self._is_dense = is_dense(x, self._kind)
        are_read = all(tensor is None or reads(tensor, self._kind) for tensor in (x, residual))
        self._copies = not (are_read and all(tensor is None or tensor.is_contiguous() for tensor in of_channels))
        self._steps: dict[Any, list[Step]] = {}

    def __call__(
        self,
        tensors: Sequence[Any],
        statistics: Tensor | None,
        moments: Tensor | None = None,
        steps: list[Step] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns y, if the part applies, and bits, if it has any.

        If the part reduces, fills `statistics`, and `moments` unless None, and updates the running statistics.
        Otherwise normalizes by `statistics`, or by the running ones if that is None.

        Args:
            steps: the launches of a trial; None: those that are chosen.
        """
        part, originals = self._part, tensors
        if self._copies:
            tensors = self._readable(BatchNormTensors._make(tensors))
        x, residual, weight, bias, running_mean, running_var, counter = tensors
        y = None
        if self._applies:
            y = torch.empty_like(x) if self._is_dense else dense_like(x, kind=self._kind)
        bits = None if part.bits_kind is None else empty_bits(x, part.bits_kind)
        added = 0 if residual is None else residual.data_ptr() % VECTOR_BYTES
        key = x.data_ptr() % VECTOR_BYTES, added, moments is None
        steps = steps or self._steps.get(key)
        if steps is None:
            others = dtypes_of((weight, bias, running_mean, running_var, counter, statistics, moments, bits))
            forms = self._prepare(x, residual, others)
            steps = self._steps[key] = forms.chosen(x.device, self._trial(tensors, statistics, moments))
        for step in steps:
            reduces, partials, sync = step.reduces, None, None
            count = counter if reduces else None
            if step.partials:
                partials = self._like.new_empty(3 * step.partials * self._shape[1])
            if step.partials or (count is not None and self._spec.momentum is None):
                sync = zeros(step.n_counts, x.device)
            swept = (residual, y, bits, weight, bias) if step.applies else _NOTHING_SWEPT
            running = (running_mean, running_var) if reduces or statistics is None else (None, None)
            left = moments if reduces else None
            step.launch(x, *swept, statistics, left, *running, count, partials, sync)
            if self._copies and reduces:  # before a later launch can fail
                _, _, _, _, *original_statistics, _ = originals
                copy_back(original_statistics, (running_mean, running_var))
        return y, bits

    def _trial(
        self, tensors: Sequence[Any], statistics: Tensor | None, moments: Tensor | None
    ) -> Callable[[list[Step]], None]:
        """Returns the function that launches steps to measure their times. It moves copies."""

        def run(steps: list[Step]) -> None:
            *others, running_mean, running_var, counter = tensors
            moved = (None if tensor is None else tensor.clone() for tensor in (running_mean, running_var, counter))
            self((*others, *moved), statistics, moments, steps)

        return run

    def _readable(self, tensors: BatchNormTensors) -> BatchNormTensors:
        x, residual, weight, bias, running_mean, running_var, counter = tensors
        added = None if residual is None else as_readable(residual, self._kind).tensor
        running = contiguous(running_mean), contiguous(running_var)
        read = as_readable(x, self._kind).tensor, added, contiguous(weight), contiguous(bias), *running, counter
        return BatchNormTensors._make(read)

    def _prepare(self, x: Tensor, residual: Tensor | None, others: Types) -> Forms[list[Step]]:
        placements = (
            as_readable(x, self._kind).placement,
            None if residual is None else as_readable(residual, self._kind).placement,
        )
        swept = dtypes_of((x, residual))
        read = Read(self._shape, self._kind, placements, x.dtype, swept, others, x.device)
        return _forward_forms(read, self._spec, self._part)


def forward_plan_of(spec: BatchNormSpec, part: Part, tensors: BatchNormTensors) -> ForwardPlan:
    """Returns the plan of forwards of this signature, creating it if necessary."""
    key = spec, part, *(tensor is None for tensor in tensors)
    plan: ForwardPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = ForwardPlan(spec, part, tensors)
        plans.keep(key, tensors, plan)
    return plan


def forward_part(spec: BatchNormSpec, bits_kind: str | None) -> Part:
    return Part(Phase.FUSED if spec.training else Phase.APPLY, bits_kind)


def forward(
    spec: BatchNormSpec, tensors: BatchNormTensors, bits_kind: str | None, moments: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns y, the batch's statistics [3, C] in training, and one bit an element in the layout `bits_kind`, if any.

    Args:
        moments: [3, C], filled with the batch's moments; or None.
    """
    statistics = None
    if spec.training:
        statistics = tensors.x.new_empty((3, tensors.x.shape[1]), dtype=compute_dtype(tensors.x))
    y, bits = forward_plan_of(spec, forward_part(spec, bits_kind), tensors)(tensors, statistics, moments)
    assert y is not None
    return y, statistics, bits


class Allocation:
    """Allocates dx and dresidual, in the layout `kind`, and dweight and dbias [C], where needed.

    It serves calls whose x and weight have the dtypes and strides of these. torch allocates fastest by empty_like.
    """

    def __init__(self, x: Tensor, weight: Tensor | None, gradient_dtypes: GradientDtypes, kind: str) -> None:
        self._gradient_dtypes, self._kind, self._n_channels = gradient_dtypes, kind, x.shape[1]
        self._dx_alike = gradient_dtypes.dx_dtype == x.dtype and is_dense(x, kind)
        alike = weight.dtype if weight is not None and weight.dim() == 1 and weight.is_contiguous() else None
        self._dweight_alike, self._dbias_alike = (
            gradient_dtypes.dweight_dtype == alike,
            gradient_dtypes.dbias_dtype == alike,
        )

    def __call__(self, x: Tensor, weight: Any) -> Gradients:
        dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype = self._gradient_dtypes
        dx = dresidual = dweight = dbias = None
        if self._dx_alike:
            dx = torch.empty_like(x)
        elif dx_dtype is not None:
            dx = dense_like(x, dx_dtype, self._kind)
        if dresidual_dtype is not None:
            dresidual = dense_like(x, dresidual_dtype, self._kind)
        if dweight_dtype is not None:
            dweight = torch.empty_like(weight) if self._dweight_alike else self._parameter(x, dweight_dtype)
        if dbias_dtype is not None:
            dbias = torch.empty_like(weight) if self._dbias_alike else self._parameter(x, dbias_dtype)
        return dx, dresidual, dweight, dbias

    def _parameter(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.new_empty(self._n_channels, dtype=dtype)


def gradients(x: Tensor, gradient_dtypes: GradientDtypes, bits_kind: str | None) -> Gradients:
    """Allocates dx and dresidual, in the layout `bits_kind` or else x's, and dweight and dbias [C], where needed."""
    return Allocation(x, None, gradient_dtypes, bits_kind or kind_of(x))(x, None)


@remembered
def _backward_forms(read: Read, spec: BatchNormSpec, part: Part) -> Forms[list[Step]]:
    activations.check(spec.activation)
    x, dy, residual = read.placements
    assert x is not None and dy is not None
    waits = part.phase is Phase.FUSED and not part.constant
    streamed = (0 if residual is None else residual.itemsize) + (0 if part.bits_kind is None else 1 / 8)
    resident = x.itemsize + dy.itemsize if waits else 0
    launches = Launches("channels_backward_kernel", read, resident, streamed, activation=spec.activation)

    def step(made: Launches, phase: Phase, plan: Plan | None = None) -> Step:
        return made.step(
            phase,
            read.swept,
            made.scalars(),
            plan,
            DY_SPREAD=int(made.layout.spread(dy)),
            EPS=spec.eps,
            LOCAL=part.local,
            CONSTANT=part.constant,
            BY_COLUMN=False,
            REDUCE=phase.reduces,
            ACTIVATION=spec.activation,
            SLOPE=spec.slope,
        )

    apart = [step(launches, phase) for phase in launches.phases(part.phase, part.constant)]
    clusters = launches.of_clusters()
    return clusters.with_clusters(apart, lambda plan: step(clusters, Phase.FUSED, plan))


class BackwardPlan:
    """Runs the backward of all calls of one signature that need one part of the work."""

    def __init__(
        self, spec: BatchNormSpec, gradient_dtypes: GradientDtypes, part: Part, tensors: BackwardTensors
    ) -> None:
        self._spec, self._part = spec, part
        self._kind = part.bits_kind or kind_of(tensors.x)
        self._shape = tuple(tensors.x.shape)
        self._like = tensors.x.new_empty(0, dtype=compute_dtype(tensors.x))
        self._allocate = Allocation(tensors.x, tensors.weight, gradient_dtypes, self._kind)
        self._has_means = part.phase is Phase.FUSED and not (part.constant or part.local)
        dy, x, residual, *others = tensors
        are_read = reads(dy, self._kind, broadcast=True) and reads(x, self._kind) and not dy.is_neg()
        drops = residual is not None and (part.bits_kind is not None or spec.activation is None)
        adds = residual is None or reads(residual, self._kind)
        others_are_contiguous = all(tensor is None or tensor.is_contiguous() for tensor in others)
        self._copies = drops or not (are_read and adds and others_are_contiguous)
        self._steps: dict[Any, list[Step]] = {}

    def __call__(
        self, tensors: Sequence[Any], means: Tensor | None = None, steps: list[Step] | None = None
    ) -> Gradients:
        """Returns the gradients that are needed, None for the others.

        Args:
            means: [2, C], of dz and of dz · x_hat · rstd: written if the part only reduces, read if it only applies.
            steps: the launches of a trial; None: those that are chosen.
        """
        if self._copies:
            tensors = self._readable(BackwardTensors._make(tensors))
        dy, x, residual, bits, weight, bias, statistics, running_mean, running_var = tensors
        result = dx, dresidual, dweight, dbias = self._allocate(x, weight)
        added = 0 if residual is None else residual.data_ptr() % VECTOR_BYTES
        key = dy.data_ptr() % VECTOR_BYTES, x.data_ptr() % VECTOR_BYTES, added, means is None
        steps = steps or self._steps.get(key)
        if steps is None:
            others = dtypes_of((bits, weight, bias, statistics, running_mean, running_var, *result, means))
            forms = self._prepare((x, dy, residual), others)
            steps = self._steps[key] = forms.chosen(x.device, lambda steps: self._try(steps, tensors))
        if self._has_means and not steps[0].alone:
            means = self._like.new_empty(2 * self._shape[1])
        inputs = dy, x, residual, bits
        parameters = weight, bias, statistics, running_mean, running_var
        for step in steps:
            partials = sync = None
            if step.partials:
                partials = self._like.new_empty(2 * step.partials * self._shape[1])
                sync = zeros(step.n_counts, x.device)
            stored = (dx, dresidual) if step.applies else (None, None)
            summed = (dweight, dbias) if step.reduces else (None, None)
            step.launch(*inputs, *stored, *parameters, *summed, means, partials, sync)
        return result

    def _try(self, steps: list[Step], tensors: Sequence[Any]) -> None:
        self(tensors, None, steps)

    def _readable(self, tensors: BackwardTensors) -> BackwardTensors:
        """Returns tensors that the kernels can read. A hook may have restored them with other strides."""
        dy, x, residual, bits, *of_channels = tensors
        if bits is not None or self._spec.activation is None:
            residual = None
        added = None if residual is None else as_readable(residual, self._kind).tensor
        swept = (
            as_readable(dy.resolve_neg(), self._kind, broadcast=True).tensor,
            as_readable(x, self._kind).tensor,
            added,
        )
        return BackwardTensors._make((*swept, contiguous(bits), *map(contiguous, of_channels)))

    def _prepare(self, sweeps: Sequence[Any], others: Types) -> Forms[list[Step]]:
        x, dy, residual = sweeps
        placement = None if residual is None else as_readable(residual, self._kind).placement
        placements = (
            as_readable(x, self._kind).placement,
            as_readable(dy, self._kind, broadcast=True).placement,
            placement,
        )
        swept = dtypes_of((dy, x, residual))
        read = Read(self._shape, self._kind, placements, x.dtype, swept, others, x.device)
        return _backward_forms(read, self._spec, self._part)


def backward_plan_of(
    spec: BatchNormSpec, gradient_dtypes: GradientDtypes, part: Part, tensors: BackwardTensors
) -> BackwardPlan:
    """Returns the plan of backwards of this signature, creating it if necessary."""
    key = spec, gradient_dtypes, part, *(tensor is None for tensor in tensors)
    plan: BackwardPlan | None = plans.find(key, tensors)
    if plan is None:
        plan = BackwardPlan(spec, gradient_dtypes, part, tensors)
        plans.keep(key, tensors, plan)
    return plan


def backward_part(spec: BatchNormSpec, gradient_dtypes: GradientDtypes, bits_kind: str | None) -> Part | None:
    """Returns the part of the work that computes these gradients, or None if none is needed."""
    uses_sums = spec.training and gradient_dtypes.dx_dtype is not None
    reduces = uses_sums or gradient_dtypes.dweight_dtype is not None or gradient_dtypes.dbias_dtype is not None
    applies = gradient_dtypes.dx_dtype is not None or gradient_dtypes.dresidual_dtype is not None
    if not (reduces or applies):
        return None
    phase = Phase.FUSED if reduces and applies else Phase.REDUCE if reduces else Phase.APPLY
    return Part(phase, bits_kind, False, not uses_sums)
