"""Converted models of Hugging Face's transformers under torch.compile and torch.export."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import triton_norm as tn
from support.models import FULL, TINY, assert_same_step, built, convert, step

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "few_programs"),
    # Dynamo's own, on every autograd.Function that it traces.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


class Recorder:
    """A backend for torch.compile that runs traced forwards and backwards, and stores their code."""

    def __init__(self) -> None:
        self.graphs: list[str] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph.code)
        return make_boxed_func(graph)

    def taken(self) -> list[bool]:
        """Returns for each graph since the last call: is it of this library's kernels?"""
        graphs, self.graphs = self.graphs, []
        return ["triton_norm" in code for code in graphs]


@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_a_compiled_model_that_is_converted_and_reverted(name: str, device: str) -> None:
    """It is compiled again without a break, trains in the bits of eager, and back there is nothing to compile."""
    compiled, inputs = built(name, TINY, device)
    eager, recorder = copy.deepcopy(compiled), Recorder()
    run = torch.compile(compiled, fullgraph=True, backend=recorder.backend)

    def steps(n: int) -> list[bool]:
        for _ in range(n):
            with tn.backend("triton"):
                actual, expected = (step(model, inputs, of, hidden_states=False) for model, of in pairs)
            assert_same_step(actual, expected)
        return recorder.taken()

    pairs = (compiled, run), (eager, None)
    assert steps(1) == [False, False]
    for model in (compiled, eager):
        convert(model)
    assert steps(2) == [True, True]
    for model in (compiled, eager):
        tn.revert(model)
    assert steps(1) == []


@pytest.mark.unguarded
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of Inductor and what it imports
@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_inductor_agrees_with_eager(name: str, device: str) -> None:
    compiled, inputs = built(name, FULL, device)
    convert(compiled)
    eager = copy.deepcopy(compiled)
    pairs = (compiled, torch.compile(compiled, fullgraph=True)), (eager, None)
    with tn.backend("triton"):
        for _ in range(2):
            actual, expected = (step(model, inputs, run, hidden_states=False) for model, run in pairs)
            assert_same_step(actual, expected)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # as torch 2.11 loads it
@pytest.mark.parametrize("name", ["bert", "t5", "resnet_contiguous"])
def test_an_exported_model(name: str, device: str) -> None:
    """Saved and loaded, and of any batch size, it calls the kernels."""
    model, inputs = built(name, TINY, device)
    model.eval()
    convert(model)
    batch = torch.export.Dim("batch", min=2)
    shapes = {key: {0: batch} for key in inputs}
    file = io.BytesIO()
    with tn.backend("triton"), torch.no_grad():
        torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes), file)
        file.seek(0)
        exported = torch.export.load(file).module()
        assert "triton_norm" in exported.code
        for n in (TINY.batch, TINY.batch + 1):
            arguments = {key: torch.cat((x, x))[:n] for key, x in inputs.items()}
            torch.testing.assert_close(exported(**arguments).logits, model(**arguments).logits, rtol=1e-6, atol=1e-6)
