"""`perf tune` on a GPU that is not there, with times that are made up."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from perf import measure, tune, tuner
from perf.points import Point, Workload
from support import spaces
from support.gpus import H100
from triton_norm import launch
from triton_norm.tuning.row_spaces import RowWork, rows_forward

FILE = "nvidia-unheard-of-9.json"
SMALL, LARGE = (Workload("rows", "", (n_rows, 40), "") for n_rows in (3, 9))
FORWARD, BACKWARD = "rows_forward_kernel", "rows_backward_kernel"
ROWS = [Point("layer_norm", "forward", "fp32", workload) for workload in (SMALL, LARGE)]
IMAGES = Workload("channels", "", (2, 3, 4, 8), "")


class MadeUpTimes:
    """A clock that tells each call's time from its name: µs where part of the name is in `times`, otherwise 50."""

    device = "cpu"

    def __init__(self, times=()):
        self.times = dict(times)
        self.rounds = 0

    def round(self, entries, backlog_us):
        self.rounds += 1
        return [self._of(entry.name) for entry in entries]

    def _of(self, name):
        return next((us for (workload, config), us in self.times.items() if workload in name and config in name), 50.0)

    def host(self, entry):
        return 3.0

    def kernels(self, entry):
        return []

    def synchronize(self):
        pass


@contextlib.contextmanager
def unknown_gpu(folder: Path) -> Iterator[Path]:
    """A GPU that nothing is known of, whose kernels have several configs; yields where its file would be."""
    tuned = folder / "tuned"
    tuned.mkdir()
    with mock.patch.object(measure, "WARMUPS", 1), spaces.unknown_gpu(tuned):
        yield tuned / FILE


def tuned(points, out, timer=None, **options):
    return tune.run(points, out / "tuned", out, math.inf, lambda line: None, timer or MadeUpTimes(), **options)


def forward_space():
    return rows_forward(RowWork(40, ("float32",), 4, 4), H100)


def times_of(rows):
    """Takes (workload, number of a config, µs) of the forward's space."""
    return {(workload, tuner.text(forward_space().configs[number])): us for workload, number, us in rows}


ALONE = [
    ("3x40", 0, 10.0),
    ("3x40", 1, 12.0),
    ("3x40", 2, 40.0),
    ("9x40", 0, 40.0),
    ("9x40", 1, 12.0),
    ("9x40", 2, 10.0),
]


def choices_in(file):
    return json.loads(file.read_text())["choices"]


def record_of(results, kernel):
    (record,) = (record for record in results["keys"] if record["kernel"] == kernel)
    return record


def failing(monkeypatch, fails, then=None):
    """Launches for which `fails(arguments by name, config)` raise or, with `then`, go on to do that."""
    start = launch.start

    def patched(kernel, count, arguments, constants, config):
        inputs = dict(zip(kernel.arg_names, arguments, strict=False))
        if not fails(inputs, config):
            return start(kernel, count, arguments, constants, config)
        if then is None:
            raise RuntimeError("out of resource: shared memory")
        started = start(kernel, count, arguments, constants, config)
        then(inputs)
        return started

    monkeypatch.setattr(launch, "start", patched)


def n_rows(inputs):
    return inputs["x_ptr"].shape[0]
