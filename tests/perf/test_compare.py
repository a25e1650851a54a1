"""`perf compare`: its failures and notes, and the files that it refuses. Every time is made up."""

import pytest

from perf import compare
from perf.records import Refused
from support.results import write

POINT = {"op": "layer_norm", "mode": "forward", "dtype": "bf16", "shape": [64, 96], "layout": "contiguous"}
STEP = {"model": "BERT base, one layer", "dtype": "bf16"}


def record(about=POINT, us=10.0, contender="triton_norm", spread=0.001, **fields):
    timed = {"median_us": us, "p20_us": us * (1 - spread), "p80_us": us * (1 + spread)}
    return {**about, "contender": contender, "status": "ok", "message": "", **timed, **fields}


def failed(status="wrong", **fields):
    return {**POINT, "contender": "triton_norm", "status": status, "message": "y is off by 1.00e-01", **fields}


def run(*records, gpu="NVIDIA Made-Up", steps=()):
    environment = {"GPU": gpu} if gpu else {}
    about = {"environment": environment, "copy_gbps": 3000.0}
    return {**about, "records": list(records), "steps": list(steps)}


@pytest.fixture
def compared(tmp_path):
    """Returns the exit status, the output, and the errors, for two files' contents."""

    def call(old, new, fail_below=0.95, **options):
        paths = []
        for name, content in (("old.jsonl", old), ("new.jsonl", new)):
            paths.append(tmp_path / name)
            if isinstance(content, str):
                paths[-1].write_text(content)
            elif content is not None:
                write(paths[-1], content)
        said = []
        try:
            status = compare.compare(*paths, fail_below, say=said.append, **options)
        except Refused as reason:
            return 2, said, str(reason).replace(f"{tmp_path}/", "")
        return status, said, ""

    return call


def test_equal_runs_pass(compared):
    status, said, errors = compared(run(record()), run(record()))
    assert (status, errors) == (0, "")
    assert said[1].split() == [
        "layer_norm",
        "forward",
        "bf16",
        "64x96",
        *["10.0"] * 2,
        "1.000",
        "within",
        "the",
        "spread",
    ]
    assert "1 points paired, 0 only in" in said[-2]
    assert said[-1] == "0 below 0.95, 0 that were right and now fail"


@pytest.mark.parametrize(
    ("us", "fail_below", "status"),
    [(11.0, 0.95, 1), (9.0, 0.95, 0), (10.4, 0.95, 0), (10.4, 1.0, 1), (8.0, 1.5, 1), (12.5, 0.8, 0), (12.5, 0.81, 1)],
)
def test_slower_than_the_threshold_fails_and_just_at_it_passes(us, fail_below, status, compared):
    result, said, _ = compared(run(record()), run(record(us=us)), fail_below)
    assert result == status
    assert f"{10 / us:.3f}" in said[1]
    assert ("BELOW" in said[1]) == bool(status)


def test_overlapping_bands_are_told_and_fail_all_the_same(compared):
    status, said, _ = compared(run(record(spread=0.2)), run(record(us=11.0, spread=0.2)))
    assert status == 1
    assert said[1].endswith("BELOW, within the spread")
    status, said, _ = compared(run(record(spread=0.01)), run(record(us=11.0, spread=0.01)))
    assert said[1].endswith("BELOW")


@pytest.mark.parametrize("now", ["wrong", "error"])
def test_what_was_right_and_now_fails_fails_whatever_the_threshold(now, compared):
    status, said, _ = compared(run(record()), run(failed(now)), 0.0)
    assert status == 1
    assert said[1].split()[4:7] == ["10.0", now, "was"]
    assert "y is off by 1.00e-01" in said[1]
    assert said[-1] == "0 below 0, 1 that were right and now fail"


@pytest.mark.parametrize("now", [failed(), record()])
def test_what_failed_before_fails_nothing(now, compared):
    status, said, _ = compared(run(failed()), run(now))
    assert status == 0
    assert "was right" not in said[1]


def test_the_worst_come_first_and_columns_are_aligned(compared):
    shapes = [[1, 8], [2, 8], [3, 8], [1000000, 8]]
    old = [record({**POINT, "shape": shape}) for shape in shapes]
    new = [record({**POINT, "shape": shape}, us) for shape, us in zip(shapes, (5.0, 20.0, 1000.0, 10.0), strict=True)]
    new[3] = failed(shape=shapes[3])
    status, said, _ = compared(run(*old), run(*new))
    assert status == 1
    rows = said[1:5]
    assert [row.split()[3] for row in rows] == ["1000000x8", "3x8", "2x8", "1x8"]
    assert len({row.index("10.0") + len("10.0") for row in rows}) == 1
    assert said[0].split() == ["point", "old", "µs", "new", "µs", "ratio", "torch"]


