"""The perf suite's report: derived figures, pictures and the page, from results that are made up."""

import csv
import json
from html.parser import HTMLParser

import pytest
import torch

from perf import charts, findings, report, workloads
from perf.points import FAMILY, MODES

pytestmark = pytest.mark.unguarded


def synthetic(seed=0):
    """A results file such as a GPU would give; every figure in it is made up."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for point in workloads.points():
        for contender, share in (("triton_norm", 0.9), ("torch", 0.5), ("torch.compile", 0.75), ("other", 0.6)):
            record = {**point.describe(), "contender": contender, "status": "ok", "message": ""}
            if contender == "other" and point.op != "rms_norm":
                records.append(record | {"status": "unsupported", "message": "made up"})
                continue
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
        f"throughput-0-{op}-{mode}-{dtype}.png" for op in FAMILY for mode in MODES for dtype in ("bf16", "fp32")
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


def test_the_report_says_what_is_less_exact_than_torch(tmp_path):
    about = {"op": "rms_norm", "dtype": "bf16", "columns": 64, "status": "ok", "message": ""}
    found = findings.Findings({"torch": "0", "triton": "0", "date": "never"})
    found.numerics = [
        about | {"data": "easy", "y": {"triton_norm": 0.501, "torch": 0.499}, "dx": {"triton_norm": 1.0, "torch": 2.0}},
        about | {"data": "hard", "y": {"triton_norm": 3.0, "torch": 0.5}, "dx": {"triton_norm": 20.0, "torch": None}},
    ]
    worse, far = findings.shortfalls(found)
    assert worse.startswith("RMSNorm bf16 y: less exact than torch on 1 of 2 inputs, at worst 3.00 ulp")
    assert far == "RMSNorm bf16 dx: no worse than torch, and far from exact all the same: hard (up to 20.00 ulp)"
    text = report.write(found, tmp_path).read_text()
    Page(text)
    assert text.count('class="warn"') == 1
    assert "3 of 4" in text
    assert "not finite" in text
    assert (tmp_path / "results.csv").read_text().count("numerics") == 2
    assert not report.has_failed(found)
