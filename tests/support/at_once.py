"""Calls from many threads that start together."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from support.patience import LIMIT_S

SWITCH = 1e-5  # seconds that a thread keeps the interpreter, of Python's 5e-3: more places for others to come between


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Returns the result of each call in a thread of its own; raises the first error among them, and
    AssertionError where one does not end."""
    begin, actual = threading.Barrier(len(calls)), dict[int, Any]()

    def run(place: int, call: Callable[[], Any]) -> None:
        try:
            begin.wait(LIMIT_S)
            actual[place] = call()
        except BaseException as error:
            actual[place] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(calls)]
    before, deadline = sys.getswitchinterval(), time.monotonic() + LIMIT_S
    sys.setswitchinterval(SWITCH)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        sys.setswitchinterval(before)
    stuck = sum(thread.is_alive() for thread in threads)
    assert not stuck, f"{stuck} of {len(threads)} threads still run after {LIMIT_S:.0f} seconds"
    for outcome in actual.values():
        if isinstance(outcome, BaseException):
            raise outcome
    return [actual[place] for place in range(len(calls))]
