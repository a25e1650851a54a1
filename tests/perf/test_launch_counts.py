"""Operators and launches of training steps: the counts, steps without arithmetic, and the table in the documents."""

import json
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from perf import launches, readme
from perf.launches import Counted, kernels_of, kernels_of_torch
from perf.models import Model
from perf.records import Refused
from support import processes

pytestmark = pytest.mark.unguarded

STORED = readme.ROOT / "perf" / "results"


def counted(monkeypatch, call, computed):
    monkeypatch.setattr(launches, "COMPUTED_ELEMENTS", computed)
    with Counted() as mode:
        call()
    return dict(mode.operators)


def test_views_allocations_and_questions_are_no_kernels():
    x = torch.randn(4, 6)
    with Counted() as mode:
        y = x.t().reshape(2, 12)[0].detach()  # one copy, as the transpose can't be viewed so
        torch.empty_like(y)
        x.new_empty(3)
        torch.promote_types(torch.float16, torch.float32)
        with torch.profiler.record_function("name"):
            y.sum().item()
        x.add_(1)
        torch._foreach_mul_([x, y], 2.0)
        torch.ones(3)
    assert dict(mode.operators) == {"clone": 1, "sum": 1, "add_": 1, "_foreach_mul_": 1, "ones": 1}


def test_uncomputed_results_have_the_form_of_computed_ones(monkeypatch):
    monkeypatch.setattr(launches, "COMPUTED_ELEMENTS", 0)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 8, 3, 3)
    calls = [
        lambda: F.conv2d(x, weight),
        lambda: F.max_pool2d(x, 2, return_indices=True),
        lambda: x.to(torch.bfloat16),
        lambda: x.sum((0, 2)),
        lambda: (x > 0, x.split(3, 1)),
    ]
    for call in calls:
        with Counted():
            results = call()
        for result, expected in zip(*map(torch.utils._pytree.tree_leaves, (results, call())), strict=True):
            assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
            assert result.stride() == expected.stride()


def test_an_operator_in_place_returns_its_argument(monkeypatch):
    monkeypatch.setattr(launches, "COMPUTED_ELEMENTS", 0)
    x, copied = torch.zeros(2, 3), torch.zeros(3)
    with Counted():
        assert x.add_(1) is x
        torch.add(copied, 1, out=copied)
    assert not x.any()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.row_norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(self.row_norm(F.relu(self.norm(self.convolution(x)))))


def test_without_arithmetic_a_step_has_the_same_operators(monkeypatch):
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    step()
    computed, uncomputed = (counted(monkeypatch, step, limit) for limit in (1 << 40, 0))
    assert uncomputed == computed
    assert computed["native_batch_norm"] == computed["native_layer_norm_backward"] == computed["_fused_adamw_"] == 1


IN_A_PROCESS = """
import copy, json, sys, tempfile
from pathlib import Path
import torch
import triton_norm
from torch import nn
from perf import launches, models
from perf.models import Model, Trained, resnet
from triton_norm.testing import stub_driver

if stub_driver.missing():
    sys.exit(3)
models.STEPS = launches.STEPS = 1
sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
model = Model("", "", (), "bf16", lambda: resnet(2, 32, **sizes), "pixel_values", "logits", True, True)
with tempfile.TemporaryDirectory() as folder, stub_driver.installed(Path(folder)) as count:
    trained = Trained(model, "cpu")
    module = copy.deepcopy(trained.module)
    triton_norm.convert(module)
    train = trained.candidate("converted", module).run
    train(None)
    before = count()
    train(None)
    eager = count() - before
    operators, launched = launches.step_of(trained, "converted", count)
    print(json.dumps([eager, launched, operators]))
"""


def test_launches_are_those_of_a_step_without_the_counter():
    done = processes.run("-c", IN_A_PROCESS)
    if done.returncode == 3:
        pytest.skip("no stub of CUDA's driver")
    assert done.returncode == 0, done.stderr
    eager, launched, operators = json.loads(done.stdout)
    assert launched == eager > 0
    assert not {*operators} & {*launches.NORMS}
    assert not [name for name in operators if "batch_norm" in name]


