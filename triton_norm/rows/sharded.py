"""Runs rows of DTensors by the kernels, on each process's local tensors, and places the results as torch does.

A process has whole rows: x is sharded along axes before the rows, or replicated; weight and bias are replicated. The
forward needs no communication. The gradients of weight and bias are partial sums where x is sharded, as torch's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_norm.captures import is_intercepted
from triton_norm.plain import TYPES, holds, is_distributed
from triton_norm.rows import operator
from triton_norm.rows.plan import plan_of
from triton_norm.saved import is_unsavable, needs_gradient
from triton_norm.specs import RowSpec, RowTensors

Placements = tuple[Any, ...]


def unserved(tensors: RowTensors, n_outer: int) -> str | None:
    """Returns why the kernels can't serve rows of DTensors, or None. All processes of the mesh decide alike.

    Args:
        tensors: at least one is a DTensor.
        n_outer: number of x's axes before normalized_shape.
    """
    x: Any = tensors.x
    if not is_distributed(x):
        return "an argument is a DTensor, but the input is not"
    for name, tensor in tensors._asdict().items():
        if tensor is None or tensor is x:
            continue
        if not is_distributed(tensor):
            return f"the input is a DTensor, but the {name} is not"
        if tensor.device_mesh != x.device_mesh:
            return f"the input and the {name} are DTensors on different meshes"
    reason = _misplaced(tensors, n_outer)
    if reason is None and not torch.compiler.is_compiling():  # torch.compile can't trace the rest
        reason = _unreadable(tensors)
    return reason


def _misplaced(tensors: RowTensors, n_outer: int) -> str | None:
    x: Any = tensors.x
    residual: Any = tensors.residual
    shards = [1] * n_outer
    for mesh_axis, placement in enumerate(x.placements):
        if placement.is_partial():
            return "the input is a DTensor of partial sums"
        if placement.is_shard():
            if placement.dim >= n_outer:
                return f"the input is a DTensor that is sharded along axis {placement.dim}, which is normalized"
            shards[placement.dim] *= x.device_mesh.size(mesh_axis)
        elif not placement.is_replicate():
            return f"the input is a DTensor that is placed as {placement}"
    for axis, n_shards in enumerate(shards):
        if holds(x.shape[axis] < n_shards):  # torch gathers such an axis
            return f"the input is a DTensor with more shards along axis {axis} than elements"
    if residual is not None and residual.placements != x.placements:
        return "the input and the residual are DTensors of different placements"
    for name, parameter in (("weight", tensors.weight), ("bias", tensors.bias)):
        if parameter is not None and not _is_replicated(parameter):
            return f"the {name} is a DTensor that is not replicated"
    return None


def _is_replicated(parameter: Any) -> bool:
    return all(placement.is_replicate() for placement in parameter.placements)


def _unreadable(tensors: RowTensors) -> str | None:
    """Returns why the kernels can't read the local tensors, or None."""
    x: Any = tensors.x
    if x.device_mesh.get_coordinate() is None:
        return "this process has no part of the input, a DTensor"
    for local in local_tensors(tensors):
        if local is not None and local.__class__ not in TYPES:
            return f"the local tensor of a DTensor is a {type(local).__name__}"
    return None


def _local(tensor: Any) -> Any:
    """Returns the local tensor of a DTensor, once a collective that still writes to it has ended.

    DTensor.to_local makes a view of a parameter, and an autograd function of an input that requires grad.
    """
    local = tensor._local_tensor
    if local.__class__ not in TYPES and hasattr(local, "trigger_wait"):  # an AsyncCollectiveTensor
        return local.trigger_wait()
    return local


def local_tensors(tensors: Sequence[Any]) -> RowTensors:
    """Returns the local tensors of DTensors, the fields of RowTensors; None for None."""
    return RowTensors._make(None if tensor is None else _local(tensor) for tensor in tensors)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step = step * length
    return tuple(reversed(strides))


