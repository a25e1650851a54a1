"""Processes that tests start. None outlives its test, nor does what it has started: whatever the test does, they are
killed and waited for, and their pipes are closed.

Otherwise a failed test fails others: processes that it left running take their time, and Python warns of a process or
a pipe that is dropped, which is an error, in whichever test it collects garbage.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from support import patience

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.01
UNSET = ("TRITON_INTERPRET", "TRITON_NORM_BACKEND")  # a process of its own begins as a user's does


@contextlib.contextmanager
def started(*arguments: str, limit_s: float = patience.LIMIT_S, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Starts Python with these arguments in the project's folder, in a session of its own and with pipes.

    The process is ended on leaving the context. It is ended before if it still runs after `limit_s`, so that whoever
    reads from its pipes is not left waiting; then AssertionError is raised.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command, late = [sys.executable, *arguments], threading.Event()

    def give_up() -> None:
        late.set()
        end(process)

    # The session is what its members are found by once their parents have ended.
    process = subprocess.Popen(
        command, cwd=ROOT, env=inherited | environment, text=True, start_new_session=True, **pipes
    )
    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        timer.join()
        end(process)
        with contextlib.suppress(BrokenPipeError):  # what was written to it and not read
            process.__exit__(None, None, None)  # closes the pipes and waits
        if late.is_set():
            raise AssertionError(f"{' '.join(arguments)[:80]!r} still ran after {limit_s:.0f} seconds")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Returns the output of Python with these arguments, and its exit status."""
    with started(*arguments, **environment) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def output(*arguments: str, **environment: str) -> str:
    """Returns the output of Python with these arguments; raises AssertionError with its errors if it fails."""
    done = run(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def ending_children() -> Iterator[None]:
    """Ends the processes that multiprocessing has started within this context, however they were started."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()) - before:
            end(child)
            child.join()


def end(process: subprocess.Popen[str] | BaseProcess) -> None:
    """Kills a process, the members of its session and all that descend from one of these; returns once none runs."""
    known = {process.pid}
    while True:
        family = running(known) - {process.pid}
        known |= family
        process.kill()
        for number in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        if not running(known):
            return
        time.sleep(POLL_S)


def running(known: set[int]) -> set[int]:
    """Returns which of these processes, of their sessions' members and of all their descendants have not ended.

    One that has ended and that its parent has not asked for yet does not count.
    """
    parents, result = {}, set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session, *_ = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state in "ZX":
            continue
        number = int(file.parent.name)
        parents[number] = int(parent)
        if number in known or int(session) in known:
            result.add(number)
    while more := {number for number, parent in parents.items() if parent in known | result} - result:
        result |= more
    return result
