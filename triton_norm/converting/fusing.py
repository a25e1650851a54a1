"""Finds the modules whose parts `convert(model, fuse=True)` joins, by a table of classes that numbers confirm.

A class is added as a `Fusible` in the table of a file beside this one: a forward, the norms that it joins, and small
modules on which it is compared with the class's own.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_norm.converting import layers
from triton_norm.converting.blocks import BLOCKS
from triton_norm.converting.joining import Example, Fused, Fusible, made, obstacle
from triton_norm.converting.sequences import SEQUENTIAL, is_sequential
from triton_norm.converting.timm_norms import TIMM
from triton_norm.dispatch import backend

FUSIBLE: dict[str, Fusible] = {**BLOCKS}
"""Each key is module.Class."""

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Values are below 10, and bfloat16's are rounded three or four times by half of 2⁻⁸."""

TargetOf = Callable[[type[nn.Module]], type[nn.Module] | None]


def _path(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _fusible(cls: type[Any]) -> Fusible | None:
    return SEQUENTIAL if is_sequential(cls) else FUSIBLE.get(_path(cls)) or layers.fusible(cls)


def counterpart(cls: Any) -> type[nn.Module] | None:
    """Returns the class that containers of exactly this class become, its subclass of the same name, or None."""
    if issubclass(cls, Fused):
        return None
    fusible: Any = _fusible(cls)
    return None if fusible is None else made(fusible.mixin, cls)


def norm_counterpart(cls: Any) -> type[nn.Module] | None:
    """Returns the class that norms of exactly this class of timm become, or None."""
    fusible: Any = TIMM.get(_path(cls))
    return None if fusible is None else made(fusible.mixin, cls)


def is_counterpart(cls: type[Any]) -> bool:
    return issubclass(cls, Fused) and "original" in vars(cls)


class Plan(NamedTuple):
    """Lists the joins of a container, in words.

    Args:
        joined: names of the parts of each.
        left: the parts that can't be joined, and why.
    """

    joined: list[str]
    left: list[str]


def plan(module: nn.Module, becomes: Mapping[nn.Module, type[nn.Module]]) -> Plan:
    """Returns the joins of a module, where `becomes` has the new classes of the modules to convert. A subclass of a
    listed class has the joins of that class, and one that is fused already has none."""
    cls = type(module)
    listed = cls if _fusible(cls) is not None else listed_base(cls)
    result = Plan([], [])
    if issubclass(cls, Fused):
        return result

    def class_of(part: nn.Module) -> type[nn.Module]:
        return becomes.get(part, type(part))

    if listed is None:
        return Plan([], layers.unlisted(module, class_of))
    fusible: Any = _fusible(listed)
    try:
        joins = fusible.joins(module)
    except AttributeError:  # the module lacks parts of its class, or of the class above it
        return result
    shared = any(join.residual is not None and join.norm in set(join.residual.modules()) for join in joins)
    for join in joins:
        # Running statistics would move in another order.
        reason = "the shortcut has the same norm" if shared else obstacle(join, class_of)
        if reason is None:
            result.joined.append(join.parts)
        else:
            result.left.append(f"{join.parts}: {reason}")
    return result


def original_of(cls: type[Any]) -> type[Any]:
    """Returns the class that a counterpart stands for; others as they are."""
    return cls.__dict__["original"] if is_counterpart(cls) else cls


def listed_base(cls: type[Any]) -> type[Any] | None:
    """Returns the class nearest above `cls` that could be fused, or None."""
    return next((base for base in cls.__mro__[1:] if _fusible(base) is not None), None)


def mismatch(cls: type[Any], target_of: TargetOf) -> str | None:
    """Returns why modules of a listed class can't change it, or None.

    Compares the installed class with its counterpart on small modules: results and running statistics, in training and
    in evaluation.

    Args:
        target_of: returns the class that a norm's class is converted to, or None.
    """
    if nn.modules.module._has_any_global_hook():
        return "a hook of torch.nn on all modules is set"
    fusible: Any = TIMM.get(_path(cls)) or _fusible(cls)
    names = _names(made(fusible.mixin, cls).forward)
    if _names(cls.forward)[: len(names)] != names:
        return f"its version of {cls.__name__} takes other arguments"
    # The constructors draw numbers, for weights that are then replaced.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), backend("torch"):
        try:
            with torch.autocast("cpu", enabled=False):
                alike = all(_agrees(example, target_of) for example in fusible.examples(cls))
        except Exception as error:  # a patched class may raise anything
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            return f"its version of {cls.__name__} could not be tried on small tensors, and raised {said}"
    return None if alike else f"its version of {cls.__name__} computes something else than the one that is known"


def _names(forward: Any) -> list[str]:
    """Returns the names of the arguments that can be passed by position and by name."""
    parameters = inspect.signature(forward).parameters.values()
    return [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _agrees(example: Example, target_of: TargetOf) -> bool:
    theirs = example.module.to(example.dtype)
    for number, tensor in enumerate((*theirs.parameters(), *theirs.buffers())):
        if tensor.is_floating_point():
            drawn = _drawn(tensor, number)
            tensor.copy_(drawn if tensor.dim() > 1 else 1.0 + 0.5 * drawn)
    ours = copy.deepcopy(theirs)
    for part in list(ours.modules()):
        cls = target_of(type(part)) or counterpart(type(part))
        if cls is not None:
            part.__class__ = cls
    inputs = [
        _drawn(each, number).to(example.dtype) if isinstance(each, Tensor) else each
        for number, each in enumerate(example.inputs)
    ]
    for mode in (True, True, False) if example.trains else (False,):
        results = [module.train(mode)(*copy.deepcopy(inputs), **example.named) for module in (theirs, ours)]
        if not _alike(*results):
            return False
    return all(map(_alike, theirs.buffers(), ours.buffers()))


def _drawn(like: Tensor, number: int) -> Tensor:
    """Returns values between −1 and 1, of the tensor's shape, strides and dtype."""
    values = torch.sin((torch.arange(float(like.numel())) + number + 1.0).square())
    return torch.empty_like(like).copy_(values.view(like.shape))


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    tolerance = _TOLERANCES.get(one.dtype, 0.0)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def differs(module: nn.Module) -> str | None:
    """Returns why this module of a listed class can't be fused, or None."""
    fusible: Any = _fusible(type(module))
    reason: str | None = fusible.differs(module)
    return reason


def trials(target_of: TargetOf) -> Callable[[Any], str | None]:
    """Returns `mismatch`, which tries each class once: models have many modules of few classes."""
    return functools.cache(functools.partial(mismatch, target_of=target_of))
