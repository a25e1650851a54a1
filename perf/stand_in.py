"""The ops without their GPU: CPU tensors, with the launches of a GPU on which nothing was measured yet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import triton_norm
from perf.contenders import triton_norm_functions
from triton_norm import dispatch, tuning
from triton_norm.ops import launch

OPS = triton_norm_functions()


def _ops_modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("triton_norm.ops.")]


@contextmanager
def as_on_gpu(
    multiprocessors: int,
    warp: int = 32,
    start: Callable[..., Any] | None = None,
    cache: int = tuning.INTERPRETED_CACHE,
) -> Iterator[None]:
    """CPU tensors are served, with the launches chosen for a GPU of so many multiprocessors, threads a warp and bytes
    of cache.

    `start` replaces `triton_norm.ops.launch.start`, through which every launch goes.
    """
    with ExitStack() as replaced:
        replaced.callback(tuning.forget)

        def replace(module: Any, name: str, stand_in: Any) -> None:
            replaced.enter_context(mock.patch.object(module, name, stand_in))

        replaced.enter_context(triton_norm.backend("triton"))
        replace(tuning, "WARP", warp)
        replace(dispatch, "INTERPRETED", True)
        stand_ins: tuple[tuple[str, Any], ...] = (
            ("INTERPRETED", False),
            ("multiprocessors", lambda _: multiprocessors),
            ("cache_bytes", lambda _: cache),
        )
        for module in _ops_modules():
            for name, stand_in in stand_ins:
                if hasattr(module, name):
                    replace(module, name, stand_in)
        if start is not None:
            replace(launch, "start", start)
        tuning.forget()
        yield
