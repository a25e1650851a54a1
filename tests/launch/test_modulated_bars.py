"""Bars for rows with a gate or a modulation that need no GPU: machine code, launches and bytes."""

import json

import pytest

from perf.findings import layout_text, streamed
from support.bars import TARGETS, moved, records, wanting

pytest.importorskip("triton")

pytestmark = [pytest.mark.unguarded, pytest.mark.long]

RESOURCES = """
from perf import resources, workloads

target, dtypes, quick = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "quick"
chosen = [each for each in workloads.GATED_OR_MODULATED_BARS if each.quick or not quick]
points = workloads.layer_bars(chosen, workloads.GATED_OR_MODULATED_OPS, dtypes=dtypes)
made_records = resources.records(points, resources.targets_of([target]))
"""
TRAFFIC = """
from perf import traffic, workloads

chosen = [each for each in workloads.GATED_OR_MODULATED_SLICES if list(each.shape) in json.loads(sys.argv[1])]
made_records = traffic.records(workloads.layer_bars(chosen, workloads.GATED_OR_MODULATED_OPS, dtypes=("bf16",)))
"""
LONG = """
from perf import resources, workloads
from perf.points import Workload

chosen = [Workload("gated", "", (64, 16384), ""), Workload("modulated", "", (2, 32, 16384), "")]
points = workloads.layer_bars(chosen, workloads.GATED_OR_MODULATED_OPS, dtypes=("bf16",))
made_records = resources.records(points, resources.targets_of(sys.argv[1:2]))
"""
MOST_OVER_FLOOR = {"forward": 1.001, "backward": 1.05}
# dweight takes once more the sums that dscale has taken, from cache.
MOST_OVER_FLOOR_OF = {"rms_norm_modulated": {"forward": 1.001, "backward": 1.055}}
# Registers that a kernel may spill, by the type of x. With the gate first or a gated residual, the backward in fp32
# needs up to 3 more than the limit at which a multiprocessor has enough programs.
MOST_SPILLED = {"bf16": 0, "fp32": 3}
BULK = {"forward": {"x", "residual", "gate", "y", "total"}, "backward": {"dy", "dx", "dgate", "dresidual"}}


def without_few_spills(record):
    most = MOST_SPILLED[record["dtype"]]
    if record["status"] != "ok" or max(record["spill_stores"], record["spill_loads"]) > most:
        return record
    return record | {"spill_stores": 0, "spill_loads": 0}


@TARGETS
def test_machine_code(target, dtypes, which):
    """No kernel in bf16 spills, each access to x, y and their like moves 16 bytes, and a backward is two launches."""
    compiled = records(RESOURCES, target, json.dumps(dtypes), which)
    result = {
        f"{r['op']} {r['mode']} {r['dtype']} {layout_text(r)}, {r['kernel']}": wanting(without_few_spills(r), 128)
        for r in compiled
    }
    assert {name: faults for name, faults in result.items() if faults} == {}
    assert BULK["forward"] | BULK["backward"] <= {name for name, _ in moved(compiled)}
    launches = {}
    for record in compiled:
        call = record["op"], record["mode"], record["dtype"], *record["shape"]
        launches[call] = launches.get(call, 0) + 1
    assert {(mode, count) for (_, mode, *_), count in launches.items()} == {("forward", 1), ("backward", 2)}


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("sm_80", "sm_100"))]
)
def test_machine_code_of_long_rows(target):
    """No kernel spills, accesses move 16 bytes, and a backward has a launch for the sums of rows."""
    compiled = records(LONG, target)
    result = {f"{r['op']} {r['mode']}, {r['kernel']}": wanting(r, 128) for r in compiled}
    assert {name: faults for name, faults in result.items() if faults} == {}
    kernels = {}
    for record in compiled:
        kernels.setdefault((record["op"], record["mode"]), []).append(record["kernel"])
    backward = [f"modulated_{name}_kernel" for name in ("row_sums", "backward", "backward_finalise")]
    for (op, mode), launched in kernels.items():
        assert launched == (["modulated_forward_kernel"] if mode == "forward" else backward), op


@pytest.mark.parametrize(
    "shapes",
    [
        [[512, 4, 128], [1, 333, 1536]],
        pytest.param(
            [[128, 2048], [128, 4096], [128, 5120], [512, 2, 1024], [2, 256, 1152], [1, 512, 3072]],
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_bytes(shapes):
    """Counts the sums that programs leave for each other, too, and weights and modulations once."""
    counted = records(TRAFFIC, json.dumps(shapes), TRITON_INTERPRET="1")
    assert {tuple(record["shape"]) for record in counted} == set(map(tuple, shapes))
    assert [record["message"] for record in counted if record["status"] != "ok"] == []
    over = {
        f"{r['op']} {r['mode']} {layout_text(r)}": streamed(r)
        for r in counted
        if not 1 <= streamed(r) <= MOST_OVER_FLOOR_OF.get(r["op"], MOST_OVER_FLOOR)[r["mode"]]
    }
    assert over == {}
