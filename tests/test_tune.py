"""`perf tune` without a GPU: what it chooses from made-up times, and that the library takes up the file it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import triton_norm
from perf import measure, tune, tuner
from perf.calls import make_inputs
from perf.points import Point, Workload
from row_norms import LAYER_NORM
from triton_norm import tuning
from triton_norm.ops import launch

triton = pytest.importorskip("triton")

if launch.INTERPRETED:
    from perf.interleave import interleaved

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU this is for real")

GPU = "NVIDIA Unheard-Of 9"
FILE = "nvidia-unheard-of-9.json"
SMALL, LARGE = (Workload("rows", "", (n_rows, 40), "") for n_rows in (3, 9))
FORWARD, BACKWARD = "rows_forward_kernel", "rows_backward_kernel"
ROWS = [Point("layer_norm", "forward", "fp32", workload) for workload in (SMALL, LARGE)]
IMAGES = Workload("channels", "", (2, 3, 4, 8), "")


class MadeUpTimes:
    """A clock that tells each call's time from its name: µs where part of the name is in `times`, otherwise 50."""

    device = "cpu"

    def __init__(self, times=()):
        self.times = dict(times)
        self.rounds = 0

    def round(self, entries, backlog_us):
        self.rounds += 1
        return [self._of(entry.name) for entry in entries]

    def _of(self, name):
        return next((us for (workload, config), us in self.times.items() if workload in name and config in name), 50.0)

    def host(self, entry):
        return 3.0

    def kernels(self, entry):
        return []

    def synchronize(self):
        pass


@pytest.fixture
def unknown_gpu(monkeypatch, tmp_path):
    """A GPU that nothing is known of, whose kernels have several configs; returns where its file would be."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    monkeypatch.setattr(launch, "gpu_name", lambda device: GPU)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "TUNED", folder)
    monkeypatch.setattr(measure, "WARMUPS", 1)
    for space in ("rows_forward", "rows_backward", "rows_backward_finalise", "channels"):
        made = getattr(tuning, space)
        monkeypatch.setattr(tuning, space, lambda *a, made=made: made(*a[:-1], False))
    tuning.measured.cache_clear()
    tuning.forget()
    yield folder / FILE
    tuning.measured.cache_clear()
    tuning.forget()


def tuned(points, out, timer=None, **options):
    return tune.run(points, None, out, 600.0, lambda line: None, timer or MadeUpTimes(), **options)


def forward_space():
    return tuning.rows_forward(40, "float32", 4, 4, tuning.INTERPRETED_SMS, False)


def times_of(rows):
    """From (workload, number of a config, µs) of the forward's space."""
    return {(workload, tuner.text(forward_space().configs[number])): us for workload, number, us in rows}


def choices_in(file):
    return json.loads(file.read_text())["choices"]


def record_of(results, kernel):
    (record,) = (record for record in results["keys"] if record["kernel"] == kernel)
    return record


def raising(*_):
    raise AssertionError("launches were searched for")


ALONE = [
    ("3x40", 0, 10.0),
    ("3x40", 1, 12.0),
    ("3x40", 2, 40.0),
    ("9x40", 0, 40.0),
    ("9x40", 1, 12.0),
    ("9x40", 2, 10.0),
]


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
OF_CHANNELS = {"channels_forward_kernel", "channels_backward_kernel"}


