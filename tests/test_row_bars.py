"""The bars for rows that need no GPU: machine code without spills and with wide accesses, and no needless bytes.

Without all that a residual adds to RMSNorm and to backward passes, to save time: `python -m perf resources --full` and
`python -m perf traffic --full` go through every op.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perf import findings
from perf.workloads import BAR_COLUMNS, BULK

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.unguarded
DTYPES = ("bf16", "fp32")

RESOURCES = """
from perf import resources, workloads

points = workloads.bars(("layer_norm", "rms_norm")) + workloads.bars(("layer_norm_residual",), ("forward",))
found = resources.records(points, sys.argv[1:], at_once=len(points))
"""

TRAFFIC = """
from perf import traffic, workloads

columns = [n for n in workloads.BAR_COLUMNS if n <= 32768]
points = workloads.bars(("layer_norm", "layer_norm_residual"), ("forward",), sys.argv[1:])
points += workloads.bars(("layer_norm",), ("backward",), sys.argv[1:], columns)
found = traffic.records(points)
"""

EXTENDED = """
from perf import traffic
from perf.workloads import Point, Workload

found = []
for columns, rows, multiprocessors in (1024, 3 * 12 * 4, 12), (96, 992, 3):
    traffic.MULTIPROCESSORS, traffic.PARTS = multiprocessors, (1, multiprocessors)
    for mode in ("forward", "backward"):
        point = Point("layer_norm", mode, "bf16", Workload("rows", "", (rows, columns), ""))
        found.append([traffic.count(point), traffic.counted(point, multiprocessors)[0].record()])
"""


def records(code, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = f"import json, sys\n{code}\nfor record in found:\n    print(json.dumps(record))"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def named(record):
    where = f"{record['op']} {record['mode']} {record['dtype']} {record['shape'][-1]} columns"
    return f"{where}, {record['kernel']}" if "kernel" in record else where


def wanting(record):
    """What is wrong with a kernel's machine code.

    16 bytes an access for x, y and their like, which every one of these lengths allows: PTX says through which argument
    an access goes, and has the widths that the machine code has. Statistics, weights and sums may be narrower.
    """
    if record["status"] != "ok":
        return [record["message"]]
    found = []
    if record["spill_stores"] or record["spill_loads"]:
        found.append(f"{record['spill_stores']} registers are stored and {record['spill_loads']} loaded back")
    if not 0 < record["resident_warps"] <= record["possible_warps"]:
        found.append(f"{record['resident_warps']} warps are resident")
    for kind in ("load", "store"):
        widths = {name: set(access.get(kind, {})) for name, access in record["accesses"].items()}
        if set().union(*widths.values()) != set(record[f"{kind}s"]):
            found.append(f"{kind}s of {widths} bits in PTX, of {record[f'{kind}s']} in machine code")
        narrow = {name: sorted(widths[name] - {"128"}) for name in widths if name in BULK}
        found += [f"{kind}s of {name} of {bits} bits" for name, bits in narrow.items() if bits]
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_machine_code_of_every_row_length(target, tmp_path):
    pytest.importorskip("triton")
    compiled = records(RESOURCES, target, TRITON_CACHE_DIR=str(tmp_path))
    assert {record["shape"][-1] for record in compiled} == set(BAR_COLUMNS)
    assert {record["kernel"] for record in compiled} == {
        "rows_forward_kernel", "rows_backward_kernel", "rows_backward_finalise_kernel"
    }  # fmt: skip
    moved = {(name, kind) for record in compiled for name, access in record["accesses"].items() for kind in access}
    assert {(name, "load") for name in ("x", "residual", "dy")} < moved
    assert {(name, "store") for name in ("y", "total", "dx")} < moved
    found = [f"{named(record)}: {', '.join(wanting(record))}" for record in compiled if wanting(record)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_every_row_length(dtype):
    """As a GPU of 132 multiprocessors launches them, with the fp32 sums of dweight and dbias, and each weight once: the
    other programs find it in cache. 1024 rows forward, 16384 backward; backward of longer rows takes a minute.
    """
    counted = records(TRAFFIC, dtype, TRITON_INTERPRET="1")
    assert {record["shape"][-1] for record in counted} == set(BAR_COLUMNS)
    assert [f"{named(record)}: {record['message']}" for record in counted if record["status"] != "ok"] == []
    bars = {"forward": 1.02, "backward": 1.05}
    found = [
        f"{named(record)}: {findings.streamed(record):.3f} of the floor"
        for record in counted
        if not 1 <= findings.streamed(record) <= bars[record["mode"]]
    ]
    assert not found, "\n".join(found)


def test_counts_of_few_rows_extend_to_those_of_all():
    """Three turns of 12 teams, and a launch whose last turn some teams sit out."""
    for extended, direct in records(EXTENDED, TRITON_INTERPRET="1"):
        assert {name: extended[name] for name in direct} == direct
