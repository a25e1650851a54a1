"""The bars for channels that need no GPU: machine code without spills and with wide accesses, no needless bytes and
launches.

To save time there is, of machine code, one shape for each way of launching, that with the largest tiles, and most GPUs
have only the kernels that do the most in one type; of bytes a few shapes of each kind. `python -m perf resources
--shapes full` and `traffic --shapes full` go through every shape of ResNet-50, a 3-D U-Net and an MLP.
"""

import json
from collections import Counter
from math import gcd, prod

import pytest

from perf import findings, workloads
from perf.points import ITEMSIZE, LAYOUTS, MODES
from perf.workloads import CHANNEL_OPS
from support import processes
from support.bars import moved, records, wanting
from support.gpus import H100
from triton_norm.tuning import channel_spaces

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.unguarded

BAR = 1.02
EXCHANGED = 0.06
_SPILLS = "sm_90 {} forward bf16 {}, channels_forward_kernel"
SPILLING = {
    "3.6.0": {_SPILLS.format("batch_norm", "32×128×28×28 NCHW")},
    "3.8.0": {
        _SPILLS.format("batch_norm", "32×128×28×28 NCHW"),
        _SPILLS.format("batch_norm_add_relu", "32×128×28×28 NCHW"),
        _SPILLS.format("batch_norm_add_relu", "32×2048×7×7 NCHW"),
        _SPILLS.format("batch_norm_add_relu", "4096×1000"),
    },
    "3.9.0": {_SPILLS.format("batch_norm_add_relu", "32×128×28×28 NHWC")},
}
"""Kernels that spill in the config that is tried first, by versions of Triton that the choices were not made with."""
KERNELS = {"channels_forward_kernel", "channels_backward_kernel"}

RESOURCES = """
from math import prod

from perf import resources, workloads
from perf.points import Workload

NARROWER = ("SHARED", "LANES", "WIDTH")  # constants of launches that change sizes alone, and no work


def representatives(points, target):
    # One point for each way of launching: of launches that differ in sizes alone, the largest tiles'.
    largest = {}
    for point in points:
        with resources.launches_of(point, target) as launches:
            ways = [
                (launch.kernel.__name__, *((k, v) for k, v in launch.constants.items() if k not in NARROWER))
                for launch in launches
            ]
            size = sum(
                prod(dict(launch.config.blocks).values()) * launch.constants.get("LANES", 1) for launch in launches
            )
        way = point.op, point.mode, point.dtype, str(ways)
        if way not in largest or largest[way][0] < size:
            largest[way] = size, point
    return [point for _, point in largest.values()]


target, (ops, dtypes, shapes) = sys.argv[1], map(json.loads, sys.argv[2:])
chosen = [Workload("channels", "", tuple(shape), "", layout) for shape, layout in shapes] or workloads.CHANNEL_BARS
points = workloads.layer_bars(chosen, ops, dtypes=dtypes)
points = representatives(points, resources.TARGETS[target])
made_records = resources.records(points, resources.targets_of([target]), at_once=len(points))
"""

TRAFFIC = """
from dataclasses import replace

from perf import traffic, workloads
from triton_norm.testing.stub_driver import H100

gpu = replace(H100, limits=replace(H100.limits, one_launch_bytes=2**62))


def slices(op, dtype):
    return workloads.layer_bars(workloads.CHANNEL_SLICES, (op,), dtypes=(dtype,))


made_records = list(traffic.records(slices("batch_norm", "bf16") + slices("batch_norm_add_relu", "bf16"), gpu))
made_records += traffic.records(slices("batch_norm", "fp32") + slices("batch_norm_eval", "bf16"))
"""


def named(record):
    where = f"{record['op']} {record['mode']} {record['dtype']} {findings.layout_text(record)}"
    return f"{record['target']} {where}, {record['kernel']}" if "kernel" in record else where


def channels_lie_side_by_side(record):
    """Returns True if channels lie side by side; of one channel the positions do."""
    return (record["layout"] == "channels_last" and record["shape"][1] > 1) or len(record["shape"]) == 2


