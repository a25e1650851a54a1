"""InstanceNorm's running statistics, and the layers of groups: as torch's, converted, copied, recorded."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import triton_norm
from support.group_norms import EVERY_LAYER, LAYERS, PATHS, channels_last, drawn, pair

TRACKING = [kind for kind in LAYERS if "tracking" in kind or "momentum" in kind]


def statistics(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 6, dtype=dtype, device=device), torch.linspace(0.5, 2, 6, dtype=dtype, device=device)


@PATHS
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, -0.5, 1, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last], ids=["first", "last"])
@pytest.mark.parametrize("shape", [(4, 6, 5), (1, 6, 3, 4), (3, 6, 2)], ids=str)
def test_running_statistics(shape, layout, momentum, path, device):
    x, _, weight, bias = drawn(shape, device, torch.float64)
    ours, theirs = statistics(device, torch.float64), statistics(device, torch.float64)
    expected = F.instance_norm(x, *theirs, weight, bias, momentum=momentum)
    with triton_norm.backend(path):
        y = triton_norm.instance_norm(layout(x), *ours, weight, bias, momentum=momentum)
    torch.testing.assert_close((y, *ours), (expected, *theirs))


def test_one_launch_moves_the_running_statistics(guard, device):
    """Checks more samples than it adds at a time, whose means are large and equal."""
    x = drawn((20, 6, 5), device)[0]
    x = x - x.mean(2, keepdim=True).double().float() + 12345.0
    ours, theirs = statistics(device), statistics(device, torch.float64)
    with triton_norm.backend("triton"):
        triton_norm.instance_norm(x, *ours, momentum=0.3)
    F.instance_norm(x.double(), *theirs, momentum=0.3)
    torch.testing.assert_close([each.double() for each in ours], list(theirs), rtol=1e-6, atol=0)
    assert [each._version for each in ours] == [1, 1]
    if guard is not None:
        assert len(guard.kernels) == 2


@PATHS
@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("uses_input", [True, False])
def test_statistics_of_another_type(uses_input, dtype, running, path, device):
    x, residual, weight, bias = drawn((3, 6, 5), device, dtype)
    ours = statistics(device, running)
    exact = [statistic.double() for statistic in ours]
    wide = [tensor.double() for tensor in (weight, bias)]
    expected = F.relu(F.instance_norm(x.double(), *exact, *wide, uses_input, 0.3) + residual.double())
    with triton_norm.backend(path):
        y = triton_norm.instance_norm(x, *ours, weight, bias, uses_input, 0.3, residual=residual, activation="relu")
    assert (y.dtype, ours[0].dtype) == (dtype, running)
    eps = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != running else 0.0)
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=eps)
    eps = 4 * max(torch.finfo(kind).eps for kind in (running, torch.promote_types(dtype, torch.float32)))
    torch.testing.assert_close([statistic.double() for statistic in ours], exact, rtol=eps, atol=eps)


@PATHS
def test_statistics_with_gaps(path, device):
    x = drawn((3, 6, 5), device)[0]
    theirs, memory = statistics(device), torch.zeros(2, 12, device=device)
    ours = memory[:, ::2]
    ours.copy_(torch.stack(theirs))
    F.instance_norm(x, *theirs)
    with triton_norm.backend(path):
        triton_norm.instance_norm(x, *ours)
    torch.testing.assert_close(tuple(ours), theirs)
    assert not memory[:, 1::2].any()


@PATHS
@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0)], ids=str)
def test_an_empty_batch_moves_nothing(shape, path, device):
    """torch's moves them to NaN if there are no samples."""
    running = statistics(device)
    with triton_norm.backend(path):
        y = triton_norm.instance_norm(torch.ones(shape, device=device), *running)
    assert y.shape == shape
    assert all(map(torch.equal, running, statistics(device)))


