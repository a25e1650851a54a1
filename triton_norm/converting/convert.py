"""Converts the norms of an existing model, torch's and Hugging Face's, to this library's in place, and reverts them."""

import fnmatch
import functools
import types
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

from triton_norm import checks, modules
from triton_norm.converting import fusing, hugging_face, inherited, timm_norms
from triton_norm.converting.calls import modulations_by, norms_called_by
from triton_norm.converting.inherited import LAYERS
from triton_norm.symbolic import REVERTED, WAS

Selection = str | type[nn.Module]

_NORMS = (*LAYERS, nn.modules.batchnorm._NormBase)
_UNMODULATED = ("layer_norm", "layer_norm_i2vgen", "ada_norm", "ada_norm_continuous")
"""Values of norm_type with which diffusers' BasicTransformerBlock leaves modulations to its norms."""

_OF_CHANNELS = {cls.__name__.lower() for cls in LAYERS} - {"layernorm", "rmsnorm"}


@dataclass(frozen=True)
class Report:
    """Lists the modules that `convert` converted and skipped, by name, "" for the model itself. print() shows a table.

    Args:
        converted: class of each module before and after.
        skipped: reason for each other norm, and for modules that call a norm as a function, or modulate one, which
            can't be converted; with `fuse`, for joins that can't be made.
        fused: names of the parts that each module joins in one call, with `fuse`.
    """

    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        sections = {"converted": self.converted, "skipped": self.skipped}
        if self.fused:
            sections = {"converted": self.converted, "fused": self.fused, "skipped": self.skipped}
        width = max((len(name) for entries in sections.values() for name in entries), default=0)
        lines = []
        for title, entries in sections.items():
            lines.append(f"{len(entries)} {title}")
            lines += [f"  {name or '(the model)':{max(width, 11)}}  {text}" for name, text in entries.items()]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    include: Selection | Collection[Selection] | None = None,
    exclude: Selection | Collection[Selection] = (),
    sync_batch_norm: bool = False,
    process_group: Any = None,
    fuse: bool = False,
) -> Report:
    """Converts the norms inside `model` to this library's, in place: each module keeps everything but its class.

    Parameters, buffers, state_dict, hooks, device, mode and shared modules are unchanged. Converted are modules of
    torch.nn's classes LayerNorm, RMSNorm, BatchNorm1d to 3d, SyncBatchNorm, GroupNorm and InstanceNorm1d to 3d, of
    subclasses that override nothing that their forward uses, and of the classes of Hugging Face's transformers in
    `converting/hugging_face.py`, whose arithmetic is reproduced, rounding included. Adaptive norms of diffusers, in
    `converting/adaptive.py`, normalize, multiply and add in one launch, and round once. Other norms are skipped: other
    subclasses, whose forward may differ, parametrized and unknown modules. Converting again is harmless.

    A converted module is an instance of its former class, by isinstance. With `sync_batch_norm` it is one of
    torch.nn.SyncBatchNorm, but no more of BatchNorm1d to 3d, as after torch's own conversion.

    Order: convert before `fully_shard` is called on norms themselves, since it changes their classes; before or after
    DistributedDataParallel, torch.compile and a device_map; and after code that patches a class, such as
    `LlamaRMSNorm.forward = ...`. A class that was patched to compute something else is skipped; a later patch has no
    effect on modules that are converted already.

    A converted norm saves its input: `h += ...` after `norm(h)` is an error in the backward, even where Hugging Face's
    class, which saves a float32 copy in half precision, allows it.

    Args:
        include: the only modules to convert. A name as in `model.named_modules()`, with shell-style wildcards, selects
            a module and all inside it; a class selects the modules of exactly that class.
        exclude: modules to skip, selected likewise; wins over `include`.
        sync_batch_norm: converts BatchNorm1d to 3d, torch's and this library's, to SyncBatchNorm.
        process_group: group of these; None: all processes. A torch.nn.SyncBatchNorm keeps its own.
        fuse: joins norms with what follows them in torch.nn.Sequential and the classes in `converting/fusing.py`, and
            with additions before them in those of `converting/layer_lists.py`. These modules change their classes too:
            see docs/convert.md.

    Returns:
        a `Report` of the modules converted, and of those skipped and why.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a name selects nothing, or process_group without sync_batch_norm.

    Nothing has changed after an error. `revert` undoes a conversion.
    """
    _check("convert", model, sync_batch_norm, process_group, fuse)
    named = list(model.named_modules(remove_duplicate=False))
    included = None if include is None else _selected("include", include, named)
    excluded = _selected("exclude", exclude, named)
    report, becomes = _planned(named, included, excluded, sync_batch_norm)
    if fuse:
        _plan_fusions(named, included, excluded, report, becomes)
    _change_all(becomes, lambda module: _change(module, becomes[module], process_group))
    return report


