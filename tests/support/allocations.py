"""Told of every tensor that the library's own launching code allocates."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ALLOCATE = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "zeros"),
    (torch, "full"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
    (Tensor, "contiguous"),
)

OF_LAUNCHES = tuple(f"triton_norm.{name}" for name in ("rows.", "channels.", "sync.", "launch", "library", "saved"))


@contextlib.contextmanager
def allocations(
    before: Callable[[], None] = lambda: None, after: Callable[[Tensor], None] = lambda _: None
) -> Iterator[None]:
    """Calls these whenever the library's own launching code allocates a tensor."""

    def telling(name: str, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def told(*arguments: Any, **options: Any) -> Tensor:
            own = sys._getframe(1).f_globals["__name__"].startswith(OF_LAUNCHES)
            if not own or (name == "contiguous" and arguments[0].is_contiguous()):
                return allocate(*arguments, **options)
            before()
            made = allocate(*arguments, **options)
            after(made)
            return made

        return told

    with contextlib.ExitStack() as replaced:
        for owner, name in ALLOCATE:
            replaced.enter_context(mock.patch.object(owner, name, telling(name, getattr(owner, name))))
        yield
