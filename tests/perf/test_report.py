"""The perf suite's report: derived figures, pictures and the page, from results that are made up."""

import re
import socket
from html.parser import HTMLParser

import pytest

from perf import charts, findings, report, shortfalls, workloads
from perf.charts.style import short
from perf.page.blocks import slug
from perf.points import MODES
from support import results

pytestmark = pytest.mark.unguarded


class Page(HTMLParser):
    VOID = ("meta", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.counts, self.links, self.names = [], {}, [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.names |= {value for name, value in attributes if name == "id"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_of_a_results_file_has_every_figure_and_nothing_outside(tmp_path):
    ops = ("rms_norm", "batch_norm")
    run = results.timing(workloads.points(dtypes=("bf16",), ops=ops))
    static = {"traffic": [results.traffic()], "resources": [results.resources()], "numerics": [results.numerics()]}
    source = results.write(tmp_path / "made-up.jsonl", run, **static)
    result = results.findings()
    report.load([source], result)
    assert result.timed == [run]
    out = tmp_path / "report"
    text = report.write(result, out).read_text()
    shown = Page(text)
    assert result.problems == []
    assert [path.name for path in out.iterdir()] == ["index.html"]
    throughputs, shares, errors, anatomy = len(ops) * len(MODES), 1, 1, 1
    assert shown.counts["img"] == throughputs + shares + errors + anatomy
    assert all(link.startswith(("data:", "#")) for link in shown.links)
    assert {link[1:] for link in shown.links if link.startswith("#")} <= shown.names
    assert not re.search("https?:", text)
    assert findings.NOT_TIMED in text
    assert "made-up GPU" in text
    assert "outside tolerance" in text
    assert text.count("<tr>") > len(run["records"])
    assert not report.has_failed(result)


def test_a_run_with_few_facts_is_shown_too(tmp_path):
    run = results.timing(workloads.points(dtypes=("bf16",), ops=("rms_norm",), modes=("forward",)))
    for name in ("contenders", "unreached"):
        del run[name]
    run["steps"] = []
    for record in run["records"]:
        record.pop("kernels", None)
    result = results.findings()
    result.timed = [run]
    text = report.write(result, tmp_path).read_text()
    assert result.problems == []
    assert slug("Whole models") not in Page(text).names


def test_a_picture_that_cannot_be_drawn_is_a_problem_on_the_page(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no room in /a/folder/of/this/machine/file")

    monkeypatch.setattr(charts, "errors", fail)
    result = results.findings()
    result.numerics = [results.numerics()]
    text = report.write(result, tmp_path).read_text()
    assert "the picture of the errors could not be drawn: OSError: no room in …/file" in text
    assert "normal" in text
    assert report.has_failed(result)


def test_the_page_tells_nothing_of_the_machine(tmp_path):
    result = results.findings()
    message = f"error in {tmp_path}/a.py, (/usr/lib/b.so): 48/64 of x/y at ./c"
    result.traffic = [results.traffic(), results.traffic() | {"status": "error", "message": message}]
    text = report.write(result, tmp_path).read_text()
    assert "error in …/a.py, (…/b.so): 48/64 of x/y at ./c" in text
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text or len(socket.gethostname()) < 6


def test_speedups_are_over_shared_points_only():
    about = {"op": "layer_norm", "mode": "forward", "dtype": "bf16", "layout": "contiguous", "status": "ok"}
    records = [
        about | {"shape": [1, 2], "contender": "torch", "median_us": 30.0},
        about | {"shape": [1, 2], "contender": "triton_norm", "median_us": 10.0},
        about | {"shape": [1, 3], "contender": "torch", "median_us": 30.0},
    ]
    assert findings.speedups(records, "torch") == [3.0]


def test_a_file_that_is_not_results_is_a_problem_not_a_crash(tmp_path):
    (tmp_path / "other.jsonl").write_text("[]\n")
    result = results.findings()
    report.load([tmp_path / "other.jsonl", tmp_path / "absent.jsonl"], result)
    assert len(result.problems) == 2
    assert report.has_failed(result)


@pytest.mark.parametrize(
    ("value", "text"), [(1024, "1K"), (1000, "1000"), (262144, "256K"), (1 << 20, "1M"), (1.5, "1.5")]
)
def test_numbers_on_axes(value, text):
    assert short(value) == text


def test_the_report_says_what_is_less_exact_than_torch(tmp_path):
    easy, hard = results.numerics("easy", 0.501, 0.499), results.numerics("hard", 3.0, 0.5)
    easy["dx"], hard["dx"] = {"triton_norm": 1.0, "torch": 2.0}, {"triton_norm": 20.0, "torch": None}
    result = results.findings()
    result.numerics = [easy, hard]
    worse, far = (cause.line for cause in shortfalls.shortfalls(result)["Exactness"])
    assert worse == (
        "RMSNorm bf16 y: less exact than torch on 1 of 2: 3.00 ulp where torch has 0.50 ulp (hard, 64 columns)"
    )
    assert far.startswith("RMSNorm bf16 dx: no worse than torch, and far from exact all the same: 20.00 ulp")
    text = report.write(result, tmp_path).read_text()
    Page(text)
    assert text.count('class="warn"') == 1
    assert "3 of 4" in text
    assert "not finite" in text
    assert not report.has_failed(result)


def made(contender, median_us, shape=(65536, 1024), op="layer_norm", mode="forward", layout="contiguous", **more):
    """A timed record whose floor takes 100 µs at the copy bandwidth of `run`."""
    about = {"op": op, "mode": mode, "dtype": "bf16", "layout": layout, "shape": list(shape), "message": ""}
    about |= {"floor_bytes": 100_000_000, "apart_floor_bytes": 150_000_000, "contender": contender, "status": "ok"}
    return about | {"median_us": median_us} | more


def run(*records, **more):
    about = {"environment": {"GPU": "made-up GPU"}, "copy_gbps": 1000.0, "records": list(records), "steps": []}
    return about | {"contenders": {"QuACK": "missing (no such module)", "torch": "torch 0"}} | more


def falling_short(*records, **more):
    result = results.findings()
    result.timed = [run(*records, **more)]
    return {title: [cause.line for cause in causes] for title, causes in shortfalls.shortfalls(result).items()}


def test_what_is_slower_than_others_falls_short_the_worst_first():
    small = (1024, 1024)
    result = falling_short(
        made("triton_norm", 100.0),
        made("triton_norm", 10.0, small),
        made("triton_norm", 100.0, mode="backward"),
        made("torch", 90.0),
        made("torch", 50.0, mode="backward"),
        made("torch.compile", 99.0),
        made("torch.compile", 9.6, small),
        made("Liger-Kernel", 9.4, small),
    )
    assert result["Too slow against torch eager"] == [
        "LayerNorm backward bf16: geometric mean: 0.50× torch's speed where 2× is wanted (1 point)",
        "LayerNorm backward bf16: slower than torch on 1 of 1: 0.50× its speed (65536×1024)",
        "LayerNorm forward bf16: slower than torch on 1 of 1: 0.90× its speed (65536×1024)",
    ]
    assert [line.partition(": ")[2] for line in result["Too slow against others"]] == [
        "slower than Liger-Kernel up to 16 MiB on 1 of 1: 0.94× its speed (1024×1024)",
        "slower than torch.compile above 16 MiB on 1 of 1: 0.99× its speed (65536×1024)",
    ]
    assert result["The timed run"] == ["QuACK: missing (no such module)"]


@pytest.mark.parametrize(
    ("record", "least"),
    [
        (made("triton_norm", 1.0), 0.95),
        (made("triton_norm", 1.0, (1 << 18, 256)), 0.90),
        (made("triton_norm", 1.0, (1 << 15, 1024)), None),  # fewer elements than the bar is stated for
        (made("triton_norm", 1.0, (1 << 18, 256), mode="backward"), 0.75),
        (made("triton_norm", 1.0, op="rms_norm_residual"), 0.95),
        (made("triton_norm", 1.0, op="rms_norm_residual", mode="backward"), None),
        (made("triton_norm", 1.0, (256, 64, 112, 112), op="batch_norm"), 0.80),
        (made("triton_norm", 1.0, (256, 64, 112, 112), op="batch_norm", layout="channels_last"), 0.90),
        (made("triton_norm", 1.0, (32, 64, 56, 56), op="batch_norm"), None),
    ],
)
def test_bars_are_about_the_points_that_they_are_stated_for(record, least):
    bar = shortfalls.bar_of(record)
    assert (bar.least if bar else None) == least


def test_a_share_of_the_copy_bandwidth_below_its_bar_falls_short():
    channels_last = made("triton_norm", 160.0, (256, 64, 112, 112), op="batch_norm", layout="channels_last")
    title = "Below the bars for a share of the copy bandwidth"
    fast = made("triton_norm", 104.0, (32768, 2048))
    (line,) = falling_short(channels_last, fast, made("triton_norm", 125.0), made("torch", 250.0))[title]
    assert line.startswith("LayerNorm forward bf16: below the bar on 1 of 2: 80% of the copy bandwidth")
    assert line.endswith("where 95% is wanted (65536×1024)")
    two_launches = channels_last | {"median_us": 200.0}
    (line,) = falling_short(two_launches)[title]
    assert "75% of the copy bandwidth counted as two launches where 90% is wanted" in line


def test_a_cause_is_told_once_for_all_inputs_alike():
    error = {"status": "error", "message": "made up"}
    steps = [{"model": "BERT", "dtype": "bf16", "contender": "triton_norm"} | error]
    result = falling_short(
        made("torch", 1.0) | error,
        made("torch", 1.0, (65536, 2048)) | error,
        steps=steps,
        tests={"passed": False, "summary": "1 failed"},
        unreached=["a point"],
    )
    assert result["Failed or outside our tolerance"] == [
        "triton_norm: made up (training step of BERT in bf16)",
        "torch: made up in 2 cases (LayerNorm forward 65536×1024 bf16)",
    ]
    assert result["The timed run"][:2] == ["the tests did not pass: 1 failed", "1 point not reached in the time given"]
    counted = results.findings()
    shapes = [(32, 64, 8, 8), (32, 64, 16, 16)]
    counted.traffic = [
        results.traffic("batch_norm", "backward", shape) | {"total_bytes": 10**9, "again_bytes": 0} for shape in shapes
    ]
    (cause,) = shortfalls.shortfalls(counted)["Bytes moved"]
    assert cause.text == "BatchNorm, training backward moves more than 1.25 times the floor's bytes"
    assert [case.where for case in cause.cases] == ["32×64×8×8 NCHW bf16", "32×64×16×16 NCHW bf16"]


def test_a_slower_step_falls_short():
    times = {"torch": 100.0, "triton_norm": 110.0, "torch.compile": 90.0, "triton_norm, compiled": 80.0}
    about = {"model": "BERT", "dtype": "bf16", "status": "ok", "message": ""}
    steps = [about | {"contender": who, "median_us": median} for who, median in times.items()]
    assert falling_short(steps=steps)["Slower steps of whole models"] == [
        "a step with triton_norm slower than with torch: 0.91× its speed (BERT)"
    ]