def _change(module: nn.Module, cls: type[nn.Module], process_group: Any) -> None:
    module.__dict__.setdefault(WAS, type(module))
    module.__dict__.pop(REVERTED, None)
    _become(module, cls)
    if cls is modules.SyncBatchNorm and "process_group" not in module.__dict__:
        module.process_group = process_group


def _planned(
    named: list[tuple[str, nn.Module]], included: set[nn.Module] | None, excluded: set[nn.Module], sync_batch_norm: bool
) -> tuple[Report, dict[nn.Module, type[nn.Module]]]:
    """Returns the report, and the new class of each module to convert."""
    report = Report()
    becomes: dict[nn.Module, type[nn.Module]] = {}
    # Models have many modules of few classes.
    norms_called, modulations = functools.cache(norms_called_by), functools.cache(modulations_by)
    mismatch = _trials()
    for name, module in named:
        target = _target(type(module), sync_batch_norm)
        reason = _obstacle(module, target, norms_called, mismatch)
        if target is None and reason is None:
            reason = _modulates(module, modulations)
        if target is not None and reason is None:
            if module in excluded:
                reason = "excluded"
            elif included is not None and module not in included:
                reason = "not included"
            elif any(norm in excluded for norm in hugging_face.joined(module)):
                reason = "its norm is excluded"
        if reason is not None:
            report.skipped[name] = reason
        elif target is not None:
            becomes[module] = target
            report.converted[name] = f"{_described(type(module))} → {_described(target)}"
    return report, becomes


def _plan_fusions(
    named: list[tuple[str, nn.Module]],
    included: set[nn.Module] | None,
    excluded: set[nn.Module],
    report: Report,
    becomes: dict[nn.Module, type[nn.Module]],
) -> None:
    """Adds the modules that join norms of `becomes`, or earlier ones, with their neighbours."""
    mismatch = _trials()
    fused: dict[nn.Module, type[nn.Module]] = {}
    for name, module in named:
        target = fusing.counterpart(type(module))
        plan = fusing.plan(module, becomes)
        reasons = plan.left
        if plan.joined:
            reason = _unfusible(module, target, mismatch)
            if module in excluded:
                reason = "excluded"
            elif included is not None and module not in included:
                reason = "not included"
            if reason is not None:
                reasons = [*(f"{parts}: {reason}" for parts in plan.joined), *reasons]
            elif target is not None:
                fused[module] = target
                report.fused[name] = ", ".join(plan.joined)
        if reasons:
            report.skipped[name] = "; ".join([report.skipped[name], *reasons] if name in report.skipped else reasons)
    becomes |= fused


def _trials() -> Callable[[Any], str | None]:
    return fusing.trials(functools.partial(_target, sync_batch_norm=False))


def _unfusible(module: nn.Module, target: type[nn.Module] | None, mismatch: Callable[[Any], str | None]) -> str | None:
    """Returns the reason why a module with joins stays of its class, or None."""
    cls = type(module)
    if target is None:
        base = fusing.listed_base(cls)
        return None if base is None else f"{cls.__name__} is a subclass of {_described(base)}: its forward may differ"
    if parametrize.is_parametrized(module):
        return "parametrized"
    if not _forward_is_its_class(module):
        return "its forward was replaced on the module itself"
    return mismatch(cls) or fusing.differs(module)


