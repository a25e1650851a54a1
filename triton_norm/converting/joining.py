"""Calls a norm with the addition and the activation that follow it, in one launch where nothing stands between them."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import has_torch_function_unary

from triton_norm import activations, captures, modules, modules_groups, overrides, plain
from triton_norm.symbolic import Scriptable

TAKES_ACTIVATION: frozenset[type[Any]] = frozenset(
    {
        modules.BatchNorm1d,
        modules.BatchNorm2d,
        modules.BatchNorm3d,
        modules.SyncBatchNorm,
        modules_groups.GroupNorm,
        modules_groups.InstanceNorm1d,
        modules_groups.InstanceNorm2d,
        modules_groups.InstanceNorm3d,
    }
)
"""The forward of exactly these classes takes residual, activation and negative_slope."""


def takes_activation(cls: type[Any]) -> bool:
    """Decides whether the forward of exactly this class is that of a class of TAKES_ACTIVATION."""
    return cls in TAKES_ACTIVATION or layer_of(cls) in TAKES_ACTIVATION


def layer_of(cls: type[Any]) -> type[Any]:
    """Returns the layer of this library that `made` has put before a subclass of torch's norms; other classes as they
    are."""
    if not (issubclass(cls, Fused) and "original" in vars(cls)):
        return cls
    *_, layer, _ = cls.__bases__
    return layer


_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_OTHERS = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}
"""Each key is module.Class, of a library that is not imported."""


def path_of(cls: type[Any]) -> str:
    """Returns module.Class of a class, or of the class that a counterpart stands for."""
    cls = cls.__dict__.get("original", cls)
    return f"{cls.__module__}.{cls.__qualname__}"


def is_observed(module: nn.Module) -> bool:
    """Decides whether a call of the module does more than its class's forward."""
    return _has_hooks(module) or _has_any_global_hook()


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def options_of(activation: Any) -> dict[str, Any] | None:
    """Returns a norm's keyword arguments for a module of an activation; none for None and Identity, which change
    nothing; None for a class that is not known."""
    cls = type(activation)
    if activation is None or cls is nn.Identity:
        return {}
    if cls is nn.GELU:
        return {"activation": _GELUS[activation.approximate]}
    name = _ACTIVATIONS.get(cls) or _OTHERS.get(path_of(cls))
    if name is None:
        return None
    slope = {"negative_slope": activation.negative_slope} if cls is nn.LeakyReLU else {}
    return {"activation": name, **slope}


def _is_dense(x: Any) -> bool:
    return x.__class__ in plain.TYPES and x.layout is torch.strided


def _is_like(residual: Any, x: Tensor) -> bool:
    """Decides whether y + residual is of y's shape and dtype."""
    return _is_dense(residual) and residual.dtype is x.dtype and plain.holds(residual.shape == x.shape)


def _is_overridden(x: Any) -> bool:
    """Decides whether a mode takes calls, or torch.jit traces them: these see the parts one by one."""
    return bool(captures.is_traced()) or (has_torch_function_unary(x) and overrides.active_mode() is not None)


def is_recorded(x: Any) -> bool:
    """Decides whether torch.fx records the call: its nodes are then in the order of the class's own forward."""
    return isinstance(x, fx.Proxy)


def joined(norm: Any, x: Tensor, activation: Any, residual: Tensor | None = None) -> dict[str, Any] | None:
    """Returns the keyword arguments with which norm(x) computes activation(norm(x) + residual), or None where the three
    have to be computed one by one.

    Args:
        norm: any module.
        activation: any module, or None.
    """
    if not takes_activation(type(norm)) or _has_hooks(norm):
        return None
    return options_for(x, activation, residual)


def options_for(x: Any, activation: Any, residual: Any = None) -> dict[str, Any] | None:
    """Returns the keyword arguments of `joined`, for a norm that takes them."""
    options = options_of(activation)
    if options is None or (activation is not None and _has_hooks(activation)) or _has_any_global_hook():
        return None
    if not _is_dense(x) or _is_overridden(x):
        return None
    if residual is None:
        return options
    if not _is_like(residual, x):
        return None
    options["residual"] = residual
    return options


def normalized(norm: Any, x: Tensor, activation: Any) -> Tensor:
    """Returns activation(norm(x))."""
    options = joined(norm, x, activation)
    if options is not None:
        return norm(x, **options)  # type: ignore[no-any-return]
    y = norm(x)
    return y if activation is None else activation(y)  # type: ignore[no-any-return]


def normalized_sum(norm: Any, x: Tensor, residual: Any, activation: Any) -> Tensor:
    """Returns activation(norm(x) + residual). Where they can't be joined, norm(x) is added to in place."""
    options = None if residual is None else joined(norm, x, activation, residual)
    if options is not None:
        return norm(x, **options)  # type: ignore[no-any-return]
    y = norm(x)
    y += residual
    return activation(y)  # type: ignore[no-any-return]


