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
from torch import nn
from torch.nn import functional

from perf import contenders, measure
from perf.calls import EPS
from perf.contenders import CONTENDERS
from perf.ops import FAMILY, OPS
from perf.points import BOTH, PASSES, Point, Workload

pytestmark = [
    pytest.mark.unguarded,
    # Dynamo's own, on every autograd.Function that it traces.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

ROWS = Workload("rows", "", (12, 16), "")
IMAGES = Workload("channels", "", (4, 8, 5, 5), "", "channels_last")
CHANNELS = {"batch_norm", "batch_norm_eval"}
BY_NAME = {contender.name: contender for contender in CONTENDERS}
COMPILED = [contender for contender in CONTENDERS if contender.compiles]


class FakeTimer:
    """Runs what it is to time, by no clock."""

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
    return Point(op, mode, dtype, ROWS if family == "rows" else images)


def measured(contender, op, mode, **options):
    (record,) = measure.measure_point(point_of(op, mode, **options), [contender], FakeTimer(), seconds=0)
    return record


# What each library gives to call, by its own signature and what it returns, with torch's functions computing.


def layer_norm_of_sum(x, residual, weight, bias, eps):
    total = x + residual
    return functional.layer_norm(total, weight.shape, weight, bias, eps), total


def rms_norm_of_sum(x, residual, weight, eps):
    total = x + residual
    return functional.rms_norm(total, weight.shape, weight, eps), total


def layer_norm_statistics(x, eps):
    var, mean = torch.var_mean(x, -1, correction=0)
    return mean, torch.rsqrt(var + eps)


def layer_norm_gradients(dy, x, mean, rstd, weight, bias):
    return torch.ops.aten.native_layer_norm_backward(
        dy, x, weight.shape, mean[:, None], rstd[:, None], weight, bias, [True] * 3
    )


def liger():
    def liger_layer_norm(X, W, B, eps):
        return functional.layer_norm(X, W.shape, W, B, eps)

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        return functional.rms_norm(X, W.shape, W, eps)

    def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        return rms_norm_of_sum(X, R, W, eps)

    def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
        assert num_channels == X.shape[1]
        return functional.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)

    return {"liger_kernel.transformers.functional": locals()}


def quack():
    def rmsnorm(
        x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False,
        weight_offset=0.0,
    ):  # fmt: skip
        assert prenorm == (residual is not None)
        return (
            rms_norm_of_sum(x, residual, weight, eps) if prenorm else functional.rms_norm(x, weight.shape, weight, eps)
        )

    def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
        if weight.dtype != torch.float32:
            raise AssertionError("Weight must be float32")
        y = functional.layer_norm(x, weight.shape, weight, bias, eps)
        mean, rstd = layer_norm_statistics(x, eps)
        assert return_rstd == return_mean
        return (y, rstd, mean) if return_rstd else y

    def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
        assert has_bias
        return layer_norm_gradients(dout, x, mean, rstd, weight, weight)

    return {"quack.rmsnorm": locals()}


def flash_linear_attention():
    def layer_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False, is_rms_norm=False):
        assert prenorm == (residual is not None)
        zero = torch.zeros_like(x) if residual is None else residual
        found = layer_norm_of_sum(x, zero, weight, bias, eps)
        return found if prenorm else found[0]

    def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
        assert bias is None
        assert prenorm == (residual is not None)
        zero = torch.zeros_like(x) if residual is None else residual
        found = rms_norm_of_sum(x, zero, weight, eps)
        return found if prenorm else found[0]

    return {"fla.modules.layernorm": locals()}


def apex():
    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        return functional.rms_norm(input, normalized_shape, weight, eps)

    return {"apex.normalization.fused_layer_norm": locals(), "fused_layer_norm_cuda": {}}


def apex_with_extensions():
    class BatchNorm2d_NHWC(nn.modules.batchnorm._BatchNorm):
        def __init__(
            self, num_features, fuse_relu=False, bn_group=1, max_cta_per_sm=2, cta_launch_margin=12, multi_stream=False
        ):
            super().__init__(num_features)
            self.fuse_relu = fuse_relu

        def forward(self, x, z=None):
            assert x.is_contiguous()
            assert self.fuse_relu == (z is not None)
            y = functional.batch_norm(
                x.permute(0, 3, 1, 2), self.running_mean, self.running_var, self.weight, self.bias, self.training,
                self.momentum, self.eps,
            ).permute(0, 2, 3, 1)  # fmt: skip
            return functional.relu(y + z) if self.fuse_relu else y

    class GroupNorm(nn.Module):
        def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, act=""):
            super().__init__()
            self.num_groups, self.eps, self.act = num_groups, eps, act
            self.weight = self.bias = nn.Parameter(torch.empty(num_channels))

        def _check_legality(self, input):
            return input.shape[1] == 128 and input.is_contiguous(memory_format=torch.channels_last)

        def forward(self, input):
            y = functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
            return functional.silu(y) if self.act == "silu" else y

    modules = {"bnp": {}, "apex.contrib.groupbn.batch_norm": {"BatchNorm2d_NHWC": BatchNorm2d_NHWC}}
    return {**apex(), **modules, "group_norm_cuda": {}, "apex.contrib.group_norm": {"GroupNorm": GroupNorm}}


def flag_gems():
    def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps), *layer_norm_statistics(input, eps)

    def layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight=None, bias=None, output_mask=None):
        assert output_mask == [True] * 3
        return layer_norm_gradients(grad_out, input, mean, rstd, weight, bias)

    def rms_norm(x, normalized_shape, weight, eps=1e-5):
        return functional.rms_norm(x, normalized_shape, weight, eps)

    def batch_norm(
        input, weight=None, bias=None, running_mean=None, running_var=None, training=False, momentum=0.1, eps=1e-05
    ):
        return torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)

    def batch_norm_backward(
        grad_out, input, weight=None, running_mean=None, running_var=None, save_mean=None, save_invstd=None,
        train=False, eps=1e-05, output_mask=None,
    ):  # fmt: skip
        return torch.ops.aten.native_batch_norm_backward(
            grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask
        )

    def group_norm(input, weight, bias, N, C, HxW, group, eps=1e-05):
        return torch.native_group_norm(input.contiguous(), weight, bias, N, C, HxW, group, eps)

    def group_norm_backward(grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask):
        return torch.ops.aten.native_group_norm_backward(
            grad_out.contiguous(), input.contiguous(), mean, rstd, weight, N, C, HxW, group, output_mask
        )

    def instance_norm(
        input, weight=None, bias=None, running_mean=None, running_var=None, use_input_stats=True, momentum=0.1,
        eps=1e-5, cudnn_enable=False,
    ):  # fmt: skip
        return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    return {"flag_gems": locals()}


STAND_INS = {
    "Liger-Kernel": liger,
    "QuACK": quack,
    "flash-linear-attention": flash_linear_attention,
    "apex": apex,
    "FlagGems": flag_gems,
}
CASES = {
    "Liger-Kernel": (liger, {"layer_norm", "rms_norm", "rms_norm_residual", "group_norm"}),
    "QuACK": (quack, {"layer_norm", "rms_norm", "rms_norm_residual"}),
    "flash-linear-attention": (
        flash_linear_attention, {"layer_norm", "rms_norm", "layer_norm_residual", "rms_norm_residual"}
    ),
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
    wanted = "missing (RuntimeError: No device were detected on your machine ! ... Please check it.)"
    assert BY_NAME["FlagGems"].status() == wanted


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
