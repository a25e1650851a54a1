"""Fuses torch.nn.Sequential: a norm and the activation after it become one call."""

import itertools
from typing import Any

import torch
from torch import nn

from triton_norm.converting.joining import (
    Example,
    Fused,
    Fusible,
    Join,
    built,
    is_reverted,
    joined,
    options_of,
    takes_activation,
)

_CHANNEL_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


class FusedSequential(Fused):
    """Calls modules one after the other, but for a norm and its activation."""

    def forward(self: Any, input: Any) -> Any:
        if is_reverted(self):
            return type(self).forward(self, input)
        skips = False
        for module, after in itertools.pairwise((*self._modules.values(), None)):
            if skips:
                skips = False
                continue
            options = None
            if takes_activation(type(module)) and after is not None:
                options = joined(module, input, after)
            skips = bool(options)
            input = module(input, **options) if options else module(input)
        return input


def _joins(module: Any) -> list[Join]:
    return [
        Join(f"{name} + {next_name}", norm, activation)
        for (name, norm), (next_name, activation) in itertools.pairwise(module._modules.items())
        if isinstance(norm, _CHANNEL_NORMS) and _is_activation(activation)
    ]


def _is_activation(module: Any) -> bool:
    return bool(options_of(module)) or type(module).__module__ == nn.ReLU.__module__


def _examples(cls: Any) -> list[Example]:
    parts = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.GroupNorm(2, 4), nn.SiLU(), nn.BatchNorm2d(4)
    module = built(cls, **{str(place): part for place, part in enumerate(parts)})
    return [Example(module, (torch.empty(2, 2, 5, 5),))]


SEQUENTIAL = Fusible(FusedSequential, _joins, _examples)

_CALLED = "forward", "__call__", "_call_impl", "__iter__", "__getattr__", "__getattribute__"
_MADE_BY = "__new__", "__init_subclass__", "__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__"


def is_sequential(cls: type[Any]) -> bool:
    """Decides whether the class is torch.nn.Sequential, or runs its modules by the code that it inherits from there."""
    if cls is nn.Sequential:
        return True
    if not issubclass(cls, nn.Sequential) or type(cls) is not type:
        return False
    own = cls.__mro__[: cls.__mro__.index(nn.Sequential)]
    return not any(name in vars(base) for base in own for name in (*_CALLED, *_MADE_BY))