class Sharding:
    """Places the results of all calls on DTensors of one signature.

    Attributes:
        placements: placements of x and of all results.
        of_gradients: placements of each tensor's gradient.
        n_outer: number of x's axes before normalized_shape.
        shapes: shape of each tensor, or None.
    """

    def __init__(self, spec: RowSpec, tensors: Sequence[Any], n_outer: int) -> None:
        from torch.distributed.tensor import Partial

        x, *_ = tensors
        self.spec, self.n_outer = spec, n_outer
        self.mesh, self.placements = x.device_mesh, x.placements
        summed = tuple(Partial() if placement.is_shard() else placement for placement in x.placements)
        self.of_gradients = self.placements, self.placements, summed, summed
        self._class, self._shape = x.__class__, x.shape
        self.shapes = [None if tensor is None else tensor.shape for tensor in tensors]
        self._specs: dict[Any, Any] = {}
        self._composed: Any = None

    def composed(self, tensors: Sequence[Any]) -> Any:
        """Returns a plan whose backward composes torch's functions of DTensors."""
        if self._composed is None:
            self._composed = operator.RecordedPlan(self.spec, tensors)
        return self._composed

    def result(self, local: Tensor | None) -> Any:
        """Returns the DTensor of y or total from its local tensor, which is contiguous."""
        return None if local is None else self._placed(local, self.placements, self._shape)

    def gradients(self, local: Sequence[Tensor | None]) -> list[Any]:
        """Returns the DTensors of all gradients from their local tensors, which are contiguous."""
        places = zip(local, self.of_gradients, self.shapes, strict=True)
        return [None if own is None else self._placed(own, placements, shape) for own, placements, shape in places]

    def _placed(self, local: Tensor, placements: Placements, shape: Any) -> Any:
        """Returns a DTensor. DTensor.from_local takes as long as torch's whole norm of DTensors.

        Results of all calls have one DTensorSpec, as torch's: its hash, which operators on them need, is computed once.
        """
        key = placements is self.placements, shape, local.dtype
        spec = self._specs.get(key)
        if spec is None:
            from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

            meta = TensorMeta(torch.Size(shape), _contiguous_strides(shape), local.dtype)
            spec = self._specs[key] = DTensorSpec(self.mesh, placements, tensor_meta=meta)
        return self._class.__new__(self._class, local, spec, requires_grad=False)  # its __init__ does nothing

    def is_local(self, x: Any, dy: Any, dtotal: Any) -> bool:
        """Decides whether a backward runs on the local tensors, not by torch's functions of DTensors.

        These leave a gradient where it is if x is replicated and the gradient sharded along the rows: to gather it
        costs more than to compute with some rows of x.
        """
        if dy is None or torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return False
        if torch._C._are_functorch_transforms_active() or x.__class__ is not self._class:  # a hook has changed it
            return False
        if x.placements != self.placements:
            return False
        return self._follows(dy) and (dtotal is None or self._follows(dtotal))

    def _follows(self, gradient: Any) -> bool:
        if gradient.__class__ is not self._class or gradient.device_mesh != self.mesh:
            return False
        if gradient.placements == self.placements:
            return True
        pairs = zip(gradient.placements, self.placements, strict=True)
        return not any(to.is_replicate() and own.is_shard() and own.dim < self.n_outer for own, to in pairs)

    def redistributed(self, gradient: Any) -> Any:
        """Returns the local tensor of a gradient, or None."""
        if gradient is None:
            return None
        if gradient.placements != self.placements:
            gradient = gradient.redistribute(placements=self.placements)
        return _local(gradient)


class _Context:
    """Stands in for autograd's context of RowsFunction, on local tensors."""

    def __init__(self, plan: Any, needs_input_grad: tuple[bool, ...] = (), saved_tensors: Sequence[Any] = ()) -> None:
        self.plan, self.needs_input_grad, self.saved_tensors = plan, needs_input_grad, tuple(saved_tensors)
        self.non_differentiable: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *results: Tensor) -> None:
        self.non_differentiable = results

    def set_materialize_grads(self, value: bool) -> None:
        """Does nothing: the sharded function's own context has this option."""