def revert(model: nn.Module) -> tuple[str, ...]:
    """Reverts every module that `convert` converted inside `model` to its former class. Returns their names.

    A forward set on such a module since, by accelerate's hooks or `module.forward = torch.compile(...)`, stays. If it
    calls the converted forward, that calls the restored class's forward.

    Tools that look up a module's exact class, such as torch.ao.quantization.fuse_modules, need this first;
    docs/tools-by-class.md lists them.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: the class of a converted module was changed since, by `fully_shard` or a parametrization.

    Nothing has changed after an error.
    """
    _check("revert", model)
    converted = [pair for pair in model.named_modules(remove_duplicate=False) if _was_converted(pair[1])]
    changed = [(name, type(module).__name__) for name, module in converted if not _is_ours(type(module))]
    if changed:
        each = "; ".join(f"{name!r} was converted, but is a {kind} now" for name, kind in changed)
        raise RuntimeError(f"revert(): {each}: undo that first")
    _change_all({module: None for _, module in converted}, _give_back)
    return tuple(name for name, _ in converted)


def _was_converted(module: nn.Module) -> bool:
    """Decides whether the module was converted, or is a slice of a Sequential that was fused."""
    return WAS in module.__dict__ or fusing.is_counterpart(type(module))


def _give_back(module: nn.Module) -> None:
    original, wrapped = fusing.original_of(type(module)), not _forward_is_its_class(module)
    original = module.__dict__.pop(WAS, original)
    _become(module, original)
    if wrapped:
        module.__dict__[REVERTED] = True
    if original in modules.BATCH_NORMS:
        module.__dict__.pop("process_group", None)


def _change_all(changed: Iterable[nn.Module], change: Callable[[nn.Module], None]) -> None:
    """Changes all modules, or none if that raises: a class may refuse to have an attribute set."""
    before = [(module, type(module), dict(module.__dict__)) for module in changed]
    try:
        for module, _, _ in before:
            change(module)
    except BaseException:
        for module, cls, attributes in before:
            object.__setattr__(module, "__class__", cls)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise


def _check(
    function: str,
    model: object,
    sync_batch_norm: object = False,
    process_group: object = None,
    fuse: object = False,
) -> None:
    checks.module(function, "model", model)
    for name, flag in (("sync_batch_norm", sync_batch_norm), ("fuse", fuse)):
        if type(flag) is not bool:
            raise TypeError(f"{function}(): argument '{name}' must be bool, not {type(flag).__name__}")
    if process_group is None:
        return
    if not sync_batch_norm:
        raise ValueError("convert(): process_group was given without sync_batch_norm=True")
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        kind = type(process_group).__name__
        raise TypeError(f"convert(): argument 'process_group' must be a ProcessGroup of torch.distributed, not {kind}")


def _selected(
    argument: str, selections: Selection | Collection[Selection], named: list[tuple[str, nn.Module]]
) -> set[nn.Module]:
    """Returns the modules selected by one of their names, by the name of an enclosing module, or by their class."""
    if isinstance(selections, (str, type)):
        selections = (selections,)
    elif not isinstance(selections, Collection):
        raise TypeError(f"convert(): argument '{argument}' must hold names and classes, not {selections!r}")
    selected: set[nn.Module] = set()
    for selection in selections:
        if isinstance(selection, type) and issubclass(selection, nn.Module):
            selected |= {module for _, module in named if type(module) is selection}
        elif isinstance(selection, str):
            inside = {module for name, module in named if fnmatch.fnmatchcase(name, selection)}
            if not inside:
                raise ValueError(f"convert(): argument '{argument}': the model has no module named {selection!r}")
            selected.update(part for module in inside for part in module.modules())
        else:
            raise TypeError(f"convert(): argument '{argument}' must hold names and classes, not {selection!r}")
    return selected


