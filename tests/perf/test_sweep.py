"""A timed run as a whole, and in several processes: stored results, and runs that go on from them."""

import pytest
import torch

from perf import environment, measure, models, sweep
from perf.contenders import Contender
from perf.ops import torch_functions
from perf.points import Point, Workload
from perf.records import ResultsFile, dumped, read
from support.timers import FakeTimer

pytestmark = pytest.mark.unguarded

ROWS = Workload("rows", "columns", (64, 96), "test")
TORCH = Contender("torch", torch_functions)
POINTS = [Point("layer_norm", "forward", dtype, ROWS) for dtype in ("fp32", "bf16", "fp16")]
LATE = "layer_norm forward fp16 64x96"


@pytest.fixture(autouse=True)
def _gpu_of_the_test(monkeypatch):
    monkeypatch.setattr(measure, "CudaTimer", FakeTimer)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda timer: 1000.0)
    monkeypatch.setattr(sweep, "CONTENDERS", [TORCH, Contender("absent", dict, ("no_such_module",))])


def run(path, points=POINTS, resume=False, **plan):
    file = ResultsFile(path, environment.describe(), resume)
    return sweep.timed_run(sweep.Plan(points, **plan), file, lambda _: None)


def failing(monkeypatch, error):
    """The point of fp16 raises; returns the points that were measured."""
    measured, real = [], measure.measure_point

    def measure_point(point, *rest):
        measured.append(point.dtype)
        if point.dtype == "fp16":
            raise error
        return real(point, *rest)

    monkeypatch.setattr(measure, "measure_point", measure_point)
    return measured


def test_a_run_keeps_what_it_measured(monkeypatch, tmp_path):
    failing(monkeypatch, KeyboardInterrupt)
    path = tmp_path / "results.jsonl"
    results = run(path)
    assert read(path).run == results
    assert [record["dtype"] for record in results["records"]] == ["fp32", "bf16"]
    assert results["stopped"] == "interrupted"
    assert results["unreached"] == [LATE]
    assert results["copy_gbps"] == 1000
    assert results["contenders"]["absent"].startswith("missing (ModuleNotFoundError")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.jsonl"]


def test_a_run_ends_with_its_time(tmp_path):
    results = run(tmp_path / "results.jsonl", seconds=0)
    assert results["records"] == []
    assert len(results["unreached"]) == len(POINTS)


def test_only_chosen_contenders_are_timed_and_listed(tmp_path):
    results = run(tmp_path / "results.jsonl", contenders=("absent",))
    assert list(results["contenders"]) == ["absent"]
    assert results["records"] == []


def test_a_resumed_run_measures_what_is_not_there(monkeypatch, tmp_path):
    path = tmp_path / "results.jsonl"
    with monkeypatch.context() as patched:
        failing(patched, KeyboardInterrupt)
        first = run(path)
    measured = failing(monkeypatch, RuntimeError("not reached twice"))
    second = run(path, resume=True)
    assert measured == ["fp16"]
    assert second["records"] == first["records"]
    assert second["stopped"] == "RuntimeError: not reached twice"


def test_another_contender_is_added_to_a_resumed_run(monkeypatch, tmp_path):
    path = tmp_path / "results.jsonl"
    run(path, POINTS[:1])
    monkeypatch.setattr(sweep, "CONTENDERS", [TORCH, Contender("other", torch_functions)])
    results = run(path, POINTS[:1], resume=True)
    assert [record["contender"] for record in results["records"]] == ["torch", "other"]
    assert run(path, POINTS[:1], resume=True)["records"] == results["records"]


OTHER = dumped("facts", {"format": 3, "environment": {"torch": "1.0"}}) + "\n"


@pytest.mark.parametrize("content", ["", "[]\n", '{"kind": "other"}\n', '{"kind": "facts", "format": 2}\n', OTHER])
def test_what_cannot_be_gone_on_with_is_an_error_and_stays(content, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"results.jsonl (is not a results file|was measured with something else: .*torch 1.0)"
    ):
        run(path, resume=True)
    assert path.read_text() == content


def test_records_to_be_made_anew_leave_the_file_and_timings_stay(tmp_path):
    path = tmp_path / "results.jsonl"
    run(path, POINTS[:1])
    file = ResultsFile(path, environment.describe(), resume=True)
    file.add("traffic", {"op": "layer_norm", "status": "ok", "message": ""})
    before = read(path)
    file.drop(("traffic", "numerics"))
    assert before.traffic
    assert (read(path).traffic, file.results.traffic) == ([], [])
    assert read(path).run == before.run


def test_half_a_line_that_a_process_has_left_is_not_read_and_replaced(tmp_path):
    path = tmp_path / "results.jsonl"
    first = run(path, POINTS[:1])
    with path.open("a") as file:
        file.write('{"kind": "timing", "op": "lay')
    assert read(path).run == first
    second = run(path, POINTS[:2], resume=True)
    assert [record["dtype"] for record in read(path).run["records"]] == ["fp32", "bf16"]
    assert read(path).run == second


