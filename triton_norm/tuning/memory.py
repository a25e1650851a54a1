"""Caches results that follow from the limits, the GPU and the choices, until one of them changes."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

# A cache holds at most this many results: calls of ever new shapes must not exhaust memory.
MOST_REMEMBERED = 4096

_forgets: list[Callable[[], object]] = []


def when_forgotten(clear: Callable[[], object]) -> None:
    """Registers `clear`, which empties a cache, to be called by `forget`."""
    _forgets.append(clear)


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function with an LRU cache that `forget` empties."""
    cached = functools.lru_cache(MOST_REMEMBERED)(function)
    when_forgotten(cached.cache_clear)
    return cast("Callable[P, T]", cached)


def forget() -> None:
    """Empties every registered cache: the limits, the GPU or the choices have changed."""
    for clear in _forgets:
        clear()
