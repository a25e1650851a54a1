"""The configs of a GPU's launches where kernels are interpreted."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from triton_norm import tuning
from triton_norm.ops import launch

GPU = "NVIDIA Unheard-Of 9"


def on_a_gpu(space: str) -> Callable[..., tuning.Space]:
    made = getattr(tuning, space)
    return lambda *arguments: made(*arguments[:-1], False)


def first_of(space: Callable[..., tuning.Space], count: int = 1) -> Callable[..., tuning.Space]:
    def first(*arguments: Any) -> tuning.Space:
        found = space(*arguments)
        return tuning.Space(found.kernel, found.key, found.configs[:count])

    return first


@contextlib.contextmanager
def unknown_gpu(folder: Path) -> Iterator[None]:
    """Launches are those of a GPU that nothing is known of, whose tuned file would be in `folder`."""
    patches = {"_chosen": {}, "_with_foreign_choices": set(), "TUNED": folder}
    patches |= {
        space: on_a_gpu(space) for space in ("rows_forward", "rows_backward", "rows_backward_finalise", "channels")
    }
    with contextlib.ExitStack() as stack:
        stack.callback(tuning.forget)
        stack.callback(tuning.measured.cache_clear)
        stack.enter_context(mock.patch.object(launch, "gpu_name", return_value=GPU))
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(tuning, name, value))
        tuning.measured.cache_clear()
        tuning.forget()
        yield
