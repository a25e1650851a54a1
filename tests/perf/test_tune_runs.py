"""`perf tune` without a GPU: its files, runs that are cut off, and the library's use of its files."""

import json

import pytest
import torch
from torch.nn import functional as F

import triton_norm
from perf import tune, tuner
from perf.points import Point, Workload
from perf.records import Refused
from support import processes, tuners
from support.row_norms import LAYER_NORM
from support.spaces import GPU
from support.tuners import (
    ALONE,
    BACKWARD,
    FILE,
    FORWARD,
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
from triton_norm.tuning.choices import choose, choose_only, chosen, chosen_so_far
from triton_norm.tuning.configs import config
from triton_norm.tuning.limits import INTERPRETED
from triton_norm.tuning.memory import forget

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU this is for real")


@pytest.fixture
def unknown_gpu(tmp_path):
    with tuners.unknown_gpu(tmp_path) as file:
        yield file


def raising(*_):
    raise AssertionError("launches were searched for")


@pytest.mark.parametrize("fresh", [False, True])
def test_choices_of_other_keys_stay_unless_a_fresh_file_is_asked_for(fresh, unknown_gpu, tmp_path):
    choice = config(4, BLOCK_M=1, BLOCK_N=64).keywords
    space = forward_space()
    old = {FORWARD: {"columns 8, float32": choice, space.key: choice}, "another_kernel": {"": choice}}
    unknown_gpu.write_text(json.dumps({"environment": {"date": "earlier"}, "choices": old}))
    tuned(ROWS[:1], tmp_path, fresh=fresh)
    new = {FORWARD: {space.key: space.configs[0].keywords}}
    saved = {FORWARD: old[FORWARD] | new[FORWARD], "another_kernel": {"": choice}}
    assert choices_in(unknown_gpu) == (new if fresh else saved)
    content = json.loads(unknown_gpu.read_text())
    assert content["environment"]["torch"]
    assert unknown_gpu.read_text() == json.dumps(content, indent=1, sort_keys=True) + "\n"


def test_a_file_that_cannot_be_merged_is_told_before_anything_is_measured(unknown_gpu, tmp_path):
    unknown_gpu.write_text("{")
    timer = MadeUpTimes()
    with pytest.raises(Refused, match="holds no choices that could be kept"):
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
        with pytest.raises(Refused, match="nothing can be written to"):
            tune.run(ROWS, folder, out, 60.0, lambda line: None, timer)
    assert timer.rounds == 0


def test_without_a_gpu_there_is_nothing_to_search(tmp_path):
    with pytest.raises(Refused, match="there is nothing to search"):
        tune.run(ROWS, tmp_path, tmp_path, 60.0, print)
    with pytest.raises(Refused, match="launches on cpu are not searched for"):
        tune.run(ROWS, tmp_path, tmp_path, 60.0, print, MadeUpTimes())


def test_an_interrupted_run_leaves_what_is_done(unknown_gpu, monkeypatch, tmp_path):
    """The run ends in the midst of the second workload, of which nothing counts."""

    class Interrupted(MadeUpTimes):
        def _of(self, name):
            if "9x40" in name:
                raise KeyboardInterrupt
            return super()._of(name)

    said = []
    results = tune.run(ROWS, unknown_gpu.parent, tmp_path, 60.0, said.append, Interrupted(times_of(ALONE)))
    assert results["stopped"] == "interrupted"
    assert results["unreached"] == [str(ROWS[1])]
    assert choices_in(unknown_gpu) == {FORWARD: {forward_space().key: forward_space().configs[0].keywords}}
    assert json.loads((tmp_path / "tune.json").read_text()) == results
    assert sorted(path.name for path in unknown_gpu.parent.iterdir()) == [FILE]
    assert said[-1].endswith("points not reached: 1, stopped: interrupted")


def test_a_run_that_is_killed_leaves_whole_files(unknown_gpu, tmp_path):
    """Both are whole after every point, long before the end."""
    result = []

    def say(line):
        if line.startswith("[2/2]"):
            result.append((json.loads(unknown_gpu.read_text()), json.loads((tmp_path / "tune.json").read_text())))

    tune.run(ROWS, unknown_gpu.parent, tmp_path, 60.0, say, MadeUpTimes())
    ((tuned_file, results),) = result
    assert tuned_file["choices"][FORWARD]
    assert results["reached"] == 1


def test_a_run_ends_with_its_time(unknown_gpu, monkeypatch, tmp_path):
    results = tune.run(ROWS, unknown_gpu.parent, tmp_path, -1.0, lambda line: None, MadeUpTimes())
    assert results["unreached"] == [str(point) for point in ROWS]
    assert not unknown_gpu.exists()
    measure = tuner.Tuner.measure
    clock = [0.0]

    def slow(self, point):
        clock[0] += 58.0
        return measure(self, point)

    monkeypatch.setattr(tuner.Tuner, "measure", slow)
    monkeypatch.setattr(tune, "time", type("Time", (), {"monotonic": staticmethod(lambda: clock[0])}))
    results = tune.run(ROWS, unknown_gpu.parent, tmp_path, 60.0, lambda line: None, MadeUpTimes())
    assert (results["reached"], results["confirmed"]) == (1, 1)
    assert results["unreached"] == [str(ROWS[1])]


def test_a_gpu_that_no_longer_answers_ends_the_run(unknown_gpu, monkeypatch, tmp_path):
    """All that is known by then is written, but for the launch that failed; nothing is confirmed."""
    dead = []

    class Dying(MadeUpTimes):
        def synchronize(self):
            if dead:
                raise RuntimeError("an illegal memory access")

    third = forward_space().configs[2]
    failing(monkeypatch, lambda values, config: config == third and n_rows(values) == 9, lambda values: dead.append(1))
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
    choose_only(GPU, {})
    points = [Point("layer_norm", mode, "fp32", SMALL) for mode in ("forward", "backward")]
    tuned(points, tmp_path, MadeUpTimes({(FORWARD, tuner.text(forward_space().configs[1])): 1.0}))
    assert not chosen_so_far(GPU)
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
        forget()


PROCESS = """
import json
import sys
from pathlib import Path
import torch
from support import spaces
import triton_norm
from triton_norm import launch

start = launch.start

def search(*arguments):
    raise AssertionError("launches were searched for")

def noted(kernel, count, arguments, constants, config):
    print(json.dumps(config.keywords))
    return start(kernel, count, arguments, constants, config)

launch.search, launch.start = search, noted
with spaces.unknown_gpu(Path(sys.argv[1])):
    triton_norm.layer_norm(torch.randn(7, 40), (40,))
"""


def test_a_fresh_process_uses_the_file_and_searches_nothing(unknown_gpu, tmp_path):
    tuned(ROWS[:1], tmp_path, MadeUpTimes({("", tuner.text(forward_space().configs[1])): 1.0}))
    command = "-W", "error::UserWarning", "-c", PROCESS, str(unknown_gpu.parent)
    done = processes.run(*command, PYTHONPATH="tests", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == choices_in(unknown_gpu)[FORWARD][forward_space().key]


def test_a_known_gpus_file_and_the_users_choices_play_no_part_and_stay(unknown_gpu, monkeypatch, tmp_path):
    space = forward_space()
    unknown_gpu.write_text(json.dumps({"choices": {FORWARD: {space.key: space.configs[2].keywords}}}))
    choose(space, GPU, space.configs[3])
    monkeypatch.setattr(launch, "search", raising)
    results = tuned(ROWS[:1], tmp_path)
    assert len(record_of(results, FORWARD)["workloads"]) == 1
    assert choices_in(unknown_gpu) == {FORWARD: {space.key: space.configs[0].keywords}}
    assert chosen(space, GPU) == space.configs[3]
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