def figures():
    _, _, rest = launches.PAGE.read_text().partition(launches.BEGIN)
    return rest.partition(readme.END)[0]


def rows():
    """Returns operators, launches and kernels by model and way, from the table in the documents."""
    lines = re.findall(r"^\| (.+?) \| (.+?) \| (\d+) \| (\d+) \| (\d+) \|$", figures(), re.M)
    return {(model, way): tuple(map(int, counts)) for model, way, *counts in lines}


def test_converted_and_fused_models_never_have_more_kernels():
    table = rows()
    assert {model for model, _ in table} == {model.name for model in launches.MODELS}
    assert {way for _, way in table} >= {"as it is", "converted"}
    for model, way in table:
        before, after = table[model, "as it is"], table[model, way]
        assert after[2] <= before[2], (model, way)
        assert after[0] < before[0] or way == "as it is"
    fused = {model for model, way in table if way == "fused"}
    for model in fused:
        assert sum(table[model, "fused"][:2]) <= sum(table[model, "converted"][:2])


def test_the_table_is_of_the_versions_that_are_pinned():
    pinned = (readme.ROOT / ".ci" / "constraints.txt").read_text()
    counted = re.findall(r"\b(torch|transformers) (\d[\d.]*\d)", figures())
    assert {f"{name}=={version}" for name, version in counted} <= {*pinned.split()}
    assert len(counted) == 2


def test_the_table_is_current():
    """BERT's rows, which take a few seconds."""
    if launches.versions() not in figures():
        pytest.skip("counted with other versions")
    done = processes.run("-m", "perf", "launches", "--op", "layer_norm", "--lines")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    if records and records[0]["status"] == "skipped":
        pytest.skip(records[0]["message"])
    assert done.returncode == 0, done.stderr + done.stdout
    (run, *_), _ = readme.load(STORED)
    fewest = kernels_of_torch(run)
    table = rows()
    for record in records:
        counts = sum(record["operators"].values()), record["launches"], kernels_of(record, fewest)
        assert table.get((record["model"], record["way"])) == counts, "python -m perf launches --write"


def test_kernels_of_torchs_norms_are_measured():
    kernels = {"forward": [["a"] * 3, ["a"] * 4], "backward": [["a"] * 5]}
    timed = [
        {
            "op": "batch_norm",
            "mode": mode,
            "contender": who,
            "status": "ok",
            "kernels": names[: 1 if who != "torch" else 9],
        }
        for who in ("torch", "triton_norm")
        for mode, lists in kernels.items()
        for names in lists
    ]
    fewest = kernels_of_torch({"records": [*timed, {**timed[0], "kernels": []}, {**timed[0], "status": "error"}]})
    assert fewest == {
        "native_batch_norm": 3,
        "native_batch_norm_backward": 5,
        "native_layer_norm": 1,
        "native_layer_norm_backward": 1,
    }
    record = {"launches": 2, "operators": {"mm": 4, "native_batch_norm": 2}}
    assert kernels_of(record, fewest) == 2 + 4 + 2 * 3


def test_a_part_of_the_models_is_not_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{launches.BEGIN}\nold\n{readme.END}\nafter\n")
    record = {"way": "as it is", "status": "ok", "message": "", "operators": {"mm": 2}, "launches": 0}
    all_models = [{**record, "model": model.name, "source": "s", "dtype": "bf16"} for model in launches.MODELS]
    with pytest.raises(Refused, match="there is nothing of ResNet-50"):
        launches.write(all_models[:-1], STORED, page)
    assert "old" in page.read_text()
    launches.write(all_models, STORED, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| ResNet-50 | as it is | 2 | 0 | 2 |" in text


def test_a_model_that_fails_is_a_record_of_its_own():
    def build():
        raise ValueError("no such weights")

    broken = Model("broken", "s", (), "bf16", build, "x", "y")
    (record,) = launches.measure(broken, lambda: 0)
    assert (record["status"], record["message"]) == ("error", "ValueError: no such weights")
    assert launches.line(record) == "broken, all: error, ValueError: no such weights"
