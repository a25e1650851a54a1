"""Bars for GroupNorm and InstanceNorm that need no GPU: machine code, launches, and programs that fill it."""

import json

import pytest

from perf.findings import layout_text, uncached
from support.bars import TARGETS, moved, records, wanting

pytest.importorskip("triton")

pytestmark = [pytest.mark.unguarded, pytest.mark.long]

RESOURCES = """
from perf import resources, workloads

target, dtypes, quick = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "quick"
chosen = [each for each in workloads.SAMPLE_BARS if each.quick or not quick]
made_records = resources.records(workloads.layer_bars(chosen, dtypes=dtypes), resources.targets_of([target]))
"""
TRAFFIC = """
from perf import traffic
from perf.points import Point, Workload
from triton_norm.testing.stub_driver import H100

made_records = []
for shape, layout, mode in json.loads(sys.argv[1]):
    workload = Workload("groups", "bars", tuple(shape), "", layout)
    made_records.append(traffic.count(Point("group_norm_silu", mode, "bf16", workload), H100))
"""
BAR = 1.02
# Sums that programs leave for each other, and for the launch that adds them up, are at most this part of the floor.
EXCHANGED = 0.06
KERNELS = {
    "groups_forward_kernel",
    "groups_fused_backward_kernel",
    "channels_forward_kernel",
    "channels_backward_kernel",
}


@TARGETS
def test_machine_code(target, dtypes, which):
    """No kernel spills, and each access to x, y and their like moves 16 bytes."""
    compiled = records(RESOURCES, target, json.dumps(dtypes), which)
    result = {
        f"{r['op']} {r['mode']} {r['dtype']} {layout_text(r)}, {r['kernel']}": wanting(r, 128)
        for r in compiled
        if r["status"] != "ok" or r["kernel"] in KERNELS
    }
    assert {name: faults for name, faults in result.items() if faults} == {}
    assert {("x", "load"), ("dy", "load"), ("y", "store"), ("dx", "store")} < moved(compiled)
    launches = {}
    for record in compiled:
        call = record["op"], record["mode"], *record["shape"], record["layout"], record["dtype"]
        launches.setdefault(call, []).append(record)
    for (op, mode, *_), made in launches.items():
        assert len(made) <= {"forward": 2, "backward": 3}[mode], op
        if made[0]["floor_bytes"] > 1 << 26:  # a large input is worked on by two blocks a multiprocessor or more
            assert all(r["programs"] * r["blocks"] >= 2 * 132 for r in made if r["kernel"] in KERNELS)


READ_ONCE = [  # shape, layout, mode, programs of an H100
    ((32, 512, 7, 7), "contiguous", "forward", 32 * 32 // 4),  # four groups a program
    ((1, 320, 64, 64), "contiguous", "forward", 3 * 32),
    ((1, 320, 64, 64), "channels_last", "forward", 8 * 32),  # blocks of four groups, 40 of 64 columns
    ((1, 2048, 35, 35), "contiguous", "forward", 10 * 32),  # 64 channels of an odd number of positions
    ((8, 512, 8, 8), "contiguous", "backward", 8 * 32 // 4),
    ((1, 320, 64, 64), "contiguous", "backward", 5 * 32),
    ((1, 128, 128, 96), "contiguous", "backward", 4 * 2 * 32),  # halves of channels
    ((1, 320, 64, 32), "channels_last", "backward", 16 * 8),  # blocks of four groups, 40 of 64 columns
]


def test_bytes_of_tensors_that_are_read_once():
    """Counts those of programs that have several groups, and of programs that share one and wait for each other."""
    counted = records(TRAFFIC, json.dumps([case[:3] for case in READ_ONCE]), TRITON_INTERPRET="1")
    for record, (shape, _, mode, n_programs) in zip(counted, READ_ONCE, strict=True):
        assert record["status"] == "ok", record["message"]
        launch, *combining = record["launches"]
        assert launch["programs"] == n_programs, shape
        assert len(combining) == (mode == "backward")
        exchanged = sum(
            record["bytes"][group][way] for group in ("partials", "statistics") for way in ("loaded", "stored")
        )
        floor = record["floor_bytes"]
        assert 1 <= uncached(record) <= BAR + exchanged / floor, shape
        assert exchanged <= EXCHANGED * floor, shape
        assert not record["again_bytes"], shape
