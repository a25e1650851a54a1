"""CUDA graphs of converted models, captured by hand and by make_graphed_callables, and kernels in several streams."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import triton_norm
from triton_norm import launch
from triton_norm.tuning.limits import INTERPRETED
from triton_norm.tuning.memory import forget

# make_graphed_callables keeps the graph of its last warm-up, in another stream, while it captures; torch says so once.
pytestmark = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")

WIDTH, TOKENS, VOCABULARY = 32, 8, 17
WARM_UPS, REPLAYS = 3, 4
ROUGHLY = {"rtol": 1e-2, "atol": 1e-2}  # convolutions may be computed in TF32; what is stale or missing is far off


def norms() -> nn.Module:
    """Norms alone, whose bits are the same in a graph."""
    channels = nn.BatchNorm1d(TOKENS), nn.BatchNorm1d(TOKENS, momentum=None)
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), *channels)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.block(x) + x))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


class FromTokens(nn.Module):
    """One of transformers' models from tokens to the last hidden state; a given mask asks the GPU nothing."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mask", mask[None, None])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, attention_mask=self.mask, use_cache=False).last_hidden_state


def _sizes() -> dict[str, object]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "vocab_size": VOCABULARY, "attn_implementation": "eager"}


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**_sizes(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return FromTokens(transformers.BertModel(config, add_pooling_layer=False), torch.zeros(TOKENS, TOKENS))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    later = torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)
    return FromTokens(transformers.LlamaModel(transformers.LlamaConfig(**_sizes())), later)


def rows(device: str) -> Tensor:
    return torch.randn(6, TOKENS, WIDTH, device=device, requires_grad=True)


def images(device: str) -> Tensor:
    return torch.randn(6, 3, 12, 12, device=device, requires_grad=True)


def tokens(device: str) -> Tensor:
    return torch.randint(0, VOCABULARY, (3, TOKENS), device=device)


