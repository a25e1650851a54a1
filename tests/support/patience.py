"""The time that a test waits before it calls something hung.

No test is decided by a number of seconds. Whoever waits waits up to LIMIT_S, which only ends what would last for ever.
Speed is tested as a ratio to something that is timed in turn with it: see test_host_time.py and test_page.py.
"""

import time
from collections.abc import Callable

QUIET_S = 0.06  # seconds that `_work` takes on a quiet x86-64 machine with Python 3.11
QUIET_LIMIT_S = 20 * 60  # several times what any process or thread of a test takes there


def _work() -> float:
    """Returns the seconds that a fixed piece of Python takes here and now, beside all that this machine does."""
    began = time.perf_counter()
    counts: dict[int, int] = {}
    for number in range(500_000):
        counts[number % 97] = counts.get(number % 97, 0) + number
    return time.perf_counter() - began


LIMIT_S = QUIET_LIMIT_S * max(1.0, _work() / QUIET_S)


def until(holds: Callable[[], bool]) -> bool:
    """Returns whether it holds, now or within LIMIT_S."""
    give_up = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True
