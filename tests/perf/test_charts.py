"""The pictures, of made-up results: each is drawn whatever was found."""

import random
import re
from itertools import cycle

import pytest

from perf import charts, workloads
from perf.charts import forms, style
from perf.ops import FAMILY
from perf.points import PASSES, Point

pytestmark = pytest.mark.unguarded

NAMES = list(style.STYLES)
SOME = ["triton_norm", "torch", "torch.compile", "other"]
FAIL = {"status": "error", "message": "RuntimeError: made up"}
ROW_CONTENDERS = ("Liger-Kernel", "QuACK", "flash-linear-attention", "FlagGems")


def timings(contenders, modes=PASSES, ops=tuple(FAMILY), seed=0):
    """Records such as a timed run makes; torch's share of the bandwidth is half, the others' are about it."""
    draws = random.Random(seed)
    records = []
    for known in workloads.points(ops=ops):
        for mode in modes if known.mode == "forward" else ():
            point = Point(known.op, mode, known.dtype, known.workload)
            for number, contender in enumerate(contenders):
                record = {**point.describe(), "contender": contender, "status": "ok", "message": ""}
                if contender in ROW_CONTENDERS and FAMILY[point.op] != "rows":
                    records.append(record | {"status": "unsupported", "message": "made up"})
                elif draws.random() < 0.04:
                    records.append(record | FAIL)
                else:
                    fraction = 0.92 - 0.065 * number if contender != "torch" else 0.5
                    gbps = 4000 * fraction * draws.uniform(0.93, 1.07)
                    gbps *= point.floor_bytes / (point.floor_bytes + (8 << 20))
                    median = point.floor_bytes / gbps / 1e3
                    times = {"median_us": median, "p20_us": 0.97 * median, "p80_us": 1.05 * median, "host_us": 9.0}
                    records.append(record | times | {"gbps": gbps})
    return records


def with_forms(records, blocks):
    """Gives our points launches: clusters of these blocks in turn, and two launches where they are 1."""
    configs = cycle([{"num_ctas": n}] if n > 1 else [{}, {}] for n in blocks)
    return [
        r | {"launches": [{"kernel": "made_up", "config": config} for config in next(configs)]}
        if r["contender"] == "triton_norm"
        else r
        for r in records
    ]


def all_failed(records):
    return [record | FAIL for record in records]


def exactness():
    records = []
    for op in ("layer_norm", "rms_norm"):
        for dtype in ("fp32", "bf16"):
            for data, ours in (("normal", 0.5), ("constant rows", 0.0), ("as large as the type goes", None)):
                for columns in (64, 4096):
                    error = {"triton_norm": ours, "torch": 700.0}
                    about = {"op": op, "dtype": dtype, "data": data, "columns": columns, "status": "ok", "message": ""}
                    records.append(about | {"y": error, "dx": error})
    return [*records, {**about, "data": "normal", **FAIL}]


def is_drawn(figure):
    return style.encoded(figure)[8:12] == b"WEBP"


def labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("contenders", [NAMES[:1], NAMES], ids=("one", "all"))
@pytest.mark.parametrize("op", ["rms_norm", "batch_norm"])
def test_throughput(contenders, op):
    records = [r for r in timings(contenders, ("forward_backward",), (op,)) if r["dtype"] == "bf16"]
    figure = charts.throughput(records, 4100.0)
    assert is_drawn(figure)
    assert labels(figure)[0] == "triton_norm"
    assert is_drawn(charts.throughput(all_failed(records), None))


@pytest.mark.parametrize("contenders", [NAMES[:1], NAMES], ids=("one", "all"))
def test_shares_and_speedups(contenders):
    records = timings(contenders)
    for figure in (charts.shares(records, 4100.0), charts.over_rivals(records)):
        assert is_drawn(figure)
    assert labels(charts.shares(records, 4100.0)) == [*contenders, "copy, 4,100 GB/s"]


