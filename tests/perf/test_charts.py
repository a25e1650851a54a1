"""The pictures, of made-up results: each is drawn whatever was found, and none of its texts covers another."""

import random
from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from perf import charts, workloads
from perf.charts import canvas
from perf.points import FAMILY, PASSES, Point

pytestmark = pytest.mark.unguarded

MACHINE = "made-up GPU · torch 0 · triton 0 · never"
NAMES = list(canvas.STYLES)
SOME = ["triton_norm", "torch", "torch.compile", "other"]
FAIL = {"status": "error", "message": "RuntimeError: made up, and as long as messages are $ {0} " + "again " * 40}
ROW_CONTENDERS = ("Liger-Kernel", "QuACK", "flash-linear-attention", "FlagGems")


@pytest.fixture(autouse=True)
def texts_are_apart(monkeypatch):
    """Of every picture that is saved here."""
    drawn = []
    draw, save = Text.draw, canvas.Canvas.save

    def noting(self, renderer):
        if self.get_visible() and self.get_text():
            drawn.append((self, Text.get_window_extent(self, renderer)))  # an annotation's own has its arrow
        draw(self, renderer)

    def checking(self, path):
        drawn.clear()
        found = save(self, path)
        boxes = {id(text): (text, box) for text, box in drawn if text.get_rotation() % 90 == 0}.values()
        covered = [
            (a.get_text(), b.get_text())
            for (a, one), (b, other) in combinations(boxes, 2)
            if one.padded(-0.5).overlaps(other.padded(-0.5))
        ]
        assert covered == []
        width, height = self.figure.get_size_inches() * canvas.DPI
        assert [t.get_text() for t, b in drawn if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height] == []
        return found

    monkeypatch.setattr(Text, "draw", noting)
    monkeypatch.setattr(canvas, "DPI", 100)
    monkeypatch.setattr(canvas.Canvas, "save", checking)


def timings(contenders, modes=PASSES, ops=tuple(FAMILY), quick=True, seed=0):
    """Records such as a timed run makes; torch's share of the bandwidth is half, the others' are about it."""
    draws = random.Random(seed)
    records = []
    for known in workloads.points(quick=quick, ops=ops):
        for mode in modes if known.mode == "forward" else ():
            point = Point(known.op, mode, known.dtype, known.workload)
            for number, contender in enumerate(contenders):
                record = {**point.describe(), "contender": contender, "status": "ok", "message": ""}
                if contender in ROW_CONTENDERS and FAMILY[point.op] != "rows":
                    records.append(record | {"status": "unsupported", "message": "made up"})
                elif draws.random() < 0.04:
                    records.append(record | FAIL)
                elif contender == "apex" and not point.workload.landmark:
                    records.append(record | {"status": "skipped", "message": "made up"})
                else:
                    share = 0.92 - 0.065 * number if contender != "torch" else 0.5
                    gbps = 4000 * share * draws.uniform(0.93, 1.07)
                    gbps *= point.floor_bytes / (point.floor_bytes + (8 << 20))
                    median = point.floor_bytes / gbps / 1e3
                    times = {"median_us": median, "p20_us": 0.97 * median, "p80_us": 1.05 * median, "host_us": 9.0}
                    records.append(record | times | {"gbps": gbps})
    return records


def model_steps(contenders, fails=("FlagGems", "apex")):
    models = {
        "BERT base, one layer": ("8 × 512 tokens, transformers", 2400.0, 3),
        "ResNet-50": ("64 images of 224 × 224, channels last", 81234.5, 53),
        "Llama-3 8B, one layer": ("4096 tokens, transformers", 7100.0, 2),
    }
    records = []
    for model, (source, base, norms) in models.items():
        for number, contender in enumerate(contenders):
            about = {"model": model, "source": source, "dtype": "bf16", "contender": contender, "norms": norms}
            about |= {"status": "ok", "message": "", "host_us": 100.0}
            if contender in fails:
                records.append(about | FAIL)
                continue
            median = base * (1 - 0.05 * number) * (0.2 if contender == "QuACK" else 1)
            without = None if contender == "torch.compile" else median * (1.02 if contender == "QuACK" else 0.78)
            records.append(
                about
                | {"median_us": median, "p20_us": 0.96 * median, "p80_us": 1.1 * median, "without_norms_us": without}
            )
    return records


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


