"""torch.compile: no graph break, the same kernels, the same bits, the same running statistics."""

import copy
import hashlib

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS

import triton_norm
from support import operator_calls
from triton_norm.library import DEFINED

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # Dynamo's own, on every autograd.Function that it traces.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


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
    result = []
    for x in batches:
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        result += [y.detach(), leaf.grad]
    return result + [p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize(("training", "momentum"), [(True, 0.1), (True, None), (False, 0.1)])
def test_training_agrees_with_eager(training, momentum, backend, device):
    """Backend "triton" keeps the kernels, and so their bits. Batch sizes change: the second makes shapes dynamic, and
    compiles nothing more after that."""
    eager = Network(momentum).to(device).train(training)
    compiled = copy.deepcopy(eager)
    batches = [torch.randn(n, 4, 3, 6, device=device) for n in (2, 3, 5, 4)]
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with triton_norm.backend(backend):
        actual, expected = trained(compiled, run, batches), trained(eager, eager, batches)
    for a, b in zip(actual, expected, strict=True):
        if backend == "triton":
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.unguarded  # Inductor's workspaces are its own
@pytest.mark.filterwarnings("ignore")  # of Inductor and what it imports
def test_inductor_agrees_with_eager(device):
    eager = Network().to(device)
    compiled = copy.deepcopy(eager)
    batches = [torch.randn(n, 4, 3, 6, device=device) for n in (2, 3)]
    result = trained(compiled, torch.compile(compiled, fullgraph=True), batches)
    torch.testing.assert_close(result, trained(eager, eager, batches), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", operator_calls.of_rows_and_channels("cpu"))
def test_opcheck(name, trains, device):
    operator, arguments = operator_calls.of_rows_and_channels(device)[name]
    if trains and "move" not in name:
        floating = [isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in arguments]
        saved = ("statistics", "rstd") if "backward" in name else "running_"
        names = [argument.name for argument in operator.default._schema.arguments]
        arguments = [
            tensor.clone().requires_grad_() if is_floating and not name.startswith(saved) else tensor
            for tensor, is_floating, name in zip(arguments, floating, names, strict=True)
        ]
    # With gradients it does all that it does without, and more.
    checks = ("test_schema", "test_faketensor") if not trains and "move" not in name else DEFAULT_TEST_UTILS
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


LAYERS = {
    "LayerNorm": lambda library: library.LayerNorm(6),
    "LayerNorm, two axes, no bias": lambda library: library.LayerNorm((3, 6), bias=False),
    "RMSNorm": lambda library: library.RMSNorm(6),
    "RMSNorm, no weight": lambda library: library.RMSNorm(6, elementwise_affine=False),
    "BatchNorm2d": lambda library: library.BatchNorm2d(4),
    "BatchNorm2d, no parameters": lambda library: library.BatchNorm2d(4, affine=False),
    "BatchNorm2d, no statistics": lambda library: library.BatchNorm2d(4, track_running_stats=False),
}


class EachLayer(nn.Module):
    """Returns the result of each of LAYERS."""

    def __init__(self, library) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(library) for make in LAYERS.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_an_exported_program_is_torchs_own_call_by_call(training, strict, device):
    """Nothing stands before or behind the operators: no view, no cast, no question of a size."""
    x, shapes = torch.randn(3, 4, 3, 6, device=device), ({0: torch.export.Dim("batch", min=2)},)
    ours, theirs = (
        torch.export.export(EachLayer(library).to(device).train(training), (x,), dynamic_shapes=shapes, strict=strict)
        for library in (triton_norm, nn)
    )
    calls = [
        [(str(node.target), str(node.args), node.kwargs) for node in program.graph.nodes if node.op == "call_function"]
        for program in (ours, theirs)
    ]
    assert calls[0] == calls[1]
    assert len(calls[0]) >= len(LAYERS)
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
    assert digest == "5aea3118993e1f52", schemas
