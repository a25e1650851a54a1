"""convert(fuse=True): a norm, the addition and the activation after it in one call, wherever nothing stands between."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import triton_norm as tn
from support.processes import output
from support.steps import saved_and_loaded, state_of
from support.vision import find, importable  # noqa: F401

BasicBlock, Bottleneck = (find(f"torchvision.models.resnet.{name}") for name in ("BasicBlock", "Bottleneck"))
Conv2dNormActivation = find("torchvision.ops.misc.Conv2dNormActivation")


class Named(nn.Sequential):
    """Runs by the code that it inherits, however it is constructed."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.SiLU())


class Own(nn.Sequential):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Reduced(nn.Sequential):
    """Is copied in its own way, with what a subclass could leave out."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Reduced, tuple(self)


class OwnBlock(BasicBlock):
    """May do more than its base."""


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.LeakyReLU(0.2)),
        Named(4),
        Own(nn.BatchNorm2d(4), nn.ReLU()),
        nn.InstanceNorm2d(4),
        nn.Hardswish(),
    )


def strided() -> nn.Module:
    """A block whose shortcut has a norm of its own."""
    return BasicBlock(2, 4, 2, nn.Sequential(nn.Conv2d(2, 4, 1, 2, bias=False), nn.BatchNorm2d(4)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "sequential": sequential,
    "basic": lambda: BasicBlock(2, 2),
    "basic, strided": strided,
    "bottleneck": lambda: nn.Sequential(nn.Conv2d(2, 4, 1), Bottleneck(4, 1)),
    "layer": lambda: Conv2dNormActivation(2, 4, activation_layer=nn.SiLU),
}
OF_BLOCKS = pytest.mark.parametrize("name", BLOCKS)


def built(name: str, device: str, training: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, a copy that is fused, and an input."""
    theirs = BLOCKS[name]().to(device).train(training)
    for part in theirs.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 1.5)
    ours = copy.deepcopy(theirs)
    assert tn.convert(ours, fuse=True).fused
    return theirs, ours, torch.randn(3, 2, 6, 6, device=device)


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Results of a step, and the gradients and the buffers after it."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.sin().sum().backward()
    gradients = {f"d{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(model.named_buffers())}


def test_the_report_and_the_way_back():
    module = sequential()
    before, names, text = state_of(module), list(module.state_dict()), str(module)
    modules = dict(module.named_modules())
    report = tn.convert(module, fuse=True)
    assert report.fused == {"": "1 + 2", "3": "1 + 2", "4": "0 + 1"}
    assert report.skipped == {
        "": "6 + 7: Hardswish is not among the activations that are known",
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


class Operators(TorchDispatchMode):
    """Lists the operators of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


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


def _hook(module: nn.Module, calls: list[Any]) -> None:
    module.register_forward_hook(lambda module, inputs, y: calls.append(y.clone()))


def _pre_hook(module: nn.Module, calls: list[Any]) -> None:
    module.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].clone()))


def _backward_hook(module: nn.Module, calls: list[Any]) -> None:
    module.register_full_backward_hook(lambda module, dx, dy: calls.append(dy[0].clone()))


def _replaced(module: nn.Module, calls: list[Any]) -> None:
    own = module.forward
    module.forward = lambda x: calls.append(x.clone()) or own(x)


# torch refuses an addition in place to the result of a module with a backward hook: bn2 has none.
@pytest.mark.parametrize(
    ("part", "observe"),
    [
        *(("bn1", observe) for observe in (_hook, _pre_hook, _backward_hook, _replaced)),
        *(("relu", observe) for observe in (_hook, _pre_hook, _backward_hook, _replaced)),
        *(("bn2", observe) for observe in (_hook, _pre_hook, _replaced)),
        ("conv2", _backward_hook),
        ("downsample", _backward_hook),
    ],
)
def test_what_is_put_between_later_is_called(part, observe, device):
    theirs, ours, x = built("basic, strided", device)
    for module in (theirs, ours):
        module.relu.inplace = False  # torch refuses a backward hook before an activation in place
    seen, expected = [], []
    observe(getattr(ours, part), seen)
    observe(getattr(theirs, part), expected)
    torch.testing.assert_close(trained(ours, x), trained(theirs, x), rtol=1e-4, atol=1e-5)
    assert len(expected) > 0
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_all_modules_see_each_part(device):
    theirs, ours, x = built("basic", device)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, inputs, y: seen.append(type(m).__name__))
    try:
        torch.testing.assert_close(ours(x), theirs(x))
        report = tn.convert(sequential(), fuse=True)
    finally:
        handle.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert report.fused == {}
    assert "1 + 2: Conv" not in str(report)
    assert report.skipped["3"] == "1 + 2: GroupNorm has hooks or another forward"


def test_parts_replaced_later_are_called(device):
    theirs, ours, x = built("basic, strided", device)
    for module in (theirs, ours):
        module.relu, module.bn1 = nn.Tanh(), nn.Identity()
    torch.testing.assert_close(ours(x), theirs(x))


class Broadcast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


def test_a_shortcut_that_returns_nothing_is_an_error(device):
    for fuse in (False, True):
        model = BasicBlock(2, 2, downsample=Nothing()).to(device)
        assert bool(tn.convert(model, fuse=fuse).fused) == fuse
        with pytest.raises(TypeError):
            model(torch.randn(2, 2, 4, 4, device=device))


@pytest.mark.parametrize("shortcut", [Broadcast, Doubled])
def test_a_shortcut_of_another_shape_or_dtype(shortcut, device):
    """torch adds it in place, in the dtype of the norm's result."""
    theirs = BasicBlock(2, 2, downsample=shortcut()).to(device)
    ours = copy.deepcopy(theirs)
    assert tn.convert(ours, fuse=True).fused == {"": "bn1 + relu, bn2 + shortcut + relu"}
    x = torch.randn(2, 2, 4, 4, device=device)
    torch.testing.assert_close(ours(x), theirs(x))


def test_wrong_inputs_raise_torchs_errors_and_move_nothing(device):
    theirs, ours, _ = built("sequential", device)
    before = copy.deepcopy(ours.state_dict())
    for x in (torch.randn(2, 3, 6, 6, device=device), [1.0], None):
        with pytest.raises((RuntimeError, TypeError)) as expected:
            theirs(x)
        with pytest.raises(expected.type):
            ours(x)
    torch.testing.assert_close(ours.state_dict(), before)


def test_a_norm_that_the_shortcut_has_too_moves_in_its_order(device):
    norm = nn.BatchNorm2d(2)
    theirs = BasicBlock(2, 2, downsample=nn.Sequential(nn.Conv2d(2, 2, 1), norm))
    theirs.bn2 = norm
    theirs.to(device)
    ours = copy.deepcopy(theirs)
    report = tn.convert(ours, fuse=True)
    assert report.fused == {}
    reason = "the shortcut has the same norm"
    assert report.skipped[""] == f"bn1 + relu: {reason}; bn2 + shortcut + relu: {reason}"
    x = torch.randn(2, 2, 4, 4, device=device)
    torch.testing.assert_close(trained(ours, x), trained(theirs, x), rtol=1e-4, atol=1e-5)


def _other(self: Any, x: Tensor) -> Tensor:
    """Leaves the shortcut out."""
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def _renamed(self: Any, y: Tensor) -> Tensor:
    return y


OWN_FORWARD = BasicBlock.forward


def _moving(self: Any, x: Tensor) -> Tensor:
    """Moves the running statistics twice."""
    self.bn1(self.conv1(x))
    return OWN_FORWARD(self, x)


def _failing(self: Any, x: Tensor) -> Tensor:
    raise ValueError("patched\nfor some reason")


@pytest.mark.parametrize(
    ("cls", "forward", "reason"),
    [
        (BasicBlock, _other, "its version of BasicBlock computes something else than the one that is known"),
        (
            BasicBlock,
            _failing,
            "its version of BasicBlock could not be tried on small tensors, and raised ValueError: patched",
        ),
        (nn.ReLU, _failing, "its version of ReLU raised ValueError on a few numbers"),
        (BasicBlock, _moving, "its version of BasicBlock computes something else than the one that is known"),
        (BasicBlock, _renamed, "its version of BasicBlock takes other arguments"),
        (nn.ReLU, lambda self, x: x, "its version of ReLU computes something else than the one that is known"),
    ],
)
def test_a_patched_class_is_skipped(cls, forward, reason, monkeypatch):
    model = nn.Sequential(BasicBlock(2, 2))
    before = type(model[0])
    monkeypatch.setattr(cls, "forward", forward)
    report = tn.convert(model, fuse=True)
    assert report.fused == {}
    assert report.skipped == {"0": f"bn1 + relu: {reason}; bn2 + shortcut + relu: {reason}"}
    assert type(model[0]) is before
    assert type(model[0].bn1) is tn.BatchNorm2d


def test_modules_that_lack_parts_of_their_class_are_left():
    model = nn.Sequential(BasicBlock(2, 2), OwnBlock(2, 2))
    del model[0].relu, model[1].bn2
    report = tn.convert(model, fuse=True)
    assert (report.fused, report.skipped, len(report.converted)) == ({}, {}, 3)


def test_modules_that_are_skipped_and_why():
    model = nn.ModuleDict(
        {
            "own": OwnBlock(2, 2),
            "replaced": nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()),
            "hooked": BasicBlock(2, 2),
            "reduced": Reduced(nn.BatchNorm2d(2), nn.ReLU()),
        }
    )
    model["replaced"].forward = lambda x: x
    model["hooked"].bn1.register_forward_hook(lambda module, inputs, y: y)
    model["hooked"].bn2.forward = lambda x: x
    report = tn.convert(model, fuse=True)
    subclass = "OwnBlock is a subclass of torchvision.BasicBlock: its forward may differ"
    assert report.fused == {}
    assert report.skipped == {
        "own": f"bn1 + relu: {subclass}; bn2 + shortcut + relu: {subclass}",
        "replaced": "0 + 1: its forward was replaced on the module itself",
        "hooked": "bn1 + relu: BatchNorm2d has hooks or another forward; "
        "bn2 + shortcut + relu: the norm stays BatchNorm2d",
        "reduced": "0 + 1: Reduced is a subclass of torch.nn.Sequential: its forward may differ",
        "hooked.bn2": "its forward was replaced on the module itself",
    }


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ({}, ["", "0"]),
        ({"exclude": "0"}, [""]),
        ({"exclude": "0.bn?"}, [""]),
        ({"exclude": "0.bn1"}, ["", "0"]),
        ({"exclude": nn.Sequential}, ["0"]),
        ({"include": "0"}, ["0"]),
        ({"include": [nn.BatchNorm2d]}, []),
        ({"include": [nn.BatchNorm2d, BasicBlock]}, ["0"]),
    ],
)
def test_include_and_exclude(arguments, fused):
    model = nn.Sequential(BasicBlock(2, 2), nn.BatchNorm2d(2), nn.ReLU())
    report = tn.convert(model, fuse=True, **arguments)
    assert list(report.fused) == fused
    theirs = (nn.Sequential, BasicBlock)
    assert [
        name for name, part in model.named_modules() if isinstance(part, theirs) and type(part) not in theirs
    ] == fused


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


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.3), nn.GELU(), nn.GELU(approximate="tanh")], ids=repr
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=repr)
def test_each_norm_with_each_activation(norm, activation, device):
    theirs = copy.deepcopy(nn.Sequential(norm, activation)).to(device)
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
