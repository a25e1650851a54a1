"""`perf tune` without a GPU: its choices from made-up times."""

import json

import pytest
import torch
from torch.nn import functional as F

from perf import tuner
from perf.calls import make_inputs
from perf.points import Point, Workload
from support import spaces, tuners
from support.tuners import (
    ALONE,
    BACKWARD,
    FORWARD,
    IMAGES,
    LARGE,
    ROWS,
    SMALL,
    MadeUpTimes,
    choices_in,
    failing,
    forward_space,
    n_rows,
    record_of,
    times_of,
    tuned,
)
from triton_norm import launch
from triton_norm.tuning import channel_spaces
from triton_norm.tuning.limits import INTERPRETED

triton = pytest.importorskip("triton")

if INTERPRETED:
    from triton_norm.testing.interleave import interleaved

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU this is for real")


@pytest.fixture
def unknown_gpu(tmp_path):
    with tuners.unknown_gpu(tmp_path) as file:
        yield file


@pytest.fixture
def few_configs(monkeypatch):
    """Has three configs at most for each launch on channels."""
    monkeypatch.setattr(channel_spaces, "channels", spaces.first_of(channel_spaces.channels, 3))


def test_the_best_geometric_mean_over_the_workloads_is_chosen(unknown_gpu, tmp_path):
    """Each workload alone would choose another config."""
    space = forward_space()
    for points, number in ((ROWS[:1], 0), (ROWS[1:], 2), (ROWS, 1)):
        results = tuned(points, tmp_path, MadeUpTimes(times_of(ALONE)), fresh=True)
        assert choices_in(unknown_gpu) == {FORWARD: {space.key: space.configs[number].keywords}}
    record = record_of(results, FORWARD)
    assert record["chosen"] == space.configs[1].keywords
    assert [each["status"] for each in record["configs"]] == ["ok"] * len(space.configs)
    assert record["configs"][1]["ratio"] == pytest.approx(1.2)
    assert record["configs"][0]["ratio"] == pytest.approx(2.0)
    assert [each["point"] for each in record["workloads"]] == [str(point) for point in ROWS]
    assert record["workloads"][1]["us"][:3] == [40.0, 12.0, 10.0]
    assert results["problems"] == []
    assert (results["reached"], results["confirmed"], results["unreached"]) == (2, 2, [])
    assert json.loads((tmp_path / "tune.json").read_text()) == results


OF_ROWS = {FORWARD, BACKWARD, "rows_backward_finalise_kernel"}
OF_MODULATED = {f"modulated_{kernel}_kernel" for kernel in ("forward", "backward", "backward_finalise")}
OF_CHANNELS = {"channels_forward_kernel", "channels_backward_kernel"}
OF_GROUPS = {"groups_forward_kernel", "groups_fused_backward_kernel"}


@pytest.mark.parametrize(
    ("op", "workload", "one_launch", "kernels"),
    [
        ("layer_norm_residual", LARGE, True, OF_ROWS),
        ("rms_norm", LARGE, True, OF_ROWS),
        ("rms_norm_gated", Workload("gated", "", (12, 16), ""), True, OF_MODULATED),
        ("layer_norm_modulated_residual", Workload("modulated", "", (3, 4, 16), ""), True, OF_MODULATED),
        ("batch_norm", IMAGES, False, OF_CHANNELS),
        ("batch_norm_eval", IMAGES, True, OF_CHANNELS),
        ("batch_norm_add_relu", IMAGES, False, OF_CHANNELS),
        ("group_norm_silu", Workload("groups", "", (2, 64, 4, 5), ""), False, OF_GROUPS),
        ("instance_norm", Workload("instances", "", (2, 8, 8, 8), ""), False, OF_GROUPS),
    ],
)
def test_both_directions_are_tuned_once_for_each_workload(
    op, workload, one_launch, kernels, unknown_gpu, few_configs, numbers, tmp_path
):
    numbers(one_launch_bytes=2**62 if one_launch else 0)
    points = [Point(op, mode, "fp32", workload) for mode in ("forward", "backward")]
    results = tuned(points, tmp_path)
    assert results["problems"] == []
    assert results["confirmed"] == 2
    assert {record["kernel"] for record in results["keys"]} == kernels
    for record in results["keys"]:
        assert len(record["workloads"]) == 1
        assert record["workloads"][0]["point"] == str(points["backward" in record["kernel"]])
        assert None not in record["workloads"][0]["us"]
        assert record["chosen"] == record["configs"][0]["config"]  # of equal ones the best guess
    assert set(choices_in(unknown_gpu)) == kernels


