"""Captured norms in other processes than the one that captured them: exported programs where this library is not
installed, caches of compiled code, and stages of a pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support import processes
from support.captured import CASES, TOLERANCE, batches, pair, trained

pytestmark = [
    pytest.mark.unguarded,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # torch's own, while it exports
]

ELSEWHERE = """
import sys, warnings
from pathlib import Path

sys.modules["triton_norm"] = None  # what stands for a module that can't be imported
warnings.simplefilter("ignore")
import torch

for file in Path(sys.argv[1]).glob("*.pt2"):
    run = torch.export.load(file).module()
    results = []
    for batch in torch.load(file.with_suffix(".batches")):
        leaves = [tensor.requires_grad_() for tensor in batch]
        run.zero_grad()
        y = run(*leaves)
        y.sin().sum().backward()
        results += [y.detach(), *(leaf.grad for leaf in leaves)]
        results += [parameter.grad.clone() for _, parameter in sorted(run.named_parameters())]
    results += [buffer for _, buffer in sorted(run.named_buffers())]
    torch.save(results, file.with_suffix(".results"))
"""


def test_exported_programs_train_where_this_library_is_not(tmp_path):
    """Their graphs hold torch's own operators alone."""
    expected = {}
    for number, (kind, training) in enumerate(CASES):
        ours, theirs = pair(kind, training)
        example, *data = batches(6, 6, 6)
        program = torch.export.export(ours, example)
        assert "triton_norm" not in program.graph_module.code
        torch.export.save(program, tmp_path / f"{number}.pt2")
        torch.save(data, tmp_path / f"{number}.batches")
        actual = trained(theirs, theirs, data)
        steps = [
            [actual[f"y {step}"], actual[f"gradient of x {step}"], actual[f"gradient of residual {step}"]]
            + [actual[f"gradient of {name} {step}"] for name, _ in sorted(theirs.named_parameters())]
            for step in range(2)
        ]
        expected[number] = [*steps[0], *steps[1], *(buffer for _, buffer in sorted(theirs.named_buffers()))]
    processes.output("-c", ELSEWHERE, str(tmp_path))
    for number, tensors in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.results"), tensors, **TOLERANCE)


COMPILED = """
import json, sys, warnings

sys.path.insert(0, "tests")
warnings.simplefilter("ignore")
import torch
from torch._dynamo.precompile_context import PrecompileContext

import triton_norm
from support.captured import TOLERANCE, batches, pair, trained

kind, training, backend, stores, stance = sys.argv[1:]
ours, theirs = pair(kind, training == "True")
torch._dynamo.config.caching_precompile = stores == "True"
data = batches(6, 6)
with triton_norm.backend(backend):
    run = torch.compile(ours, fullgraph=True)
    with torch.compiler.set_stance(stance):
        results = trained(run, ours, data)
torch.testing.assert_close(results, trained(theirs, theirs, data), **TOLERANCE)
if stores == "True":
    PrecompileContext.save_to_dynamo_cache()
print(json.dumps({name: dict(counted) for name, counted in torch._dynamo.utils.counters.items()}))
"""
OPS = ("LayerNorm", "RMSNorm", "BatchNorm1d")


def counted(kind: str, training: bool, backend: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Returns torch's counters after a process has trained the norm by Inductor and compared it with torch's."""
    requested = {"stores": False, "stance": "default", **options}
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    printed = processes.output(
        "-c", COMPILED, kind, str(training), backend, *map(str, requested.values()), **environment
    )
    counters: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return counters


QUICK = [("BatchNorm1d", True, "auto")]
STORED = [
    pytest.param(kind, training, backend, marks=() if (kind, training, backend) in QUICK else pytest.mark.thorough)
    for kind, training in CASES
    for backend in ("auto", "triton", "torch")
]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "training", "backend"), STORED)
def test_stored_code_is_loaded_elsewhere_and_not_compiled_again(kind, training, backend, tmp_path):
    """No guard of Dynamo's holds in one process alone."""
    first = counted(kind, training, backend, tmp_path, stores=True)
    assert first["dynamo_cache"] == {"dynamo_cache_miss": 1}
    second = counted(kind, training, backend, tmp_path, stores=True, stance="fail_on_recompile")
    assert second["dynamo_cache"] == {"dynamo_cache_hit": 1}


@pytest.mark.long
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", ["LayerNorm", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in OPS[1:])])
def test_a_warm_cache_of_forward_and_backward(kind, backend, tmp_path):
    first, second = (counted(kind, True, backend, tmp_path)["aot_autograd"] for _ in range(2))
    assert first.get("autograd_cache_saved") == 1
    assert second.get("autograd_cache_hit") == 1
    assert "autograd_cache_miss" not in second
