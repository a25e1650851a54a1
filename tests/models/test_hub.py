"""The folder for the Hugging Face Hub follows the Hub's rules, and computes without this package."""

import ast
import base64
import copy
import hashlib
import importlib
import inspect
import json
import sys

import pytest
import torch
from torch import nn

import triton_norm as tn
from support import processes
from triton_norm.hub import __main__, folder, layers
from triton_norm.tuning.limits import INTERPRETED

PURE = [layers.LayerNorm, layers.RMSNorm, layers.RMSNormGated, layers.RMSNormZeroCentered]
HALF, SINGLE = torch.bfloat16, torch.float32
COLUMNS = 48


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    folder.write(path)
    return path


def builds(written):
    return sorted((written / "build").iterdir())


def test_metadata_is_complete(written):
    described = {build.name: json.loads((build / "metadata.json").read_text()) for build in builds(written)}
    assert list(described) == ["torch-cpu", "torch-cuda", "torch-rocm"]  # the names of builds of Python alone
    for name, metadata in described.items():
        backend = name.removeprefix("torch-")
        assert metadata["backend"] == {"type": backend}
        assert metadata["id"].isidentifier()
        assert metadata["id"].startswith(f"_triton_norm_{backend}_")
        assert (metadata["name"], metadata["license"], metadata["version"]) == ("triton-norm", "Apache-2.0", 0)
        assert metadata["python-depends"] == metadata["kernel-depends"] == []
    assert len({metadata["id"] for metadata in described.values()}) == len(described)


def test_the_digest_has_every_file(written):
    for build in builds(written):
        digest = json.loads((build / "metadata.json").read_text())["digest"]
        files = {file for file in build.rglob("*") if file.is_file() and file.name != "metadata.json"}
        hashes = {file.relative_to(build).as_posix(): hashlib.sha256(file.read_bytes()).digest() for file in files}
        assert digest["algorithm"] == "sha256"
        assert digest["files"] == {name: base64.b64encode(value).decode() for name, value in hashes.items()}


def test_ids_change_with_the_files_alone():
    files = {"__init__.py": b"", "plans.py": b"import torch"}
    one = folder.metadata(files, "cuda")["id"]
    assert folder.metadata(dict(reversed(files.items())), "cuda")["id"] == one
    assert folder.metadata({**files, "plans.py": b"pass"}, "cuda")["id"] != one
    name = min(files)
    moved = {"moved.py" if key == name else key: content for key, content in files.items()}
    assert folder.metadata(moved, "cuda")["id"] != one


def test_modules_import_the_standard_library_torch_triton_and_each_other(written):
    """Anything absolute of this package would be another copy of it, if there is one."""
    build, *_ = builds(written)
    known = sys.stdlib_module_names | {"torch", "triton"}
    n_relative = 0
    for file in build.rglob("*.py"):
        depth = len(file.relative_to(build).parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= known
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.partition(".")[0] in known
            elif isinstance(node, ast.ImportFrom):
                assert node.level == depth, file
                n_relative += 1
    assert n_relative > 100


@pytest.mark.parametrize(
    ("line", "depth", "result"),
    [
        ("from triton_norm import plans, reference", 1, "from . import plans, reference"),
        ("from triton_norm.rows import operator as rows", 1, "from .rows import operator as rows"),
        ("from triton_norm.rows.plan import RowPlan", 2, "from ..rows.plan import RowPlan"),
        ("if True:\n    from triton_norm.library import (\n        a,\n        b,\n    )", 2, None),
        ("from triton_normal import a", 1, "from triton_normal import a"),
        ('text = """\nfrom triton_norm import plans\n"""', 1, 'text = """\nfrom triton_norm import plans\n"""'),
    ],
)
def test_imports_become_relative(line, depth, result):
    if result is None:
        result = line.replace("from triton_norm.", "from ..")
    assert folder.relative(line, depth) == result


@pytest.mark.parametrize("layer", PURE)
def test_layers_are_pure(layer):
    assert layer.__bases__ == (nn.Module,)
    own = set(vars(layer)) - {"__module__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__"}
    assert own - {"__annotate_func__", "__annotations_cache__"} == {"forward", "has_backward", "can_torch_compile"}
    assert layer.has_backward is layer.can_torch_compile is True
    assert {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)} == {
        "has_backward",
        "can_torch_compile",
    }


def test_the_module_has_these_layers(written):
    defined = [
        value for value in vars(layers).values() if inspect.isclass(value) and value.__module__ == layers.__name__
    ]
    assert sorted(defined, key=lambda layer: layer.__name__) == PURE
    text = (written / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert all(f"`{layer.__name__}`" in text for layer in PURE)


def own_class(path):
    model, name = path.split(".")
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("layer", "path"),
    [
        (layers.RMSNorm, "llama.LlamaRMSNorm"),
        (layers.RMSNormZeroCentered, "gemma.GemmaRMSNorm"),
        (layers.RMSNormGated, "kimi_linear.KimiLinearRMSNormGated"),
    ],
)
def test_layers_round_as_the_classes_of_transformers(layer, path, backend, device):
    """Sums in another order change x̂ before it is rounded to half precision, and so a result at a tie by an ulp."""
    for x_dtype, dtype in ((HALF, HALF), (HALF, SINGLE), (SINGLE, SINGLE)):
        module = own_class(path)(COLUMNS).to(device, dtype)
        nn.init.normal_(module.weight)
        signatures = [list(inspect.signature(cls.forward).parameters.values()) for cls in (layer, type(module))]
        assert len({tuple(parameter.kind for parameter in each) for each in signatures}) == 1
        inputs = (3 * torch.randn(len(signatures[0]) - 1, 6, COLUMNS, device=device)).to(x_dtype).unbind()
        with tn.backend(backend):
            y = layer.forward(module, *inputs)
        expected = module(*inputs)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected)
        assert (y != expected).float().mean() < (0.02 if x_dtype == HALF else 1)


