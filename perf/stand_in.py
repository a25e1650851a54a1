"""The ops without their GPU: CPU tensors, with the launches of a GPU on which nothing was measured yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from perf.contenders import Functions
from triton_norm import tuning
from triton_norm.ops import channels, launch, rows


@contextmanager
def as_on_gpu(multiprocessors: int, warp: int = 32, start: Callable[..., int] | None = None) -> Iterator[None]:
    """Launches as chosen for a GPU of so many multiprocessors and threads a warp. `start` replaces what starts them."""
    with ExitStack() as replaced:
        replaced.callback(tuning.forget)
        replaced.enter_context(mock.patch.object(tuning, "WARP", warp))
        for module in (launch, rows, channels):
            replaced.enter_context(mock.patch.object(module, "INTERPRETED", False))
            replaced.enter_context(mock.patch.object(module, "multiprocessors", lambda _: multiprocessors))
            if start is not None:
                replaced.enter_context(mock.patch.object(module, "launch", start))
        tuning.forget()
        yield


def _layer_norm(x: Any, shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Any:
    return rows.layer_norm(x, shape, weight, bias, eps, None)


def _batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Any:
    return channels.batch_norm(x, running_mean, running_var, None, weight, bias, training, momentum, eps)


OPS = Functions(_layer_norm, _batch_norm)
