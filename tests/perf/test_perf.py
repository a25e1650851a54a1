"""The perf suite where no GPU is needed: floors, records, the gate, and the parts that run as processes."""

import json
import math
import signal
from itertools import product

import pytest
import torch
from torch.nn import functional

from perf import calls, findings, gate, measure, workloads
from perf.contenders import Contender
from perf.ops import FAMILY, OPS, ROW_FAMILIES, torch_functions
from perf.points import BOTH, MODES, PASSES, STRIDED, Point, Workload, floor_of
from perf.records import read
from support import processes
from support.patience import until
from support.timers import FakeTimer
from triton_norm.tuning.choices import TUNED

pytestmark = pytest.mark.unguarded

CHANNEL_OPS = ("batch_norm", "batch_norm_eval")

ROWS = Workload("rows", "columns", (64, 96), "test")

IMAGES = Workload("channels", "networks", (4, 6, 5, 5), "test", "channels_last")


def records_of(*arguments):
    done = processes.run("-m", "perf", *arguments, "--lines")
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("op", "mode", "dtype", "shape", "by_hand"),
    [
        # x and y, 2 bytes an element; weight and bias, 2 bytes a column.
        ("layer_norm", "forward", "bf16", (128, 1000), 2 * 128 * 1000 * 2 + 2 * 1000 * 2),
        # x, dy, dx; weight, dweight, dbias; mean and rstd, 4 bytes a row.
        ("layer_norm", "backward", "fp32", (10, 30), 3 * 300 * 4 + 3 * 30 * 4 + 2 * 10 * 4),
        # fp64 statistics for fp64 input.
        ("layer_norm", "backward", "fp64", (10, 30), 3 * 300 * 8 + 3 * 30 * 8 + 2 * 10 * 8),
        # No bias; rstd without a mean.
        ("rms_norm", "forward", "bf16", (128, 1000), 2 * 128 * 1000 * 2 + 1000 * 2),
        ("rms_norm", "backward", "fp32", (10, 30), 3 * 300 * 4 + 2 * 30 * 4 + 10 * 4),
        # x, residual, y, total; then total, dy, dtotal and dx, which is dresidual too.
        ("layer_norm_residual", "forward", "bf16", (10, 30), 4 * 300 * 2 + 2 * 30 * 2),
        ("layer_norm_residual", "backward", "bf16", (10, 30), 4 * 300 * 2 + 3 * 30 * 2 + 2 * 10 * 4),
        ("rms_norm_residual", "forward", "bf16", (10, 30), 4 * 300 * 2 + 30 * 2),
        ("rms_norm_residual", "backward", "bf16", (10, 30), 4 * 300 * 2 + 2 * 30 * 2 + 10 * 4),
        # x, gate, y and a weight; then x, gate, dy, dx, dgate, weight, dweight and rstd.
        ("rms_norm_gated", "forward", "bf16", (10, 30), 3 * 300 * 2 + 30 * 2),
        ("rms_norm_gated", "backward", "bf16", (10, 30), 5 * 300 * 2 + 2 * 30 * 2 + 10 * 4),
        ("rms_norm_gate_first", "forward", "fp32", (10, 30), 3 * 300 * 4 + 30 * 4),
        ("rms_norm_gate_first", "backward", "fp32", (10, 30), 5 * 300 * 4 + 2 * 30 * 4 + 10 * 4),
        # x and y; scale and shift of 2 samples. Then x, dy, dx; scale, dscale, dshift; mean and rstd of 10 tokens.
        ("layer_norm_modulated", "forward", "bf16", (2, 5, 30), 2 * 300 * 2 + 2 * 2 * 30 * 2),
        ("layer_norm_modulated", "backward", "bf16", (2, 5, 30), 3 * 300 * 2 + 3 * 2 * 30 * 2 + 2 * 10 * 4),
        # A weight, no mean.
        ("rms_norm_modulated", "forward", "bf16", (2, 5, 30), 2 * 300 * 2 + 30 * 2 + 2 * 2 * 30 * 2),
        ("rms_norm_modulated", "backward", "bf16", (2, 5, 30), 3 * 300 * 2 + 2 * 30 * 2 + 3 * 2 * 30 * 2 + 10 * 4),
        # x, residual, y, total; three modulations. Then total, x, dy, dtotal, dx, dresidual; two modulations, and
        # three gradients.
        ("layer_norm_modulated_residual", "forward", "bf16", (2, 5, 30), 4 * 300 * 2 + 3 * 2 * 30 * 2),
        ("layer_norm_modulated_residual", "backward", "bf16", (2, 5, 30), 6 * 300 * 2 + 5 * 2 * 30 * 2 + 2 * 10 * 4),
        # x and y; fp32 weight and bias; two running statistics read and written.
        ("batch_norm", "forward", "bf16", (2, 3, 4, 4), 2 * 96 * 2 + 2 * 3 * 4 + 4 * 3 * 4),
        ("batch_norm", "backward", "bf16", (2, 3, 4, 4), 3 * 96 * 2 + 3 * 3 * 4 + 2 * 3 * 4),
        ("batch_norm_eval", "forward", "fp32", (2, 3, 4, 4), 2 * 96 * 4 + 2 * 3 * 4 + 2 * 3 * 4),
        ("batch_norm_eval", "backward", "fp32", (2, 3, 4, 4), 3 * 96 * 4 + 3 * 3 * 4 + 2 * 3 * 4),
        # x, residual, y, one bit an element, and what the backward needs of the statistics; then dresidual apart.
        ("batch_norm_add_relu", "forward", "bf16", (2, 3, 4, 4), 3 * 96 * 2 + 96 // 8 + 2 * 12 + 4 * 12 + 2 * 12),
        ("batch_norm_add_relu", "backward", "bf16", (2, 3, 4, 4), 4 * 96 * 2 + 96 // 8 + 3 * 12 + 2 * 12),
        # x and y; weight and bias of x's type; statistics of 2 samples of 32 groups; the bias under an activation.
        ("group_norm", "forward", "bf16", (2, 64, 4, 4), 2 * 2048 * 2 + 2 * 64 * 2),
        ("group_norm", "backward", "bf16", (2, 64, 4, 4), 3 * 2048 * 2 + 3 * 64 * 2 + 2 * 64 * 4),
        ("group_norm_silu", "backward", "bf16", (2, 64, 4, 4), 3 * 2048 * 2 + 4 * 64 * 2 + 2 * 64 * 4),
        # fp32 weight and bias, no running statistics; one mean for each channel of a sample.
        ("instance_norm", "forward", "bf16", (2, 64, 4, 4), 2 * 2048 * 2 + 2 * 64 * 4),
        ("instance_norm", "backward", "bf16", (2, 64, 4, 4), 3 * 2048 * 2 + 3 * 64 * 4 + 2 * 128 * 4),
    ],
)
def test_floor(op, mode, dtype, shape, by_hand):
    assert Point(op, mode, dtype, Workload(FAMILY[op], "", shape, "")).floor_bytes == by_hand


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        ("batch_norm", 96 * 2, 2 * 96 * 2),
        ("batch_norm_add_relu", 96 * 2, 2 * 96 * 2 + 96 // 8),
        ("batch_norm_eval", 0, 0),
        ("group_norm_silu", 96 * 2, 2 * 96 * 2),
        ("instance_norm", 96 * 2, 2 * 96 * 2),
        ("layer_norm", 0, 0),
    ],
)
def test_two_launches_read_what_is_reduced_twice(op, forward, backward):
    for mode, again in zip(MODES, (forward, backward), strict=True):
        point = Point(op, mode, "bf16", Workload(FAMILY[op], "", (2, 3, 4, 4), ""))
        assert point.apart_floor_bytes == point.floor_bytes + again


