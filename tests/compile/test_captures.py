"""Programs that torch.export and make_fx record of a norm, run and trained later: as torch's own layers in eager mode.

Cases that torch's own layers can't pass under the same tool are left out.
"""

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.proxy_tensor import make_fx

import triton_norm
from support.captured import (
    BACKENDS,
    CASES,
    EVERY_CASE,
    TOLERANCE,
    WIDTH,
    Batch,
    Traced,
    assert_as_torchs,
    batches,
    pair,
    trained,
)
from support.pairwise import pairwise

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, while it exports.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]
RECORDING = pytest.mark.parametrize("backend", ["auto", "triton"])
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])


def decomposed(module: nn.Module, example: Batch) -> nn.Module:
    return export(module, example).run_decompositions().module()


def exported_without_gradients(module: nn.Module, example: Batch) -> nn.Module:
    with torch.no_grad():
        return export(module, example).module()


def decomposed_without_gradients(module: nn.Module, example: Batch) -> nn.Module:
    with torch.no_grad():
        return decomposed(module, example)


def saved_and_loaded(module: nn.Module, example: Batch) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(export(module, example), file)
    file.seek(0)
    return torch.export.load(file).module()


EXPORTS = [exported_without_gradients, decomposed, decomposed_without_gradients, saved_and_loaded]


@pairwise({"strict": [False, True], "kind, training": CASES, "backend": ["auto", "triton", "torch"]})
def test_exported(strict, kind, training, backend):
    """Programs take any number of samples, and call torch's own functions unless the kernels are asked for."""
    n = Dim("n", min=2)

    def capture(module: nn.Module, example: Batch) -> nn.Module:
        run = export(module, example, strict=strict, dynamic_shapes=({0: n}, {0: n})).module()
        assert ("triton_norm" in run.code) == (backend == "triton")
        return run

    if strict and kind.endswith("cumulative"):
        kind = "BatchNorm1d"
    with triton_norm.backend(backend):
        assert_as_torchs(kind, training, capture, sizes=(6, 5, 7))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # as torch 2.11 loads it
def can_be_trained(capture, case, backend):
    """Returns False for torch's own BatchNorm if it is decomposed: it writes back statistics that were saved."""
    by_torch = backend != "triton" and case in [("BatchNorm1d", True), ("BatchNorm1d, fused", True)]
    return not by_torch or capture not in (decomposed, decomposed_without_gradients)


@pairwise({"capture": EXPORTS, "kind, training": CASES, "backend": ["auto", "triton"]}, can_be_trained)
def test_exported_otherwise(capture, kind, training, backend):
    with triton_norm.backend(backend):
        assert_as_torchs(kind, training, capture)


@BACKENDS
@STRICT
def test_an_exported_gradient_by_hand(strict, backend):
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = triton_norm.RMSNorm(2, eps=0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(x)

    with triton_norm.backend(backend):
        run = export(Block(), (x,), strict=strict).module()
        leaf = x.clone().requires_grad_()
        run(leaf)[:, 0].sum().backward()
    expected = torch.tensor([[1.5060, -0.2530], [1.1783, -0.1070]])
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-4)


@pairwise(
    {
        "norms": [nn, triton_norm],
        "strict": [False, True],
        "tool": ["move_exported_model_to_eval", "allow_exported_model_train_eval"],
        "backend": ["auto", "torch"],
    }
)
def test_exported_in_training_and_switched_to_evaluation(norms, strict, tool, backend):
    """The tools know aten's BatchNorm alone: of backend "triton", which asks for operators, they see none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pt2e = pytest.importorskip("torchao.quantization.pt2e")
        x = torch.tensor([[10.0], [14.0]])
        with triton_norm.backend(backend):
            run = export(norms.BatchNorm1d(1), (x,), strict=strict).module()
        getattr(pt2e, tool)(run)
        if tool.startswith("allow"):
            run.eval()
    torch.testing.assert_close(run(x), x, rtol=1e-5, atol=0)
    assert run.running_mean.item() == 0.0
    assert run.running_var.item() == 1.0


class Loss(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs).sin().sum()


def run_joint(program: ExportedProgram, inputs: Batch) -> dict[str, Tensor]:
    """Returns the results of a program of forward and backward, by the names of `captured.trained`, for one step."""
    signature, values = program.graph_signature, iter(inputs)
    state = {**program.state_dict, **program.constants}
    arguments = [next(values) if spec.target is None else state[spec.target] for spec in signature.input_specs]
    names, result = iter(("x", "residual")), {}
    for spec, tensor in zip(signature.output_specs, program.graph_module(*arguments), strict=True):
        target = str(spec.target).removeprefix("module.")
        if spec.kind.name == "GRADIENT_TO_USER_INPUT":  # which are in order, by names of no placeholder
            result[f"gradient of {next(names)} 0"] = tensor.detach()
        elif spec.kind.name == "GRADIENT_TO_PARAMETER":
            result[f"gradient of {target} 0"] = tensor.detach()
        elif spec.kind.name == "BUFFER_MUTATION":
            result[target] = tensor.detach()
    return result


@RECORDING
@EVERY_CASE
def test_exported_with_its_backward(kind, training, backend):
    experimental = pytest.importorskip("torch.export.experimental")
    if not hasattr(experimental, "_export_forward_backward"):
        pytest.skip("this torch exports no backward")
    ours, theirs = pair(kind, training)
    example, batch = batches(6, 6)
    with triton_norm.backend(backend):
        program = export(Loss(ours), tuple(tensor.requires_grad_() for tensor in example))
        actual = run_joint(experimental._export_forward_backward(program), batch)
    expected = trained(theirs, theirs, [batch])
    assert actual.keys() >= {name for name in expected if "gradient" in name}
    torch.testing.assert_close(actual, {name: expected[name] for name in actual}, **TOLERANCE)
    if training and "Batch" in kind:
        assert actual.keys() >= {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def can_be_traced(mode, case, backend, *others):
    """Returns False for torch's own BatchNorm if it reads the counter."""
    return backend != "torch" or case != ("BatchNorm1d, cumulative", True)


