"""Calls that fail halfway leave everything as it was, or done."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_norm
from support import spaces
from support.allocations import allocations
from support.at_once import at_once
from support.turns import taking_turns
from triton_norm import distributed, launch
from triton_norm.channels import plan, running
from triton_norm.specs import BatchNormOptions, BatchNormTensors
from triton_norm.sync import operator as synchronized
from triton_norm.tuning import channel_spaces
from triton_norm.tuning.choices import choose_only
from triton_norm.tuning.configs import Config, Space
from triton_norm.tuning.limits import INTERPRETED

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU for real")
pytestmark = pytest.mark.unguarded


class Step:
    """A training step: a call, and its backward for ones. `state`: tensors that each step updates."""

    def __init__(self, call: Callable[..., Any], *leaves: Tensor, state: tuple[Tensor, ...] = ()) -> None:
        self.call, self.leaves, self.state = call, leaves, state

    def __call__(self) -> list[Tensor]:
        result = self.call(*self.leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        grads = torch.autograd.grad(outputs, self.leaves, [torch.ones_like(y) for y in outputs])
        return [*(y.detach() for y in outputs), *grads]

    def moved(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.state]

    def set(self, state: list[Tensor]) -> None:
        for tensor, value in zip(self.state, state, strict=True):
            tensor.copy_(value)


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


def rows(device: str, columns: int = 24) -> Step:
    function = functools.partial(triton_norm.layer_norm, normalized_shape=(columns,))
    parameters = (leaf(columns, device=device) for _ in range(2))
    return Step(lambda x, w, b: function(x, weight=w, bias=b), leaf(2, columns, device=device), *parameters)


def rows_and_total(device: str) -> Step:
    leaves = leaf(2, 24, device=device), leaf(2, 24, device=device), leaf(24, device=device)
    return Step(lambda x, residual, w: triton_norm.rms_norm(x, (24,), w, residual=residual), *leaves)


def batch_norm(device: str, training: bool = True, spread: bool = False, **fused: Any) -> Step:
    """`spread`: running statistics with gaps, which the kernels move in a copy."""
    x, parameters = leaf(3, 2, 5, 2, device=device), [leaf(2, device=device) for _ in range(2)]
    mean, var = torch.zeros(2, 2, device=device)[:, 0], torch.ones(2, 2, device=device)[:, 0]
    if not spread:
        mean, var = mean.contiguous(), var.contiguous()
    counter = torch.tensor(2, device=device)
    residual = [leaf(3, 2, 5, 2, device=device)] if fused else []

    def call(x: Tensor, w: Tensor, b: Tensor, *residual: Tensor) -> Tensor:
        added = {"residual": residual[0], **fused} if residual else {}
        return triton_norm.batch_norm(x, mean, var, w, b, training, None, num_batches_tracked=counter, **added)

    return Step(call, x, *parameters, *residual, state=(mean, var, counter))


def synchronized_batch_norm(device: str) -> Step:
    step = batch_norm(device)
    mean, var, counter = step.state
    group = distributed.Group("", 1)

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        tensors = BatchNormTensors(x, None, w, b, mean, var, counter)
        return distributed.sync_batch_norm(tensors, BatchNormOptions(True, None, 1e-5), group)

    return Step(call, *step.leaves, state=step.state)


STEPS: dict[str, Callable[[str], Step]] = {
    "rows": rows,
    "rows of several programs": functools.partial(rows, columns=40),
    "rows and total": rows_and_total,
    "training in two launches": batch_norm,
    "evaluation": functools.partial(batch_norm, training=False),
    "relu": functools.partial(batch_norm, activation="relu"),
    "synchronized": synchronized_batch_norm,
}


class Zeros:
    """Those of a stream, the same ones each time, as on a GPU."""

    def __init__(self) -> None:
        self.memory = torch.zeros(64, dtype=torch.int32)

    def __call__(self, n: int, device: torch.device) -> Tensor:
        return self.memory[:n]


@pytest.fixture
def zeros(monkeypatch) -> Zeros:
    zeros = Zeros()
    if INTERPRETED:
        monkeypatch.setattr(plan, "zeros", zeros)
        monkeypatch.setattr(running, "zeros", zeros)
    return zeros


@pytest.fixture
def make(numbers, monkeypatch, device, zeros):
    """Makes a step by name; where it says so, of programs that share rows or a channel."""
    monkeypatch.setattr(distributed, "gather", lambda packed, group: packed[None])
    monkeypatch.setattr(synchronized, "total", lambda sums, group_name: sums)

    def made(name: str) -> Step:
        most = 0 if name in ("training in two launches", "training, statistics with gaps") else 2**62
        numbers(
            multiprocessors=6,
            min_resident_elements=1,
            min_split_elements=1,
            one_launch_bytes=most,
            interpreted_tile_elements=256,
        )
        if name == "rows of several programs":
            numbers(interpreted=False, whole_row_bytes=64, forward_piece_bytes=256, backward_span_bytes=128)
        return (STEPS | {"training, statistics with gaps": functools.partial(batch_norm, spread=True)})[name](device)

    with triton_norm.backend("triton"), taking_turns():
        yield made


def assert_unlocked() -> None:
    """Asserts that no lock is held, for any other thread too."""

    def take() -> bool:
        with launch._starting:
            return True

    assert at_once([take]) == [True]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def fail_everywhere(step: Step, zeros: Zeros, failing: Callable[[int], Any], error: type[Exception]) -> int:
    """A step for each place that can fail, in which that fails, and one in which nothing does; returns how many places
    there are.

    `failing(place)` is a context in which the event at that place raises.
    """
    before, expected = step.moved(), step()
    after = step.moved()
    for place in itertools.count():
        step.set(before)
        with failing(place):
            try:
                actual = step()
            except error:
                actual = None
        moved = step.moved()
        assert same(moved, before) or same(moved, after), place
        assert not zeros.memory.any(), place
        assert_unlocked()
        if actual is not None:
            assert same(actual, expected)
            assert same(moved, after)
            return place
    raise AssertionError


def nth_raises(place: int, error: Callable[[], Exception]) -> Callable[..., None]:
    """A function whose calls count from 0."""
    places = itertools.count()

    def call(*_: Any) -> None:
        if next(places) == place:
            raise error()

    return call


@interpreted
@pytest.mark.parametrize("name", STEPS)
def test_no_memory_for_any_tensor_of_a_step(name, make, zeros):
    def failing(place: int) -> Any:
        return allocations(before=nth_raises(place, lambda: torch.OutOfMemoryError("made up")))

    places = fail_everywhere(make(name), zeros, failing, torch.OutOfMemoryError)
    assert places >= 5


SEVERAL_LAUNCHES = "rows", "training in two launches", "synchronized"


@interpreted
@pytest.mark.parametrize("name", [*SEVERAL_LAUNCHES, "training, statistics with gaps"])
def test_any_launch_of_a_step_fails(name, make, zeros, monkeypatch):
    start = launch.start

    @contextlib.contextmanager
    def failing(place: int) -> Iterator[None]:
        raising = nth_raises(place, lambda: RuntimeError("made up"))
        with monkeypatch.context() as patch:
            patch.setattr(launch, "start", lambda *arguments: (raising(), start(*arguments))[1])
            yield

    assert fail_everywhere(make(name), zeros, failing, RuntimeError) >= 2


@interpreted
def test_any_timing_of_a_search_fails(make, zeros, unknown_gpu, monkeypatch):
    """The launch is cut off, and leaves something in the zeros that it began with."""
    from triton.runtime.autotuner import Autotuner

    search, inputs = launch.search, [zeros.memory[:0]]

    def noting(kernel: Any, space: Space, n_programs: Any, arguments: Any, constants: Any) -> Config:
        sync = dict(zip(kernel.arg_names, arguments, strict=False)).get("sync_ptr")
        inputs[0] = zeros.memory[:0] if sync is None else sync
        return search(kernel, space, n_programs, arguments, constants)

    @contextlib.contextmanager
    def failing(place: int) -> Iterator[None]:
        raising = nth_raises(place, lambda: RuntimeError("made up"))

        def bench(call: Callable[[], Any], quantiles: Any) -> list[float]:
            try:
                raising()
            except RuntimeError:
                call()
                inputs[0].fill_(7)
                raise
            return [1.0] * 3

        choose_only(spaces.GPU, {})
        with monkeypatch.context() as patch:
            patch.setattr(Autotuner, "do_bench", staticmethod(bench))
            yield

    step = make("training in two launches")
    with monkeypatch.context() as patch:  # undone before the unknown GPU is
        patch.setattr(launch, "search", noting)
        patch.setattr(channel_spaces, "channels", spaces.first_of(channel_spaces.channels, 2))
        patch.setattr(Autotuner, "do_bench", staticmethod(lambda call, quantiles: [1.0] * 3))
        assert fail_everywhere(step, zeros, failing, RuntimeError) >= 4
