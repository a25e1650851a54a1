"""The perf suite where no GPU is needed: floors, records, the gate, the report, and the parts that run as processes."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from perf import charts, findings, measure, report, sweep, workloads
from perf.contenders import Contender, Functions
from perf.workloads import Point, Workload

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.unguarded

ROWS = Workload("rows", "columns", (64, 96), "test")
IMAGES = Workload("channels", "networks", (4, 6, 5, 5), "test", "channels_last")


def perf(*arguments, **options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "perf", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def records_of(*arguments):
    process = perf(*arguments, "--lines")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize(
    ("op", "mode", "dtype", "shape", "by_hand"),
    [
        # x and y, 2 bytes an element; weight and bias, 2 bytes a column.
        ("layer_norm", "forward", "bf16", (128, 1000), 2 * 128 * 1000 * 2 + 2 * 1000 * 2),
        # x, dy, dx; weight, dweight, dbias; mean and rstd, 4 bytes a row.
        ("layer_norm", "backward", "fp32", (10, 30), 3 * 300 * 4 + 3 * 30 * 4 + 2 * 10 * 4),
        # fp64 statistics for fp64 input.
        ("layer_norm", "backward", "fp64", (10, 30), 3 * 300 * 8 + 3 * 30 * 8 + 2 * 10 * 8),
        # x and y; fp32 weight and bias; two running statistics read and written.
        ("batch_norm", "forward", "bf16", (2, 3, 4, 4), 2 * 96 * 2 + 2 * 3 * 4 + 4 * 3 * 4),
        ("batch_norm", "backward", "bf16", (2, 3, 4, 4), 3 * 96 * 2 + 3 * 3 * 4 + 2 * 3 * 4),
        ("batch_norm_eval", "forward", "fp32", (2, 3, 4, 4), 2 * 96 * 4 + 2 * 3 * 4 + 2 * 3 * 4),
        ("batch_norm_eval", "backward", "fp32", (2, 3, 4, 4), 3 * 96 * 4 + 3 * 3 * 4 + 2 * 3 * 4),
    ],
)
def test_floor(op, mode, dtype, shape, by_hand):
    assert Point(op, mode, dtype, Workload(workloads.FAMILY[op], "", shape, "")).floor_bytes == by_hand


def test_workloads_are_distinct_and_the_sweep_is_of_one_size():
    assert len(set(workloads.WORKLOADS)) == len(workloads.WORKLOADS)
    assert {w.elements for w in workloads.WORKLOADS if w.group == "columns"} == {workloads.SWEEP_ELEMENTS}
    quick, full = workloads.points(), workloads.points(quick=False)
    assert set(quick) < set(full)
    assert quick[0].workload.landmark


class FakeTimer:
    """Calls take 10, 20, 30 ... µs in turn: no clock is read."""

    device = "cpu"

    def __init__(self):
        self.calls = 0

    def round(self, entries, backlog_us):
        self.calls += 1
        return [10.0 * (place + 1) + self.calls / 1000 for place, _ in enumerate(entries)]

    def host(self, entry):
        return 3.0

    def synchronize(self):
        pass


def off_by_a_percent(x, *rest):
    return 1.01 * functional.layer_norm(x, *rest)


def fails(*_):
    raise ValueError("no such shape\n\nand more")


TORCH = Contender("torch", lambda: Functions(functional.layer_norm, functional.batch_norm))
CONTENDERS = [
    TORCH,
    Contender("wrong", lambda: Functions(off_by_a_percent)),
    Contender("lax", lambda: Functions(off_by_a_percent), accuracy=1e5),
    Contender("fails", lambda: Functions(fails)),
    Contender("other", lambda: Functions(None, functional.batch_norm)),
]


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_every_contender_has_a_record_and_only_right_ones_are_timed(mode):
    point = Point("layer_norm", mode, "fp32", ROWS)
    records = measure.measure_point(point, CONTENDERS, FakeTimer(), seconds=0)
    by_name = {record["contender"]: record for record in records}
    statuses = {name: record["status"] for name, record in by_name.items()}
    assert statuses == {"torch": "ok", "wrong": "wrong", "lax": "ok", "fails": "error", "other": "unsupported"}
    assert by_name["fails"]["message"] == "ValueError: no such shape ... and more"
    assert "is allowed" in by_name["wrong"]["message"]
    assert "median_us" not in by_name["wrong"]
    assert by_name["lax"]["median_us"] == pytest.approx(20, abs=0.1)
    assert by_name["torch"]["gbps"] == pytest.approx(point.floor_bytes / by_name["torch"]["median_us"] / 1e3)
    assert set(by_name["torch"]["errors"]) == ({"y"} if mode == "forward" else {"dx", "dweight", "dbias"})
    assert 0 < by_name["torch"]["errors"]["y" if mode == "forward" else "dx"] < 2**-17
    assert by_name["torch"]["repetitions"] == measure.MINIMUM_ROUNDS


@pytest.mark.parametrize("op", ["batch_norm", "batch_norm_eval"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_the_gate_knows_batch_norm_and_its_running_statistics(op, mode):
    (record,) = measure.measure_point(Point(op, mode, "fp32", IMAGES), [TORCH], FakeTimer(), seconds=0)
    assert record["status"] == "ok"
    assert ("running_var" in record["errors"]) == (op == "batch_norm" and mode == "forward")


def test_nan_never_passes_the_gate():
    wanted = {"y": torch.ones(4, dtype=torch.float64)}
    found = {"y": torch.tensor([1.0, 1.0, math.nan, 1.0])}
    assert measure.verdict(measure.errors(found, wanted), 1.0)


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
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: told.append("flush"))
    entry = measure.Candidate("test", lambda: told.append("prepare"), lambda _: told.append("call"))
    assert timer.round([entry, entry], [50, 100]) == [250, 250]
    assert told == [
        *("prepare", "flush", "wait 100000", "event", "call", "event"),
        *("prepare", "flush", "wait 200000", "event", "call", "event"),
        "synchronize",
    ]
    assert timer.host(entry) >= 0


def test_copy_bandwidth_counts_bytes_read_and_written():
    assert measure.copy_bandwidth(FakeTimer(), size=5000, seconds=0) == pytest.approx(1, rel=0.01)


@pytest.fixture
def gpu_of_the_test(monkeypatch):
    monkeypatch.setattr(measure, "CudaTimer", FakeTimer)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda timer: 1000.0)
    monkeypatch.setattr(sweep, "CONTENDERS", [TORCH, Contender("absent", Functions, ("no_such_module",))])


def test_timed_run_keeps_what_it_measured(gpu_of_the_test, monkeypatch, tmp_path):
    points = [Point("layer_norm", "forward", dtype, ROWS) for dtype in ("fp32", "bf16", "fp16")]
    real = measure.measure_point

    def interrupted(point, *rest):
        if point.dtype == "fp16":
            raise KeyboardInterrupt
        return real(point, *rest)

    monkeypatch.setattr(measure, "measure_point", interrupted)
    path = tmp_path / "timing.json"
    results = sweep.timed_run(points, path, 60, quick=True, tests=False, say=lambda _: None)
    assert json.loads(path.read_text()) == results
    assert [record["dtype"] for record in results["records"]] == ["fp32", "bf16"]
    assert results["stopped"] == "interrupted"
    assert results["unreached"] == ["layer_norm forward fp16 64x96"]
    assert results["copy_gbps"] == 1000
    assert results["contenders"]["absent"].startswith("missing (ModuleNotFoundError")


def test_timed_run_ends_with_its_time(gpu_of_the_test, tmp_path):
    points = [Point("layer_norm", "forward", "fp32", ROWS)]
    results = sweep.timed_run(points, tmp_path / "timing.json", 0, quick=True, tests=False, say=lambda _: None)
    assert results["records"] == []
    assert len(results["unreached"]) == 1


def synthetic(seed=0):
    """A results file such as a GPU would give; every figure in it is made up."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for point in workloads.points():
        for contender, share in (("triton_norm", 0.9), ("torch", 0.5), ("torch.compile", 0.75)):
            record = {**point.describe(), "contender": contender, "status": "ok", "message": ""}
            if contender == "torch.compile" and not point.workload.landmark:
                records.append(record | {"status": "skipped", "message": "made up"})
                continue
            if contender == "torch" and point.workload.shape[-1] == 1023:
                records.append(record | {"status": "wrong", "message": "made up"})
                continue
            noise = 0.95 + 0.1 * float(torch.rand((), generator=generator))
            gbps = 3000 * share * noise * point.floor_bytes / (point.floor_bytes + (8 << 20))
            median = point.floor_bytes / gbps / 1e3
            record |= {"median_us": median, "p20_us": 0.97 * median, "p80_us": 1.05 * median, "host_us": 9.0}
            records.append(record | {"gbps": gbps, "repetitions": 11, "errors": {"y": 1e-3}})
    environment = {"GPU": "made-up GPU", "torch": "0", "triton": "0", "date": "never"}
    run = {"kind": "timing", "format": 1, "environment": environment, "copy_gbps": 3000.0}
    return run | {"records": records, "contenders": {"torch": "torch 0"}, "unreached": []}