@pytest.mark.parametrize("op", OPS)
def test_both_passes_move_what_each_moves_and_the_statistics_between_them(op):
    workload = Workload(FAMILY[op], "", (10, 30) if FAMILY[op] in ROW_FAMILIES else (2, 32, 4, 4), "")
    forward, backward, both = (Point(op, mode, "bf16", workload) for mode in PASSES)
    left = {"batch_norm_eval": 0, "batch_norm_add_relu": 0}.get(op, 1 if op.startswith("rms_norm") else 2)
    assert both.floor_bytes == forward.floor_bytes + backward.floor_bytes + left * 4 * workload.means
    assert both.apart_floor_bytes - both.floor_bytes == sum(
        point.apart_floor_bytes - point.floor_bytes for point in (forward, backward)
    )
    assert both.differentiates


def test_floors_of_both_passes_are_named():
    assert floor_of("layer_norm", BOTH).short == "3R2W"
    assert floor_of("batch_norm_add_relu", BOTH).short == "4R3W + 1 bit"


def test_workloads_are_distinct_and_the_sweep_is_of_one_size():
    assert len(set(workloads.WORKLOADS)) == len(workloads.WORKLOADS)
    assert {w.elements for w in workloads.WORKLOADS if w.group == "columns"} == {workloads.SWEEP_ELEMENTS}
    quick, full = workloads.points(), workloads.points(quick=False)
    assert set(quick) < set(full)
    assert quick[0].workload.landmark