def widest(record):
    """Bits: 128 where the elements that lie side by side allow it; few and odd positions of all channels do."""
    n_samples, n_channels, *positions = record["shape"]
    n_positions = prod(positions)
    if channels_lie_side_by_side(record):
        side_by_side = n_channels
    else:
        side_by_side = n_channels * n_positions if n_positions % 2 and n_samples >= 8 else n_positions
    return 8 * gcd(16, side_by_side * ITEMSIZE[record["dtype"]])


def test_shapes_with_narrower_accesses():
    """8 bytes for 14 × 14 positions in 16-bit types, 16 for all else, 7 × 7 too."""
    points = workloads.layer_bars(workloads.CHANNEL_BARS, ("batch_norm",), ("forward",))
    narrow = {(p.workload.shape[2:], p.workload.layout, p.dtype) for p in points if widest(p.describe()) < 128}
    assert narrow == {((14, 14), "contiguous", "bf16")}
    assert {widest(p.describe()) for p in points} == {64, 128}


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "ops", "dtypes"),
    [
        pytest.param("sm_80", ("batch_norm_add_relu",), ("fp32",), marks=pytest.mark.thorough),
        ("sm_90", CHANNEL_OPS, ("bf16", "fp32")),
        pytest.param("sm_100", ("batch_norm_add_relu",), ("bf16",), marks=pytest.mark.thorough),
        ("gfx942", ("batch_norm_add_relu",), ("bf16",)),
    ],
)
def test_machine_code_of_every_way_of_launching(target, ops, dtypes):
    compiled = inspected(target, ops, dtypes)
    if target != "gfx942":
        assert {(name, "load") for name in ("x", "residual", "dy", "bits")} < moved(compiled)
        assert {(name, "store") for name in ("y", "dx", "dresidual", "bits")} < moved(compiled)


FEW_CHANNELS = [
    ((*size[:1], n_channels, *size[1:]), layout)
    for n_channels in (1, 2, 3, 4, 8)
    for size in ((32, 32, 32), (128, 224, 224), (256, 7, 7), (16384,))
    for layout in LAYOUTS[: 2 if len(size) > 1 else 1]
]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_machine_code_for_few_channels(dtype):
    """Launches are one and two. With three channels-last each element has an access, and so an address, of its own:
    149 registers were spilled by the forward, 18 by the backward, in half as many threads."""
    compiled = inspected("sm_90", CHANNEL_OPS, (dtype,), FEW_CHANNELS)
    assert {record["shape"][1] for record in compiled} >= {1, 2, 3, 4}  # of 8 in fp32 the accesses are those of 4
    assert {widest(record) for record in compiled} == {8 * ITEMSIZE[dtype] * n for n in (1, 2, 4)} | {128}
    calls = Counter((r["op"], r["mode"], *r["shape"], r["layout"]) for r in compiled if r["op"] != "batch_norm_eval")
    assert set(calls.values()) == {1, 2}  # launches


def inspected(target, ops, dtypes, shapes=()):
    """The records of every way of launching that these shapes have, or else those of the bars; nothing is wanting."""
    compiled = records(RESOURCES, target, json.dumps(ops), json.dumps(dtypes), json.dumps(shapes))
    assert {record["kernel"] for record in compiled} == KERNELS
    assert {(r["op"], r["dtype"], r["mode"], channels_lie_side_by_side(r)) for r in compiled} == {
        (op, dtype, mode, last)
        for op in ops for dtype in dtypes for mode in MODES for last in (True, False)
    }  # fmt: skip
    wrong = {named(record): ", ".join(wanting(record, widest(record))) for record in compiled}
    result = {name: case for name, case in wrong.items() if case}
    spilling = SPILLING.get(triton.__version__, frozenset())
    assert result.keys() == spilling & wrong.keys(), "\n".join(map(": ".join, result.items()))
    return compiled


def in_flight(record):
    """Bytes that the programs that run at once will read again."""
    (launch,) = record["launches"]
    at_once = H100.limits.holding_programs_per_sm * record["multiprocessors"]
    return record["again_bytes"] * min(1, at_once / launch["programs"])