MODELS = {  # how to make it, its inputs, and how many norms it has
    "norms": (norms, rows, 4),
    "convolutions": (ConvNet, images, 3),
    "encoder": (encoder, rows, 5),
    "BERT": (bert, tokens, 5),
    "Llama": (llama, tokens, 5),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def converted(name: str, device: str) -> tuple[nn.Module, Callable[[str], Tensor]]:
    make, inputs, n_norms = MODELS[name]
    model = make().to(device)
    assert len(triton_norm.convert(model).converted) == n_norms
    return model, inputs


def step(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y and all gradients, in memory of their own: a graph writes its outputs to the same place each time."""
    leaves = [x] if x.requires_grad else []
    y = model(x)
    gradients = torch.autograd.grad(y, [*leaves, *model.parameters()], dy)
    return [tensor.detach().clone() for tensor in (y, *gradients)]


def assert_same(actual: list[Tensor], expected: list[Tensor], name: str) -> None:
    torch.testing.assert_close(actual, expected, **{"rtol": 0, "atol": 0} if name == "norms" else ROUGHLY)


def counts(model: nn.Module) -> list[int]:
    return [int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]


class NoWaiting(TorchDispatchMode):
    """Waiting for the GPU, or bringing something to it, is an error: no graph can hold it."""

    REFUSED = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.lift_fresh.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.nonzero.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func is torch.ops.aten.index.Tensor else ()
        by_mask = any(index is not None and index.dtype is torch.bool for index in indices)
        assert not by_mask, func
        assert func not in self.REFUSED, func
        return func(*args, **kwargs or {})


@EVERY_MODEL
def test_the_models_here_can_be_captured(name, device):
    """Also where there is no GPU to capture them on: converted they compute the same, and wait for nothing."""
    model, inputs = converted(name, device)
    plain, x = copy.deepcopy(model), inputs(device)
    triton_norm.revert(plain)
    dy = torch.randn_like(copy.deepcopy(plain)(x))
    expected = step(plain, x, dy)
    with NoWaiting():
        actual = step(model, x, dy)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    assert all(count == 1 for count in counts(model))


def test_what_would_wait_is_refused():
    for wait in (lambda x: bool(x.all()), lambda x: x[x > 0], lambda x: x + torch.tensor(1.0), lambda x: x.item()):
        with NoWaiting(), pytest.raises(AssertionError, match="aten"):
            wait(torch.ones(1))


@pytest.mark.gpu
@EVERY_MODEL
def test_replays_of_graphed_callables_equal_eager_steps(name):
    """Replays have other inputs each; running statistics move once for each replay, and not for the capture."""
    model, inputs = converted(name, "cuda")
    eager = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (inputs("cuda"),), num_warmup_iters=WARM_UPS)
    assert all(count == WARM_UPS for count in counts(model))
    eager.load_state_dict(model.state_dict())
    for replay in range(1, REPLAYS + 1):
        x = inputs("cuda")
        dy = torch.randn_like(copy.deepcopy(eager)(x))
        assert_same(step(graphed, x, dy), step(eager, x, dy), name)
        assert_same(list(model.buffers()), list(eager.buffers()), name)
        assert all(count == WARM_UPS + replay for count in counts(model))
    x = inputs("cuda")
    assert_same([graphed.eval()(x)], [eager.eval()(x)], name)  # what was captured is training


@pytest.mark.gpu
def test_steps_of_an_optimizer_on_a_graphed_callable():
    """The graph reads parameters where they are, as they are then."""
    model, inputs = converted("convolutions", "cuda")
    eager = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (inputs("cuda"),), num_warmup_iters=WARM_UPS)
    eager.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, eager)]
    for _ in range(REPLAYS):
        x = inputs("cuda").detach().requires_grad_()
        for each, optimizer in zip((graphed, eager), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(eager.named_parameters()), **ROUGHLY)


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Returns a graph of it and the result that replays fill. torch.cuda.graph wants calls in a side stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y


@pytest.mark.gpu
@EVERY_MODEL
@torch.no_grad()
def test_inference_in_a_graph(name):
    model, inputs = converted(name, "cuda")
    model.eval()
    x = inputs("cuda").detach()
    graph, y = captured(lambda: model(x))
    for _ in range(REPLAYS):
        x.copy_(inputs("cuda").detach())
        graph.replay()
        assert_same([y], [model(x)], name)


SHARED = (64, 16, 28, 28)
"""The shape of a BatchNorm in one launch whose programs share each channel, on a GPU of 132 multiprocessors."""


def test_programs_share_the_channels_of_that_shape():
    if not INTERPRETED:
        pytest.skip("the plan is that of a GPU: it is made where there is none")
    from triton_norm.testing.stub_driver import H100, as_on_gpu

    launches = []

    def note(kernel, count, arguments, constants, config):
        launches.append((kernel.__name__, constants["SHARED"], count))

    x = torch.randn(SHARED, requires_grad=True)
    with as_on_gpu(H100, start=note):
        y = triton_norm.batch_norm(x, None, None, training=True)
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert [name for name, *_ in launches] == ["channels_forward_kernel", "channels_backward_kernel"]
    assert all(shares and count > SHARED[1] for _, shares, count in launches)


def trained(module: nn.Module, x: Tensor, times: int) -> list[Tensor]:
    """Returns the results of the last of so many steps, and the statistics that all of them have moved."""
    leaf = x.detach().requires_grad_()
    for _ in range(times):
        y = module(leaf)
        gradients = torch.autograd.grad(y, [leaf, *module.parameters()], x)
    return [y.detach(), *gradients, *module.buffers()]


@pytest.mark.gpu
def test_three_streams_at_once():
    """Programs of three launches wait for their own: they count in zeros that each stream keeps, and leaves zeros."""
    inputs = [torch.randn(SHARED, device="cuda") for _ in range(3)]
    modules = [triton_norm.BatchNorm2d(SHARED[1], device="cuda") for _ in inputs]
    times = 200
    expected = [trained(copy.deepcopy(module), x, times) for module, x in zip(modules, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    actual = [[] for _ in inputs]
    for _ in range(times):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                actual[place] = trained(modules[place], inputs[place], 1)
    torch.cuda.synchronize()
    for of_stream, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(of_stream, exact, rtol=0, atol=0)
    assert not any(saved.any() for saved in launch._zeros.values())


@pytest.mark.gpu
def test_graphs_replayed_in_several_streams_at_once():
    """Each counts in zeros of its own, since it may be replayed in any stream."""
    inputs = [torch.randn(SHARED, device="cuda") for _ in range(3)]
    graphs = [captured(lambda x=x: triton_norm.batch_norm(x, None, None, training=True)) for x in inputs]
    expected = [triton_norm.batch_norm(x, None, None, training=True) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for _, y in graphs:
        y.fill_(torch.nan)
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, y), exact in zip(graphs, expected, strict=True):
        assert torch.equal(y, exact)


STREAMED = {
    "LayerNorm": (triton_norm.LayerNorm, 64, (512, 64)),
    "RMSNorm": (triton_norm.RMSNorm, 64, (512, 64)),
    "BatchNorm2d": (triton_norm.BatchNorm2d, SHARED[1], SHARED),
}
A_WHILE = 50_000_000  # cycles, tens of milliseconds


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize("name", STREAMED)
def test_kernels_run_in_the_current_stream(name, first):
    """There the input comes late; in any other stream a kernel would read the memory's former contents."""
    norm, width, shape = STREAMED[name]
    module, source = norm(width, device="cuda"), torch.randn(shape, device="cuda")
    expected = trained(copy.deepcopy(module), source, 1)
    if first:
        forget()  # the launchers go, and Triton looks its kernels up again
    x, side = torch.full_like(source, torch.nan), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        x.copy_(source)
        actual = trained(module, x, 1)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STREAMED)
def test_a_backward_runs_in_its_forwards_stream(name):
    """Autograd sees to that, from a thread of its own, whichever stream backward is called in."""
    norm, width, shape = STREAMED[name]
    module, source = norm(width, device="cuda"), torch.randn(shape, device="cuda")
    expected = trained(copy.deepcopy(module), source, 1)
    leaf, side = torch.full_like(source, torch.nan).requires_grad_(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        leaf.detach().copy_(source)
        y = module(leaf)
    gradients = torch.autograd.grad(y, [leaf, *module.parameters()], source)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close([y.detach(), *gradients, *module.buffers()], expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_an_input_from_another_stream():
    """Waited for as torch asks for it, and kept from being used again by Tensor.record_stream."""
    module, side = triton_norm.BatchNorm2d(SHARED[1], device="cuda"), torch.cuda.Stream()
    source = torch.randn(SHARED, device="cuda")
    expected = trained(copy.deepcopy(module), source, 1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        x = source.clone()
    torch.cuda.current_stream().wait_stream(side)
    x.record_stream(torch.cuda.current_stream())
    actual = trained(module, x, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