class Fused(Scriptable):
    """Precedes the class of a module in the order of inheritance, and overrides its forward alone.

    The forward calls the parts of the module as the class's forward does, but for norms that it joins with their
    neighbours. It begins with `if is_reverted(self): return type(self).forward(self, ...)`.
    """

    original: Any

    @classmethod
    def preceding(cls, original: Any) -> tuple[type[Any], ...]:
        """Returns the classes that precede `original` in the order of inheritance."""
        return (cls,)

    @classmethod
    def attributes_for(cls, original: Any) -> dict[str, Any]:
        """Returns attributes of the subclass of `original` that differ from class to class."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by `original`. A subclass, as fully_shard creates, is pickled as usual, if at all."""
        reduced: Any = super().__reduce_ex__(protocol)
        cls = type(self)
        return (_remade, (cls.__bases__[0], self.original), *reduced[2:]) if "original" in vars(cls) else reduced


def is_reverted(module: Any) -> bool:
    """Decides whether a module that was reverted is still called by a forward of `Fused`, from a wrapper of it."""
    return not isinstance(module, Fused)


def made(mixin: Any, cls: Any) -> type[nn.Module]:
    """Returns the subclass of `cls` whose forward is the mixin's, of the same name."""
    return _made(mixin, cls, cls.forward)


@functools.cache
def _made(mixin: Any, cls: Any, forward: Any) -> type[nn.Module]:
    """Returns the subclass for this forward of `cls`: code that patches a class exchanges it."""
    own = {"__module__": mixin.__module__, "__qualname__": cls.__qualname__, "original": cls}
    return type(cls.__name__, (*mixin.preceding(cls), cls), own | mixin.attributes_for(cls))


def _remade(mixin: Any, original: Any) -> nn.Module:
    cls = made(mixin, original)
    return cls.__new__(cls)


class Join(NamedTuple):
    """Describes a norm and its neighbours that become one call.

    Args:
        parts: names of what is joined, from the container, for the report.
        norm: the norm.
        activation: the module after it; None: none.
        residual: the module that computes the addend, before the norm is called and not after it, or None.
        passed: modules whose calls are left out, as their parts are called directly.
        takes: decides whether the norm's forward can take the neighbours, by the class that it has or will have.
    """

    parts: str
    norm: nn.Module
    activation: nn.Module | None = None
    residual: nn.Module | None = None
    passed: tuple[nn.Module, ...] = ()
    takes: Callable[[Any], bool] = takes_activation


class Example(NamedTuple):
    """Describes a call of a small module, to compare a class with its counterpart.

    Args:
        module: a module of the class; its tensors get other values.
        inputs, named: arguments of the call: tensors on the CPU. Values are drawn for those of `inputs`.
        dtype: of parameters, and of the tensors of `inputs`.
        trains: the module can be called in training too.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    named: Mapping[str, Any] = MappingProxyType({})
    dtype: torch.dtype = torch.float32
    trains: bool = True


def built(cls: Any, **attributes: Any) -> nn.Module:
    """Returns a module of the class with these parts and other attributes. Its constructor, which may need a model's
    configuration, is not called."""
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Fusible(NamedTuple):
    """Describes how modules of a class are fused.

    Args:
        mixin: its forward.
        joins: lists the norms of a module with neighbours that the forward joins.
        examples: returns small modules of the class, which together reach each of its branches; none: see `differs`.
        differs: returns why a module of the class can't be fused, or None.
    """

    mixin: type[Fused]
    joins: Callable[[Any], list[Join]]
    examples: Callable[[Any], list[Example]] = lambda cls: []
    differs: Callable[[Any], str | None] = lambda module: None


def obstacle(join: Join, class_of: Callable[[nn.Module], type[Any]]) -> str | None:
    """Returns why the parts can't be joined, or None.

    Args:
        class_of: returns the class that a module will have after the conversion.
    """
    cls = class_of(join.norm)
    if not join.takes(cls):
        return f"the norm stays {cls.__name__}"
    unknown = None if join.activation is None else _unknown(join.activation)
    if unknown is not None:
        return unknown
    for module in (join.norm, join.activation, *join.passed):
        if module is not None and is_observed(module):
            return f"{type(module).__name__} has hooks or another forward"
    return None


def _unknown(activation: nn.Module) -> str | None:
    """Returns why the activation can't be joined, or None. Compares it with the function of its name on numbers."""
    cls, options = type(activation), options_of(activation)
    if options is None:
        return f"{cls.__name__} is not among the activations that are known"
    if not options:
        return None
    z = torch.linspace(-8.0, 8.0, 65, device="cpu", dtype=torch.float32)
    expected = activations.activate(z, options["activation"], options.get("negative_slope", 0.0))
    try:
        with torch.no_grad():
            if torch.allclose(cls.forward(activation, z.clone()), expected, rtol=1e-6, atol=1e-6):
                return None
    except Exception as error:  # a patched forward may raise anything
        return f"its version of {cls.__name__} raised {type(error).__name__} on a few numbers"
    return f"its version of {cls.__name__} computes something else than the one that is known"