def excess(record):
    """Returns the faults of the bytes that a call moves.

    Bits count, and each weight once, as the other programs find it in cache. So do elements that a program reads a
    second time in one launch: those of all programs that run at once may take only a part of the cache. Partial sums,
    counters and statistics, which programs of a channel leave for each other and read within microseconds, are apart,
    with a bar of their own.
    """
    if record["status"] != "ok":
        return [record["message"]]
    result = []
    floor = record["floor_bytes"] if len(record["launches"]) == 1 else record["apart_floor_bytes"]
    partials = sum(record["bytes"]["partials"].values())
    statistics = sum(record["bytes"]["statistics"].values()) - sum(record["footprint"]["statistics"].values())
    exchanged = (partials + statistics) / floor
    moved_bytes = findings.uncached(record) * record["floor_bytes"]
    over = round(moved_bytes / floor - exchanged, 9)  # a ratio of 1 may be off by roundoff
    if not 1 <= over <= BAR:
        result.append(f"{over:.4f} of the floor of {len(record['launches'])} launches")
    if not exchanged <= EXCHANGED:
        result.append(f"{exchanged:.4f} of that floor are exchanged")
    cache = H100.l2_bytes * record["multiprocessors"] / H100.multiprocessors
    if record["again_bytes"] and in_flight(record) * H100.limits.cache_bytes_per_reread_byte > cache:
        result.append(f"{in_flight(record)} bytes are read again at once")
    return result


def test_bytes():
    """There is one launch wherever that is possible, and as many as are chosen."""
    counted = records(TRAFFIC, TRITON_INTERPRET="1")
    slices = {(workload.shape, workload.layout) for workload in workloads.CHANNEL_SLICES}
    assert {(tuple(record["shape"]), record["layout"]) for record in counted} == slices
    assert {len(record["launches"]) for record in counted} == {1, 2}
    wrong = {named(record): excess(record) for record in counted}
    assert not any(wrong.values()), "\n".join(f"{name}: {', '.join(case)}" for name, case in wrong.items() if case)


def test_bytes_of_clusters(tmp_path):
    """A program is a cluster: the interpreter ignores its number of blocks. Each reads once, and exchanges nothing."""
    shapes = [{"shape": [4, 2, 64, 64]}, {"shape": [64, 32, 4, 4], "layout": "channels_last"}]
    shapes += [{"shape": [32, 16, 7, 7]}, {"shape": [2, 65536]}]  # folded: eight channels a program
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps(shapes))
    chosen = "--shapes", str(file), "--op", "layer_norm,batch_norm,batch_norm_add_relu", "--dtype", "bf16"
    printed = processes.output("-m", "perf", "traffic", "--blocks", "8", "--lines", *chosen)
    counted = [json.loads(line) for line in printed.splitlines()]
    *of_channels, forward, backward = counted
    assert (len(of_channels), backward["launches"][0]["config"]["num_ctas"]) == (12, 8)
    for record in (*of_channels, forward):
        assert record["status"] == "ok", record["message"]
        (launch,) = record["launches"]
        assert 1 < launch["config"]["num_ctas"] <= 8, record
        assert launch["programs"] == {"contiguous": 2, "channels_last": 1}[record["layout"]], record
        assert sum(record["bytes"]["partials"].values()) <= 16, record  # the count of batches
        assert 1 <= findings.uncached(record) <= BAR, named(record)
        assert record["again"]["bulk"] == 0, named(record)


def test_launches_of_a_training_step_and_of_evaluation(monkeypatch):
    """Forward one or two, backward one or two: one where the programs of a channel wait for each other."""
    from perf import resources

    plans = []
    plan = channel_spaces.plan_channels
    monkeypatch.setattr(channel_spaces, "plan_channels", lambda work, gpu: plans.append(plan(work, gpu)) or plans[-1])
    counts = {}
    for point in workloads.layer_bars(workloads.CHANNEL_BARS):
        plans.clear()
        with resources.launches_of(point, resources.TARGETS["sm_90"]) as launches:
            counts.setdefault((point.op, point.mode), set()).add(len(launches))
            assert len(launches) == (1 if not plans or plans[-1] else 2), point
    evaluation = {("batch_norm_eval", mode): {1} for mode in MODES}
    assert counts == {(op, mode): {1, 2} for op in CHANNEL_OPS for mode in MODES} | evaluation
