"""Contenders that are timed: each is called with its own library's arguments, and compiled once a point."""

import importlib
import inspect
import sys
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from perf import contenders, measure
from perf.calls import EPS
from perf.contenders import CONTENDERS
from perf.ops import FAMILY, OPS
from perf.points import BOTH, PASSES, Point, Workload
from support.stand_ins import apex, apex_with_extensions, flag_gems, flash_linear_attention, liger, mamba_ssm, quack

pytestmark = [
    pytest.mark.unguarded,
    # Dynamo's own, on every autograd.Function that it traces.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

ROWS = Workload("rows", "", (12, 16), "")
TOKENS = {"gated": Workload("gated", "", (12, 16), ""), "modulated": Workload("modulated", "", (3, 4, 16), "")}
IMAGES = Workload("channels", "", (4, 8, 5, 5), "", "channels_last")
CHANNELS = {"batch_norm", "batch_norm_eval"}
BY_NAME = {contender.name: contender for contender in CONTENDERS}
COMPILED = [contender for contender in CONTENDERS if contender.compiles]


class FakeTimer:
    """Runs functions without a clock."""

    device = "cpu"

    def __init__(self, started=lambda: None):
        self.started = started

    def round(self, entries, backlog_us):
        for entry in entries:
            entry.run(entry.prepare())
        return [1.0] * len(entries)

    def host(self, entry):
        self.started()
        return 1.0

    def kernels(self, entry):
        return []

    def synchronize(self):
        pass


def point_of(op, mode, dtype="fp32", images=IMAGES):
    family = FAMILY[op]
    if family in ("groups", "instances"):
        images = replace(images, family=family, shape=(2, 128, 3, 3))
    return Point(op, mode, dtype, {"rows": ROWS, **TOKENS}.get(family, images))


def measured(contender, op, mode, **options):
    (record,) = measure.measure_point(point_of(op, mode, **options), [contender], FakeTimer(), seconds=0)
    return record


STAND_INS = {
    "Liger-Kernel": liger,
    "QuACK": quack,
    "flash-linear-attention": flash_linear_attention,
    "mamba-ssm": mamba_ssm,
    "apex": apex,
    "FlagGems": flag_gems,
}
CASES = {
    "Liger-Kernel": (liger, {"layer_norm", "rms_norm", "rms_norm_residual", "rms_norm_modulated", "group_norm"}),
    "QuACK": (quack, {"layer_norm", "rms_norm", "rms_norm_residual"}),
    "flash-linear-attention": (
        flash_linear_attention,
        {"layer_norm", "rms_norm", "layer_norm_residual", "rms_norm_residual", "rms_norm_gated"},
    ),
    "mamba-ssm": (mamba_ssm, {"rms_norm_gated", "rms_norm_gate_first"}),
    "apex": (apex, {"layer_norm", "rms_norm"}),
    "apex, with its extensions": (
        apex_with_extensions,
        {"layer_norm", "rms_norm", "batch_norm_add_relu", "group_norm", "group_norm_silu", *CHANNELS},
    ),
    "FlagGems": (flag_gems, {"layer_norm", "rms_norm", "group_norm", "instance_norm", *CHANNELS}),
}  # fmt: skip


def install(monkeypatch, modules):
    """Stands in for those that are installed."""
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for extension in ("bnp", "group_norm_cuda"):
        if extension not in modules:
            monkeypatch.setitem(sys.modules, extension, None)


def test_names_are_unique_and_ours_comes_first():
    names = [contender.name for contender in CONTENDERS]
    assert len(names) == len(set(names))
    assert names[:2] == ["triton_norm", "torch"]
    assert {*STAND_INS, "torch.compile", "torch.compile, max-autotune", "triton_norm, compiled"} <= {*names}
    assert {c.name.split(",")[0] for c in CONTENDERS if c.accuracy != 1.0} == {"torch", "torch.compile"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", PASSES)
@pytest.mark.parametrize("op", OPS)
def test_others_are_called_with_their_own_arguments(monkeypatch, op, mode, case):
    stand_in, has = CASES[case]
    install(monkeypatch, stand_in())
    record = measured(BY_NAME[case.removesuffix(", with its extensions")], op, mode)
    assert record["status"] == ("ok" if op in has else "unsupported"), record["message"]


@pytest.mark.parametrize("mode", PASSES)
def test_mamba_normalizes_the_groups_of_a_token_with_weights_of_their_own(monkeypatch, mode):
    install(monkeypatch, mamba_ssm())
    groups = Workload("gated", "", (12, 4, 16), "", weights=4)
    point = Point("rms_norm_gate_first", mode, "fp32", groups)
    (record,) = measure.measure_point(point, [BY_NAME["mamba-ssm"]], FakeTimer(), seconds=0)
    assert record["status"] == "ok", record["message"]


def test_what_a_library_refuses_is_recorded_with_its_message(monkeypatch):
    install(monkeypatch, quack())
    record = measured(BY_NAME["QuACK"], "layer_norm", "forward", dtype="bf16")
    assert record["status"] == "error"
    assert record["message"] == "AssertionError: Weight must be float32"


@pytest.mark.parametrize("op", ["batch_norm", "batch_norm_add_relu"])
@pytest.mark.parametrize(
    "images",
    [
        Workload("channels", "", (4, 8, 5, 5), ""),
        Workload("channels", "", (4, 6, 5, 5), "", "channels_last"),
        Workload("channels", "", (4, 8, 5, 5, 5), "", "channels_last"),
    ],
)
def test_apex_batch_norm_is_kept_from_what_it_would_misread(monkeypatch, op, images):
    install(monkeypatch, apex_with_extensions())
    record = measured(BY_NAME["apex"], op, "forward", images=images)
    assert record["status"] == "error"
    assert "takes channels-last images" in record["message"]


def test_apex_group_norm_never_times_torch_under_its_name(monkeypatch):
    install(monkeypatch, apex_with_extensions())
    images = Workload("groups", "", (2, 96, 3, 3), "", "channels_last")
    (record,) = measure.measure_point(
        Point("group_norm", "forward", "fp32", images), [BY_NAME["apex"]], FakeTimer(), seconds=0
    )
    assert record["status"] == "error"
    assert "leaves this input to torch" in record["message"]


def real(name):
    """The module itself, or nothing where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception:
        return None


@pytest.mark.parametrize("stand_in", [stand_in for stand_in, _ in CASES.values()])
def test_stand_ins_have_the_signatures_of_what_they_stand_for(stand_in):
    compared = 0
    for name, members in stand_in().items():
        module = real(name) if members else None
        for member, ours in members.items() if module else ():
            theirs = inspect.signature(getattr(module, member)).parameters.values()
            ours = inspect.signature(ours).parameters.values()
            assert [(p.name, p.kind, p.default) for p in theirs] == [(p.name, p.kind, p.default) for p in ours], member
            compared += 1
    if not compared:
        pytest.skip("not installed")


@pytest.mark.parametrize("name", STAND_INS)
def test_missing_ones_are_listed_as_missing(monkeypatch, name):
    contender = BY_NAME[name]
    for module in contender.modules:
        if module != "triton":
            monkeypatch.setitem(sys.modules, module, None)
    assert contender.missing().startswith("ModuleNotFoundError: ")
    assert contender.status() == f"missing ({contender.missing()})"


def test_one_that_fails_to_be_imported_is_missing_too(monkeypatch):
    def fails(name):
        raise RuntimeError("No device were detected on your machine !\n Please check it.")

    monkeypatch.setattr(contenders.importlib, "import_module", fails)
    status = "missing (RuntimeError: No device were detected on your machine ! ... Please check it.)"
    assert BY_NAME["FlagGems"].status() == status


@pytest.mark.parametrize("name", STAND_INS)
def test_present_ones_tell_their_version(monkeypatch, name):
    install(monkeypatch, STAND_INS[name]())
    monkeypatch.setattr(contenders, "version", lambda distribution: "1.2")
    (distribution,) = BY_NAME[name].distributions
    assert BY_NAME[name].status() == f"{distribution} 1.2"


def test_ours_tells_its_version_and_tritons(monkeypatch):
    pytest.importorskip("triton")
    import triton_norm

    versions = {"triton": "9.8"}
    monkeypatch.setattr(contenders, "version", lambda distribution: versions.get(distribution, "not installed"))
    assert BY_NAME["triton_norm"].status() == f"triton_norm {triton_norm.__version__}, triton 9.8"


@pytest.fixture
def compilations(monkeypatch):
    """Counts how often the contenders were compiled, by mode; AOTAutograd alone compiles, since Inductor takes long."""
    from torch._dynamo.backends.debugging import aot_eager

    counts = Counter()
    compile = torch.compile
    backends = {}

    def counting(mode, graph, inputs):
        counts[mode] += 1
        return aot_eager(graph, inputs)

    def counted(function, *, dynamic, fullgraph, mode=None):
        assert (dynamic, fullgraph) == (False, True)
        backend = backends.setdefault(mode, partial(counting, mode))
        return compile(function, dynamic=dynamic, fullgraph=fullgraph, backend=backend)

    monkeypatch.setattr(torch, "compile", counted)
    contenders._at_this_point.clear()
    yield counts
    contenders._at_this_point.clear()
    torch._dynamo.reset()


@pytest.fixture
def scopes():
    """Entered for the whole of a run, as a run does."""
    pytest.importorskip("triton")
    with ExitStack() as entered:
        for contender in COMPILED:
            entered.enter_context(contender.scope())
        yield


@pytest.mark.usefixtures("scopes")
@pytest.mark.parametrize(("op", "mode"), [("layer_norm", "forward"), *((op, BOTH) for op in OPS)])
def test_compiled_ones_have_every_op_and_no_graph_break(op, mode, compilations):
    records = measure.measure_point(point_of(op, mode), COMPILED, FakeTimer(), seconds=0)
    assert [(record["contender"], record["status"]) for record in records] == [(c.name, "ok") for c in COMPILED]
    assert compilations == {None: 3, "max-autotune-no-cudagraphs": 1}


@pytest.mark.usefixtures("scopes")
@torch._dynamo.config.patch(recompile_limit=len(COMPILED))
def test_each_compiles_once_a_point_and_never_while_it_is_timed(compilations):
    """More points than Dynamo allows recompilations; the sets of inputs take turns."""
    before_timing = []
    timer = FakeTimer(started=lambda: before_timing.append(compilations.total()))
    for n in range(len(COMPILED) + 1):
        point = Point("layer_norm", BOTH, "fp32", Workload("rows", "", (3, 8 + n), ""))
        records = measure.measure_point(point, COMPILED, timer, seconds=0)
        assert {record["status"] for record in records} == {"ok"}
        assert before_timing[-1] == compilations.total() == (n + 1) * len(COMPILED)


@pytest.mark.usefixtures("compilations", "scopes")
def test_a_compiled_call_that_the_kernels_do_not_serve_is_an_error():
    functions = BY_NAME["triton_norm, compiled, kernels forced"].load()
    x, weight = torch.randn(3, 8), torch.randn(8)
    rms_norm = functions["rms_norm"]
    torch.testing.assert_close(rms_norm(x, (8,), weight, EPS), functional.rms_norm(x, (8,), weight, EPS))
    with pytest.raises(Exception, match="can't serve this call"):
        rms_norm(x[:0], (8,), weight, EPS)
