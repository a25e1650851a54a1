"""Counts the operators and launches of training steps of whole models, as they are, converted and fused.

It takes no GPU and no arithmetic: launches go to the stub of CUDA's driver, and large operators return memory of the
right form with undefined contents. The operators are those that PyTorch dispatches for CPU tensors.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import triton_norm
from perf import models, readme
from perf.findings import device_of
from perf.models import MODELS, STEPS, Model, Trained
from perf.records import Launches, Refused, Run, failed, made, ok
from triton_norm import captures, plans
from triton_norm.testing import stub_driver
from triton_norm.tuning.limits import assumed

WAYS: dict[str, Callable[[nn.Module], object]] = {
    "as it is": lambda module: None,
    "converted": triton_norm.convert,
    "fused": lambda module: triton_norm.convert(module, fuse=True),
}
"""Changes a model in place, by the names of columns."""
# Operators on fewer elements are computed: models choose their way by the values of small tensors.
COMPUTED_ELEMENTS = 1 << 14
ALLOCATING = "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"
WITHOUT_KERNEL = frozenset({*ALLOCATING, "_unsafe_view", "resize_", "set_"})
"""Names of operators that allocate or describe memory, beside those that return views."""
NORMS = {
    "native_layer_norm": ("layer_norm", "forward"),
    "native_layer_norm_backward": ("layer_norm", "backward"),
    "native_batch_norm": ("batch_norm", "forward"),
    "native_batch_norm_backward": ("batch_norm", "backward"),
}
"""Op and pass of the suite by the names of torch's operators, which have several kernels each."""
PAGE = readme.ROOT / "docs" / "convert.md"
BEGIN = "<!-- figures: python -m perf launches --write -->"


def is_view(operator: Any) -> bool:
    aliases = [result.alias_info for result in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def starts_kernel(operator: Any) -> bool:
    schema = operator._schema
    if is_view(operator) or schema.name.partition("::")[2] in WITHOUT_KERNEL:
        return False
    writes = any(argument.is_write for argument in schema.arguments)
    return writes or any("Tensor" in str(result.type) for result in schema.returns)


class Counted(TorchDispatchMode):
    """Counts the operators that start a kernel on a GPU, by name, and leaves out the arithmetic of large ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.fakes = FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counts = starts_kernel(func)
        if counts:
            self.operators[func._schema.name.partition("::")[2]] += 1
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not counts or not tensors or sum(map(torch.numel, tensors)) <= COMPUTED_ELEMENTS:
            return func(*args, **kwargs)
        return uncomputed(func, args, kwargs, self.fakes)


def uncomputed(func: Any, args: Any, kwargs: Any, fakes: FakeTensorMode) -> Any:
    """Returns an operator's results with undefined contents; arguments that it writes to stay as they are.

    Args:
        fakes: the mode in which it runs; it knows the results' shapes and strides.
    """
    originals: dict[int, tuple[Tensor, Tensor]] = {}

    def described(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fake = fakes.from_tensor(value.detach())
        originals[id(fake)] = value, fake
        return fake

    def allocated(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in originals:
            return originals[id(value)][0]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

    described_args, named = tree_map(described, (args, kwargs))
    with fakes:
        results = func(*described_args, **named)
    return tree_map(allocated, results)


def step_of(trained: Trained, way: str, launches: Callable[[], int]) -> tuple[dict[str, int], int]:
    """Returns the operators and the launches of one step that is not the first."""
    module = copy.deepcopy(trained.module)
    WAYS[way](module)
    train = trained.candidate(way, module).run
    with ExitStack() as scope:
        # As without a mode: the library's calls go to their plans, and not to operators that a mode could see.
        for place in (plans, captures):
            scope.enter_context(mock.patch.object(place, "_dispatch_modes", lambda: 0))
        counted = scope.enter_context(Counted())
        train(None)
        counted.operators.clear()
        before = launches()
        train(None)
        after = launches()
    operators = {name: round(count / STEPS) for name, count in counted.operators.most_common()}
    return operators, (after - before) // STEPS


def measure(model: Model, launches: Callable[[], int]) -> Iterator[Launches]:
    try:
        with Counted():
            trained = Trained(model, "cpu")
    except Exception as error:
        yield made(Launches, model.describe(), {"way": "all"}, failed(error))
        return
    for way in WAYS:
        record = made(Launches, model.describe(), {"way": way, "status": "ok", "message": ""})
        try:
            operators, count = step_of(trained, way, launches)
            yield made(Launches, record, {"operators": operators, "launches": count})
        except Exception as error:
            yield made(Launches, record, failed(error))


def records(folder: Path, chosen: Sequence[Model] = MODELS, blocks: int = 1) -> Iterator[Launches]:
    """Yields one record for each model and way.

    Args:
        folder: where the stub is built.
        blocks: the most blocks of a cluster.
    """
    reason = stub_driver.missing() or models.missing()
    if reason:
        yield {"model": "all", "way": "all", "status": "skipped", "message": reason}
        return
    gpu = replace(stub_driver.STUB_GPU, most_blocks=blocks)
    with stub_driver.installed(folder) as launches, assumed(gpu):
        for model in chosen:
            yield from measure(model, launches)


def kernels_of_torch(run: Run) -> dict[str, int]:
    """Returns the fewest kernels that each operator of NORMS had at any shape of a timed run."""
    fewest: dict[str, int] = {}
    for name, (op, mode) in NORMS.items():
        counts = [
            len(r["kernels"])
            for r in ok(run["records"])
            if (r["op"], r["mode"], r["contender"]) == (op, mode, "torch") and r.get("kernels")
        ]
        fewest[name] = min(counts, default=1)
    return fewest


def kernels_of(record: Launches, fewest: dict[str, int]) -> int:
    """Returns the launches, and for each operator one kernel, or torch's `fewest`."""
    return record["launches"] + sum(count * fewest.get(name, 1) for name, count in record["operators"].items())


def versions() -> str:
    return " and ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers"))


