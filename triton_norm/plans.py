"""Caches plans: from the signature of a call to the plan that serves calls like it.

A signature is a key, made of everything that is not a tensor, and guards on the tensors. A guard checks all that
decides how a tensor is read, and who takes a call on it: class, dtype, device, shape, strides, requires_grad, and
dispatch keys. With this thread's state the keys tell whether a tensor is negated or an inference tensor, and whether
autocast, a transform of torch.func or torch.jit.trace would take the call. A call of the same signature needs no
further checks.

The families of kernels build the plans; this module doesn't look inside.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_norm.plain import REAL, is_distributed, is_plain
from triton_norm.tuning.memory import when_forgotten

MOST_KEYS = 4096
"""The cache has at most this many keys: calls of ever new shapes must not exhaust memory."""
MOST_PLANS = 16
"""A key has at most this many plans, each with other guards: calls of ever new strides must not exhaust it, either."""

_dispatch_modes = torch._C._len_torch_dispatch_stack


class GuardsInPython:
    """Guards some tensors as torch.compile's own class does."""

    def __init__(self, *tensors: Tensor) -> None:
        self._facts = list(map(_guarded_facts, tensors))

    def check(self, *tensors: Any) -> bool:
        return list(map(_guarded_facts, tensors)) == self._facts


def _guarded_facts(tensor: Any) -> tuple[Any, ...] | None:
    if not isinstance(tensor, Tensor):
        return None
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    keys = (torch._C._dispatch_keys(tensor) | included) - excluded
    memory = tensor.dtype, tensor.device, tensor.shape, tensor.stride()
    return type(tensor), keys.raw_repr(), tensor.requires_grad, *memory


_guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)


def guards_on(*tensors: Tensor) -> Any:
    """Returns guards on some tensors: torch.compile's own class, in C++, if torch has it and no tensor is repeated.

    Its check takes 0.25 µs for three tensors, that of `GuardsInPython` 4 µs (Python 3.11, torch 2.13).
    """
    if _guards is None or len(set(map(id, tensors))) < len(tensors):
        return GuardsInPython(*tensors)
    return _guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


class GuardsOnDTensors:
    """Guards some tensors with DTensors among them, and how these are placed.

    Meshes are compared by identity: one that replaces an equal mesh, whose processes have ended, has other groups.
    """

    def __init__(self, *tensors: Any) -> None:
        self._check, self._specs = guards_on(*tensors).check, [getattr(tensor, "_spec", None) for tensor in tensors]
        self._locals = [type(getattr(tensor, "_local_tensor", None)) for tensor in tensors]

    def check(self, *tensors: Any) -> bool:
        if not self._check(*tensors):
            return False
        for tensor, spec, local in zip(tensors, self._specs, self._locals, strict=True):
            if spec is not None:
                own = tensor._spec
                same = own is spec or (own.mesh is spec.mesh and own == spec)
                if not same or type(tensor._local_tensor) is not local:
                    return False
        return True


_plans: dict[Any, tuple[Callable[[Any], Any], list[tuple[Callable[..., bool], Any]]]] = {}
"""Maps (key, first tensor's shape) to a function that picks the tensors that are not None, and the plans, each with the
check of its guards. Layers of one model differ mostly in shape, and a look-up is faster than several checks."""

when_forgotten(_plans.clear)


_NO_PLAN = KeyError, TypeError, AttributeError, RuntimeError
"""A look-up raises these errors for a call that has no plan, or can't have one: a list in its key, or no shape."""


def find(key: Any, tensors: Sequence[Tensor | None]) -> Any:
    """Returns the plan of calls of this signature, or None. Returns None, too, under a mode of operators or
    forward-mode differentiation, which guards don't tell.

    Args:
        key: tells which tensors are None, if any may be.
        tensors: the first is never None.
    """
    if _dispatch_modes() or forward_ad._current_level >= 0:
        return None
    try:
        pick, plans = _plans[key, tensors[0].shape]  # type: ignore[union-attr]
        present = pick(tensors)
        for tensor in present:
            if tensor.is_nested:  # its strides are an error, in which the check in C++ would end the process
                return None
    except _NO_PLAN:
        return None
    for check, plan in plans:
        if check(*present):
            return plan
    return None


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) in REAL and is_plain(tensor)


def keep(key: Any, tensors: Sequence[Tensor | None], plan: Any) -> None:
    """Caches a plan for calls of this signature, unless a tensor is neither plain memory nor a DTensor, or `find` could
    not find it."""
    if _dispatch_modes() or forward_ad._current_level >= 0:
        return
    distributed = any(map(is_distributed, tensors))
    if not all(tensor is None or _is_real(tensor) or is_distributed(tensor) for tensor in tensors):
        return
    first, *others = (place for place, tensor in enumerate(tensors) if tensor is not None)
    pick = operator.itemgetter(first, *others) if others else operator.itemgetter(slice(first, first + 1))
    present = pick(tensors)
    if len(_plans) >= MOST_KEYS:
        _plans.clear()
    _, plans = _plans.setdefault((key, present[0].shape), (pick, []))
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans.append(((GuardsOnDTensors if distributed else guards_on)(*present).check, plan))
