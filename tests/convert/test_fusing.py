"""convert(fuse=True): a norm, the addition and the activation after it in one call, wherever nothing stands between."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import triton_norm as tn
from support.fused_blocks import (
    BLOCKS,
    OF_BLOCKS,
    BasicBlock,
    Bottleneck,
    Named,
    built,
    sequential,
    trained,
)
from support.operators import Operators
from support.processes import output
from support.steps import saved_and_loaded, state_of
from support.vision import find, importable  # noqa: F401


def test_the_report_and_the_way_back():
    module = sequential()
    before, names, text = state_of(module), list(module.state_dict()), str(module)
    modules = dict(module.named_modules())
    report = tn.convert(module, fuse=True)
    assert report.fused == {"": "1 + 2", "3": "1 + 2", "4": "0 + 1"}
    assert report.skipped == {
        "": "6 + 7: Mish is not among the activations that are known",
        "5": "0 + 1: Own is a subclass of torch.nn.Sequential: its forward may differ",
    }
    assert "3 fused\n  (the model)  1 + 2\n" in str(report)
    assert len(report.converted) == 5
    assert isinstance(module[4], Named)
    assert (list(module.state_dict()), str(module), dict(module.named_modules())) == (names, text, modules)
    assert set(tn.revert(module)) == {*report.converted, *report.fused}
    assert state_of(module) == before


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@OF_BLOCKS
def test_steps_are_as_exact_as_those_of_the_parts(name, training, device):
    """Kernels compute the norms of both, and torch the convolutions."""
    theirs, ours, x = built(name, device, training)
    exact = trained(copy.deepcopy(theirs).double(), x.double())
    tn.convert(theirs)
    expected, actual = trained(theirs, x), trained(ours, x)
    assert actual.keys() == exact.keys()
    for key, tensor in exact.items():
        error, of_parts = ((result[key].double() - tensor).abs().max() for result in (actual, expected))
        assert error <= 2 * of_parts + 64 * 2.0**-24 * tensor.abs().max(), key


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@OF_BLOCKS
def test_half_precision_is_rounded_less_often(name, training, device):
    """Gradients are left out: a rounding moves an element across ReLU's kink."""
    models = [model.bfloat16() for model in built(name, device, training)[:2]]
    x = torch.randn(3, 2, 6, 6, device=device).bfloat16()
    exact = copy.deepcopy(models[0]).double()(x.double())
    expected, actual = (model(x) for model in models)
    assert actual.dtype == expected.dtype
    error, of_parts = ((result.double() - exact).abs().max() for result in (actual, expected))
    assert error <= 2 * of_parts + 2.0**-8 * exact.abs().max()


@pytest.mark.usefixtures("through_the_kernels")
@pytest.mark.parametrize(("name", "n_norms"), [("basic", 2), ("basic, strided", 3), ("bottleneck", 3), ("layer", 1)])
def test_a_norm_its_shortcut_and_its_activation_are_one_launch(name, n_norms, device, guard):
    theirs, ours, x = built(name, device)
    ours(x)
    if guard is not None:
        assert len(guard.launches) == n_norms
    with Operators() as fused, torch.no_grad():
        ours(x)
    with Operators() as parts, torch.no_grad(), tn.backend("torch"):
        theirs(x)

    joined = "aten.relu_.default", "aten.silu_.default", "aten.add_.Tensor"
    assert not {*joined} & {*fused.names}
    assert len([each for each in parts.names if each in joined]) >= 2 * n_norms - 1  # and additions to the counters


def test_again_and_in_steps():
    model = sequential()
    before = state_of(model)
    assert tn.convert(model).fused == {}
    first = tn.convert(model, fuse=True)
    assert (first.converted, list(first.fused)) == ({}, ["", "3", "4"])
    classes = [type(part) for part in model.modules()]
    for fuse in (True, False):
        again = tn.convert(model, fuse=fuse)
        assert (again.converted, again.fused) == ({}, {})
        assert again.skipped[""] == again.skipped["1"] == "is triton_norm's already"
    assert [type(part) for part in model.modules()] == classes
    tn.revert(model)
    assert state_of(model) == before


def test_sync_batch_norm_is_fused(device):
    theirs, _, x = built("basic", device)
    ours = copy.deepcopy(theirs)
    assert list(tn.convert(ours, fuse=True, sync_batch_norm=True).fused) == [""]
    assert type(ours.bn1) is tn.SyncBatchNorm
    with Operators() as fused, torch.no_grad(), tn.backend("triton"):
        copy.deepcopy(ours)(x)
    assert not any("relu" in name for name in fused.names)
    torch.testing.assert_close(trained(ours, x), trained(theirs, x), rtol=1e-4, atol=1e-5)
    tn.revert(ours)
    assert state_of(ours)[0][1] is BasicBlock


