"""Runs programs that wait for each other in Triton's interpreter, by letting them take turns.

Triton's own interpreter runs one program after the other: the first that waits for a later one would wait forever.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from queue import SimpleQueue
from typing import Any, NoReturn
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from triton_norm.testing.interpreter import BUILDER, Array
from triton_norm.testing.process_wide import process_wide

# After this many rounds over the live programs without a change, a delayed one gets its turn; after twice as many, it
# is a deadlock.
PATIENCE = 16


class DeadlockError(AssertionError):
    """Reports that all resident programs wait: for each other, or for one that can only start when one of them ends."""


class _Unwound(BaseException):
    """Ends a program whose launch has failed; not an Exception, which the interpreter would wrap."""


class _Program(threading.Thread):
    """Runs a program within `step` alone, while the launching thread waits."""

    def __init__(self, number: int, grid_idx: tuple[int, int, int], body: Callable[[], object]) -> None:
        super().__init__(name=f"program {grid_idx}", daemon=True)
        self.number = number
        self.grid_idx = grid_idx
        self.body = body
        self.ended = False
        self.error: BaseException | None = None
        self._numpy_errors: Any = np.geterr()  # a thread-local setting
        self._turns: SimpleQueue[bool] = SimpleQueue()
        self._pauses: SimpleQueue[None] = SimpleQueue()

    def step(self) -> None:
        if self.ident is None:
            self.start()
        else:
            self._turns.put(True)
        self._pauses.get()
        if self.ended:
            self.join()

    def pause(self) -> None:
        """Gives up the turn. The program calls it, in its own thread."""
        self._pauses.put(None)
        if not self._turns.get():
            raise _Unwound

    def unwind(self) -> None:
        self._turns.put(False)
        if self.is_alive():
            self.join()

    def run(self) -> None:
        try:
            with np.errstate(**self._numpy_errors):
                self.body()
        except _Unwound:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self._pauses.put(None)


class _Launch:
    """Passes the turn from program to program.

    A program runs in the launching thread, or, if that has a paused program, in a thread of its own: a launch without
    atomics starts no thread.
    """

    def __init__(self, kernel: str, programs: Sequence[_Program], resident: int, delayed: int | None) -> None:
        self._kernel = kernel
        self._resident = resident
        self._delayed = delayed
        self._n_programs = len(programs)
        self._waiting = iter(programs)
        self._live: deque[_Program] = deque()
        self._n_ended = 0
        self._idle = 0  # turns since an atomic changed memory or a program ended
        self._running: _Program | None = None
        self._here: _Program | None = None  # in the launching thread
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._take_turns()
        except _Unwound:
            pass
        finally:
            for program in self._live:
                program.unwind()
        if self._failure is not None:
            raise self._failure

    def pause(self, progress: bool) -> None:
        """Passes the turn on, after each atomic of the running program; `progress`: the atomic changed memory."""
        program = self._running
        assert program is not None
        self._idle = 0 if progress else self._idle + 1
        if program is self._here:
            self._take_turns(until=program)
        else:
            program.pause()

    def _take_turns(self, until: _Program | None = None) -> None:
        while program := self._next():
            self._running = program
            interpreter.interpreter_builder.set_grid_idx(*program.grid_idx)
            if program is until:
                return
            if self._step(program):
                self._live.pop()
                self._n_ended += 1
                self._idle = 0

    def _next(self) -> _Program | None:
        self._live += islice(self._waiting, self._resident - len(self._live))
        if not self._live:
            return None
        if self._idle >= 2 * PATIENCE * len(self._live):
            self._fail(DeadlockError(self._deadlock_message()))
        self._live.rotate(-1)
        if self._live[-1].number == self._delayed and self._idle < PATIENCE * (len(self._live) - 1):
            self._live.rotate(-1)
        return self._live[-1]

    def _step(self, program: _Program) -> bool:
        """Gives the program a turn. Returns whether it has ended."""
        if self._here is None and program.ident is None:
            self._here = program
            program.body()
            self._here = None
            return True
        program.step()
        if program.error is not None:
            self._fail(program.error)
        return program.ended

    def _fail(self, error: BaseException) -> NoReturn:
        """Leaves the frames of the program in this thread; they would wrap an Exception."""
        self._failure = error
        raise _Unwound

    def _deadlock_message(self) -> str:
        n_live = len(self._live)
        started = f"{self._n_ended + n_live} of {self._n_programs} programs have started"
        return f"{self._kernel}: deadlock: {started}, {self._n_ended} have ended, and {n_live} wait"


class _AllPrograms:
    """Replaces a kernel's function, which the interpreter calls once a program: the first call runs them all."""

    def __init__(self, function: Any, run: Callable[[str, Callable[[], object]], None]) -> None:
        self.__name__ = function.__name__
        self.__globals__ = function.__globals__
        self.__signature__ = inspect.signature(function)
        self._function, self._run, self._called = function, run, False

    def __call__(self, **arguments: Any) -> None:
        if not self._called:
            self._called = True
            self._run(self.__name__, functools.partial(self._function, **arguments))