@pytest.mark.parametrize(
    ("op", "workload", "one_launch", "kernels"),
    [
        ("layer_norm_residual", LARGE, True, OF_ROWS),
        ("rms_norm", LARGE, True, OF_ROWS),
        ("batch_norm", IMAGES, True, OF_CHANNELS),
        ("batch_norm", IMAGES, False, OF_CHANNELS),
        ("batch_norm_eval", IMAGES, True, OF_CHANNELS),
        ("batch_norm_add_relu", IMAGES, True, OF_CHANNELS),
    ],
)
def test_both_directions_are_tuned_once_for_each_workload(
    op, workload, one_launch, kernels, unknown_gpu, monkeypatch, tmp_path
):
    monkeypatch.setattr(tuning, "ONE_LAUNCH", one_launch)
    monkeypatch.setattr(tuning, "INTERPRETED_TILE", 4096)  # of which there are several configs to keep it
    tuning.forget()
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
def test_peers_begin_with_zeros_each_time(op, workload, unknown_gpu, monkeypatch, tmp_path):
    """Programs that share a row or channel wait for arrivals that are counted from zero."""
    small = dict.fromkeys(("WHOLE_ROW_BYTES", "FORWARD_PIECE_BYTES", "BACKWARD_SPAN_BYTES"), 1024)
    for number, value in {**small, "INTERPRETED_SMS": 12, "INTERPRETED_TILE": 4096, "MIN_HELD_ELEMENTS": 16}.items():
        monkeypatch.setattr(tuning, number, value)
    tuning.forget()
    begun = []

    def noted(given):
        if given.get("sync_ptr") is not None:
            begun.append(int(given["sync_ptr"].abs().sum()))
        return False

    failing(monkeypatch, lambda given, config: noted(given))
    with interleaved():
        results = tuned([Point(op, mode, "fp32", workload) for mode in ("forward", "backward")], tmp_path)
    assert results["problems"] == []
    assert len(begun) > 20
    assert not any(begun)
    for record in results["keys"]:
        assert {each["status"] for each in record["configs"]} == {"ok"}


def failing(monkeypatch, fails, then=None):
    """Launches for which `fails(arguments by name, config)` raise or, with `then`, go on to do that."""
    start = launch.start

    def patched(kernel, count, arguments, constants, config):
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        if not fails(given, config):
            return start(kernel, count, arguments, constants, config)
        if then is None:
            raise RuntimeError("out of resource: shared memory")
        started = start(kernel, count, arguments, constants, config)
        then(given)
        return started

    monkeypatch.setattr(launch, "start", patched)


def n_rows(given):
    return given["x_ptr"].shape[0]


def test_a_config_that_fails_on_one_workload_is_out(unknown_gpu, monkeypatch, tmp_path):
    """The fastest on the other one, where it is met first."""
    fastest, second = forward_space().configs[:2]
    failing(monkeypatch, lambda given, config: config == fastest and n_rows(given) == 9)
    timer = MadeUpTimes({("", tuner.text(fastest)): 1.0, ("", tuner.text(second)): 2.0})
    results = tuned(ROWS, tmp_path, timer)
    assert choices_in(unknown_gpu)[FORWARD] == {forward_space().key: second.keywords}
    failed, chosen, *_ = record_of(results, FORWARD)["configs"]
    assert (failed["status"], failed["ratio"]) == ("error", None)
    assert failed["message"] == "layer_norm forward fp32 9x40: RuntimeError: out of resource: shared memory"
    assert chosen["ratio"] == 1.0
    assert results["problems"] == []


def test_a_key_no_config_of_which_works_is_left_out(unknown_gpu, monkeypatch, tmp_path):
    failing(monkeypatch, lambda given, config: n_rows(given) == 9)
    results = tuned(ROWS, tmp_path)
    assert not unknown_gpu.exists()
    record = record_of(results, FORWARD)
    assert (record["chosen"], record["left_out"]) == (None, "no config works on every workload")
    (problem,) = results["problems"]
    assert problem.startswith("layer_norm forward fp32 9x40: RuntimeError: no config of rows_forward_kernel works")