@pytest.mark.parametrize("records", [all_failed(timings(SOME, ops=("rms_norm",))), []], ids=("failed", "none"))
def test_shares_and_speedups_of_nothing(records):
    assert is_drawn(charts.shares(records, 4100.0))
    assert is_drawn(charts.over_rivals(records))


def test_a_median_is_drawn_only_of_as_many_points_as_ours():
    """A median of few points would say nothing beside those of others."""
    records = [r for r in timings(SOME[:2], ("forward",), ("rms_norm",)) if r["dtype"] == "bf16"]
    few = [r for r in records if r["contender"] == "triton_norm" or r["shape"] == [16384, 768]]
    marks = [len(charts.shares(chosen, 4100.0).axes[0].lines) for chosen in (records, few)]
    assert marks[0] - marks[1] == 1


@pytest.mark.parametrize("records", [exactness(), all_failed(exactness())], ids=("some", "failed"))
def test_every_panel_of_errors_has_tick_labels(records):
    figure = charts.errors(records)
    assert is_drawn(figure)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            assert any(label.get_text() and label.get_visible() for label in axis.get_ticklabels())


def marks(figure, label):
    """Returns the places of the marks of a form."""
    lines = [line for ax in figure.axes for line in ax.lines if line.get_label() == label]
    return [place for line in lines for place in line.get_xydata().tolist()]


@pytest.mark.parametrize("op", ["rms_norm", "batch_norm"])
def test_forms_of_our_launches_are_marked_where_some_are_clusters(op):
    """Draws some 20 points, 3 in 4 of them clusters; a failed one, and those of other contenders, have no mark."""
    records = [r for r in timings(SOME, ("forward",), (op,)) if r["dtype"] == "bf16"]
    records = with_forms(records, (2, 4, 8, 1))
    right = [r for r in records if r["contender"] == "triton_norm" and r["status"] == "ok"]
    n_blocks = [r["launches"][0]["config"].get("num_ctas", 1) for r in right]
    clusters = [str(n) for n in n_blocks if n > 1]
    counts = len(clusters), n_blocks.count(1)
    assert min(counts) > 2
    figure = charts.throughput(records, 4100.0)
    assert is_drawn(figure)
    assert (len(marks(figure, forms.NUMBERED)), len(marks(figure, forms.TWICE))) == counts
    assert {y for _, y in marks(figure, forms.NUMBERED)} <= {r["gbps"] for r in right}
    assert sorted(text.get_text() for ax in figure.axes for text in ax.texts) == sorted(clusters)
    figure = charts.shares(records, 4100.0)
    assert (len(marks(figure, forms.CLUSTER)), len(marks(figure, forms.TWICE))) == counts
    assert set(labels(figure)) == {*SOME, forms.CLUSTER, forms.TWICE, "copy, 4,100 GB/s"}
    (text, *_) = [text.get_text() for text in charts.over_rivals(records).axes[0].texts]
    n_points, n_clusters = map(int, re.fullmatch(r" *[\d.]+× \((\d+), (\d+) clusters\)", text).groups())
    assert 0 < n_clusters <= min(n_points - 1, len(clusters))


@pytest.mark.parametrize("blocks", [(1,), None], ids=("two launches", "not recorded"))
def test_nothing_tells_of_forms_without_a_cluster(blocks):
    records = timings(SOME, ("forward",), ("batch_norm",))
    records = records if blocks is None else with_forms(records, blocks)
    for figure in (charts.throughput(records, None), charts.shares(records, 4100.0), charts.over_rivals(records)):
        assert not {forms.CLUSTER, forms.NUMBERED, forms.TWICE} & set(labels(figure))
        assert not any("cluster" in text.get_text() for ax in figure.axes for text in ax.texts)


def test_contenders_have_styles_of_their_own():
    styles = style.styles_of([*NAMES, "one more", "and another"])
    assert len({each.colour for each in styles.values()}) == len({each.marker for each in styles.values()}) == 14
    assert style.in_order(["other", "torch", "triton_norm"]) == ["triton_norm", "torch", "other"]
