"""Calls repeated give the same bits: whatever the order of the programs, in another process, and under
torch.use_deterministic_algorithms."""

import contextlib
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import triton_norm
from support import processes, spaces
from support.channel_norms import drawn, running_statistics, share
from support.every_op import MODULATIONS, ModulatedOp
from support.row_norms import NORMS, Norm
from support.spaces import GPU
from triton_norm import launch
from triton_norm.tuning.choices import chosen_so_far, file_name
from triton_norm.tuning.configs import Config, config
from triton_norm.tuning.limits import INTERPRETED

pytest.importorskip("triton")
pytestmark = [pytest.mark.unguarded, pytest.mark.usefixtures("through_the_kernels")]

if INTERPRETED:
    from triton_norm.testing.interleave import interleaved

TIMES = 3 if INTERPRETED else 20  # interpreted, each time in another order
ROWS, COLUMNS = 3, 40
SMALL = {"flat": ((2, 2, 4, 8), 32), "last": ((2, 8, 3, 4), 64), "folded": ((9, 3, 3, 3), 512)}
"""Shapes by kind, and tiles with which two programs share a channel."""

Step = Callable[[], list[Tensor]]

GATED = ModulatedOp("gated", (ROWS, COLUMNS), "flat", "rms_norm", modulations=("gate",))
MODULATED = ModulatedOp(
    "modulated", (2, 130, COLUMNS), "flat", "layer_norm", residual=True, modulations=MODULATIONS, lengths=(2,)
)
"""Two programs share the tokens of a sample, in the backward."""


def rows_step(norm: Norm, device: str, residual: bool = False) -> Step:
    x, weight, bias, dy = norm.drawn((ROWS, COLUMNS), 1, torch.bfloat16, device)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    if not residual:
        return lambda: results([norm.ours((COLUMNS,))(*leaves)], leaves, [dy])
    leaves.append(torch.randn(ROWS, COLUMNS, device=device, requires_grad=True))
    dtotal = torch.randn(ROWS, COLUMNS, device=device)
    return lambda: results(norm.ours((COLUMNS,), residual=leaves[-1])(*leaves[:-1]), leaves, [dy, dtotal])


def modulated_step(op: ModulatedOp, device: str) -> Step:
    tensors = op.drawn(device, torch.bfloat16)
    leaves = [tensor for tensor in tensors if tensor is not None]
    dys = [torch.randn(op.shape, device=device).bfloat16() for _ in op.ours(*tensors)]
    return lambda: results(op.ours(*tensors), leaves, dys)


def channels_step(kind: str, device: str, training: bool = True, activation: str | None = None) -> Step:
    """Makes a step, with a residual beside an activation, and in training with running statistics."""
    residual = None if activation is None else torch.float32
    call = drawn(SMALL[kind][0], kind, device, residual=residual, training=training, activation=activation)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in call.inputs()]
    x, added, weight, bias = leaves
    before = running_statistics(x.shape[1], device)
    fused = {"residual": added, "activation": activation}

    def step() -> list[Tensor]:
        running, counter = [tensor.clone() for tensor in before], torch.tensor(3, device=device)
        y = triton_norm.batch_norm(
            x, *running, weight, bias, training, None if training else 0.1, num_batches_tracked=counter, **fused
        )
        requested = [leaf for leaf in leaves if leaf is not None]
        return [*results([y], requested, [call.dy]), *running, counter]

    return step