def compiled(spills=0):
    records = []
    for point in workloads.resource_points()[::3]:
        for target, possible in (("sm_90", 64), ("gfx942", 32)):
            about = {**point.describe(), "target": target, "kernel": "rows_backward_finalise_kernel", "status": "ok"}
            about |= {"message": "", "registers": 255, "spill_stores": spills, "spill_loads": spills, "programs": 132}
            about |= {"loads": {"128": 4, "16": 1}, "stores": {"128": 2}, "accesses": {"x": {"load": {"16": 1}}}}
            records.append(
                about | {"resident_warps": possible // 8, "possible_warps": possible, "limited_by": "threads"}
            )
    return records


def is_drawn(path):
    return path.is_file() and path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("contenders", [NAMES[:1], NAMES], ids=("one", "all"))
@pytest.mark.parametrize("op", ["rms_norm", "batch_norm"])
def test_throughput(tmp_path, contenders, op):
    records = [r for r in timings(contenders, ("forward_backward",), (op,)) if r["dtype"] == "bf16"]
    assert is_drawn(charts.throughput(records, 4100.0, MACHINE, tmp_path / "new" / "a.png"))
    assert is_drawn(charts.throughput(all_failed(records), None, MACHINE, tmp_path / "b.png"))


@pytest.mark.parametrize("contenders", [NAMES[:1], NAMES], ids=("one", "all"))
def test_speedups_and_roofline(tmp_path, contenders):
    records = timings(contenders)
    assert is_drawn(charts.speedups(records, MACHINE, tmp_path / "a.png"))
    assert is_drawn(charts.roofline(records, 4100.0, 67e3, MACHINE, tmp_path / "b.png"))


@pytest.mark.parametrize(("roof", "peak"), [(4100.0, None), (None, 67e3), (None, None)])
def test_roofline_without_a_roof(tmp_path, roof, peak):
    assert is_drawn(charts.roofline(timings(SOME, ("forward",)), roof, peak, MACHINE, tmp_path / "a.png"))


@pytest.mark.parametrize("records", [all_failed(timings(SOME, ops=("rms_norm",))), []], ids=("failed", "none"))
def test_speedups_and_roofline_of_nothing(tmp_path, records):
    assert is_drawn(charts.speedups(records, MACHINE, tmp_path / "a.png"))
    assert is_drawn(charts.roofline(records, 4100.0, 67e3, MACHINE, tmp_path / "b.png"))


def test_speedups_and_roofline_of_a_single_point(tmp_path):
    records = [
        r for r in timings(SOME, ("forward",), ("rms_norm",)) if r["shape"] == [16384, 768] and r["status"] == "ok"
    ]
    assert is_drawn(charts.speedups(records, MACHINE, tmp_path / "a.png"))
    assert is_drawn(charts.roofline(records, 4100.0, 67e3, MACHINE, tmp_path / "b.png"))


@pytest.mark.parametrize("contenders", [NAMES[:1], NAMES], ids=("one", "all"))
def test_steps(tmp_path, contenders):
    records = model_steps(contenders)
    for number, chosen in enumerate((records, all_failed(records), [])):
        assert is_drawn(charts.steps(chosen, MACHINE, tmp_path / f"{number}.png"))


def test_errors(tmp_path):
    records = exactness()
    for number, chosen in enumerate((records, all_failed(records), [])):
        assert is_drawn(charts.errors(chosen, MACHINE, tmp_path / f"{number}.png"))


def test_resources(tmp_path):
    for number, chosen in enumerate((compiled(spills=60), all_failed(compiled()), [])):
        assert is_drawn(charts.resources(chosen, MACHINE, tmp_path / f"{number}.png"))


def test_traffic_of_nothing(tmp_path):
    assert is_drawn(charts.traffic([], MACHINE, tmp_path / "a.png"))


def test_contenders_have_styles_of_their_own():
    styles = canvas.styles_of([*NAMES, "one more", "and another"])
    assert len({style.colour for style in styles.values()}) == len({style.marker for style in styles.values()}) == 13
    assert canvas.in_order(["other", "torch", "triton_norm"]) == ["triton_norm", "torch", "other"]


def test_the_saved_picture_is_what_was_drawn(tmp_path, monkeypatch):
    """At the resolution of a report, with fewer colours."""
    monkeypatch.setattr(canvas, "DPI", 150)
    sheet = canvas.Canvas(2.0, "A title", [MACHINE])
    ax = sheet.figure.add_subplot()
    ax.barh([0, 1], [1, 2], color=[canvas.BLUE, canvas.ORANGE])
    ax.plot(0.5, 0.5, "o", color=canvas.VERMILION, markersize=3)  # a colour of few dots
    saved = Image.open(sheet.save(tmp_path / "saved.png")).convert("RGB")
    sheet.figure.savefig(tmp_path / "drawn.png", dpi=150)
    drawn = Image.open(tmp_path / "drawn.png").convert("RGB")
    assert saved.size == drawn.size
    difference = np.abs(np.asarray(saved, dtype=int) - np.asarray(drawn, dtype=int))
    assert difference.mean() < 0.5
    assert difference.max() < 16