def test_the_ops_with_a_residual_make_a_quick_run_little_longer():
    ops = workloads.ROW_OPS + workloads.CHANNEL_OPS
    before, after = (workloads.points(ops=some) for some in (("layer_norm", *CHANNEL_OPS), ops))
    assert len(after) < 1.5 * len(before)
    assert sum(point.is_landmark for point in after) < 1.7 * sum(point.is_landmark for point in before)
    assert {point.op for point in after} == set(ops)
    assert OPS["layer_norm_residual"].forward.short == "2R2W"
    assert OPS["layer_norm_residual"].backward.short == "3R1W"
    assert OPS["batch_norm_add_relu"].backward.short == "2R2W + 1 bit"


def off_by_a_percent(x, *rest):
    return 1.01 * functional.layer_norm(x, *rest)


def fails(*_):
    raise ValueError("no such shape\n\nand more")


TORCH = Contender("torch", torch_functions)

CONTENDERS = [
    TORCH,
    Contender("wrong", lambda: {"layer_norm": off_by_a_percent}),
    Contender("lax", lambda: {"layer_norm": off_by_a_percent}, accuracy=1e5),
    Contender("fails", lambda: {"layer_norm": fails}),
    Contender("other", lambda: {"batch_norm": functional.batch_norm}),
]


@pytest.mark.parametrize("mode", PASSES)
def test_every_contender_has_a_record_and_only_right_ones_are_timed(mode):
    point = Point("layer_norm", mode, "fp32", ROWS)
    records = measure.measure_point(point, CONTENDERS, FakeTimer(), seconds=0)
    by_name = {record["contender"]: record for record in records}
    statuses = {name: record["status"] for name, record in by_name.items()}
    assert statuses == {"torch": "ok", "wrong": "wrong", "lax": "ok", "fails": "error", "other": "unsupported"}
    assert by_name["fails"]["message"] == "ValueError: no such shape ... and more"
    assert "is allowed" in by_name["wrong"]["message"]
    assert "median_us" not in by_name["wrong"]
    assert by_name["lax"]["median_us"] == pytest.approx(20, abs=0.1)
    assert by_name["torch"]["gbps"] == pytest.approx(point.floor_bytes / by_name["torch"]["median_us"] / 1e3)
    outputs = {"forward": {"y"}, "backward": {"dx", "dweight", "dbias"}}
    assert set(by_name["torch"]["errors"]) == outputs.get(mode, outputs["forward"] | outputs["backward"])
    assert by_name["torch"]["kernels"] == ["kernel of torch"]
    assert "kernels" not in by_name["wrong"]
    assert 0 < by_name["torch"]["errors"]["dx" if mode == "backward" else "y"] < 2**-17
    assert by_name["torch"]["repetitions"] == measure.MINIMUM_ROUNDS