class ShardedFunction(torch.autograd.Function):
    """Runs RowsFunction on the local tensors of DTensors.

    Saves the DTensors themselves: only they notice changes in place, and hooks receive them as they receive torch's.
    """

    @staticmethod
    def forward(ctx: Any, sharding: Sharding, *tensors: Any) -> Any:
        local = local_tensors(tensors)
        plan = _plan(sharding, local)
        context = _Context(plan, ctx.needs_input_grad[1:])
        results = operator.RowsFunction.forward(context, *local, plan)
        several = isinstance(results, tuple)
        results = results if several else (results,)
        placed = tuple(map(sharding.result, results))
        whole = dict(zip(map(id, (*local, *results)), (*tensors, *placed), strict=True))
        ctx.save_for_backward(*(whole.get(id(tensor), tensor) for tensor in context.saved_tensors))
        ctx.mark_non_differentiable(*(whole[id(result)] for result in context.non_differentiable))
        ctx.set_materialize_grads(not several)
        ctx.sharding, ctx.plan, ctx.composed = sharding, plan, sharding.composed(tensors)
        return placed if several else placed[0]

    @staticmethod
    def backward(ctx: Any, dy: Any, dtotal: Any = None) -> tuple[Any, ...]:
        sharding, saved = ctx.sharding, ctx.saved_tensors
        needs = *ctx.needs_input_grad[1:], False
        if torch.compiler.is_compiling():
            return None, *_recorded_backward(sharding, _Context(ctx.composed, needs, saved), dy, dtotal)
        backward = operator.RowsFunction.backward
        if not sharding.is_local(saved[0], dy, dtotal):
            *gradients, _ = backward(_Context(ctx.composed, needs, saved), dy, dtotal)
            return None, *gradients
        local = [_local(tensor) if tensor.__class__ is saved[0].__class__ else tensor for tensor in saved]
        context = _Context(ctx.plan, needs, local)
        *gradients, _ = backward(context, sharding.redistributed(dy), sharding.redistributed(dtotal))
        return None, *sharding.gradients(gradients)


def _recorded_backward(sharding: Sharding, context: _Context, dy: Any, dtotal: Any) -> list[Any]:
    """Returns the gradients by an operator on the local tensors, for compiled autograd."""
    from torch.distributed.tensor import DTensor

    def local_of(gradient: Any) -> Any:
        return None if gradient is None else gradient.redistribute(placements=sharding.placements).to_local()

    saved = [own.to_local() if isinstance(own, DTensor) else own for own in context.saved_tensors]
    local = operator.recorded_gradients(context, saved, local_of(dy), local_of(dtotal))
    places: Any = zip(local, sharding.of_gradients, sharding.shapes, strict=True)
    return [
        None
        if own is None
        else DTensor.from_local(own, sharding.mesh, at, shape=shape, stride=_contiguous_strides(shape))
        for own, at, shape in places
    ]


# torch.autograd.Function.apply without its check for torch.func's transforms, which `dispatch` has made.
_apply: Any = super(torch.autograd.Function, ShardedFunction).apply


def _plan(sharding: Sharding, local: RowTensors) -> Any:
    """Returns a plan of launches, or of operators if a tool records them or this process has nothing to launch."""
    x, *_ = local
    present = [tensor for tensor in local if tensor is not None]
    if is_intercepted(*present) or x.numel() == 0 or any(tensor.is_neg() for tensor in present):
        return operator.RecordedPlan(sharding.spec, local)
    return plan_of(sharding.spec, local)


def _run(tensors: Sequence[Any], sharding: Sharding) -> Any:
    """Returns y, or (y, total) with a residual, by the kernels."""
    if needs_gradient(tensors):
        x, residual, *others = tensors
        saves_copy = residual is None and is_unsavable(x)
        return _apply(sharding, x.clone() if saves_copy else x, residual, *others)
    local = local_tensors(tensors)
    y, total, _ = _plan(sharding, local).forward(local, False)
    return sharding.result(y) if total is None else (sharding.result(y), sharding.result(total))


def _record(tensors: Sequence[Any], sharding: Sharding, is_fusible: bool) -> Any:
    """Returns y, or (y, total) with a residual, by an operator on the local tensors, for torch.compile."""
    from torch.distributed.tensor import DTensor

    x, *_ = tensors
    pairs = zip(tensors, sharding.of_gradients, strict=True)
    local = [None if tensor is None else tensor.to_local(grad_placements=places) for tensor, places in pairs]
    results = operator.record(RowTensors._make(local), sharding.spec, is_fusible)
    sizes = {"shape": x.shape, "stride": _contiguous_strides(x.shape)}
    if not isinstance(results, tuple):
        return DTensor.from_local(results, sharding.mesh, sharding.placements, **sizes)
    return tuple(DTensor.from_local(result, sharding.mesh, sharding.placements, **sizes) for result in results)


def normalize(tensors: Sequence[Any], sharding: Sharding, is_fusible: bool) -> Any:
    """Returns y, or (y, total) with a residual, as DTensors."""
    if torch.compiler.is_compiling():
        return _record(tensors, sharding, is_fusible)
    return _run(tensors, sharding)
