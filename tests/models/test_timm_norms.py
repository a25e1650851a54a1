"""timm's norms: each listed class, its numbers, and modules between a norm and its activation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.steps import state_of, trained
from support.vision import find, importable  # noqa: F401
from triton_norm.converting.timm_norms import TIMM

CHANNELS = 4
GROUPED = {"num_groups": 2}


def made(path: str, **options: Any) -> nn.Module:
    """A norm whose parameters and statistics are no defaults."""
    cls = find(path)
    grouped = GROUPED if cls.__name__ in ("GroupNorm", "GroupNormAct") else {}
    norm: nn.Module = cls(CHANNELS, **grouped, **options)
    if cls.__name__ == "SyncBatchNormAct":
        norm.drop, norm.act = nn.Identity(), nn.ReLU(inplace=True)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def input_of(path: str, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows, or images; RmsNorm2d's kernels take channels-last ones."""
    name = path.rpartition(".")[2]
    if not any(part in name for part in ("2d", "Group", "Sync")):
        return torch.randn(3, CHANNELS, device=device).to(dtype)
    layout = torch.channels_last if name.startswith("Rms") else torch.contiguous_format
    return torch.randn(2, CHANNELS, 3, 5, device=device).to(dtype, memory_format=layout)


LISTED = pytest.mark.parametrize("path", TIMM, ids=lambda path: path.rpartition(".")[2])


@LISTED
def test_every_class_computes_as_its_own(path, device):
    theirs = made(path).to(device)
    ours = nn.Sequential(copy.deepcopy(theirs))
    name = find(path).__name__
    assert tn.convert(ours).converted == {"0": f"timm.{name} → triton_norm.{name}"}
    assert isinstance(ours[0], find(path))
    x = input_of(path, device)
    with tn.backend("triton"):
        actual = trained(ours[0], ours[0], x)
    expected = trained(theirs, theirs, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert actual["y"].stride() == expected["y"].stride()
    assert tn.explain(ours[0], x).backend == "triton"
    tn.revert(ours)
    assert type(ours[0]) is find(path)


@LISTED
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_has_the_dtype_of_the_class(path, weight_dtype, device):
    theirs = made(path).to(device, weight_dtype)
    x = input_of(path, device, torch.bfloat16)
    try:
        expected = theirs(x)
    except RuntimeError:
        pytest.skip("torch's function does not take these dtypes")
    ours = copy.deepcopy(theirs)
    tn.convert(ours)
    exact = copy.deepcopy(theirs).double()(x.double())
    actual = ours(x)
    assert actual.dtype == expected.dtype
    error, of_theirs = ((result.double() - exact).abs().max() for result in (actual, expected))
    assert error <= 2 * of_theirs + 2.0**-8 * exact.abs().max()


@pytest.mark.usefixtures("importable")
def test_everything_stays_and_comes_back():
    model = nn.Sequential(*(made(path) for path in TIMM))
    before, text, names = state_of(model), str(model), list(model.state_dict())
    report = tn.convert(model)
    assert len(report.converted) == len(TIMM)
    assert report.skipped == {}
    assert (str(model), list(model.state_dict())) == (text, names)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(part) for part in other] == [type(part) for part in model]
    assert set(tn.convert(model, fuse=True).skipped.values()) == {"is triton_norm's already"}
    tn.revert(model)
    assert state_of(model) == before


ACTIVATED = "timm.layers.norm_act.BatchNormAct2d"
SYNCHRONIZED = "timm.layers.norm_act.SyncBatchNormAct"


