"""Writes the folder of a kernel that `kernels.get_kernel` and `kernels.get_local_kernel` load.

The Hub's rules, for kernels that are Python alone:

- each backend has a build of its own, `build/torch-<backend>`, with the package's files and a `metadata.json`;
- a build is imported under a name of its own, the `id` of its metadata, so that its modules import each other by
  relative names, and its operators are `torch.ops.<id>`;
- layers are in `layers`, an attribute of the package.
"""

import ast
import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton_norm

ROOT = Path(triton_norm.__file__).parent
PACKAGE = ROOT.name
NAME = PACKAGE.replace("_", "-")
LICENSE = "Apache-2.0"
BACKENDS = ("cuda", "rocm", "cpu")
"""The "cpu" build computes by torch, as the library does without a GPU."""
EXPORTS = ROOT / "hub" / "exports.py"
"""This module is the `__init__.py` of a build."""
# An id has as many hexadecimal digits of the hash of its files.
ID_DIGITS = 10

CARD = f"""---
library_name: kernels
license: {LICENSE.lower()}
tags:
- kernel
---

# {NAME}

LayerNorm, RMSNorm, BatchNorm, GroupNorm and InstanceNorm as Triton kernels, forward and backward. Written by
`python -m {PACKAGE}.hub` of {PACKAGE} {triton_norm.__version__}.

Functions: {{functions}}.

Layers, for `kernelize`: {{layers}}.

```python
from pathlib import Path

from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

norm = LocalLayerRepository(Path("this folder"), layer_name="RMSNorm")
with use_kernel_mapping({{{{"RMSNorm": {{{{"cuda": norm, "rocm": norm}}}}}}}}):
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
```
"""


def write(folder: Path) -> list[Path]:
    """Writes a build for each backend, and the card, README.md.

    Args:
        folder: made if it does not exist.

    Returns:
        The folders of the builds.

    Raises:
        FileExistsError: `folder` has builds already, whose files would mix with the new ones.
    """
    build = folder / "build"
    build.mkdir(parents=True)
    files = contents()
    builds = [build / f"torch-{backend}" for backend in BACKENDS]
    for path, backend in zip(builds, BACKENDS, strict=True):
        described = json.dumps(metadata(files, backend), indent=2) + "\n"
        for name, content in {**files, "metadata.json": described.encode()}.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    (folder / "README.md").write_text(_card(), encoding="utf-8")
    return builds


def contents() -> dict[str, bytes]:
    """Returns the files of a build by their paths: modules that EXPORTS needs, and the measured choices."""
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted((ROOT / "tuned").glob("*.json"))}
    for path in sorted(_modules()):
        target = Path("__init__.py") if path == EXPORTS else path.relative_to(ROOT)
        files[target.as_posix()] = relative(path.read_text(encoding="utf-8"), depth=len(target.parts)).encode()
    return files


def metadata(files: dict[str, bytes], backend: str) -> dict[str, Any]:
    """Returns the contents of metadata.json for a build with these files."""
    hashes = {name: hashlib.sha256(content).digest() for name, content in sorted(files.items())}
    unique = hashlib.sha256(b"".join(name.encode() + value for name, value in hashes.items())).hexdigest()
    return {
        "id": f"_{PACKAGE}_{backend}_{unique[:ID_DIGITS]}",
        "name": NAME,
        "version": int(triton_norm.__version__.partition(".")[0]),
        "license": LICENSE,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(value).decode() for name, value in hashes.items()},
        },
    }


def relative(source: str, depth: int) -> str:
    """Returns a module's source with its imports from this package made relative.

    Args:
        depth: number of parts of the module's path below the package: 1 for modules of the package itself.
    """
    lines = source.splitlines(keepends=True)
    for node in _imports(source):
        line = node.lineno - 1
        lines[line] = re.sub(rf"\bfrom {PACKAGE}\b\.?", f"from {'.' * depth}", lines[line], count=1)
    return "".join(lines)


def _imports(source: str) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{PACKAGE}."):
            yield node


def _modules() -> set[Path]:
    """Returns EXPORTS, the modules that it imports, directly or not, and the packages that these are in."""
    needed, new = set(), {EXPORTS}
    while new:
        needed |= new
        names = {
            f"{node.module}.{alias.name}"
            for path in new
            for node in _imports(path.read_text(encoding="utf-8"))
            for alias in node.names
        }
        new = {path for name in names for path in _files(name)} - needed
    return needed


def _files(name: str) -> Iterator[Path]:
    """Yields the file of a module, or of the module that has this name, and the `__init__.py` of packages above it."""
    _, *parts = name.split(".")
    for length in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:length])
        yield from (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists())


def _card() -> str:
    from triton_norm.hub import exports, layers

    functions = [name for name in exports.__all__ if name != "layers"]
    own = [name for name, value in vars(layers).items() if getattr(value, "__module__", "") == layers.__name__]
    return CARD.format(functions=_listed(functions), layers=_listed(own))


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
