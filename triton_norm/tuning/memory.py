"""Remembers what follows from the limits, the GPU and the choices, until one of them changes."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

# A memory holds at most this many results: calls of ever new shapes must not fill it.
MOST_REMEMBERED = 4096

_forgets: list[Callable[[], object]] = []


def when_forgotten(clear: Callable[[], object]) -> None:
    """Has `forget` call `clear`, which empties a memory of results that follow from the limits, GPU or choices."""
    _forgets.append(clear)


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """Returns the function with a memory of its latest results, emptied by `forget`."""
    cached = functools.lru_cache(MOST_REMEMBERED)(function)
    when_forgotten(cached.cache_clear)
    return cast("Callable[P, T]", cached)


def forget() -> None:
    """Empties every memory: the limits, the GPU or the choices have changed."""
    for clear in _forgets:
        clear()