@pytest.mark.parametrize("number", [0, 2])
def test_a_wrong_result_is_not_written(number, unknown_gpu, monkeypatch, tmp_path):
    """Whether it is the best guess, with which the call is made first, or another one: that config alone is out."""
    wrong, second = forward_space().configs[number], forward_space().configs[1]
    failing(monkeypatch, lambda given, config: config == wrong, lambda given: given["y_ptr"].mul_(1.01))
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
    """Statistics that no output of the forward shows, wrong with one config: what a later backward is wrong by."""
    fastest = forward_space().configs[1]
    failing(
        monkeypatch,
        lambda given, config: config == fastest and given.get("statistics_ptr") is not None and "y_ptr" in given,
        lambda given: given["statistics_ptr"].mul_(2.0),
    )
    timer = MadeUpTimes({("", tuner.text(fastest)): 1.0})
    points = [Point("layer_norm", mode, "fp32", SMALL) for mode in ("forward", "backward")]
    monkeypatch.setattr(tuner.Tuner, "_check_each", lambda *_: None)
    monkeypatch.setattr(tune, "SAVE_EVERY", 0.0)  # it was in the file already
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
        lambda given, config: config == wrong and given.get("statistics_ptr") is not None and "y_ptr" in given,
        lambda given: given["statistics_ptr"].mul_(2.0),
    )
    points = [Point("layer_norm", mode, "fp32", SMALL) for mode in ("forward", "backward")]
    results = tuned(points, tmp_path)
    assert results["problems"] == []
    assert record_of(results, FORWARD)["configs"][0]["status"] == "wrong"
    assert record_of(results, FORWARD)["chosen"] == forward_space().configs[1].keywords
    assert {each["status"] for each in record_of(results, BACKWARD)["configs"]} == {"ok"}


def test_running_statistics_move_as_by_one_call(unknown_gpu, monkeypatch, tmp_path):
    """Of the call that is made to learn its launches; those that are timed move copies."""
    seen, started = [], []

    def kept(*arguments):
        seen.append(make_inputs(*arguments))
        return seen[-1]

    def timed_after(self, point, inputs, *_):
        started.append((inputs.running_mean.clone(), inputs.running_var.clone()))

    monkeypatch.setattr(tuner, "make_inputs", kept)
    monkeypatch.setattr(tuner.Tuner, "_check_each", timed_after)
    point = Point("batch_norm", "forward", "fp32", IMAGES)
    tuned([point], tmp_path)
    inputs = make_inputs(point, "cpu")
    F.batch_norm(inputs.x, inputs.running_mean, inputs.running_var, training=True, momentum=0.1)
    (moved,) = started
    torch.testing.assert_close(moved, (inputs.running_mean, inputs.running_var))
    torch.testing.assert_close(seen[0].x, inputs.x, rtol=0, atol=0)


@pytest.mark.parametrize("fresh", [False, True])
def test_choices_of_other_keys_stay_unless_a_fresh_file_is_asked_for(fresh, unknown_gpu, tmp_path):
    choice = tuning.config(4, BLOCK_M=1, BLOCK_N=64).keywords
    space = forward_space()
    old = {FORWARD: {"columns 8, float32": choice, space.key: choice}, "another_kernel": {"": choice}}
    unknown_gpu.write_text(json.dumps({"environment": {"date": "earlier"}, "choices": old}))
    tuned(ROWS[:1], tmp_path, fresh=fresh)
    new = {FORWARD: {space.key: space.configs[0].keywords}}
    kept = {FORWARD: old[FORWARD] | new[FORWARD], "another_kernel": {"": choice}}
    assert choices_in(unknown_gpu) == (new if fresh else kept)
    content = json.loads(unknown_gpu.read_text())
    assert content.get("kept_from") == (None if fresh else [{"date": "earlier"}])
    assert content["environment"]["torch"]
    assert unknown_gpu.read_text() == json.dumps(content, indent=1, sort_keys=True) + "\n"


def test_a_file_that_cannot_be_merged_is_told_before_anything_is_measured(unknown_gpu, tmp_path):
    unknown_gpu.write_text("{")
    timer = MadeUpTimes()
    with pytest.raises(tune.CannotTune, match="holds no choices that could be kept"):
        tuned(ROWS, tmp_path, timer)
    assert timer.rounds == 0
    assert unknown_gpu.read_text() == "{"
    tuned(ROWS[:1], tmp_path, timer, fresh=True)
    assert choices_in(unknown_gpu)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(unknown_gpu, tmp_path):
    timer = MadeUpTimes()
    file = tmp_path / "file"
    file.write_text("")
    for folder, out in ((file / "tuned", tmp_path), (tmp_path, file / "out")):
        with pytest.raises(tune.CannotTune, match=f"nothing can be written to {file}"):
            tune.run(ROWS, folder, out, 60.0, lambda line: None, timer)
    assert timer.rounds == 0


