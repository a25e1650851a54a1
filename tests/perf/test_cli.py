"""The perf suite's command line: the points that options select, and the messages for those that it refuses."""

import json
import os
import signal

import pytest

from perf import __main__ as cli
from perf import environment, options, workloads
from perf.ops import OPS
from perf.points import BOTH, MODES, PASSES
from triton_norm.tuning import limits

pytestmark = pytest.mark.unguarded

VERBS = (
    "list", "run", "report", "compare", "resources", "code", "traffic", "tune", "numerics", "host", "launches",
    "readme",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_before():
    """Undoes a command's effects on its process."""
    before = os.environ.copy()
    handler = signal.getsignal(signal.SIGTERM)
    yield
    os.environ.clear()
    os.environ.update(before)
    signal.signal(signal.SIGTERM, handler)


def listed(capsys, *arguments):
    assert cli.main(["list", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def tasks(capsys, *arguments):
    return [line for line in listed(capsys, *arguments) if line.startswith((*OPS, "step "))]


def refused(capsys, *arguments):
    """Returns the message about a command line that is refused, with the exit status 2."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    return said.err.splitlines()[-1]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert "usage: python -m perf" in capsys.readouterr().out


def test_points_are_selected(capsys):
    lines = tasks(capsys, "--op", "rms_norm,batch_norm_eval", "--mode", "bwd,fwd_bwd", "--dtype", "fp16")
    words = [line.split()[:3] for line in lines]
    assert {op for op, _, _ in words} == {"rms_norm", "batch_norm_eval"}
    assert {mode for _, mode, _ in words} == {"backward", BOTH}
    assert {dtype for _, _, dtype in words} == {"fp16"}


def test_quick_is_part_of_full(capsys):
    quick, full = (tasks(capsys, "--op", "layer_norm", "--shapes", shapes) for shapes in ("quick", "full"))
    assert set(quick) < set(full)
    assert {line.split()[1] for line in quick} == {*MODES, "bf16"}  # "bf16" is a step's
    assert {line.split()[1] for line in full} == {*PASSES, "bf16"}


def test_full_has_every_size_of_model_by_every_number_of_tokens():
    shapes = {workload.shape for workload in workloads.WORKLOADS if workload.family == "rows"}
    for n in workloads.MODELS:
        for tokens in workloads.TOKENS:
            assert ((tokens, n) in shapes) == (tokens * n <= workloads.MOST_ELEMENTS), (tokens, n)
    assert max(workloads.TOKENS) == 1 << 20


def test_steps_are_of_models_that_have_the_op(capsys):
    assert tasks(capsys, "--mode", "step", "--op", "batch_norm")[0].startswith("step bf16 ResNet-50")
    assert len(tasks(capsys, "--mode", "step")) > 2


def test_contenders_are_listed_with_what_they_are(capsys):
    lines = listed(capsys, "--op", "rms_norm", "--mode", "fwd", "--contenders", "torch,torch.compile-max-autotune")
    assert [line.partition(":")[0] for line in lines[:3]][:2] == ["torch", "torch.compile, max-autotune"]
    assert lines[2].startswith("rms_norm")


def test_shapes_of_a_file(capsys, tmp_path):
    file = tmp_path / "shapes.json"
    described = [
        {"shape": [8, 16, 96], "family": "rows", "source": "mine"},
        {"shape": [4, 6, 5, 5], "layout": "channels_last"},
        {"shape": [32, 64]},
        {"shape": [2, 3, 64], "family": "modulated"},
    ]
    file.write_text(json.dumps(described))
    ops = "layer_norm,batch_norm,layer_norm_modulated"
    lines = tasks(capsys, "--shapes", str(file), "--mode", "fwd", "--dtype", "bf16", "--op", ops)
    assert [line.partition("  floor")[0] for line in lines] == [
        "layer_norm forward bf16 128x96  mine",
        "batch_norm forward bf16 4x6x5x5 channels_last  from a file",
        "layer_norm forward bf16 32x64  from a file",
        "layer_norm_modulated forward bf16 2x3x64  from a file",
    ]


def test_traffic_is_counted_for_what_is_selected(tmp_path):
    file = tmp_path / "shapes.json"
    file.write_text('[{"shape": [32, 64]}]')
    parser = cli._parser()
    inputs = parser.parse_args(["traffic", "--shapes", str(file), "--op", "rms_norm", "--mode", "bwd,step"])
    assert [str(point) for point in options.inspected_of(inputs, workloads.traffic_points)] == [
        "rms_norm backward bf16 32x64",
        "rms_norm backward fp32 32x64",
    ]
    inputs = parser.parse_args(["traffic", "--op", "rms_norm", "--points", "1"])
    assert [str(point) for point in options.inspected_of(inputs, workloads.traffic_points)] == [
        str(next(point for point in workloads.traffic_points() if point.op == "rms_norm"))
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ("{}", "does not hold a list of workloads"),
        ("[]", "does not hold a list of workloads"),
        ("[3]", "3 is not a workload"),
        ('[{"shape": [4]}]', "is not a workload: it needs a shape of two extents or more"),
        ('[{"shape": [4, 0]}]', "is not a workload"),
        ('[{"shape": [4, 4.5]}]', "is not a workload"),
        ('[{"shape": [4, true]}]', "is not a workload"),
        ('[{"shape": [4, 8], "dtype": "bf16"}]', "is not a workload"),
        ('[{"shape": [4, 8], "family": "columns"}]', "family is one of rows, gated, modulated, channels"),
        ('[{"shape": [4, 8], "family": "modulated"}]', "a modulated shape has samples, tokens and features"),
        ('[{"shape": [4, 8], "layout": "channels_last"}]', "is a layout of channels with two or three spatial extents"),
        ('[{"shape": [4, 8, 2, 2], "layout": "strided"}]', "layout one of contiguous, channels_last"),
    ],
)
def test_a_file_without_shapes_is_refused(content, said, capsys, tmp_path):
    file = tmp_path / "shapes.json"
    file.write_text(content)
    assert said in refused(capsys, "list", "--shapes", str(file))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("list", "--op", "layernorm"), "'layernorm': choose from layer_norm, rms_norm"),
        (("list", "--mode", "forwards"), "'forwards': choose from fwd, bwd, fwd_bwd"),
        (("list", "--dtype", "int8"), "'int8': choose from bf16, fp16, fp32, fp64"),
        (("list", "--shapes", "absent.json"), "absent.json cannot be read"),
        (("list", "--contenders", "torch,cuDNN"), "'torch,cuDNN': choose from triton_norm, torch, torch.compile"),
        (("run", "--seconds", "0"), "'0' is no time to measure in"),
        (("run", "--seconds", "nan"), "'nan' is no time to measure in"),
        (("resources", "--target", "sm_20"), "'sm_20' is none of the targets sm_80"),
        (("traffic", "--blocks", "3"), "argument --blocks: invalid choice: 3"),
        (("launches", "--blocks", "8", "--write"), "not allowed with argument"),
        (("code",), "one of the arguments --save --compare is required"),
        (("code", "--save", "code.json", "--target", "sm_20"), "'sm_20' is none of the targets sm_80"),
        (("code", "--compare", "absent.json"), "absent.json"),
        (("compare", "one.json"), "required: new"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(arguments, said, capsys):
    assert said in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [("resources",), ("resources", "--target", "sm_90"), ("code", "--save", "code.json"), ("launches",)],
    ids=" ".join,
)
def test_clusters_are_refused_where_triton_does_not_compile_them(arguments, capsys, monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.8.1")
    said = refused(capsys, *arguments, "--blocks", "2")
    assert said.endswith("clusters of several blocks take Triton 3.9 or later, and this is 3.8.1")


def test_clusters_are_refused_where_no_target_has_them(capsys, monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.9.0")
    said = refused(capsys, "resources", "--blocks", "2", "--target", "sm_80", "--target", "gfx942")
    assert said == "perf resources: none of sm_80, gfx942 has clusters"


def test_blocks_that_can_be_assumed_are_portable():
    assert max(options.BLOCKS) == limits.PORTABLE_BLOCKS
    assert all(n & (n - 1) == 0 for n in options.BLOCKS)


@pytest.mark.parametrize("verb", ["run", "tune"])
def test_what_needs_a_gpu_says_so_in_one_sentence(verb, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    assert refused(capsys, verb, "--out", str(tmp_path / "out")) == f"perf {verb}: {cli.NO_GPU}"
    assert not (tmp_path / "out").exists()