@pytest.mark.usefixtures("importable")
@OF_BLOCKS
def test_copies_and_pickles_are_fused_and_reverted_too(name):
    module = BLOCKS[name]()
    before = [type(part) for part in module.modules()]
    report = tn.convert(module, fuse=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved_and_loaded(module)):
        assert [type(part) for part in other.modules()] == [type(part) for part in module.modules()]
        assert len(tn.revert(other)) == len(report.converted) + len(report.fused)
        assert [type(part) for part in other.modules()] == before


def test_a_slice_of_a_fused_sequential(device):
    _, ours, x = built("sequential", device)
    part = ours[:3]
    torch.testing.assert_close(part(x), ours[2](ours[1](ours[0](x))))
    tn.revert(part)
    assert type(part) is nn.Sequential


def test_a_wrapper_of_the_fused_forward_works_after_revert(device):
    theirs, ours, x = built("basic", device)
    wrapped = ours.forward
    ours.forward = lambda x: wrapped(x)
    tn.revert(ours)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")  # torch's GroupNorm compares sizes
@OF_BLOCKS
def test_tracers_see_the_parts(name, device):
    theirs, ours, x = built(name, device, training=False)
    expected = theirs(x)
    graph = torch.fx.symbolic_trace(ours)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == [node.target for node in torch.fx.symbolic_trace(theirs).graph.nodes if node.op == "call_module"]
    with warnings.catch_warnings():
        if name != "sequential":  # sizes of a block are not compared
            warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(ours, x)
    assert "triton_norm::" not in str(traced.inlined_graph)
    exported = torch.export.export(ours, (x,)).module()
    runs = [graph, traced, exported]
    if name != "sequential":  # torch.jit can't script Own
        runs.append(torch.jit.script(copy.deepcopy(ours)))
    for run in runs:
        torch.testing.assert_close(run(x), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_compiled_block_trains_without_a_graph_break(backend, device):
    theirs, ours, x = built("basic, strided", device)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(ours, fullgraph=True, backend=keep)
    with tn.backend(backend):
        for _ in range(2):
            torch.testing.assert_close(run(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert ("triton_norm" in graphs[0].code) == (backend == "triton")


def test_transforms_of_torch_func(device):
    theirs, ours, x = built("layer", device, training=False)

    def of(model):
        parameters = dict(model.named_parameters())
        return torch.func.vmap(torch.func.grad(lambda x: torch.func.functional_call(model, parameters, x[None]).sum()))

    torch.testing.assert_close(of(ours)(x), of(theirs)(x))


def test_a_mode_of_functions_sees_those_of_the_parts(device):
    class Functions(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    theirs, ours, x = built("basic", device)
    seen = []
    for model in (theirs, ours):
        with Functions() as mode:
            model(x)
        seen.append([name for name in mode.names if name in ("relu", "batch_norm", "conv2d")])
    assert seen[0] == seen[1] != []


def test_autocast(device):
    theirs, ours, x = built("basic", device)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected, actual = theirs(x), ours(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2.0**-5, atol=2.0**-5)


JOINED = nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU(approximate="tanh")


@pytest.mark.parametrize("activation", JOINED, ids=repr)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=repr)
def test_each_norm_with_each_activation(norm, activation, device):
    theirs = copy.deepcopy(nn.Sequential(norm, activation)).to(device)
    nn.init.constant_(theirs[0].weight, 6.0)  # z is on all sides of kinks
    ours = copy.deepcopy(theirs)
    assert tn.convert(ours, fuse=True).fused == {"": "0 + 1"}
    x = torch.randn(2, 4, 3, 3, device=device)
    with tn.backend("triton"):
        actual = trained(ours, x)
    torch.testing.assert_close(actual, trained(theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_whole_resnet_leaves_no_activation_behind_a_norm(block, device, monkeypatch):
    """Each norm has an activation, but for those of the shortcuts."""
    theirs = find("torchvision.models.resnet.ResNet")(block, [1, 1, 1, 1], num_classes=3).to(device)
    ours = copy.deepcopy(theirs)
    report = tn.convert(ours, fuse=True)
    joins = ", ".join(report.fused.values()).split(", ")
    assert len(joins) == sum("downsample" not in name for name in report.converted)
    x = torch.randn(2, 3, 32, 32, device=device)
    expected = theirs(x)
    monkeypatch.setattr(nn.ReLU, "forward", None)  # is not called
    with tn.backend("torch"):
        torch.testing.assert_close(ours(x), expected)


SETTINGS = """
import torch
torch.set_default_device("meta")
torch.set_default_dtype(torch.float64)
import triton_norm as tn
before = torch.get_rng_state()
model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.ReLU())
with torch.inference_mode(), tn.backend("triton"):
    assert tn.convert(model, fuse=True).fused == {"": "0 + 1"}
assert torch.equal(before, torch.get_rng_state())
assert model[0].num_batches_tracked.is_meta
"""


def test_defaults_of_the_process_are_no_matter_and_its_random_numbers_stay():
    output("-W", "error::UserWarning", "-c", SETTINGS)
