"""Functions of the host made wrong in one place each, by replacing a piece of their source that occurs there once."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

from triton_norm.tuning.memory import forget


@contextmanager
def mutated(module: ModuleType, function: str, old: str, new: str) -> Iterator[None]:
    """Replaces the function in its module within this context, and forgets its cached results."""
    source = inspect.getsource(inspect.unwrap(getattr(module, function)))
    assert source.count(old) == 1, f"{function} has {old!r} {source.count(old)} times: write this mutant anew"
    scope = dict(vars(module))
    exec(compile(source.replace(old, new), f"<mutant of {function}>", "exec"), scope)
    with mock.patch.object(module, function, scope[function]):
        forget()
        yield
    forget()