@pytest.mark.parametrize("op", ["batch_norm", "batch_norm_eval", "batch_norm_add_relu"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gate_knows_batch_norm_and_its_running_statistics(op, mode, dtype):
    (record,) = measure.measure_point(Point(op, mode, dtype, IMAGES), [TORCH], FakeTimer(), seconds=0)
    assert record["status"] == "ok"
    assert ("running_var" in record["errors"]) == (op != "batch_norm_eval" and mode == "forward")
    assert ("dresidual" in record["errors"]) == (op == "batch_norm_add_relu" and mode == "backward")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_relus_argument_is_nowhere_near_its_kink(dtype):
    """There rounding alone would decide on a gradient."""
    point = Point("batch_norm_add_relu", "backward", dtype, Workload("channels", "", (16, 8, 16, 16), ""))
    i = calls.make_inputs(point, "cpu").double()
    z = functional.batch_norm(i.x, None, None, i.weight, i.bias, True, 0.0, calls.EPS) + i.residual
    assert z.detach().abs().min() > calls.NEAR_ZERO / 2
    assert 0.3 < (z > 0).double().mean() < 0.7


def test_a_gradient_that_leaves_the_activation_out_fails_the_gate():
    def function(x, residual, *arguments):
        total = functional.batch_norm(x, *arguments) + residual
        return total + (total.relu() - total).detach()

    wrong = Contender("wrong", lambda: {"batch_norm_add_relu": function})
    for mode, status in (("forward", "ok"), ("backward", "wrong")):
        point = Point("batch_norm_add_relu", mode, "fp32", IMAGES)
        (record,) = measure.measure_point(point, [wrong], FakeTimer(), seconds=0)
        assert record["status"] == status


@pytest.mark.parametrize("op", ["group_norm", "group_norm_silu", "instance_norm"])
@pytest.mark.parametrize(("mode", "outputs"), [("forward", {"y"}), ("backward", {"dx", "dweight", "dbias"})])
def test_the_gate_knows_norms_of_samples(op, mode, outputs):
    images = Workload(FAMILY[op], "", (2, 12, 5, 5), "", "channels_last", num_groups=3)
    (record,) = measure.measure_point(Point(op, mode, "bf16", images), [TORCH], FakeTimer(), seconds=0)
    assert record["status"] == "ok"
    assert set(record["errors"]) == outputs


@pytest.mark.parametrize("mode", MODES)
def test_heads_are_views_of_wider_tokens(mode):
    point = Point("rms_norm", mode, "bf16", Workload("rows", "heads", (6, 2, 8), "", STRIDED, heads=5))
    inputs = calls.make_inputs(point, "cpu")
    assert (inputs.x.shape, inputs.x.stride()) == ((6, 2, 8), (40, 8, 1))
    assert inputs.bytes == 2 * (6 * 5 * 8 + 6 * 2 * 8 + 8)  # x with the other heads, dy and weight
    assert point.floor_bytes == Point("rms_norm", mode, "bf16", Workload("rows", "", (12, 8), "")).floor_bytes
    (record,) = measure.measure_point(point, [TORCH], FakeTimer(), seconds=0)
    assert record["status"] == "ok"
    assert record["layout"] == STRIDED


def test_workloads_of_one_op_are_measured_with_no_other():
    heads = [point for point in workloads.points(quick=False) if point.workload.layout == STRIDED]
    assert {(point.op, point.workload.source) for point in heads} == {
        (op, source) for source, (op, _, _) in workloads.HEADS.items()
    }


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm_residual", "rms_norm_residual"])
@pytest.mark.parametrize(("mode", "dtype"), [("forward", "fp32"), ("forward", "bf16"), ("backward", "fp32")])
def test_the_gate_knows_rows_with_and_without_a_residual(op, dtype, mode):
    (record,) = measure.measure_point(Point(op, mode, dtype, ROWS), [TORCH], FakeTimer(), seconds=0)
    assert record["status"] == "ok"
    outputs = {"y"} if mode == "forward" else {"dx", "dweight"}
    if op.endswith("residual"):
        outputs |= {"total"} if mode == "forward" else {"dresidual"}
    if op.startswith("layer_norm") and mode == "backward":
        outputs |= {"dbias"}
    assert set(record["errors"]) == outputs


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_wrong_total_and_a_gradient_that_leaves_it_out_fail_the_gate(mode):
    def function(x, residual, shape, weight, eps):
        total = x + residual
        return functional.rms_norm(total, shape, weight, eps), 1.01 * total.detach() + 0 * total

    wrong = Contender("wrong", lambda: {"rms_norm_residual": function})
    (record,) = measure.measure_point(Point("rms_norm_residual", mode, "fp32", ROWS), [wrong], FakeTimer(), seconds=0)
    assert record["status"] == "wrong"
    assert record["message"].startswith("total" if mode == "forward" else "dx")


def test_nan_never_passes_the_gate():
    exact = {"y": torch.ones(4, dtype=torch.float64)}
    result = {"y": torch.tensor([1.0, 1.0, math.nan, 1.0])}
    assert gate.verdict(gate.errors(result, exact), 1.0)


def test_traffic_of_layer_norm_reads_x_once_and_writes_y_once():
    forward, backward = records_of("traffic", "--points", "2")
    x_bytes, backward_x_bytes = (math.prod(record["shape"]) * 2 for record in (forward, backward))
    assert (forward["op"], forward["mode"], forward["dtype"]) == ("layer_norm", "forward", "bf16")
    assert forward["bytes"]["bulk"] == {"loaded": x_bytes, "stored": x_bytes}
    assert forward["bytes"]["partials"] == {"loaded": 0, "stored": 0}
    assert forward["footprint_bytes"] == forward["floor_bytes"]
    assert backward["bytes"]["bulk"] == {"loaded": 2 * backward_x_bytes, "stored": backward_x_bytes}
    assert backward["bytes"]["partials"]["loaded"] == backward["bytes"]["partials"]["stored"] > 0
    for record in (forward, backward):
        assert record["status"] == "ok"
        assert sum(launch["loaded"] + launch["stored"] for launch in record["launches"]) == record["total_bytes"]


@pytest.mark.parametrize("file", sorted(TUNED.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_choices_are_of_their_spaces_and_serve_the_quick_shapes(file):
    """Points are in bf16, landmarks in fp32 too: on that GPU none of the calls searches or warns. GPUs with a file all
    have as many multiprocessors."""
    from perf import resources

    shipped = json.loads(file.read_text())
    assert shipped["environment"]["multiprocessors"] == str(resources.TARGETS["sm_90"].multiprocessors)
    with resources.compiling_for(resources.TARGETS["sm_90"]) as launches:
        ops = workloads.ROW_OPS + workloads.CHANNEL_OPS  # no GPU was tuned for others yet
        points = [point for point in workloads.points(ops=ops) if point.workload.layout != STRIDED]  # no more are these
        for point in (point for point in points if point.dtype == "bf16" or point.workload.landmark):
            inputs = calls.make_inputs(point, "cpu", blank=True)
            call = calls.candidate("triton_norm", point, calls.bind(point, resources.OPS, inputs), inputs)
            call.run(call.prepare())
        spaces = {(made.space.kernel, made.space.key): made.space for made in launches}
    for (kernel, key), space in spaces.items():
        choice = shipped["choices"].get(kernel, {}).get(key)
        assert len(space.configs) == 1 or space.find(choice or {}), (kernel, key, choice)


def test_resources_of_a_kernel_on_gpus_that_are_not_here():
    pytest.importorskip("triton")
    records = {record["target"]: record for record in records_of("resources", "--points", "1")}
    assert set(records) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    hopper = records["sm_90"]
    assert hopper["kernel"] == "rows_forward_kernel"
    assert hopper["shape"][-1] == 1000
    assert hopper["loads"].keys() == hopper["stores"].keys() == {"128"}
    for record in records.values():
        assert record["spill_stores"] == record["spill_loads"] == 0
        assert 0 < record["registers"] <= 128
        assert 0 < record["resident_warps"] <= record["possible_warps"]


def test_errors_on_hard_data_are_no_larger_than_torchs():
    """ulp of the output's type, once torch's and again for the rounding of another order of summation."""
    records = records_of("numerics")
    assert {(r["op"], r["dtype"]) for r in records} == set(
        product(
            (
                *("layer_norm", "rms_norm", "rms_norm_gated", "rms_norm_gate_first"),
                *("layer_norm_modulated", "rms_norm_modulated"),
                *("batch_norm", "group_norm", "group_norm_silu", "instance_norm"),
            ),
            ("fp32", "bf16", "fp16"),
        )
    )
    for record in records:
        # x · silu(gate) may not fit into fp32, nor torch's into the type of x.
        of_product = record["op"] == "rms_norm_gate_first"
        for output in findings.OUTPUTS:
            ours, theirs = (record[output][name] for name in ("triton_norm", "torch"))
            if theirs is None:
                # On a GPU torch's batch_norm of fp16 is not finite for smaller data either.
                of_gpu = torch.cuda.is_available() and (record["op"], record["dtype"]) == ("batch_norm", "fp16")
                half_product = of_product and record["dtype"] == "fp16"
                assert of_gpu or half_product or record["data"] == findings.OVERFLOWING, record
            if ours is None:
                assert theirs is None, record
                fits = record["data"] != findings.OVERFLOWING or record["dtype"] == "fp16"
                assert (of_product and not fits) or (output == "dx" and FAMILY[record["op"]] not in ROW_FAMILIES), (
                    record
                )
            else:
                few = 2 if FAMILY[record["op"]] in ROW_FAMILIES else 4  # whose moments are merged, program by program
                assert theirs is None or 0 <= ours <= 2 * theirs + few, record


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run would measure")
def test_run_without_a_gpu_exits_2_with_one_sentence(tmp_path):
    done = processes.run("-m", "perf", "run", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == done.stderr.count(".") == 1
    assert list(tmp_path.iterdir()) == []


INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes are started to ignore it
runpy.run_module("perf", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the timed part would come first")
def test_interrupted_run_reports_what_is_done(tmp_path):
    path = tmp_path / "out" / "results.jsonl"
    with processes.started("-c", INTERRUPTIBLE, "--out", str(tmp_path / "out")) as process:
        assert until(lambda: path.exists() and len(path.read_text().splitlines()) > 2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 130, errors
        assert not processes.running({process.pid})
    result = read(path)
    assert len(result.traffic) + len(result.resources) + len(result.numerics) > 0
    assert "interrupted" in (tmp_path / "out" / "index.html").read_text()