def test_a_backward_alone_tunes_the_forward_that_it_needs(unknown_gpu, tmp_path):
    results = tuned([Point("layer_norm", "backward", "fp32", SMALL)], tmp_path)
    assert record_of(results, FORWARD)["workloads"][0]["point"] == "layer_norm backward fp32 3x40"


@pytest.mark.parametrize(
    ("op", "workload"), [("layer_norm", Workload("rows", "", (2, 900), "")), ("batch_norm", IMAGES)]
)
def test_peers_begin_with_zeros_each_time(op, workload, unknown_gpu, few_configs, numbers, monkeypatch, tmp_path):
    """Programs that share a row or channel wait for arrivals that are counted from zero."""
    small = dict.fromkeys(("whole_row_bytes", "forward_piece_bytes", "backward_span_bytes"), 1024)
    numbers(**small, multiprocessors=12, min_split_elements=16, one_launch_bytes=0)
    begun = []

    def noted(values):
        if values.get("sync_ptr") is not None:
            begun.append(int(values["sync_ptr"].abs().sum()))
        return False

    failing(monkeypatch, lambda values, config: noted(values))
    with interleaved():
        results = tuned([Point(op, mode, "fp32", workload) for mode in ("forward", "backward")], tmp_path)
    assert results["problems"] == []
    assert len(begun) > 20
    assert not any(begun)
    for record in results["keys"]:
        assert {each["status"] for each in record["configs"]} == {"ok"}


def test_a_config_that_fails_on_one_workload_is_out(unknown_gpu, monkeypatch, tmp_path):
    """The fastest on the other one, where it is met first."""
    fastest, second = forward_space().configs[:2]
    failing(monkeypatch, lambda values, config: config == fastest and n_rows(values) == 9)
    timer = MadeUpTimes({("", tuner.text(fastest)): 1.0, ("", tuner.text(second)): 2.0})
    results = tuned(ROWS, tmp_path, timer)
    assert choices_in(unknown_gpu)[FORWARD] == {forward_space().key: second.keywords}
    failed, chosen, *_ = record_of(results, FORWARD)["configs"]
    assert (failed["status"], failed["ratio"]) == ("error", None)
    assert failed["message"] == "layer_norm forward fp32 9x40: RuntimeError: out of resource: shared memory"
    assert chosen["ratio"] == 1.0
    assert results["problems"] == []


def test_a_key_no_config_of_which_works_is_left_out(unknown_gpu, monkeypatch, tmp_path):
    failing(monkeypatch, lambda values, config: n_rows(values) == 9)
    results = tuned(ROWS, tmp_path)
    assert choices_in(unknown_gpu) == {}
    record = record_of(results, FORWARD)
    assert (record["chosen"], record["left_out"]) == (None, "no config works on every workload")
    (problem,) = results["problems"]
    assert problem.startswith("layer_norm forward fp32 9x40: RuntimeError: no config of rows_forward_kernel works")


@pytest.mark.parametrize("number", [0, 2])
def test_a_wrong_result_is_not_written(number, unknown_gpu, monkeypatch, tmp_path):
    """The config is the best guess, with which the call is made first, or another one: that config alone is out."""
    wrong, second = forward_space().configs[number], forward_space().configs[1]
    failing(monkeypatch, lambda values, config: config == wrong, lambda values: values["y_ptr"].mul_(1.01))
    timer = MadeUpTimes({("", tuner.text(wrong)): 1.0, ("", tuner.text(second)): 2.0})
    results = tuned(ROWS[:1], tmp_path, timer)
    assert choices_in(unknown_gpu)[FORWARD] == {forward_space().key: second.keywords}
    configs = record_of(results, FORWARD)["configs"]
    assert [each["status"] for each in configs].count("wrong") == 1
    assert configs[number]["status"] == "wrong"
    assert configs[number]["message"].startswith("layer_norm forward fp32 3x40: y is off by")