@pytest.mark.parametrize("activation", ["silu", "swish", "sigmoid"])
def test_the_gates_activation_is_the_modules(activation, device):
    module = own_class("kimi_linear.KimiLinearRMSNormGated")(COLUMNS).to(device)
    module.activation = activation
    x, gate = torch.randn(2, 3, COLUMNS, device=device)
    torch.testing.assert_close(layers.RMSNormGated.forward(module, x, gate), module(x, gate))


LOADED = """
import copy, importlib.util, json, sys
from pathlib import Path
from types import MethodType

sys.modules["triton_norm"] = None  # its import is an error
import torch
from torch import nn

def load(build):  # as kernels.importer does
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return name, module

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(COLUMNS)), nn.Parameter(torch.randn(COLUMNS))
        self.normalized_shape, self.variance_epsilon, self.eps, self.activation = (COLUMNS,), 1e-5, 1e-5, "silu"

def normalized(x, centred):
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

COLUMNS = 48
ORACLE = {
    "LayerNorm": lambda m, x: normalized(x, True) * m.weight + m.bias,
    "RMSNorm": lambda m, x: normalized(x, False) * m.weight,
    "RMSNormGated": lambda m, x, gate: normalized(x, False) * m.weight * nn.functional.silu(gate),
    "RMSNormZeroCentered": lambda m, x: normalized(x, False) * (1 + m.weight),
}

def step(forward, module, inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = forward(*leaves)
    dy = torch.ones_like(y) + torch.arange(len(y))[:, None]
    gradients = torch.autograd.grad(y, [*leaves, *module.parameters()], dy, allow_unused=True)
    return [y, *(gradient for gradient in gradients if gradient is not None)]

torch.manual_seed(0)
backend, *builds = sys.argv[1:]
kernels = dict(map(load, map(Path, builds)))
for name, kernel in kernels.items():
    print(name)
    assert kernel.layers.__name__ == f"{name}.hub.layers"
    defined = sys.modules[f"{name}.library"].DEFINED
    assert len(defined) > 10 and all(op.name().startswith(f"{name}::") for op in defined.values())
for kernel in [*kernels.values()][1:]:
    for layer, oracle in ORACLE.items():
        module, inputs = Norm(), torch.randn(2 if layer == "RMSNormGated" else 1, 5, COLUMNS).unbind()
        module.forward = MethodType(getattr(kernel.layers, layer).forward, module)  # as kernelize does
        double = copy.deepcopy(module).double()
        expected = step(lambda *inputs: oracle(double, *inputs), double, [x.double() for x in inputs])
        with kernel.backend(backend):
            results = step(module, module, inputs)
        for one, other in zip(results, expected, strict=True):  # 32 ulp of numbers up to 64, sums of 48 products
            torch.testing.assert_close(one.double(), other, rtol=4e-6, atol=2**-18)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for one, other in zip(step(compiled, module, inputs), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=4e-6, atol=2**-18)
"""


@pytest.mark.unguarded
def test_it_trains_and_compiles_without_the_package(written):
    """The kernels are interpreted in a process of its own, where they can be. Two builds are loaded."""
    first, second, _ = builds(written)
    backend = "triton" if INTERPRETED else "torch"
    names = processes.output("-c", LOADED, backend, str(first), str(second), TRITON_INTERPRET="1").split()
    assert names == [json.loads((build / "metadata.json").read_text())["id"] for build in (first, second)]


def test_the_command_writes_no_build_over_another(tmp_path, monkeypatch, capsys):
    target = tmp_path / "new" / "kernel"
    monkeypatch.setattr(sys, "argv", ["triton_norm.hub", str(target)])
    assert __main__.main() == 0
    assert capsys.readouterr().out.split() == [str(target / "build" / f"torch-{name}") for name in folder.BACKENDS]
    assert __main__.main() == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert f"{target / 'build'} exists" in output.err


def test_the_kernels_package_takes_it(written):
    """Its own checks of metadata, digest and layers, where it is installed."""
    kernels = pytest.importorskip("kernels", minversion="0.17")
    rust = importlib.import_module("kernels._rust")
    for build in builds(written):
        metadata = rust.Metadata.read_from_file(build / "metadata.json")
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, build))
    repository = {"cpu": kernels.LocalLayerRepository(written, layer_name="LayerNorm")}

    class Norm(nn.LayerNorm):
        pass

    kernels.replace_kernel_forward_from_hub(Norm, "LayerNorm")
    module, x = Norm(COLUMNS), torch.randn(3, COLUMNS)
    own = copy.deepcopy(module)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({"LayerNorm": repository}, inherit_mapping=False):
        kernels.kernelize(module, mode=mode, device="cpu", use_fallback=False)
    assert module.forward.__func__.__module__.startswith("_triton_norm_cpu_")
    torch.testing.assert_close(module(x), own(x))
