"""Converts subclasses of torch's norms whose forward, and all that it uses, is torch's own."""

import abc
from typing import Any

from torch import nn

from triton_norm import modules, modules_groups
from triton_norm.converting.joining import Fused, made

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: modules.LayerNorm,
    nn.RMSNorm: modules.RMSNorm,
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.SyncBatchNorm: modules.SyncBatchNorm,
    nn.GroupNorm: modules_groups.GroupNorm,
    nn.InstanceNorm1d: modules_groups.InstanceNorm1d,
    nn.InstanceNorm2d: modules_groups.InstanceNorm2d,
    nn.InstanceNorm3d: modules_groups.InstanceNorm3d,
}
"""Names torch's classes, and the layer of this library that modules of each become."""

_HARMLESS = """
    __init__ __init_subclass__ __repr__ __dir__ _get_name extra_repr reset_parameters reset_running_stats
    train eval requires_grad_ zero_grad share_memory apply _apply to to_empty type
    cuda cpu ipu xpu mtia half float double bfloat16
    state_dict load_state_dict _save_to_state_dict _load_from_state_dict get_extra_state set_extra_state
    parameters named_parameters buffers named_buffers modules children named_children
    __doc__ __module__ __dict__ __weakref__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__
    __constants__ __firstlineno__ __static_attributes__ _version dump_patches call_super_init
"""
"""Attributes of torch's classes that a subclass may override: no call of the module, copy or pickle uses them."""

_COPIES = "__copy__", "__deepcopy__", "__getstate__", "__torch_function__", "__get__", "__set__"
"""Attributes that torch's classes lack, and by which Python treats a module otherwise."""

_STATE = "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "process_group"
"""Attributes of modules that torch's classes don't list as constants. A class's property would shadow them."""

_MISSING = object()


class Inheriting(Fused):
    """Precedes a layer of this library and a subclass of torch's class in the order of inheritance."""

    def __init_subclass__(cls, **named: Any) -> None:
        """Keeps the method of the user's class, which may register or check classes, from seeing the one made here."""

    @classmethod
    def preceding(cls, original: Any) -> tuple[type[Any], ...]:
        return cls, LAYERS[_base_of(original)]


def _base_of(cls: type[Any]) -> Any:
    """Returns the class of torch nearest above `cls` that this library has a layer for, or None."""
    return next((base for base in cls.__mro__[1:] if base in LAYERS), None)


def overridden(cls: type[Any]) -> list[str] | None:
    """Returns the names of attributes by which modules of `cls` may compute something else than torch's class above it.

    None: there is no such class. The names of methods that a layer of this library has, and torch's has not, are among
    them, since the layer's would be called in their place.
    """
    base = _base_of(cls)
    if base is None:
        return None
    own = [each for each in cls.__mro__ if each not in base.__mro__]
    named = {name for each in own for name in vars(each)}
    layers = {
        name for each in (*Inheriting.__mro__, *LAYERS[base].__mro__) if each not in base.__mro__ for name in vars(each)
    }
    never = {*vars(nn.Module()), *base.__constants__, *_STATE, *_COPIES, *layers}
    refused = {name for name in named - set(_HARMLESS.split()) if name in never or _changes(name, base, cls)}
    if any(vars(each).get("__slots__") for each in own):
        refused.add("__slots__")
    if type(cls) not in (type, abc.ABCMeta):
        refused.add("__class__")
    return sorted(refused)


def _changes(name: str, base: type[Any], cls: type[Any]) -> bool:
    """Decides whether torch's class has the attribute, and `cls` another one of that name."""
    theirs = _looked_up(base, name)
    return theirs is not _MISSING and _looked_up(cls, name) is not theirs


def _looked_up(cls: type[Any], name: str) -> Any:
    """Returns the attribute of the class as it is stored there, without a call of descriptors."""
    return next((vars(each)[name] for each in cls.__mro__ if name in vars(each)), _MISSING)


def counterpart(cls: type[Any]) -> type[nn.Module] | None:
    """Returns the class that modules of a subclass of torch's become, its subclass of the same name, or None."""
    return made(Inheriting, cls) if overridden(cls) == [] else None