def test_what_a_config_leaves_unwritten_is_not_taken_from_an_earlier_call(unknown_gpu, monkeypatch, tmp_path):
    lazy = forward_space().configs[1]
    start = launch.start

    def patched(kernel, count, arguments, constants, config):
        return None if config == lazy else start(kernel, count, arguments, constants, config)

    monkeypatch.setattr(launch, "start", patched)
    results = tuned(ROWS[:1], tmp_path)
    assert record_of(results, FORWARD)["configs"][1]["status"] == "wrong"


def test_choices_that_are_wrong_together_are_left_out(unknown_gpu, monkeypatch, tmp_path):
    """Statistics that no output of the forward shows, wrong with one config: a later backward is wrong by them."""
    fastest = forward_space().configs[1]
    failing(
        monkeypatch,
        lambda values, config: config == fastest and values.get("statistics_ptr") is not None and "y_ptr" in values,
        lambda values: values["statistics_ptr"].mul_(2.0),
    )
    timer = MadeUpTimes({("", tuner.text(fastest)): 1.0})
    points = [Point("layer_norm", mode, "fp32", SMALL) for mode in ("forward", "backward")]
    monkeypatch.setattr(tuner.Tuner, "_check_each", lambda *_: None)
    results = tuned(points, tmp_path, timer)
    (problem,) = results["problems"]
    assert problem.startswith("layer_norm backward fp32 3x40: RuntimeError: wrong with all choices in force: d")
    assert choices_in(unknown_gpu) == {}
    assert record_of(results, FORWARD)["left_out"]


def test_a_wrong_call_is_blamed_on_the_one_config_that_makes_it_wrong(unknown_gpu, monkeypatch, tmp_path):
    """The forward's, which its own point could not tell: the backward's configs are not to blame."""
    wrong = forward_space().configs[0]
    failing(
        monkeypatch,
        lambda values, config: config == wrong and values.get("statistics_ptr") is not None and "y_ptr" in values,
        lambda values: values["statistics_ptr"].mul_(2.0),
    )
    points = [Point("layer_norm", mode, "fp32", SMALL) for mode in ("forward", "backward")]
    results = tuned(points, tmp_path)
    assert results["problems"] == []
    assert record_of(results, FORWARD)["configs"][0]["status"] == "wrong"
    assert record_of(results, FORWARD)["chosen"] == forward_space().configs[1].keywords
    assert {each["status"] for each in record_of(results, BACKWARD)["configs"]} == {"ok"}


def test_running_statistics_move_as_by_one_call(unknown_gpu, monkeypatch, tmp_path):
    """The call that is made to learn its launches moves them; those that are timed move copies."""
    seen, started = [], []

    def saved(*arguments):
        seen.append(make_inputs(*arguments))
        return seen[-1]

    def timed_after(self, point, inputs, *_):
        started.append((inputs.running_mean.clone(), inputs.running_var.clone()))

    monkeypatch.setattr(tuner, "make_inputs", saved)
    monkeypatch.setattr(tuner.Tuner, "_check_each", timed_after)
    point = Point("batch_norm", "forward", "fp32", IMAGES)
    tuned([point], tmp_path)
    inputs = make_inputs(point, "cpu")
    F.batch_norm(inputs.x, inputs.running_mean, inputs.running_var, training=True, momentum=0.1)
    (moved,) = started
    torch.testing.assert_close(moved, (inputs.running_mean, inputs.running_var))
    torch.testing.assert_close(seen[0].x, inputs.x, rtol=0, atol=0)
