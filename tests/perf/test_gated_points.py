"""Points of rows with a gate or a modulation: the gate before timing, and their floors."""

import pytest
from torch.nn import functional

from perf import calls, measure, workloads
from perf.contenders import Contender
from perf.ops import OPS, torch_functions
from perf.points import Point, Workload
from support.timers import FakeTimer

pytestmark = pytest.mark.unguarded

GATED = Workload("gated", "layers", (64, 96), "test")

GROUPS = Workload("gated", "layers", (64, 3, 32), "test", weights=3)

SAMPLES = Workload("modulated", "layers", (4, 16, 96), "test")


@pytest.mark.parametrize(
    ("op", "workload", "forward", "backward"),
    [
        ("rms_norm_gated", GATED, {"y"}, {"dx", "dgate", "dweight"}),
        ("rms_norm_gate_first", GROUPS, {"y"}, {"dx", "dgate", "dweight"}),
        ("layer_norm_modulated", SAMPLES, {"y"}, {"dx", "dscale", "dshift"}),
        ("rms_norm_modulated", SAMPLES, {"y"}, {"dx", "dweight", "dscale", "dshift"}),
        (
            "layer_norm_modulated_residual", SAMPLES, {"y", "total"},
            {"dx", "dresidual", "dresidual_gate", "dscale", "dshift"},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gate_knows_gated_and_modulated_rows(op, workload, forward, backward, dtype):
    lax = Contender("torch", torch_functions, accuracy=2.0)  # torch rounds each product to bf16
    for mode, outputs in (("forward", forward), ("backward", backward)):
        (record,) = measure.measure_point(Point(op, mode, dtype, workload), [lax], FakeTimer(), seconds=0)
        assert record["status"] == "ok", record["message"]
        assert set(record["errors"]) == outputs


@pytest.mark.parametrize(
    ("op", "workload", "wrong", "output"),
    [
        ("rms_norm_gated", GATED, lambda F: OPS["rms_norm_gate_first"].torch(F), "y"),
        ("rms_norm_gate_first", GROUPS, lambda F: OPS["rms_norm_gated"].torch(F), "y"),
        (
            "layer_norm_modulated", SAMPLES,
            lambda F: lambda x, shape, scale, shift, eps: OPS["layer_norm_modulated"].torch(F)(
                x, shape, scale.roll(1, 0), shift, eps
            ),
            "y",
        ),
        (
            "rms_norm_modulated", SAMPLES,
            lambda F: lambda x, shape, weight, scale, shift, eps: OPS["rms_norm_modulated"].torch(F)(
                x, shape, weight, shift, scale, eps
            ),
            "y",
        ),
        (
            "layer_norm_modulated_residual", SAMPLES,
            lambda F: lambda x, residual, *rest: OPS["layer_norm_modulated_residual"].torch(F)(residual, x, *rest),
            "y",
        ),
    ],
)  # fmt: skip
def test_a_gate_in_the_wrong_place_and_the_scale_of_another_sample_fail(op, workload, wrong, output):
    contender = Contender("wrong", lambda: {op: wrong(functional)})
    (record,) = measure.measure_point(Point(op, "forward", "fp32", workload), [contender], FakeTimer(), seconds=0)
    assert record["status"] == "wrong"
    assert record["message"].startswith(output)


def test_weights_of_groups_are_as_many_as_groups():
    inputs = calls.make_inputs(Point("rms_norm_gate_first", "backward", "bf16", GROUPS), "cpu")
    assert inputs.weight.shape == (3, 32)
    one = Workload("gated", "layers", (64, 3, 32), "test")
    for mode, weights in (("forward", 1), ("backward", 2)):
        more, fewer = (Point("rms_norm_gate_first", mode, "bf16", each).floor_bytes for each in (GROUPS, one))
        assert more - fewer == weights * 2 * 32 * 2


def test_a_quick_run_has_a_few_points_of_gated_and_modulated_rows():
    ops = workloads.GATED_OR_MODULATED_OPS
    quick, full = workloads.points(ops=ops), workloads.points(quick=False, ops=ops)
    assert {point.op for point in quick} == {*ops}
    assert len(quick) < len(full) / 2
    assert len(quick) < len(workloads.points(ops=workloads.ROW_OPS)) / 3
    assert {point.op for point in quick if point.is_landmark} == {*ops}