def test_without_a_gpu_there_is_nothing_to_search(tmp_path):
    with pytest.raises(tune.CannotTune, match="there is nothing to search"):
        tune.run(ROWS, tmp_path, tmp_path, 60.0, print)
    with pytest.raises(tune.CannotTune, match="launches on cpu are not searched for"):
        tune.run(ROWS, tmp_path, tmp_path, 60.0, print, MadeUpTimes())


def test_an_interrupted_run_leaves_what_is_done(unknown_gpu, monkeypatch, tmp_path):
    """In the midst of the second workload, of which nothing counts."""

    class Interrupted(MadeUpTimes):
        def _of(self, name):
            if "9x40" in name:
                raise KeyboardInterrupt
            return super()._of(name)

    said = []
    results = tune.run(ROWS, None, tmp_path, 60.0, said.append, Interrupted(times_of(ALONE)))
    assert results["stopped"] == "interrupted"
    assert results["unreached"] == [str(ROWS[1])]
    assert choices_in(unknown_gpu) == {FORWARD: {forward_space().key: forward_space().configs[0].keywords}}
    assert json.loads((tmp_path / "tune.json").read_text()) == results
    assert sorted(path.name for path in unknown_gpu.parent.iterdir()) == [FILE]
    assert said[-1].endswith("points not reached: 1, stopped: interrupted")


def test_a_run_that_is_killed_leaves_whole_files(unknown_gpu, monkeypatch, tmp_path):
    """Both are whole after every point, long before the end."""
    monkeypatch.setattr(tune, "SAVE_EVERY", 0.0)
    found = []

    def say(line):
        if line.startswith("[2/2]"):
            found.append((json.loads(unknown_gpu.read_text()), json.loads((tmp_path / "tune.json").read_text())))

    tune.run(ROWS, None, tmp_path, 60.0, say, MadeUpTimes())
    ((tuned_file, results),) = found
    assert tuned_file["choices"][FORWARD]
    assert results["reached"] == 1


def test_a_run_ends_with_its_time(unknown_gpu, monkeypatch, tmp_path):
    results = tune.run(ROWS, None, tmp_path, -1.0, lambda line: None, MadeUpTimes())
    assert results["unreached"] == [str(point) for point in ROWS]
    assert not unknown_gpu.exists()
    measure = tuner.Tuner.measure
    clock = [0.0]

    def slow(self, point):
        clock[0] += 58.0
        return measure(self, point)

    monkeypatch.setattr(tuner.Tuner, "measure", slow)
    monkeypatch.setattr(tune, "time", type("Time", (), {"monotonic": staticmethod(lambda: clock[0])}))
    results = tune.run(ROWS, None, tmp_path, 60.0, lambda line: None, MadeUpTimes())
    assert (results["reached"], results["confirmed"]) == (1, 1)
    assert results["unreached"] == [str(ROWS[1])]


def test_a_gpu_that_no_longer_answers_ends_the_run(unknown_gpu, monkeypatch, tmp_path):
    """What is known by then is written, but for what was being launched; nothing is confirmed."""
    dead = []

    class Dying(MadeUpTimes):
        def synchronize(self):
            if dead:
                raise RuntimeError("an illegal memory access")

    third = forward_space().configs[2]
    failing(monkeypatch, lambda given, config: config == third and n_rows(given) == 9, lambda given: dead.append(1))
    other = Point("layer_norm", "forward", "fp32", Workload("rows", "", (3, 80), ""))
    results = tuned([other, *ROWS], tmp_path, Dying())
    assert "an illegal memory access" in results["stopped"]
    assert (results["reached"], results["confirmed"]) == (2, 0)
    assert list(choices_in(unknown_gpu)[FORWARD]) == ["columns 128, float32"]
    (mine,) = (record for record in results["keys"] if record["key"] == forward_space().key)
    assert mine["configs"][2]["status"] == "error"
    assert mine["chosen"] is None


def launched_with(monkeypatch):
    configs = []
    start = launch.start

    def noted(kernel, count, arguments, constants, config):
        configs.append(config)
        return start(kernel, count, arguments, constants, config)

    monkeypatch.setattr(launch, "start", noted)
    return configs


