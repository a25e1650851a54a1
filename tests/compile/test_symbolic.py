"""torch.fx and torch.jit.script over this library's layers: the same as over torch's."""

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

import triton_norm as tn
from support.every_op import EVERY_OP, MODULATIONS, PATHS
from support.steps import BATCH_NORMS, NORMS, TRAINING, Model, assert_same, drawn, ours_of, trained

# By torch 2.14 in another category than before.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]+. is ")


def nodes_of(graph_module: fx.GraphModule) -> list[tuple[str, ...]]:
    return [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in graph_module.graph.nodes]


@PATHS
@TRAINING
@NORMS
def test_a_graph_calls_the_layers_as_it_calls_torchs(name, training, path, device, guard):
    norm, x = drawn(name, training, device)
    theirs = Model(norm)
    ours = ours_of(theirs)
    with tn.backend(path):
        graph = fx.symbolic_trace(ours)
        assert nodes_of(graph) == nodes_of(fx.symbolic_trace(theirs))
        assert_same(dict(graph.named_buffers()), dict(theirs.named_buffers()))  # tracing has moved nothing
        assert_same(trained(graph, graph, x), trained(theirs, theirs, x))
        graph.train(not training), theirs.train(not training)
        assert_same(trained(graph, graph, x), trained(theirs, theirs, x))
    assert guard is None or bool(guard.launches) == (path == "triton")
    assert graph.norm is ours.norm


