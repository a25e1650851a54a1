"""Tests an installed wheel, in an environment and a folder where nothing else of the project can be imported.

Args:
    the project's tree, whose files the wheel must have.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from torch.nn import functional

import triton_norm
import triton_norm.testing

tree = Path(sys.argv[1])
package = Path(triton_norm.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not what the wheel has installed in {sys.prefix}"

wheel = importlib.metadata.distribution("triton-norm")
assert wheel.version == triton_norm.__version__
named = [str(file) for file in wheel.files or ()]
assert any(file.endswith("licenses/LICENSE") for file in named), "the licence is missing"
installed = {file for file in named if file.startswith("triton_norm/") and not file.endswith(".pyc")}
sources = {str(file.relative_to(tree)) for file in (tree / "triton_norm").rglob("*") if file.is_file()}
sources = {file for file in sources if not file.endswith(".pyc")}
assert installed == sources, f"missing: {sorted(sources - installed)}; left over: {sorted(installed - sources)}"
assert "triton_norm/py.typed" in installed
tuned = sorted((package / "tuned").glob("*.json"))
assert tuned
for file in tuned:
    assert json.loads(file.read_text())["choices"], file.name

x, weight = torch.randn(4, 48), torch.randn(48)
with triton_norm.backend("triton"), triton_norm.testing.guarded() as guard:
    y = triton_norm.layer_norm(x, (48,), weight)
assert guard.kernels == ["rows_forward_kernel"]
torch.testing.assert_close(y, functional.layer_norm(x, (48,), weight))
print(f"triton-norm {wheel.version}: {len(installed)} files, and a kernel that runs")
