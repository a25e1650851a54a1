"""The configs of a GPU's launches where kernels are interpreted."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.gpus import with_numbers
from triton_norm.tuning import row_spaces
from triton_norm.tuning.choices import begun_anew
from triton_norm.tuning.configs import Config, Space
from triton_norm.tuning.limits import Gpu
from triton_norm.tuning.memory import forget

GPU = "NVIDIA Unheard-Of 9"

MakesSpace = Callable[[Any, Gpu], Space]


def first_of(space: MakesSpace, count: int) -> MakesSpace:
    """Returns a space of the first configs of another one."""

    def first(work: Any, gpu: Gpu) -> Space:
        result = space(work, gpu)
        return Space(result.kernel, result.key, result.configs[:count])

    return first


def only(kernel: str, config: Config) -> Space:
    """Returns the space of one config."""
    return Space(kernel, "", (config,))


def force_rows(monkeypatch: pytest.MonkeyPatch, forward: Config, backward: Config) -> None:
    """Has rows launched with these configs, whatever the work, until the monkeypatch is undone."""
    for name, config in (("rows_forward", forward), ("rows_backward", backward)):
        space = only(f"{name}_kernel", config)
        monkeypatch.setattr(row_spaces, name, lambda work, gpu, space=space: space)
    forget()


@contextlib.contextmanager
def unknown_gpu(folder: Path) -> Iterator[None]:
    """Launches are those of a GPU that nothing is known of, whose tuned file would be in `folder`."""
    with with_numbers(name=GPU, interpreted=False), begun_anew(folder):
        yield