@TRAINING
def test_a_graph_calls_sync_batch_norm(training, device):
    theirs, x = drawn("BatchNorm2d", training, device)
    ours = copy.deepcopy(theirs)
    tn.convert(ours, sync_batch_norm=True)
    graph = fx.symbolic_trace(Model(ours))
    assert nodes_of(graph) == nodes_of(fx.symbolic_trace(Model(nn.SyncBatchNorm(4))))
    assert_same(trained(graph, graph.norm, x), trained(Model(theirs), theirs, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_copies_of_a_graph(copied, device):
    norm, x = drawn("BatchNorm1d", True, device)
    graph = fx.symbolic_trace(ours_of(Model(norm)))
    other = copied(graph)
    assert type(other.norm) is tn.BatchNorm1d
    assert_same(trained(other, other, x), trained(graph, graph, x))


@PATHS
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_a_graph_of_a_layer_itself(name, path, device):
    """The graph takes the layer's own arguments too, and calls this library's function."""
    norm, x = drawn(name, True, device)
    ours = ours_of(norm)
    graph, residual = fx.symbolic_trace(ours), torch.randn_like(x)
    with tn.backend(path):
        assert_same(trained(graph, graph, x), trained(norm, norm, x))
        for actual, expected in zip(graph(x, residual), ours(x, residual=residual), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", [*BATCH_NORMS, "SyncBatchNorm"])
def test_no_graph_of_a_batch_norm_itself(name):
    """Neither is there one of torch's: it asks the input for its dimensions."""
    for package in (nn, tn):
        with pytest.raises(TraceError, match="control flow"):
            fx.symbolic_trace(getattr(package, name)(4))


class Fused(nn.Module):
    """Calls a layer with arguments that torch's has not."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("constant", torch.ones(3, 4))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if isinstance(self.norm, tn.BatchNorm1d):
            y = self.norm(x, residual=residual, activation="leaky_relu", negative_slope=0.2)
            return self.norm(self.constant, residual=y)
        y, total = self.norm(x, residual=residual, weight_offset=1.0)
        return y * total + self.norm(self.constant, residual=x)[1]


@PATHS
@TRAINING
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
def test_a_graph_of_calls_with_our_arguments(name, training, path, device):
    norm, x = drawn(name, training, device)
    model = Fused(ours_of(norm)).to(device)
    graph, residual = fx.symbolic_trace(copy.deepcopy(model)), torch.randn_like(x)
    with tn.backend(path):
        expected = trained(functools.partial(model, residual=residual), model, x)
        assert_same(trained(functools.partial(graph, residual=residual), graph, x), expected)


@PATHS
@pytest.mark.parametrize("op", [op for op in EVERY_OP if op.training], ids=str)
def test_a_graph_of_functions(op, path, device):
    arguments = op.drawn(device)
    names = ("x", "residual", "weight", "bias", *MODULATIONS)
    tensors = dict(itertools.zip_longest(names, arguments))
    absent = {name: None for name, tensor in tensors.items() if tensor is None}

    def function(x, residual, weight, bias, gate, scale, shift, residual_gate):
        return op.ours(*(x, residual, weight, bias, gate, scale, shift, residual_gate)[: len(arguments)])

    graph = fx.symbolic_trace(function, concrete_args=absent)
    with tn.backend(path):
        results, expected = graph(*tensors.values()), op.ours(*arguments)
    (results,) = results if isinstance(results[0], tuple) else (results,)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Into(fx.Tracer):
    """Makes no layer a leaf."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return False


class Own(tn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_who_traces_into_a_layer_finds_torchs_function(device):
    norm, x = drawn("LayerNorm", True, device)
    theirs, ours = (Into().trace(model) for model in (Model(norm), ours_of(Model(norm))))
    assert [(n.op, n.target) for n in ours.nodes] == [(n.op, n.target) for n in theirs.nodes]
    subclasses = [fx.symbolic_trace(nn.Sequential(cls(4, device=device))) for cls in (Own, Doubled)]
    assert nodes_of(subclasses[0]) == nodes_of(subclasses[1])
    torch.testing.assert_close(subclasses[0](x), subclasses[1](x))


def test_a_batch_norm_that_is_traced_into_is_torchs_error():
    for norm in (nn.BatchNorm1d(4), tn.BatchNorm1d(4)):
        with pytest.raises(TraceError, match="control flow"):
            Into().trace(Model(norm))


@pytest.mark.parametrize("path", ["llama.LlamaRMSNorm", "gemma.GemmaRMSNorm", "convnext.ConvNextLayerNorm"])
def test_a_graph_of_a_hugging_face_norm_is_of_its_own_forward(path, device):
    model, _, cls = path.partition(".")
    package = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    theirs = Model(getattr(package, cls)(4).to(device))
    ours = ours_of(theirs)
    graphs = [fx.symbolic_trace(model) for model in (ours, theirs)]
    assert nodes_of(graphs[0]) == nodes_of(graphs[1])
    x = torch.randn(3, 4, device=device)
    assert_same(trained(graphs[0], graphs[0], x), trained(theirs, theirs, x))


def wrapped(norm: nn.Module) -> None:
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)


AROUND = {
    "before": lambda norm: norm.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "after": lambda norm: norm.register_forward_hook(lambda module, inputs, y: 2 * y),
    "old backward": lambda norm: norm.register_backward_hook(lambda module, dx, dy: None),
    "wrapped": wrapped,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm1d"])
def test_what_is_around_a_layer_is_not_traced_and_run_again(name, around, device):
    norm, x = drawn(name, False, device)
    model = ours_of(nn.Sequential(norm))
    AROUND[around](model[0])
    with pytest.raises(TraceError, match=r"hooks or a wrapped forward.*triton_norm\.revert"):
        fx.symbolic_trace(model)
    tn.revert(model)
    with torch.no_grad():
        torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")  # of the symbol that stands for the output
def test_a_hook_of_the_backward_runs_once_a_step(device):
    norm, x = drawn("LayerNorm", True, device)
    model, fired = ours_of(nn.Sequential(norm)), []
    model[0].register_full_backward_hook(lambda module, dx, dy: fired.append(module))
    trained(fx.symbolic_trace(model), model, x, calls=2)
    assert fired == [model[0]] * 2


@pytest.mark.parametrize("converted", [False, True], ids=["itself", "in a model"])
@TRAINING
@NORMS
def test_script(name, training, converted, device):
    norm, x = drawn(name, training, device)
    theirs = Model(norm).train(training) if converted else norm
    ours = ours_of(theirs)
    tensors = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    scripted = torch.jit.script(ours)
    actual = {**dict(scripted.named_parameters()), **dict(scripted.named_buffers())}
    assert {name: tensor.data_ptr() for name, tensor in actual.items()} == {
        name: tensor.data_ptr() for name, tensor in tensors.items()
    }
    assert [module.training for module in scripted.modules()] == [training] * (1 + converted)
    assert_same(trained(scripted, scripted, x), trained(theirs, theirs, x))
    assert type(ours) is Model or type(ours) is getattr(tn, name)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), scripted.eval()(x) if not training else theirs(x))


def test_script_takes_the_layer_into_the_model_too(device):
    """Follows torch's protocol, by which the model itself is left alone."""
    norm, x = drawn("BatchNorm1d", True, device)
    model = ours_of(Model(norm))
    torch.jit.script(copy.deepcopy(model))
    assert type(model.norm) is tn.BatchNorm1d
    parameters, before = dict(model.named_parameters()), model.norm
    torch.jit.script(model)
    assert type(model.norm) is nn.BatchNorm1d
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert tn.revert(model) == ()
    assert list(tn.convert(model).converted) == ["norm"]
    model(x)
    assert before.num_batches_tracked == 2


def hook_of_script(self, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    return 2 * y


def test_script_keeps_hooks_and_a_forward_that_is_the_classes_own(device):
    norm, x = drawn("LayerNorm", True, device)
    model = ours_of(norm)
    expected = 2 * model(x)
    model.register_forward_hook(hook_of_script)
    model.forward = model.forward  # as accelerate leaves it
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    assert type(model) is tn.LayerNorm


@pytest.mark.parametrize("package", [nn, tn])
def test_script_of_sync_batch_norm_is_torchs_error(package):
    with pytest.raises(RuntimeError, match=r"SyncBatchNorm|attribute lookup"):
        torch.jit.script(package.SyncBatchNorm(4))


def test_script_does_not_exchange_a_subclass():
    norm = Own(4)
    assert norm.__prepare_scriptable__() is norm


@pytest.mark.parametrize("path", ["llama.LlamaRMSNorm", "gemma.GemmaRMSNorm", "t5.T5LayerNorm"])
def test_script_of_a_hugging_face_norm(path, device):
    model, _, cls = path.partition(".")
    norm = getattr(pytest.importorskip(f"transformers.models.{model}.modeling_{model}"), cls)(4).to(device)
    ours, x = ours_of(Model(norm)), torch.randn(3, 4, device=device)
    scripted = torch.jit.script(ours)
    assert type(ours.norm) is type(norm)
    assert_same(trained(scripted, scripted, x), trained(Model(norm), Model(norm), x))