def _changed(pointers: Any, mask: Array | bool, result: Any) -> bool:
    taken = np.broadcast_to(np.asarray(mask, dtype=bool), pointers.data.shape)
    addresses, before = pointers.data[taken], result.data[taken]
    now = interpreter._interpreter.load(addresses, np.ones_like(addresses, dtype=bool), before, before.dtype)
    return bool(now.tobytes() != before.tobytes())


def _switching_atomics(launches: Sequence[_Launch]) -> Sequence[Callable[..., Any]]:
    rmw, cas = BUILDER.create_atomic_rmw, BUILDER.create_atomic_cas

    def switched(pointers: Any, mask: Array | bool, result: Any) -> Any:
        for launch in launches:
            launch.pause(progress=_changed(pointers, mask, result))
        return result

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return switched(pointers, mask.data, rmw(self, op, pointers, value, mask, *rest))

    def create_atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        return switched(pointers, True, cas(self, pointers, *rest))

    return create_atomic_rmw, create_atomic_cas


@process_wide
def interleaved(
    resident: int | None = None,
    order: Callable[[int], Sequence[int]] | None = None,
    delayed: int | None = None,
) -> Iterator[None]:
    """Lets the programs of each launch take turns, from one atomic to the next, so that they can wait for each other.

    The innermost of nested contexts applies.

    Args:
        resident: most programs that run at once, as on a GPU; None: all of them.
        order: returns, for a number of programs, the order in which they start. They are numbered from 0 as the
            interpreter goes through the grid, along its last axis first.
        delayed: number of a program that gets its turn only when all others wait.

    Raises:
        DeadlockError: from a launch in which all programs wait: their atomics don't change memory.
    """
    if resident is not None and resident < 1:
        raise ValueError(f"resident must be at least 1, got {resident}")
    executor = interpreter.GridExecutor
    original = executor.__call__
    running: list[_Launch] = []

    def run(kernel: str, body: Callable[[], object]) -> None:
        grid: list[Any] = list(np.ndindex(*interpreter.interpreter_builder.grid_dim))
        numbers = range(len(grid)) if order is None else order(len(grid))
        if sorted(numbers) != list(range(len(grid))):
            raise ValueError(f"{kernel}: the order {list(numbers)} does not name each of {len(grid)} programs once")
        programs = [_Program(number, grid[number], body) for number in numbers]
        running.append(_Launch(kernel, programs, resident or len(grid), delayed))
        try:
            running[-1].run()
        finally:
            running.pop()

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        programs = self.fn if isinstance(self.fn, _AllPrograms) else _AllPrograms(self.fn, run)
        try:
            with mock.patch.object(self, "fn", programs):
                original(self, *args, **kwargs)
        except InterpreterError as error:
            if isinstance(error.__cause__, DeadlockError):
                raise error.__cause__ from None
            raise

    with ExitStack() as stack:
        for atomic in _switching_atomics(running):
            stack.enter_context(mock.patch.object(BUILDER, atomic.__name__, atomic))
        stack.enter_context(mock.patch.object(executor, "__call__", call))
        yield
