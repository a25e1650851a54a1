"""Manages changes to Triton's interpreter, which apply to the whole process while a context is open."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from triton_norm import dispatch, launch

Parameters = ParamSpec("Parameters")


class _Change:
    """Applies a change and undoes it, any number of times."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make

    def begin(self) -> None:
        self._context = self._make()
        self._context.__enter__()

    def end(self) -> None:
        self._context.__exit__(None, None, None)


_in_force: list[_Change] = []
"""These changes are in force, in the order in which they were applied, each on top of those before it."""


def _require_interpreter() -> None:
    # Triton's own functions are interpreted if the variable was set when Triton was imported. This library serves CPU
    # tensors if it was set when the library was imported.
    if not (dispatch.INTERPRETED and isinstance(tl.sum, InterpretedFunction)):
        raise RuntimeError(
            "Triton's interpreter is off: TRITON_INTERPRET=1 must be in the environment before anything imports "
            "triton_norm or triton (torch.compile imports triton, and so do some of torch's modules)"
        )


def process_wide(
    change: Callable[Parameters, Iterator[None]],
) -> Callable[Parameters, AbstractContextManager[None]]:
    """Makes a context manager of a generator function that changes Triton's interpreter, yields, and undoes the change.

    Threads may leave their contexts in any order: the changes on top of the one that ends are undone and applied again.
    Entering and leaving wait until no thread interprets a kernel of this library.

    Raises:
        RuntimeError: on entering, if the interpreter is off.
    """
    scope = contextmanager(change)

    @contextmanager
    @functools.wraps(change)
    def context(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Iterator[None]:
        _require_interpreter()
        own = _Change(lambda: scope(*args, **kwargs))
        with launch.starting():
            own.begin()
            _in_force.append(own)
        try:
            yield
        finally:
            with launch.starting():
                above = _in_force[_in_force.index(own) + 1 :]
                for other in reversed(above):
                    other.end()
                own.end()
                _in_force.remove(own)
                for other in above:
                    other.begin()

    return context
