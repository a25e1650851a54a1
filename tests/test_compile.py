"""Under torch.compile: no graph break, the same kernels, the same bits, the same running statistics."""

import copy
import hashlib

import pytest
import torch
from torch import Tensor, nn

import triton_norm
from triton_norm.library import DEFINED
from triton_norm.rows.fusible import NAME as FUSIBLE

pytestmark = [
    pytest.mark.usefixtures("_fresh_dynamo"),
    # Dynamo's own, on every autograd.Function that it traces.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Network(nn.Module):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.batch_norm = triton_norm.BatchNorm2d(4, momentum=momentum)
        self.layer_norm = triton_norm.LayerNorm((3, 6))
        self.rms_norm = triton_norm.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y, stream = self.rms_norm(self.batch_norm(x).relu(), residual=x, weight_offset=1.0)
        z, stream = self.rms_norm(y.sin(), residual=stream, residual_dtype=torch.float64)
        _, last = self.rms_norm(z, residual=stream.float())
        return self.layer_norm(last).sin()


def trained(model: nn.Module, run: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients and state after a step on each batch."""
    found = []
    for x in batches:
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        found += [y.detach(), leaf.grad]
    return found + [p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_training_agrees_with_eager(training, momentum, backend, device):
    """Backend "triton" keeps the kernels, and so their bits. Batch sizes change: the second makes shapes dynamic, and
    compiles nothing more after that."""
    eager = Network(momentum).to(device).train(training)
    compiled = copy.deepcopy(eager)
    batches = [torch.randn(n, 4, 3, 6, device=device) for n in (2, 3, 5, 4)]
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with triton_norm.backend(backend):
        found, expected = trained(compiled, run, batches), trained(eager, eager, batches)
    for a, b in zip(found, expected, strict=True):
        if backend == "triton":
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.unguarded  # Inductor's workspaces are its own
@pytest.mark.filterwarnings("ignore")  # of Inductor and what it imports
def test_inductor_agrees_with_eager(device):
    eager = Network().to(device)
    compiled = copy.deepcopy(eager)
    batches = [torch.randn(n, 4, 3, 6, device=device) for n in (2, 3)]
    found = trained(compiled, torch.compile(compiled, fullgraph=True), batches)
    torch.testing.assert_close(found, trained(eager, eager, batches), rtol=1e-4, atol=1e-5)


def test_the_backend_is_guarded(device):
    x = torch.randn(3, 8, device=device)
    normalize = torch.compile(lambda x: triton_norm.layer_norm(x, (8,)), fullgraph=True, backend="aot_eager")
    kernels, torchs = (normalize_under(name, normalize, x) for name in ("triton", "torch"))
    assert torch.equal(torchs, torch.nn.functional.layer_norm(x, (8,)))
    assert torch.equal(kernels, normalize_under("triton", normalize, x))


def normalize_under(name: str, normalize, x: Tensor) -> Tensor:
    with triton_norm.backend(name):
        return normalize(x)


def test_wrong_calls_are_errors_there_too():
    normalize = torch.compile(lambda x: triton_norm.layer_norm(x, (9,)), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="expected input with shape"):
        normalize(torch.randn(3, 8))


def operators(device: str) -> dict[str, tuple]:
    """Calls of every operator, by name."""
    x, weight = torch.randn(3, 4, 6, device=device), torch.randn(6, device=device)
    row_statistics = torch.rand(2 * 12, device=device)
    of_rows = (x.dtype, None, weight.dtype, x.dtype)
    of_both = (torch.half, x.dtype, weight.dtype, None)
    statistics = torch.rand(3, 4, device=device)
    running = torch.rand(4, device=device), torch.rand(4, device=device)
    channel_weight = torch.randn(4, device=device)
    moved = [statistics[0].clone(), statistics[1].clone(), torch.tensor(0, device=device)]
    moments = torch.cat((torch.rand(12), torch.tensor([18.0]))).to(device)[None]
    wanted = (x.dtype, None, x.dtype, None)
    of_residual = (x.dtype, torch.half, x.dtype, None)
    bits = torch.randint(256, (18,), dtype=torch.uint8, device=device)
    ops = torch.ops.triton_norm
    fusible = getattr(ops, FUSIBLE)
    last = x.mT.contiguous().mT
    return {
        "rows_forward, inference": (
            ops.rows_forward,
            (x, None, weight, None, False, 6, 1e-5, 0.0, True, torch.bfloat16, None, None),
        ),
        "rows_forward, training": (
            ops.rows_forward,
            (x, None, weight, weight, True, 6, 1e-5, 0.0, True, None, None, torch.half),
        ),
        "rows_forward, residual": (
            ops.rows_forward,
            (x.half(), x, weight, None, True, 6, 1e-5, 1.0, False, None, torch.float64, None),
        ),
        "rows_forward, fusible": (
            fusible,
            (x, None, weight, weight, True, 6, 1e-5, 0.0, True, None, None, torch.half),
        ),
        "rows_forward, fusible, residual": (
            fusible,
            (x.half(), x, weight, None, True, 6, 1e-5, 1.0, False, None, torch.float64, None),
        ),
        "rows_backward": (
            ops.rows_backward,
            (x, None, x + 1, weight, row_statistics, None, *of_rows, 6, 1e-5, 0.0, True, None, None, None),
        ),
        "rows_backward, statistics apart": (
            ops.rows_backward,
            (x, None, x + 1, weight, *row_statistics.view(2, 12), *of_rows, 6, 1e-5, 0.0, True, None, None, None),
        ),
        "rows_backward, residual": (
            ops.rows_backward,
            (x, x, x + 1, weight, row_statistics, None, *of_both, 6, 1e-5, 1.0, False, None, None, torch.half),
        ),
        "batch_norm_forward": (
            ops.batch_norm_forward,
            (x, None, channel_weight, None, None, True, 1e-5, None, 0.0),
        ),
        "batch_norm_forward, nothing moves": (
            ops.batch_norm_forward,
            (x, None, channel_weight, None, None, False, 1e-5, "silu", 0.0),
        ),
        "batch_norm_forward, channels last": (
            ops.batch_norm_forward,
            (last, x.half(), None, None, "last", True, 1e-5, "relu", 0.0),
        ),
        "move_running_statistics": (
            ops.move_running_statistics,
            (moments, moved[:2], moved[2:], None, 1e-5, True),
        ),
        "move_running_statistics, nothing moves": (
            ops.move_running_statistics,
            (moments, [], [], 0.1, 1e-5, False),
        ),
        "batch_norm_inference": (
            ops.batch_norm_inference,
            (last, None, channel_weight, None, *running, None, 1e-5, "silu", 0.0),
        ),
        "batch_norm_inference, residual": (
            ops.batch_norm_inference,
            (x, x + 1, channel_weight, None, *running, "flat", 1e-5, "leaky_relu", 0.1),
        ),
        "batch_norm_backward": (
            ops.batch_norm_backward,
            (x, last, None, None, channel_weight, None, statistics, None, None, *wanted, None, 1e-5, None, 0.0),
        ),
        "batch_norm_backward, residual": (
            ops.batch_norm_backward,
            (x, last, last, None, channel_weight, None, None, *running, *of_residual, None, 1e-5, "silu", 0.0),
        ),
        "batch_norm_backward, bits": (
            ops.batch_norm_backward,
            (x, x, None, bits, channel_weight, None, statistics, None, None, *of_residual, "last", 1e-5, "relu", 0.0),
        ),
    }


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", operators("cpu"))
def test_opcheck(name, trains, device):
    operator, arguments = operators(device)[name]
    if trains and "move" not in name:
        floating = [isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in arguments]
        saved = ("statistics", "rstd") if "backward" in name else "running_"
        names = [argument.name for argument in operator.default._schema.arguments]
        arguments = [
            tensor.clone().requires_grad_() if is_floating and not name.startswith(saved) else tensor
            for tensor, is_floating, name in zip(arguments, floating, names, strict=True)
        ]
    torch.library.opcheck(operator.default, arguments)


LAYERS = {
    "LayerNorm": lambda library: library.LayerNorm(6),
    "LayerNorm, two axes, no bias": lambda library: library.LayerNorm((3, 6), bias=False),
    "RMSNorm": lambda library: library.RMSNorm(6),
    "RMSNorm, no weight": lambda library: library.RMSNorm(6, elementwise_affine=False),
    "BatchNorm2d": lambda library: library.BatchNorm2d(4),
    "BatchNorm2d, no parameters": lambda library: library.BatchNorm2d(4, affine=False),
    "BatchNorm2d, no statistics": lambda library: library.BatchNorm2d(4, track_running_stats=False),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_program_is_torchs_own_call_by_call(name, training, strict, device):
    """With nothing before or behind it: no view, no cast, no question of a size."""
    x, shapes = torch.randn(3, 4, 3, 6, device=device), ({0: torch.export.Dim("batch", min=2)},)
    ours, theirs = (
        torch.export.export(
            LAYERS[name](library).to(device).train(training), (x,), dynamic_shapes=shapes, strict=strict
        )
        for library in (triton_norm, nn)
    )
    calls = [
        [(str(node.target), str(node.args), node.kwargs) for node in program.graph.nodes if node.op == "call_function"]
        for program in (ours, theirs)
    ]
    assert calls[0] == calls[1]
    assert ours.range_constraints.keys() == theirs.range_constraints.keys()
    assert str(list(ours.range_constraints.values())) == str(list(theirs.range_constraints.values()))


def test_backend_triton_exports_the_operators(device):
    x = torch.randn(3, 4, 3, 6, device=device)
    with triton_norm.backend("triton"):
        program = torch.export.export(Network().to(device), (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"triton_norm.rows_forward.default", "triton_norm.batch_norm_forward.default"} <= targets
    assert "triton_norm.move_running_statistics.default" in targets


def test_a_changed_operator_has_another_name():
    """torch's caches of compiled code, and exported programs, know an operator by its name alone. If this fails: give
    the operator that has changed a name with a number behind it, and enter that here."""
    schemas = sorted(str(operator._schema) for operator in DEFINED.values())
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16]
    assert digest == "3b39e9b171eca3f4", schemas