@PATHS
def test_statistics_made_under_inference_mode(path, device):
    x = drawn((3, 6, 5), device)[0]
    with torch.inference_mode():
        running = statistics(device)
    with triton_norm.backend(path), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        triton_norm.instance_norm(x, *running)
    assert all(map(torch.equal, running, statistics(device)))
    with triton_norm.backend(path), torch.inference_mode():
        triton_norm.instance_norm(x, *running)
    assert not torch.equal(running[0], statistics(device)[0])


@PATHS
def test_the_running_statistics_are_batch_norms(path, device):
    inputs = drawn((3, 6, 5), device)
    x, residual, weight, bias = (tensor.requires_grad_() for tensor in inputs)
    own = {"residual": residual, "activation": "silu"}
    with triton_norm.backend(path):
        result = triton_norm.instance_norm(x, *statistics(device), weight, bias, use_input_stats=False, **own)
        expected = triton_norm.batch_norm(x, *statistics(device), weight, bias, **own)
        explained = triton_norm.explain(
            triton_norm.instance_norm, x, *statistics(device), weight, bias, use_input_stats=False, **own
        )
    assert torch.equal(result, expected)
    gradients = (torch.autograd.grad(y.cos().sum(), inputs) for y in (result, expected))
    assert all(map(torch.equal, *gradients))
    assert (explained.function, explained.backend) == ("instance_norm", "triton" if path == "auto" else "torch")


