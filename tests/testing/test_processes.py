"""Processes that a failed test has started are gone after it, and fail no other test."""

import multiprocessing
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import patience, processes

pytestmark = [
    pytest.mark.unguarded,
    # Python 3.12 warns of every fork of a process with several threads, which torch's may be too.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

WITH_A_GRANDCHILD = """
import subprocess, sys
options = {"start_new_session": sys.argv[1] == "of its own"}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"], **options)
print(child.pid, flush=True)
if sys.argv[2] == "waits":
    child.wait()
"""


def is_running(number: int) -> bool:
    """Returns whether a process has not ended, waited for or not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fail_with_a_grandchild(session, parent, seen):
    with processes.started("-c", WITH_A_GRANDCHILD, session, parent) as process:
        seen += process, int(process.stdout.readline())
        if parent == "ends":
            process.wait()
        assert is_running(seen[1])
        raise KeyError


@pytest.mark.parametrize("session", ["its parent's", "of its own"])
def test_a_grandchild_is_gone_after_a_failure(session):
    seen = []
    with pytest.raises(KeyError):
        fail_with_a_grandchild(session, "waits", seen)
    process, grandchild = seen
    assert process.returncode == -signal.SIGKILL
    assert not is_running(grandchild)
    assert process.stdout.closed
    assert process.stderr.closed


def test_a_grandchild_whose_parent_has_ended_is_gone_after_a_failure():
    seen = []
    with pytest.raises(KeyError):
        fail_with_a_grandchild("its parent's", "ends", seen)
    assert seen[0].returncode == 0
    assert not is_running(seen[1])


def read_all(seen):
    with processes.started("-c", WITH_A_GRANDCHILD, "its parent's", "waits", limit_s=1) as process:
        seen += process, *process.stdout.readlines()


def test_whoever_reads_from_what_hangs_is_not_left_waiting():
    seen = []
    with pytest.raises(AssertionError, match="still ran after 1 seconds"):
        read_all(seen)
    assert seen[0].returncode == -signal.SIGKILL
    assert len(seen) == 1 or not is_running(int(seen[1]))  # it may not even have begun


def start_a_grandchild(connection):
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
    connection.send(grandchild.pid)
    grandchild.wait()


def fail_with_a_child_of_multiprocessings(method, seen):
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    with receiver, sender, processes.ending_children():
        child = context.Process(target=start_a_grandchild, args=(sender,))
        child.start()
        assert receiver.poll(patience.LIMIT_S)
        seen += child, receiver.recv()
        assert is_running(seen[1])
        raise KeyError


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessings_children_are_gone_after_a_failure(method):
    before, seen = multiprocessing.active_children(), []
    with pytest.raises(KeyError):
        fail_with_a_child_of_multiprocessings(method, seen)
    child, grandchild = seen
    assert multiprocessing.active_children() == before
    assert not child.is_alive()
    assert not is_running(grandchild)


TWO_TESTS = """
import gc
from support import processes

def test_that_fails_amid():
    with processes.started("-c", "import time; print(flush=True); time.sleep(1e6)") as process:
        process.stdout.readline()
        assert not process.pid

def test_after_it():
    gc.collect()
"""


def test_a_failed_test_fails_no_other(tmp_path):
    """Not even by Python's warnings of a process and of pipes that are dropped, in whichever test they come."""
    (tmp_path / "test_two.py").write_text(TWO_TESTS)
    done = processes.run(
        "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-q", str(tmp_path), PYTHONPATH="tests"
    )
    assert "test_that_fails_amid" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


LIMIT_OF_ITS_OWN = re.compile(
    r"\bsubprocess\.(run|Popen|call|check_\w+)\(|\btimeout=\d|\b(join|wait|get|poll|communicate)\(\d|alarm\("
)


def test_no_other_file_starts_processes_or_sets_limits():
    files = [
        file
        for file in Path(__file__).parents[1].rglob("*.py")
        if file.name not in ("processes.py", "test_processes.py")
    ]
    assert files
    result = {file.name: match[0] for file in files if (match := LIMIT_OF_ITS_OWN.search(file.read_text()))}
    assert result == {}