class Page(HTMLParser):
    VOID = ("meta", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.counts, self.links = [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_of_a_results_file_has_every_figure_and_nothing_outside(tmp_path):
    run = synthetic()
    source = tmp_path / "made-up.json"
    source.write_text(json.dumps(run))
    found = findings.Findings({"torch": "0", "triton": "0", "date": "never"})
    report.load([source], found)
    out = tmp_path / "report"
    text = report.write(found, out).read_text()
    page = Page(text)
    pictures = sorted(path.name for path in out.glob("*.png"))
    expected = [
        f"throughput-0-{op}-{mode}-{dtype}.png"
        for op in workloads.FAMILY
        for mode in workloads.MODES
        for dtype in ("bf16", "fp32")
    ]
    assert pictures == sorted([*expected, "anatomy.png"])
    assert page.counts["img"] == len(pictures)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "http" not in text.replace("http-equiv", "")
    assert findings.NOT_TIMED in text
    assert "made-up GPU" in text
    assert text.count("<tr>") > len(run["records"])
    assert json.loads((out / "results.json").read_text())["timed"] == [run]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(run["records"])
    assert rows[0]["shape"] == "x".join(map(str, run["records"][0]["shape"]))
    assert not report.has_failed(found)


def test_speedups_are_over_shared_points_only():
    about = {"op": "layer_norm", "mode": "forward", "dtype": "bf16", "layout": "contiguous", "status": "ok"}
    records = [
        about | {"shape": [1, 2], "contender": "torch", "median_us": 30.0},
        about | {"shape": [1, 2], "contender": "triton_norm", "median_us": 10.0},
        about | {"shape": [1, 3], "contender": "torch", "median_us": 30.0},
    ]
    assert findings.speedups(records, "torch") == [3.0]


def test_a_file_that_is_not_results_is_a_problem_not_a_crash(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    found = findings.Findings({"torch": "0", "triton": "0", "date": "never"})
    report.load([tmp_path / "other.json", tmp_path / "absent.json"], found)
    assert len(found.problems) == 2
    assert report.has_failed(found)


@pytest.mark.parametrize(
    ("value", "text"), [(1024, "1K"), (1000, "1000"), (262144, "256K"), (1 << 20, "1M"), (1.5, "1.5")]
)
def test_numbers_on_axes(value, text):
    assert charts.short(value) == text


def test_traffic_of_layer_norm_reads_x_once_and_writes_y_once():
    forward, backward = records_of("traffic", "--points", "2")
    x_bytes = math.prod(forward["shape"]) * 2
    assert (forward["op"], forward["mode"], forward["dtype"]) == ("layer_norm", "forward", "bf16")
    assert forward["bytes"]["bulk"] == {"loaded": x_bytes, "stored": x_bytes}
    assert forward["bytes"]["partials"] == {"loaded": 0, "stored": 0}
    assert forward["footprint_bytes"] == forward["floor_bytes"]
    assert backward["bytes"]["bulk"] == {"loaded": 2 * x_bytes, "stored": x_bytes}
    assert backward["bytes"]["partials"]["loaded"] == backward["bytes"]["partials"]["stored"] > 0
    for record in (forward, backward):
        assert record["status"] == "ok"
        assert sum(launch["loaded"] + launch["stored"] for launch in record["launches"]) == record["total_bytes"]


def test_resources_of_a_kernel_on_gpus_that_are_not_here():
    pytest.importorskip("triton")
    records = {record["target"]: record for record in records_of("resources", "--points", "1")}
    assert set(records) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    hopper = records["sm_90"]
    assert hopper["kernel"] == "rows_forward_kernel"
    assert hopper["shape"][-1] == 1000
    assert hopper["loads"].keys() == hopper["stores"].keys() == {"128"}
    for record in records.values():
        assert record["spill_stores"] == record["spill_loads"] == 0
        assert 0 < record["registers"] <= 128
        assert 0 < record["resident_warps"] <= record["possible_warps"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run would measure")
def test_run_without_a_gpu_exits_2_with_one_sentence(tmp_path):
    process = perf("run", "--out", str(tmp_path))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert errors.count("\n") == errors.count(".") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the timed part would come first")
def test_interrupted_run_reports_what_is_done(tmp_path):
    process = perf("--out", str(tmp_path / "out"))
    for line in process.stdout:
        if "records" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["interrupted"]
    assert len(found["traffic"]) + len(found["resources"]) > 0
    assert "interrupted" in (tmp_path / "out" / "index.html").read_text()
