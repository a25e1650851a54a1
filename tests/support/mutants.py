"""Kernels made wrong in one place each, by replacing a piece of their source that occurs there once."""

import inspect
import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import triton

from support.channel_mutants import CHANNELS, CLUSTERS
from support.row_mutants import BOTH, MODULATED, ROWS


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a function of kernels/; `check`, of test_mutants.py, then fails as `caught` says there."""

    module: str
    function: str
    check: str
    caught: str
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.function}: {old} -> {new}"

    @property
    def target(self) -> Any:
        return getattr(import_module(f"triton_norm.kernels.{self.module}"), self.function)

    def source(self) -> str:
        source = inspect.getsource(self.target.fn)
        result = source.count(self.old)
        assert result == 1, f"{self.module}.{self.function} has {self.old!r} {result} times: write this mutant anew"
        return source.replace(self.old, self.new)


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """The kernel's function itself is another one: whoever has imported it calls the mutant."""
    target, source = mutant.target, mutant.source()
    file = f"<mutant of {mutant.module}.{mutant.function}>"
    scope = dict(target.fn.__globals__)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # the interpreter looks there
    try:
        exec(compile(source, file, "exec"), scope)
        broken = scope[mutant.function]
        assert type(broken) is type(target) is not triton.JITFunction
        with mock.patch.dict(vars(target), vars(broken)):
            yield
    finally:
        del linecache.cache[file]


def _read(table: str) -> list[Mutant]:
    """Below a line "module.function", lines "check | caught | old -> new", of which a long one is continued at ->."""
    result, where = [], ""
    for line in table.strip().replace("\n        ->", " ->").split("\n"):
        if not line.startswith(" "):
            where = line
            continue
        check, caught, edit = line.strip().split(" | ", 2)
        old, new = (text.strip().replace("\\n", "\n") for text in edit.split("->"))
        result.append(Mutant(*where.split("."), check, caught, old, new))
    return result


MUTANTS = [mutant for table in (ROWS, BOTH, CHANNELS, CLUSTERS, MODULATED) for mutant in _read(table)]