def _target(cls: type[nn.Module], sync_batch_norm: bool) -> type[nn.Module] | None:
    """Returns the class that modules of exactly this class are converted to, or None."""
    if sync_batch_norm and cls in modules.BATCH_NORMS:
        return modules.SyncBatchNorm
    synchronized = issubclass(cls, nn.SyncBatchNorm) or not issubclass(cls, nn.modules.batchnorm._BatchNorm)
    if sync_batch_norm and not synchronized:
        return None  # a subclass of BatchNorm can't become one of SyncBatchNorm
    listed = LAYERS.get(cls) or hugging_face.counterpart(cls) or fusing.norm_counterpart(cls)
    return listed or inherited.counterpart(cls)


def _obstacle(
    module: nn.Module,
    target: type[nn.Module] | None,
    norms_called: Callable[[Any], tuple[str, ...]],
    mismatch: Callable[[Any], str | None],
) -> str | None:
    """Returns the reason to skip a module, or None if it can be converted or is no norm."""
    cls = type(module)
    if target is not None:
        if not _forward_is_its_class(module):
            return "its forward was replaced on the module itself"
        if issubclass(target, inherited.Inheriting):
            return None
        if fusing.is_counterpart(target):
            return timm_norms.obstacle(module) or mismatch(cls)
        return hugging_face.mismatch(module)
    if any(_is_ours(base) for base in cls.__mro__):
        return "is triton_norm's already"
    for base in cls.__mro__[1:]:
        if _target(base, sync_batch_norm=False) is not None:
            if parametrize.is_parametrized(module):
                return "parametrized"
            if _target(cls, sync_batch_norm=False) is not None:
                return f"{cls.__name__} is a subclass of {_described(base)}, and can't become SyncBatchNorm"
            return f"{cls.__name__} is a subclass of {_described(base)}{_overriding(cls)}: its forward may differ"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and isinstance(module, _NORMS):
        return f"{cls.__name__} becomes another class in its first call"
    if isinstance(module, _NORMS):
        return f"triton_norm has no {cls.__name__}"
    called = norms_called(cls)
    if called:
        return f"{cls.__name__} calls {', '.join(called)} as a function"
    scripted = isinstance(module, torch.jit.ScriptModule)
    named = str(module.original_name) if scripted else cls.__name__
    foreign = scripted or not cls.__module__.startswith("torch.")
    if foreign and "norm" in named.lower() and not module._modules:
        return f"{named} is not among the classes that are known"
    return None


def _overriding(cls: type[nn.Module]) -> str:
    """Returns the attributes, if not the forward itself, by which a subclass of torch's may compute something else."""
    names = inherited.overridden(cls) or ["forward"]
    return "" if "forward" in names else f" that overrides {', '.join(names)}"


def _modulates(module: nn.Module, modulations: Callable[[Any], tuple[str, ...]]) -> str | None:
    """Returns the reason to report a module that modulates the results of LayerNorms or RMSNorms among its parts."""
    parts = {type(part).__name__.lower() for part in module.children()}
    if module.__dict__.get("norm_type") in _UNMODULATED or not any("norm" in name for name in parts - _OF_CHANNELS):
        return None
    scales = modulations(type(module))
    return f"{type(module).__name__} multiplies by 1 + {', 1 + '.join(scales)} outside of its norms" if scales else None


def _is_ours(cls: type[nn.Module]) -> bool:
    return cls in LAYERS.values() or hugging_face.is_counterpart(cls) or fusing.is_counterpart(cls)


def _described(cls: type[nn.Module]) -> str:
    package = cls.__module__.partition(".")[0]
    return f"{'torch.nn' if package == 'torch' else package}.{cls.__name__}"


def _own_forward(module: nn.Module) -> str | None:
    """Returns the name of the module's own attribute that holds its class's forward, or None. accelerate's hooks, as
    for a device_map, store that forward in `_old_forward`, and put it back to `forward` when they are removed."""
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = module.__dict__.get(name)
    own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    return name if own else None


def _forward_is_its_class(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ or _own_forward(module) is not None


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    name = _own_forward(module)
    module.__class__ = cls
    if name is not None:
        module.__dict__[name] = types.MethodType(cls.forward, module)