MODES = ["real", "fake", "symbolic"]


@pairwise(
    {
        "mode": MODES,
        "kind, training": CASES,
        "backend": ["auto", "torch"],
        "gradients": [True, False],
        "pre_dispatch": [False, True],
    },
    lambda mode, case, backend, gradients, pre_dispatch: (
        can_be_traced(mode, case, backend) and (gradients or backend == "auto")
    ),
)
def test_traced_by_make_fx(mode, kind, training, backend, gradients, pre_dispatch):
    def capture(module: nn.Module, example: Batch) -> nn.Module:
        with torch.set_grad_enabled(gradients):
            return Traced(module, example, tracing_mode=mode, pre_dispatch=pre_dispatch)

    sizes = (5, 7) if mode == "symbolic" else (6, 6)
    with triton_norm.backend(backend):
        assert_as_torchs(kind, training, capture, sizes)


def gradients_of(module: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """Returns a function of a state and inputs that gives y and the gradients of the inputs and the parameters."""

    def function(state: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        y = torch.func.functional_call(module, state, inputs)
        leaves = [*inputs, *(state[name] for name, _ in module.named_parameters())]
        return y, *torch.autograd.grad(y.sin().sum(), leaves)

    return function


@pairwise({"mode": MODES, "kind, training": CASES, "backend": ["auto", "torch"]}, can_be_traced)
def test_a_backward_traced_by_make_fx(mode, kind, training, backend):
    ours, theirs = pair(kind, training)
    example, *data = batches(6, *((5, 7) if mode == "symbolic" else (6, 6)))
    leaves = [[tensor.requires_grad_() for tensor in batch] for batch in (example, *data)]
    recorded, states = pair(kind, training)[0], [dict(ours.named_parameters()) | dict(ours.named_buffers())]
    states.append(dict(theirs.named_parameters()) | dict(theirs.named_buffers()))
    with triton_norm.backend(backend):
        values = dict(recorded.named_parameters()) | dict(recorded.named_buffers())
        run = make_fx(gradients_of(recorded), tracing_mode=mode)(values, *leaves[0])
        for inputs in leaves[1:]:
            actual, expected = run(states[0], *inputs), gradients_of(theirs)(states[1], *inputs)
            torch.testing.assert_close(actual, expected, **TOLERANCE)
    torch.testing.assert_close(states[0], states[1], **TOLERANCE)


@EVERY_CASE
def test_exported_to_onnx(kind, training):
    for module in ("onnxscript", "onnx"):
        pytest.importorskip(module)
    from onnx.reference import ReferenceEvaluator

    if training:
        kind = "LayerNorm" if "Batch" in kind else kind  # torch exports no BatchNorm that trains
    ours, theirs = pair(kind, training)
    (batch,) = batches(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(ours, batch, dynamo=True, verbose=False)
        model = ReferenceEvaluator(program.model_proto)
    names: list[Any] = model.input_names
    (actual,) = model.run(None, dict(zip(names, (tensor.numpy() for tensor in batch), strict=True)))
    torch.testing.assert_close(torch.from_numpy(actual), theirs(*batch), **TOLERANCE)
    assert actual.shape == (6, WIDTH)


class Stages(nn.Module):
    def __init__(self, norms: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.Sequential(norms.LayerNorm(WIDTH), norms.RMSNorm(WIDTH), norms.BatchNorm1d(WIDTH))
        self.double()  # four features may be close together

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norms[1:](self.second(self.norms[0](self.first(x)).relu())) * residual


@RECORDING
def test_stages_of_a_pipeline(backend):
    """torch.distributed.pipelining exports and splits the model; the stages train one after the other."""
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    theirs = Stages(nn)
    ours = copy.deepcopy(theirs)
    triton_norm.convert(ours)
    example, *data = ([tensor.double() for tensor in batch] for batch in batches(6, 6, 6))
    with triton_norm.backend(backend):
        split = {"second": pipelining.SplitPoint.BEGINNING}
        pipe = pipelining.pipeline(ours, mb_args=tuple(example), split_spec=split)
        first, second = map(pipe.get_stage_module, range(pipe.num_stages))
        stages = nn.ModuleList((first, second))
        actual = trained(lambda x, residual: second(first(x), residual), stages, data)
    graphs = [str(module.graph) for module in stages.modules() if hasattr(module, "graph")]
    assert any("triton_norm" in graph for graph in graphs) == (backend == "triton")
    actual = {re.sub(r"\b[01]\.(?=first|second|norms)", "", name): tensor for name, tensor in actual.items()}
    torch.testing.assert_close(actual, trained(theirs, theirs, data), **TOLERANCE)


@RECORDING
def test_an_exported_llama(backend):
    """Every parameter of a converted model has the gradient that it has in transformers' own."""
    models = pytest.importorskip("support.models")
    size = models.Size(layers=2, width=16, batch=2, tokens=3, image=16)
    theirs, inputs = models.llama(size).eval(), models.text(size)
    ours = copy.deepcopy(theirs)
    models.convert(ours)
    models.loss_of(theirs(**inputs).logits).backward()
    with triton_norm.backend(backend):
        run = export(ours, (), inputs).module()
        models.loss_of(run(**inputs).logits).backward()
    assert ("triton_norm" in run.code) == (backend == "triton")
    actual, expected = ({name: p.grad for name, p in model.named_parameters()} for model in (run, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
