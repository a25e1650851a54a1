"""Timing where no GPU is needed: the order of events, calls in turn, and the remains of a run that fails."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from perf import calls, measure
from perf.contenders import Contender
from perf.ops import torch_functions, triton_norm_functions
from perf.points import Point, Workload
from support import processes
from support.timers import FakeTimer

pytestmark = pytest.mark.unguarded

ROWS = Workload("rows", "columns", (64, 96), "test")
TORCH = Contender("torch", torch_functions)


def test_summary_is_the_median_and_the_outer_fifths():
    assert measure.summary(range(101)) == {"median_us": 50, "p20_us": 20, "p80_us": 80}


class CpuTimer(measure.CudaTimer):
    device = "cpu"


def test_only_the_call_lies_between_the_events(monkeypatch):
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def elapsed_time(self, end):
            return 0.25

    properties = SimpleNamespace(L2_cache_size=1 << 10, clock_rate=2_000_000)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: told.append(f"wait {cycles}"))
    timer = CpuTimer()
    monkeypatch.setattr(torch, "amax", lambda *_, out: told.append("flush"))
    entry = calls.Candidate("test", lambda: told.append("prepare"), lambda _: told.append("call"))
    assert timer.round([entry, entry], [50, 100]) == [250, 250]
    assert told == [
        *("prepare", "flush", "wait 100000", "event", "call", "event"),
        *("prepare", "flush", "wait 200000", "event", "call", "event"),
        "synchronize",
    ]
    assert timer.host(entry) >= 0


def test_kernels_are_named_in_order(monkeypatch):
    def event(name, start, device=DeviceType.CUDA):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start))

    events = [event("second" * 100, 2), event("first", 1), event("host", 0, DeviceType.CPU)]
    running = []

    @contextmanager
    def profile(activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        running.append("began")
        yield SimpleNamespace(events=lambda: events)
        running.append("ended")

    monkeypatch.setattr(torch.profiler, "profile", profile)
    timer = FakeTimer()
    entry = calls.Candidate("test", lambda: running.append("prepared"), lambda _: running.append("ran"))
    assert measure.CudaTimer.kernels(timer, entry) == ["first", ("second" * 100)[: measure.KERNEL_NAME]]
    assert running == ["prepared", "began", "ran", "ended"]


def test_calls_take_turns_with_sets_of_inputs(monkeypatch):
    told = []
    entries = [[calls_of(name, told, number) for number in range(3)] for name in "ab"]
    monkeypatch.setattr(measure, "MAXIMUM_ROUNDS", 6)
    monkeypatch.setattr(measure, "MINIMUM_ROUNDS", 6)

    class Rounds(FakeTimer):
        def round(self, entries, backlog_us):
            for entry in entries:
                entry.run(entry.prepare())
            return super().round(entries, backlog_us)

    measure.time_interleaved(entries, Rounds(), 0)
    warm = len(told) - 12
    assert told[:warm] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert told[warm:] == ["a0", "b0", "a1", "b1", "a2", "b2"] * 2


def calls_of(name, told, number):
    return calls.Candidate(name, lambda: None, lambda _: told.append(f"{name}{number}"))


def test_each_set_of_inputs_is_another():
    first, second, third = measure._input_sets(Point("layer_norm", "forward", "fp32", ROWS), "cpu")
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(second.x, third.x)
    large = Workload("rows", "", (1 << 16, 1 << 16), "")
    assert measure.INPUT_BYTES // (large.elements * 4) == 0


def test_a_profiler_that_fails_leaves_the_figure(monkeypatch):
    def refuse(self, entry):
        raise RuntimeError("another profiler")

    monkeypatch.setattr(FakeTimer, "kernels", refuse)
    (record,) = measure.measure_point(Point("layer_norm", "forward", "fp32", ROWS), [TORCH], FakeTimer(), seconds=0)
    assert record["status"] == "ok"
    assert record["kernels"] == ["not told: RuntimeError: another profiler"]


def test_a_gpu_that_stops_answering_leaves_no_figure(monkeypatch):
    answers = iter([None, None])  # what the gate and the warm-up ask for

    def synchronize(self):
        if next(answers, self) is self:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(FakeTimer, "synchronize", synchronize)
    with pytest.raises(measure.Stopped, match="an illegal memory access") as stopped:
        measure.measure_point(Point("layer_norm", "forward", "fp32", ROWS), [TORCH], FakeTimer(), seconds=0)
    (record,) = stopped.value.records
    assert (record["status"], record["contender"]) == ("error", "torch")


def test_copy_bandwidth_counts_bytes_read_and_written():
    assert measure.copy_bandwidth(FakeTimer(), size=5000, seconds=0) == pytest.approx(1, rel=0.01)


def test_the_launches_of_our_calls_are_recorded():
    """The second point's forward is not timed, and so it is not among its launches."""
    ours = Contender("triton_norm", triton_norm_functions)
    for mode, kernels in (
        ("forward", ["rows_forward_kernel"]),
        ("backward", ["rows_backward_kernel", "rows_backward_finalise_kernel"]),
    ):
        point = Point("layer_norm", mode, "fp32", ROWS)
        mine, torchs = measure.measure_point(point, [ours, TORCH], FakeTimer(), seconds=0)
        assert [launch["kernel"] for launch in mine["launches"]] == kernels
        assert all(launch["config"]["num_warps"] > 0 for launch in mine["launches"])
        assert "launches" not in torchs


OVER_A_STUB = """
import tempfile
from pathlib import Path

import torch
import triton_norm
from perf.calls import launches_noted
from triton_norm.testing import stub_driver

if not stub_driver.missing():
    with tempfile.TemporaryDirectory() as folder, stub_driver.installed(Path(folder)) as launches:
        x = torch.randn(2, 64)
        for _ in range(3):
            triton_norm.rms_norm(x, (64,))
        with launches_noted() as noted:
            triton_norm.rms_norm(x, (64,))
        triton_norm.rms_norm(x, (64,))
        print(launches(), *[launch["kernel"] for launch in noted])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub would be a second driver")
def test_launches_that_start_compiled_kernels_directly_are_noted_too():
    printed = processes.output("-c", OVER_A_STUB)
    if not printed.strip():
        pytest.skip("the stub can't be built here")
    assert printed.split() == ["5", "rows_forward_kernel"]