def results(outputs: Any, leaves: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [*(y.detach() for y in outputs), *torch.autograd.grad(list(outputs), leaves, gradients)]


STEPS: dict[str, Callable[[str], Step]] = {
    **{repr(norm): functools.partial(rows_step, norm) for norm in NORMS},
    **{f"{norm!r} with a residual": functools.partial(rows_step, norm, residual=True) for norm in NORMS},
    "gated rows": functools.partial(modulated_step, GATED),
    "modulated rows": functools.partial(modulated_step, MODULATED),
    **{f"training, {kind}": functools.partial(channels_step, kind) for kind in SMALL},
    "evaluation": functools.partial(channels_step, "flat", training=False),
    **{
        f"{activation}, {kind}": functools.partial(channels_step, kind, activation=activation)
        for activation, kind in (("relu", "flat"), ("leaky_relu", "folded"), ("silu", "last"))
    },
}


@pytest.fixture
def use(numbers, monkeypatch):
    """Has several programs share each row and channel of a step of that name, channels in one launch or in two."""

    def set_for(name: str, one_launch: bool) -> None:
        if not INTERPRETED:
            return
        kind = name.rpartition(", ")[2]
        share(numbers, SMALL.get(kind, SMALL["flat"])[1], one_launch)
        forward = config(4, BLOCK_M=1, BLOCK_N=32, PEERS=2, PIECES=1, STAGES=0)
        backward = config(4, BLOCK_M=1, BLOCK_N=32, PEERS=2, STAGES=1, HOLD_WEIGHT=False)
        spaces.force_rows(monkeypatch, forward, backward)

    return set_for


def taking_turns(seed: int | None = None) -> contextlib.AbstractContextManager[None]:
    """The programs in their order, or in one that is drawn."""
    if not INTERPRETED:
        return contextlib.nullcontext()
    return interleaved(order=None if seed is None else lambda n: random.Random(seed).sample(range(n), n))


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    ("name", "one_launch"),
    [*((name, name != "evaluation") for name in STEPS), ("training, flat", False)],
    ids=lambda value: value if isinstance(value, str) else "one launch" if value else "two launches",
)
def test_a_call_has_the_same_bits_each_time_in_whatever_order_its_programs_start(name, one_launch, use, device):
    use(name, one_launch)
    step = STEPS[name](device)
    with taking_turns():
        expected = step()
    for seed in range(TIMES):
        with taking_turns(seed):
            assert same(step(), expected), seed


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", STEPS)
def test_torchs_deterministic_algorithms_change_no_bit(name, device):
    """torch then fills new memory with NaN: nothing is read that was left there, either."""
    step = STEPS[name](device)
    expected = step()
    with deterministic():
        assert same(step(), expected)


@contextlib.contextmanager
def tuned(folder: Path, search: Callable[..., Config]) -> Iterator[None]:
    """The interpreter with a GPU's configs, and choices from a file in that folder."""
    with mock.patch.object(launch, "search", search), spaces.unknown_gpu(folder):
        yield


def digests() -> dict[str, str]:
    """Returns a digest of all results of each step."""
    result = {}
    with triton_norm.backend("triton"):
        for name, step in STEPS.items():
            torch.manual_seed(0)
            data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in step("cpu")())
            result[name] = hashlib.sha256(data).hexdigest()
    return result


ANOTHER_PROCESS = """
import json, sys
from pathlib import Path
import test_determinism

def search(kernel, space, *arguments):
    raise AssertionError(f"{space.kernel}, {space.key}: not in the file")

with test_determinism.tuned(Path(sys.argv[1]), search):
    print(json.dumps(test_determinism.digests()))
"""


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the search times for real")
def test_processes_with_the_same_file_have_the_same_bits(tmp_path):
    with tuned(tmp_path, lambda kernel, space, *_: space.configs[-1]):
        expected = digests()
        file = tmp_path / file_name(GPU)
        file.write_text(json.dumps({"choices": chosen_so_far(GPU)}, sort_keys=True))
    command = "-c", ANOTHER_PROCESS, str(tmp_path)
    environment = {"PYTHONPATH": "tests:tests/ops", "TRITON_INTERPRET": "1"}
    with contextlib.ExitStack() as stack:
        for process in [
            stack.enter_context(processes.started(*command, **environment, PYTHONHASHSEED=seed)) for seed in ("1", "2")
        ]:
            out, error = process.communicate()
            assert process.returncode == 0, error
            assert json.loads(out) == expected