@PATHS
@pytest.mark.parametrize("kind", TRACKING)
def test_a_checkpoint_moves_as_often_as_torchs(kind, path, device):
    ours, theirs = pair(kind, device)
    x = drawn((3, 6, 5), device)[0].requires_grad_()
    with triton_norm.backend(path):
        for module in (ours, theirs):
            checkpoint(module, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def stepped(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns y, all gradients of a step and the buffers after it."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    gradients = torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])
    return [y.detach(), *gradients, *(buffer.clone() for buffer in module.buffers())]


CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@PATHS
@pytest.mark.parametrize("training", [True, False])
@EVERY_LAYER
def test_layers(kind, training, path, device):
    """A second step goes by the plan of the first."""
    ours, theirs = (module.train(training) for module in pair(kind, device))
    with triton_norm.backend(path):
        for _ in range(2):
            x = drawn((3, 6, 5), device)[0]
            torch.testing.assert_close(stepped(ours, x), stepped(theirs, x), **CLOSE)
        if "Instance" in kind:
            torch.testing.assert_close(stepped(ours, x[0]), stepped(theirs, x[0]), **CLOSE)
            fused = ours(x[0], residual=x[1], activation="silu")
            torch.testing.assert_close(fused, F.silu(theirs(x[0]) + x[1]), **CLOSE)
        fused = ours.eval()(x, residual=x, activation="leaky_relu", negative_slope=0.3)
    torch.testing.assert_close(fused, F.leaky_relu(theirs.eval()(x) + x, 0.3), **CLOSE)


@pytest.mark.parametrize("device_type", ["cpu", "meta"])
@EVERY_LAYER
def test_converted_and_reverted(kind, device_type):
    module = nn.Sequential(pair(kind)[1].to(device_type))
    before = {name: (value.dtype, value.data_ptr()) for name, value in module.state_dict().items()}
    report = triton_norm.convert(module)
    cls = type(module[0])
    assert cls is getattr(triton_norm, cls.__name__)
    assert report.converted == {"0": f"torch.nn.{cls.__name__} → triton_norm.{cls.__name__}"}
    assert {name: (value.dtype, value.data_ptr()) for name, value in module.state_dict().items()} == before
    assert triton_norm.convert(module).converted == {}
    assert triton_norm.revert(module) == ("0",)
    assert type(module[0]) is getattr(nn, cls.__name__)


class Calling(nn.Module):
    def forward(self, x):
        return F.group_norm(x, 2) + torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class Own(nn.GroupNorm):
    def forward(self, input):
        return super().forward(input)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_skipped():
    model = nn.ModuleDict({"own": Own(1, 2), "lazy": nn.LazyInstanceNorm2d(), "calling": Calling()})
    report = triton_norm.convert(model)
    assert report.converted == {}
    assert report.skipped == {
        "own": "Own is a subclass of torch.nn.GroupNorm: its forward may differ",
        "lazy": "LazyInstanceNorm2d becomes another class in its first call",
        "calling": "Calling calls torch.nn.functional.group_norm, torch.instance_norm as a function",
    }


@EVERY_LAYER
def test_copied_and_pickled(kind, device):
    ours, theirs = pair(kind, device)
    x = drawn((3, 6, 5), device)[0]
    expected = stepped(theirs, x)
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(made) is type(ours)
        torch.testing.assert_close(stepped(made, x), expected, **CLOSE)
    memory = io.BytesIO()
    torch.save(ours.state_dict(), memory)
    memory.seek(0)
    assert type(ours)(**OPTIONS[kind]).load_state_dict(torch.load(memory)).missing_keys == []


OPTIONS = {
    "GroupNorm": {"num_groups": 3, "num_channels": 6},
    "GroupNorm, plain": {"num_groups": 1, "num_channels": 6, "affine": False},
    "InstanceNorm1d": {"num_features": 6},
    "InstanceNorm1d, affine": {"num_features": 6, "affine": True},
    "InstanceNorm1d, tracking": {"num_features": 6, "affine": True, "track_running_stats": True},
    "InstanceNorm1d, no momentum": {"num_features": 6, "momentum": None, "track_running_stats": True},
}


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("path", ["auto", "triton", "torch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("_fresh_dynamo")
@EVERY_LAYER
def test_compiled(kind, training, path, device):
    ours, theirs = (module.train(training).double() for module in pair(kind, device))
    x = drawn((3, 6, 5), device, torch.float64)[0]
    with triton_norm.backend(path):
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(stepped(compiled, x), stepped(theirs, x))


@pytest.mark.parametrize("training", [True, False])
@EVERY_LAYER
def test_exported_as_torchs_functions(kind, training, device):
    ours, theirs = (module.train(training) for module in pair(kind, device))
    x = drawn((3, 6, 5), device)[0]
    program = torch.export.export(ours, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    uses_input = training or not getattr(theirs, "track_running_stats", False)
    name = "group_norm" if "Group" in kind else "instance_norm" if uses_input else "batch_norm"
    assert targets == [f"aten.{name}.default"]
    torch.testing.assert_close(program.module()(x), theirs(x), **CLOSE)


@EVERY_LAYER
def test_traced_by_fx(kind, device):
    model = nn.Sequential(pair(kind, device)[0], nn.ReLU())
    graph = fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = drawn((3, 6, 5), device)[0]
    torch.testing.assert_close(graph(x), copy.deepcopy(model)(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is ")
@pytest.mark.parametrize("kind", ["GroupNorm", "InstanceNorm1d, affine"])
def test_scripted_as_torchs(kind):
    ours, theirs = pair(kind)
    x = drawn((3, 6, 5), "cpu")[0]
    torch.testing.assert_close(torch.jit.script(ours)(x), theirs(x))


def test_more_channels_than_features_warn_or_raise_as_torchs(device):
    x = torch.randn(2, 4, 5, device=device)
    plain = triton_norm.InstanceNorm1d(6, device=device)
    with pytest.warns(UserWarning, match="does not match num_features"):
        torch.testing.assert_close(plain(x), F.instance_norm(x))
    for unbatched in (x, x[0]):
        for norms in (nn, triton_norm):
            with pytest.raises(ValueError, match=r"match num_features \(6\), but got: 4"):
                norms.InstanceNorm1d(6, affine=True, device=device)(unbatched)


@pytest.mark.parametrize("name", ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"])
def test_wrong_ranks_as_torchs(name, device):
    for n_axes in range(1, 7):
        x = torch.ones((2, 3, 2, 2, 2, 2)[:n_axes], device=device)
        raised = []
        for norms in (nn, triton_norm):
            module = getattr(norms, name)(x.shape[0] if n_axes == int(name[-2]) + 1 else 3, device=device)
            try:
                module(x)
            except ValueError as error:
                raised.append(str(error))
        assert len(raised) in (0, 2)
        assert len(set(raised)) <= 1