def test_a_lost_gpu_ends_the_run_and_has_a_record(monkeypatch, tmp_path):
    path = tmp_path / "results.jsonl"
    about = {**POINTS[2].describe(), "contender": "torch", "status": "ok", "message": ""}
    failing(monkeypatch, measure.Stopped([about], RuntimeError("an illegal memory access")))
    results = run(path, [POINTS[2], POINTS[0]])
    assert results["stopped"] == f"{sweep.GPU_LOST}: RuntimeError: an illegal memory access"
    assert [(record["dtype"], record["status"]) for record in results["records"]] == [("fp16", "error")]
    assert results["unreached"] == [str(POINTS[0])]
    assert [record["dtype"] for record in run(path, [POINTS[2], POINTS[0]], resume=True)["records"]] == ["fp16", "fp32"]


def test_what_a_process_did_not_survive_is_recorded_and_not_tried_again(monkeypatch, tmp_path):
    path = tmp_path / "results.jsonl"
    run(path, POINTS[:2])
    with path.open("a") as file:
        file.write(dumped("facts", {"measuring": LATE}) + "\n")
    measured = failing(monkeypatch, KeyboardInterrupt)
    results = run(path, resume=True)
    assert measured == []
    assert results["records"][-1]["dtype"] == "fp16"
    assert (results["records"][-1]["status"], results["records"][-1]["message"]) == ("error", sweep.NOT_SURVIVED)
    assert results["measuring"] is None


def tiny(name):
    sizes = {
        "BERT base, one layer": lambda: models.bert(hidden=16, heads=2, batch=2, tokens=4),
        "Llama-3 8B, one layer": lambda: models.llama(hidden=16, inner=32, heads=(2, 1), batch=2, tokens=4),
        "ResNet-50": lambda: models.resnet(2, 32, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4),
    }
    (model,) = (model for model in models.MODELS if model.name == name)
    return models.Model(**{**vars(model), "build": sizes[name]})


@pytest.mark.parametrize("name", [model.name for model in models.MODELS])
def test_a_models_step_is_timed_with_and_without_its_norms(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(measure, "WARMUPS", 1)
    monkeypatch.setattr(models, "STEPS", 2)
    ways = ("torch", "triton_norm")
    records = models.measure_step(tiny(name), ways, FakeTimer(), seconds=0)
    assert [(record["contender"], record["status"]) for record in records] == [(way, "ok") for way in ways], records
    for place, record in enumerate(records):
        assert record["median_us"] == pytest.approx(10 * (place + 1) / models.STEPS, rel=0.01)
        assert record["without_norms_us"] == pytest.approx(30 / models.STEPS, rel=0.01)
        assert record["norms"] > 2
        assert sweep.task_name(record) == str(tiny(name))


def test_a_model_that_trains_otherwise_is_not_timed(monkeypatch):
    pytest.importorskip("transformers")

    def other_weights(module):
        with torch.no_grad():
            module.embeddings.LayerNorm.weight.mul_(1.1)
        return module

    monkeypatch.setitem(models.WAYS, "triton_norm", models.Way(other_weights, "eager"))
    torchs, ours = models.measure_step(tiny("BERT base, one layer"), ("torch", "triton_norm"), FakeTimer(), 0)
    assert (torchs["status"], ours["status"]) == ("ok", "wrong")
    assert "is allowed" in ours["message"]
    assert "median_us" not in ours


def test_models_that_cannot_be_built_are_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "missing", lambda: "no transformers")
    results = run(tmp_path / "results.jsonl", [], models=models.MODELS)
    assert len(results["steps"]) == len(models.MODELS)
    assert {(record["status"], record["message"]) for record in results["steps"]} == {("missing", "no transformers")}


@pytest.mark.parametrize(
    ("contender", "landmark", "plan", "timed"),
    [
        ({}, False, {}, True),
        ({"compiles": True}, False, {}, False),
        ({"compiles": True}, True, {}, True),
        ({"compiles": True, "searches": True}, True, {}, False),
        ({"compiles": True, "searches": True}, True, {"contenders": ("slow",)}, True),
        ({"compiles": True, "searches": True}, False, {"contenders": ("slow",)}, False),
        ({"compiles": True, "searches": True}, False, {"quick": False}, True),
    ],
)
def test_a_quick_run_compiles_little(contender, landmark, plan, timed, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "CONTENDERS", [Contender("slow", torch_functions, **contender)])
    point = Point("layer_norm", "forward", "fp32", Workload("rows", "columns", (64, 96), "test", landmark=landmark))
    (record,) = run(tmp_path / "results.jsonl", [point], **plan)["records"]
    assert record["status"] == ("ok" if timed else "skipped")
    assert (record["message"] == sweep.COMPILED) == (not timed)