def test_torchs_own_ratio_stands_beside_ours(compared):
    old = run(record(), record(contender="torch", us=30.0))
    status, said, _ = compared(old, run(record(us=20.0), record(contender="torch", us=60.0)))
    assert status == 1
    assert said[1].split()[4:8] == ["10.0", "20.0", "0.500", "0.500"]
    assert len([line for line in said if "64x96" in line]) == 1
    _, said, _ = compared(old, run(record(us=20.0)))
    assert said[1].split()[4:] == ["10.0", "20.0", "0.500", "BELOW"]


def test_contenders_are_selectable(compared):
    old = run(record(), record(contender="torch"))
    new = run(record(us=20.0), record(contender="torch"))
    assert compared(old, new, contenders=("torch",))[0] == 0
    status, said, _ = compared(old, new, contenders=("triton_norm", "torch"))
    assert status == 1
    assert said[1].startswith("layer_norm forward bf16 64x96, triton_norm ")
    assert said[2].startswith("layer_norm forward bf16 64x96, torch ")


def test_geometric_means_are_of_each_op_and_mode(compared):
    backward = {**POINT, "mode": "backward"}
    other = {**POINT, "shape": [8, 8]}
    old = run(record(), record(other), record(backward), record(contender="torch"))
    new = run(record(us=5.0), record(other, us=20.0), record(backward, us=8.0), record(contender="torch", us=8.0))
    _, said, _ = compared(old, new)
    means = [line.split() for line in said if line.startswith("layer_norm") and "bf16" not in line]
    assert means == [
        ["layer_norm", "forward", "2", "1.000", "1.250"],
        ["layer_norm", "backward", "1", "1.250"],
    ]


def test_points_differ_by_type_shape_layout_and_mode(compared):
    others = [{**POINT, name: value} for name, value in (("dtype", "fp32"), ("shape", [96, 64]), ("mode", "backward"))]
    others.append({**POINT, "layout": "channels_last"})
    old, new = run(record(), record(others[0])), run(record(), *(record(other, us=99.0) for other in others[1:]))
    status, said, _ = compared(old, new)
    assert status == 0
    assert said[-2].startswith("1 points paired, 1 only in ")
    assert ", 3 only in " in said[-2]


def test_steps_of_models_are_compared_too(compared):
    old = run(record(), steps=[record(STEP, 1000.0), record(STEP, 1200.0, "torch")])
    new = run(record(), steps=[record(STEP, 2000.0), record(STEP, 1200.0, "torch")])
    status, said, _ = compared(old, new)
    assert status == 1
    assert said[1].startswith("step bf16 BERT base, one layer  1000.0  2000.0  0.500  1.000")
    assert any(line.split() == ["step", "1", "0.500", "1.000"] for line in said)


def test_skipped_and_unsupported_points_are_no_points(compared):
    skipped = {**POINT, "contender": "triton_norm", "status": "skipped", "message": "", "shape": [8, 8]}
    status, said, _ = compared(run(record(), skipped), run(record(), skipped))
    assert status == 0
    assert said[-2].startswith("1 points paired, 0 only in ")


@pytest.mark.parametrize(
    "content", ["", "{", "[]\n", "3\n", "{}\n", '{"kind": "tuning"}\n', '{"kind": "facts"}\n', "\0"]
)
def test_files_that_are_no_results_are_refused(content, compared):
    for files in ((content, run(record())), (run(record()), content)):
        status, said, errors = compared(*files)
        assert (status, said) == (2, [])
        name = "old.jsonl" if files[0] == content else "new.jsonl"
        assert errors.startswith(f"{name} holds no results of a timed run: ")


def test_other_files_are_refused_in_one_sentence(compared):
    good = run(record())
    nothing_timed = compared(run(), good)
    assert nothing_timed[::2] == (2, "old.jsonl holds nothing that was timed.")
    for broken in ({"op": "layer_norm"}, record(us=0.0), {**POINT, "contender": "triton_norm", "status": "ok"}):
        status, _, errors = compared(good, run(broken))
        assert (status, errors) == (2, "new.jsonl holds records that are not of timed points.")
    other = run(record({**POINT, "shape": [8, 8]}))
    status, _, errors = compared(good, other)
    assert (status, errors) == (2, "old.jsonl and new.jsonl have no point of triton_norm in common.")


def test_a_file_that_is_not_there_is_refused(compared):
    status, _, errors = compared(run(record()), None)
    assert status == 2
    assert "No such file or directory" in errors


def test_runs_on_different_gpus_are_refused_unless_asked_for(compared):
    old, new = run(record()), run(record(), gpu="NVIDIA Other")
    status, said, errors = compared(old, new)
    assert (status, said) == (2, [])
    assert errors == "old.jsonl was measured on NVIDIA Made-Up, and new.jsonl on NVIDIA Other."
    assert compared(old, new, any_gpu=True)[0] == 0
    assert compared(old, run(record(), gpu=None))[2].endswith("and new.jsonl on an unknown GPU.")