@pytest.mark.parametrize("options", [{"act_layer": nn.Mish}, {"drop_layer": nn.Softplus}], ids=str)
def test_an_unknown_activation_and_a_drop_layer_are_called(options, device):
    theirs = made(ACTIVATED, **options).to(device)
    ours = copy.deepcopy(theirs)
    tn.convert(ours)
    x = input_of(ACTIVATED, device)
    torch.testing.assert_close(trained(ours, ours, x), trained(theirs, theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "path", [ACTIVATED, "timm.layers.norm_act.GroupNormAct", "timm.layers.norm_act.LayerNormAct2d"]
)
@pytest.mark.parametrize("part", ["act", "drop"])
def test_hooks_on_parts_see_their_tensors(path, part, device):
    theirs = made(path).to(device)
    ours = copy.deepcopy(theirs)
    tn.convert(ours)
    seen: list[list[Tensor]] = [[], []]
    for model, tensors in zip((ours, theirs), seen, strict=True):
        getattr(model, part).register_forward_pre_hook(lambda m, inputs, into=tensors: into.append(inputs[0].clone()))
    x = input_of(path, device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert len(seen[1]) == 1
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("through_the_kernels")
def test_the_activation_is_in_the_norms_launch(device, guard, monkeypatch):
    ours = made(ACTIVATED).to(device)
    tn.convert(ours)
    monkeypatch.setattr(type(ours.act), "forward", None)  # is not called
    ours(input_of(ACTIVATED, device))
    assert guard is None or len(guard.launches) == 1


def test_fast_norms_are_skipped():
    model = nn.Sequential(made("timm.layers.norm.LayerNorm"))
    model[0]._fast_norm = True
    assert tn.convert(model).skipped == {"0": "timm's fast norm was set when it was made"}


def test_a_fast_norm_set_later_and_other_inputs_go_to_the_class(device):
    """timm's fast norm is the same without autocast; the class raises for an input of another rank."""
    for path in ("timm.layers.norm.LayerNorm2d", "timm.layers.norm_act.GroupNormAct"):
        theirs = made(path).to(device)
        ours = copy.deepcopy(theirs)
        tn.convert(ours)
        ours._fast_norm = True
        x = input_of(path, device)
        assert tn.explain(ours, x).backend == "torch"
        torch.testing.assert_close(ours(x), theirs(x))
    ours._fast_norm = False
    norm = made("timm.layers.norm.LayerNorm2d").to(device)
    tn.convert(norm)
    for model in (norm, made("timm.layers.norm.LayerNorm2d").to(device)):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            model(torch.randn(3, CHANNELS, device=device))


def test_channels_first_images_of_rms_norm_2d_keep_their_memory_format(device):
    path = "timm.layers.norm.RmsNorm2d"
    theirs = made(path).to(device)
    ours = copy.deepcopy(theirs)
    tn.convert(ours)
    x = torch.randn(2, CHANNELS, 3, 5, device=device)
    assert ours(x).is_contiguous()
    assert tn.explain(ours, x).backend == "torch"
    torch.testing.assert_close(ours(x), theirs(x))


def test_classes_that_differ_are_skipped(monkeypatch):
    cls = find("timm.layers.norm.RmsNorm")
    subclass = type("Own", (cls,), {"__module__": __name__})
    monkeypatch.setattr(cls, "forward", lambda self, x: x * self.weight)
    report = tn.convert(nn.Sequential(made("timm.layers.norm.RmsNorm"), subclass(CHANNELS)))
    assert report.converted == {}
    assert report.skipped == {
        "0": "its version of RmsNorm computes something else than the one that is known",
        "1": "Own is a subclass of timm.RmsNorm: its forward may differ",
    }


def test_an_activated_batch_norm_is_no_sync_batch_norm():
    report = tn.convert(nn.Sequential(made(ACTIVATED)), sync_batch_norm=True)
    assert report.converted == {}
    reason = "BatchNormAct2d is a subclass of torch.nn.BatchNorm2d, and can't become SyncBatchNorm"
    assert report.skipped == {"0": reason}


@pytest.mark.parametrize("sync_batch_norm", [False, True])
def test_a_sync_batch_norm_is_converted_among_processes(sync_batch_norm, monkeypatch):
    """Its trial runs on the CPU, where torch's has no training among processes, and waits for none of them."""
    model = nn.Sequential(made(SYNCHRONIZED))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert list(tn.convert(model, sync_batch_norm=sync_batch_norm).converted) == ["0"]


def test_a_sync_batch_norm_without_an_activation(device):
    theirs = find(SYNCHRONIZED)(CHANNELS).to(device)  # as its constructor leaves it
    ours = copy.deepcopy(theirs)
    tn.convert(ours)
    x = input_of(SYNCHRONIZED, device)
    torch.testing.assert_close(trained(ours, ours, x), trained(theirs, theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("path", [ACTIVATED, "timm.layers.norm_act.GroupNormAct", "timm.layers.norm.LayerNorm2d"])
def test_compile_trace_and_export(path, device):
    theirs = made(path).to(device).eval()
    ours = copy.deepcopy(theirs)
    tn.convert(ours)
    x = input_of(path, device)
    expected = theirs(x)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for run in (compiled, torch.jit.trace(ours, x), torch.export.export(ours, (x,)).module()):
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_all_modules_see_no_trial():
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append(module))
    try:
        report = tn.convert(made(ACTIVATED))
    finally:
        handle.remove()
    assert report.skipped == {"": "a hook of torch.nn on all modules is set"}
    assert seen == []