def test_the_library_uses_the_file_and_searches_nothing(unknown_gpu, monkeypatch, tmp_path):
    """Nothing of the run itself is remembered: neither choices nor launchers, nor is a file read before it."""
    inputs = LAYER_NORM.drawn((5, 40), 1, torch.float32, "cpu")
    with pytest.MonkeyPatch.context() as before:
        before.setattr(launch, "search", lambda kernel, space, *_: space.configs[-1])
        LAYER_NORM.against_oracle(*inputs)
    tuning._chosen.clear()
    points = [Point("layer_norm", mode, "fp32", SMALL) for mode in ("forward", "backward")]
    tuned(points, tmp_path, MadeUpTimes({(FORWARD, tuner.text(forward_space().configs[1])): 1.0}))
    assert not tuning._chosen
    monkeypatch.setattr(launch, "search", raising)
    configs = launched_with(monkeypatch)
    choices = choices_in(unknown_gpu)
    for _ in range(2):
        LAYER_NORM.against_oracle(*inputs)
        assert configs[0].keywords == forward_space().configs[1].keywords
        assert [config.keywords for config in configs] == [
            next(iter(choices[kernel].values())) for kernel in (FORWARD, BACKWARD, "rows_backward_finalise_kernel")
        ]
        configs.clear()
        tuning.forget()


PROCESS = """
import json
import sys
from pathlib import Path
import torch
import triton_norm
from triton_norm import tuning
from triton_norm.ops import launch

launch.gpu_name = lambda device: "NVIDIA Unheard-Of 9"
tuning.TUNED = Path(sys.argv[1])
rows_forward = tuning.rows_forward
tuning.rows_forward = lambda *arguments: rows_forward(*arguments[:-1], False)
start = launch.start

def search(*arguments):
    raise AssertionError("launches were searched for")

def noted(kernel, count, arguments, constants, config):
    print(json.dumps(config.keywords))
    return start(kernel, count, arguments, constants, config)

launch.search, launch.start = search, noted
triton_norm.layer_norm(torch.randn(7, 40), (40,))
"""


def test_a_fresh_process_uses_the_file_and_searches_nothing(unknown_gpu, tmp_path):
    tuned(ROWS[:1], tmp_path, MadeUpTimes({("", tuner.text(forward_space().configs[1])): 1.0}))
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROCESS, str(unknown_gpu.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == choices_in(unknown_gpu)[FORWARD][forward_space().key]


def test_a_known_gpus_file_and_the_users_choices_play_no_part_and_stay(unknown_gpu, monkeypatch, tmp_path):
    space = forward_space()
    unknown_gpu.write_text(json.dumps({"choices": {FORWARD: {space.key: space.configs[2].keywords}}}))
    tuning.choose(space, GPU, space.configs[3])
    monkeypatch.setattr(launch, "search", raising)
    results = tuned(ROWS[:1], tmp_path)
    assert len(record_of(results, FORWARD)["workloads"]) == 1
    assert choices_in(unknown_gpu) == {FORWARD: {space.key: space.configs[0].keywords}}
    assert tuning.chosen(space, GPU) == space.configs[3]
    assert launch.search is raising


def test_a_point_that_fails_is_a_problem_and_the_next_is_tuned(unknown_gpu, monkeypatch, tmp_path):
    real = tuner.expected

    def expected(point, inputs):
        if point.workload is SMALL:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(point, inputs)

    monkeypatch.setattr(tuner, "expected", expected)
    results = tuned(ROWS, tmp_path)
    assert results["problems"] == ["layer_norm forward fp32 3x40: OutOfMemoryError: CUDA out of memory"]
    assert choices_in(unknown_gpu)
    assert (results["reached"], results["confirmed"]) == (2, 1)


def test_the_library_serves_as_before_afterwards(unknown_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        tuned(ROWS[:1], tmp_path)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    x = torch.randn(4, 40)
    torch.testing.assert_close(triton_norm.layer_norm(x, (40,)), F.layer_norm(x, (40,)))
