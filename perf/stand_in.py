"""The ops without their GPU: CPU tensors, with the launches of a GPU on which nothing was measured yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import triton_norm
from perf.contenders import triton_norm_functions
from triton_norm import dispatch, launch
from triton_norm.tuning.limits import Gpu, assumed

OPS = triton_norm_functions()
H100 = Gpu(name=None, multiprocessors=132, l2_bytes=50 << 20)


@contextmanager
def as_on_gpu(gpu: Gpu, start: Callable[..., Any] | None = None) -> Iterator[None]:
    """Serves CPU tensors within this context, with the launches that are chosen for a GPU.

    Args:
        start: replaces `triton_norm.launch.start`, through which every launch goes.
    """
    with ExitStack() as replaced:
        replaced.enter_context(triton_norm.backend("triton"))
        replaced.enter_context(mock.patch.object(dispatch, "INTERPRETED", True))
        if start is not None:
            replaced.enter_context(mock.patch.object(launch, "start", start))
        replaced.enter_context(assumed(gpu))
        yield