def table(counted: Sequence[Launches], run: Run) -> str:
    """Returns the counts in Markdown. Kernels of torch's norms are those of a timed run."""
    fewest = kernels_of_torch(run)
    rows = []
    for record in counted:
        counts = sum(record["operators"].values()), record["launches"], kernels_of(record, fewest)
        rows.append([record["model"], record["way"], *map(str, counts)])
    sources = "; ".join(dict.fromkeys(f"{record['model']}: {record['source']}" for record in counted))
    norms = ", ".join(f"{fewest[name]} of `{name}`" for name in NORMS)
    return (
        readme.table(["model", "", "torch's operators", "launches", "kernels, at least"], rows)
        + f"\nOne training step. {sources}. Operators are those that {versions()} dispatch on the CPU, without views "
        "and allocations. Each is one kernel at least; torch's norms are as many as the fewest that an "
        f"{device_of(run)} ran for a call: {norms}.\n"
    )


def write(counted: Sequence[Launches], stored: Path, page: Path = PAGE) -> None:
    """Puts the table between the marks of a page.

    Raises:
        Refused: the page has no marks, or some model was not counted.
    """
    missed = [model.name for model in MODELS if model.name not in {record["model"] for record in ok(counted)}]
    if missed:
        raise Refused(f"--write takes all models, and there is nothing of {', '.join(missed)}")
    (run, *_), _ = readme.load(stored)
    page.write_text(readme.filled(page, table(counted, run), BEGIN))


def line(record: Launches) -> str:
    if record["status"] != "ok":
        return f"{record['model']}, {record['way']}: {record['status']}, {record['message']}"
    operators = sum(record["operators"].values())
    return f"{record['model']}, {record['way']}: {operators} operators and {record['launches']} launches"
