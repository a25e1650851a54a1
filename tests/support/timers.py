"""A stand-in for a clock."""

from triton_norm.tuning.limits import INTERPRETED


class FakeTimer:
    """Calls take 10, 20, 30 ... µs in turn: no clock is read."""

    device = "cpu" if INTERPRETED else "cuda"

    def __init__(self):
        self.calls = 0

    def round(self, entries, backlog_us):
        self.calls += 1
        return [10.0 * (place + 1) + self.calls / 1000 for place, _ in enumerate(entries)]

    def host(self, entry):
        return 3.0

    def kernels(self, entry):
        return [f"kernel of {entry.name}"]

    def synchronize(self):
        pass
