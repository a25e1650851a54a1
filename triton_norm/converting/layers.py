"""Fuses layers of Hugging Face's transformers, such as decoder layers: a residual's addition and the norm of the sum
become one launch. The package is not imported."""

import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from triton_norm.converting import additions, sums
from triton_norm.converting.hugging_face import listed_path
from triton_norm.converting.joining import Fused, Fusible, Join, is_reverted
from triton_norm.converting.layer_lists import LAYERS


class FusedLayer(Fused):
    """Precedes a listed layer in the order of inheritance. Its forward is the layer's own, rewritten."""

    @classmethod
    def attributes_for(cls, original: Any) -> dict[str, Any]:
        """Returns the forward, and the method that it calls in place of additions and norms."""
        rewritten = _rewritten(original.forward)
        if isinstance(rewritten, str):  # `mismatch` returns it
            return {}
        own = rewritten.forward

        @functools.wraps(own)
        def forward(self: Any, *inputs: Any, **named: Any) -> Any:
            if is_reverted(self):
                return type(self).forward(self, *inputs, **named)
            return own(self, *inputs, **named)

        return {"forward": forward, additions.METHOD: staticmethod(sums.add_and_normalize)}


def fusible(cls: Any) -> Fusible | None:
    """Returns the description of a listed layer, or None."""
    return Fusible(FusedLayer, _joins, differs=mismatch) if listed_path(cls) in LAYERS else None


def _joins(module: nn.Module) -> list[Join]:
    """Lists the norms of a layer that take the sum of an addition. A subclass has those of its base."""
    listed = next(LAYERS[path] for path in map(listed_path, type(module).__mro__) if path in LAYERS)
    return [
        Join(f"addition + {name}", norm, takes=sums.is_row_norm)
        for name in dict.fromkeys(listed)
        if isinstance(norm := getattr(module, name, None), nn.Module)
    ]


def unlisted(module: nn.Module, class_of: Callable[[nn.Module], type[Any]]) -> list[str]:
    """Lists norms that take the sum of an addition in a module whose class is not listed, and says so.

    Args:
        class_of: returns the class that a module will have after the conversion.
    """
    cls: Any = type(module)
    norms = {name for name, part in module._modules.items() if part is not None and sums.is_row_norm(class_of(part))}
    rewritten = _rewritten(cls.forward) if norms and isinstance(cls.forward, FunctionType) else ""
    if isinstance(rewritten, str):
        return []
    listed = [name for name in dict.fromkeys(rewritten.norms) if name in norms]
    return [f"addition + {name}: {cls.__name__} is not on the list" for name in listed]


def mismatch(module: nn.Module) -> str | None:
    """Returns why a layer of a listed class, of the installed version of its package, can't be fused, or None.

    The source must be that of the code that runs, and have the listed norms behind additions. The rewritten forward
    must call all parts with the same arguments as the class's own forward, and return the same, on a few numbers.
    """
    cls: Any = type(module)
    rewritten = _rewritten(cls.forward)
    if isinstance(rewritten, str):
        return rewritten
    if rewritten.norms != LAYERS[listed_path(cls)]:
        return f"its version of {cls.__name__} adds and normalizes elsewhere than the one that is known"
    tried = False
    for arguments, n_results in itertools.product(_arguments(cls.forward), ({}, rewritten.n_results)):
        try:
            expected = _traced(module, cls.forward, n_results, arguments)
        except Exception:  # the class does not take such arguments, or its parts return something else
            continue
        tried = True
        try:
            alike = _alike(_traced(module, rewritten.forward, n_results, arguments), expected)
        except Exception:
            alike = False
        if not alike:
            return f"its rewritten forward computes something else than {cls.__name__}'s"
    return None if tried else f"its version of {cls.__name__} could not be tried on a few numbers"


_rewritten = functools.lru_cache(maxsize=512)(additions.rewritten)


class _Part(nn.Module):
    """Stands for a part of a layer: returns multiples of its first tensor, and appends its arguments to `calls`.

    Args:
        n_results: number of tensors to return in a tuple; None: one tensor.
    """

    def __init__(self, name: str, number: int, n_results: int | None, calls: list[Any]) -> None:
        super().__init__()
        self.name, self.number, self.n_results, self.calls = name, number, n_results, calls

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.calls.append((self.name, inputs, named))
        first = next(leaf for leaf in pytree.tree_leaves((inputs, named)) if isinstance(leaf, Tensor))
        factor = 0.5 + self.number / 8
        y = first * factor + factor
        return y if self.n_results is None else tuple(y + place for place in range(self.n_results))


def _probe(module: nn.Module, n_results: dict[str, int], calls: list[Any]) -> Any:
    """Returns a module of the same class and attributes, with stand-ins for its parts, and single numbers for
    parameters."""
    probe: Any = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__, training=False)
    probe.__dict__[additions.METHOD] = sums.add_and_normalize
    probe.__dict__["_modules"] = {
        name: None if part is None else _Part(name, number, n_results.get(name), calls)
        for number, (name, part) in enumerate(module._modules.items())
    }
    for kind in ("_parameters", "_buffers"):
        probe.__dict__[kind] = {
            name: None if tensor is None else torch.tensor(1.25, device="cpu")
            for name, tensor in module.__dict__[kind].items()
        }
    return probe


def _traced(
    module: nn.Module, forward: Callable[..., Any], n_results: dict[str, int], arguments: dict[str, Tensor]
) -> Any:
    """Returns the result of a forward with stand-ins for the module's parts, and the calls of these."""
    calls: list[Any] = []
    own = {name: tensor.clone() for name, tensor in arguments.items()}  # a layer may add in place
    with torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that are deprecated
        result = forward(_probe(module, n_results, calls), **own)
    return result, calls


def _arguments(forward: Callable[..., Any]) -> Iterator[dict[str, Tensor]]:
    """Yields calls of a layer with tensors, for the arguments without a default, and for those that may be None."""
    _, *parameters = inspect.signature(forward).parameters.values()
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    needed = [each.name for each in named if each.default is each.empty]
    optional = [each.name for each in named if each.default is None]
    states = [name for name in optional if name.endswith("hidden_states")]
    names = dict.fromkeys((tuple(needed), (*needed, *states), (*needed, *optional)))
    # [B, T, D] and [B, H, W, D]. A part's two results may be read from one tensor of length 2, too.
    for chosen, shape in itertools.product(names, ((2, 3, 4), (2, 4, 4, 4))):
        length = math.prod(shape) * len(chosen)
        numbers = torch.arange(float(length), device="cpu").square().sin().view(-1, *shape)
        yield dict(zip(chosen, numbers, strict=True))


def _alike(one: Any, other: Any) -> bool:
    leaves, structure = pytree.tree_flatten(one)
    others, other_structure = pytree.tree_flatten(other)
    return structure == other_structure and all(map(_equal, leaves, others))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is other or bool(one == other)
