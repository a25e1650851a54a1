"""Measures what the library costs on the host for each call, on top of the launches that the call makes.

Triton compiles, loads and launches as on a GPU, over the driver of `triton_norm.testing.stub_driver`, which computes
nothing. The process must be one of its own, without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import math
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.backends.nvidia import driver as nvidia

import triton_norm
from perf.records import Host, failed, made
from triton_norm.rows import operator
from triton_norm.rows.backward import RowBackwardTensors
from triton_norm.specs import GradientDtypes, RowSpec, RowTensors
from triton_norm.testing import stub_driver

Call = Callable[[], object]

SHAPE = (8, 1024)
IMAGES = (8, 64, 16, 16)
# Channels of a group of a GroupNorm.
GROUP = 4
SAMPLES = (2, 4, 1024)
# Batches, and calls in each: the shorter a batch, the more of them run undisturbed on a busy machine.
BATCHES, CALLS = 300, 20
# Calls before each batch: the caches have the other cases' data.
WARMUPS = 5
# Metadata and hooks among a launcher's arguments.
METADATA_AND_HOOKS = slice(6, 9)


class Case(NamedTuple):
    """One way of calling a norm.

    bare: an autograd.Function, forward and backward, that allocates and saves as much; None of a forward alone.
    direct: the case that the same work is when nothing records it; None where this is that.
    """

    name: str
    call: Call
    bare: Call | None = None
    direct: str | None = None


def cases() -> Iterator[Case]:
    """Yields the functions and modules, without and with gradients, and the operators that stand for them."""
    x, dy = torch.randn(2, *SHAPE).bfloat16()
    width = SHAPE[1]
    for name, parameters in (("layer_norm", 2), ("rms_norm", 1)):
        function: Any = getattr(triton_norm, name)
        weights = torch.randn(parameters, width).bfloat16()
        yield from _cases_of(name, lambda x, *weights, f=function: f(x, (width,), *weights), (x, *weights), dy)
        yield from _operators(name, x, weights, dy)
    yield from _gated_and_modulated()
    for layer in (triton_norm.LayerNorm, triton_norm.RMSNorm):
        yield from _cases_of_module(layer(width).bfloat16(), x, dy)
    images, dy = torch.randn(2, *IMAGES).bfloat16()
    mean, var, counter = torch.zeros(IMAGES[1]), torch.ones(IMAGES[1]), torch.tensor(0)

    def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return triton_norm.batch_norm(x, mean, var, weight, bias, True, num_batches_tracked=counter)

    yield from _cases_of("batch_norm", batch_norm, (images, *torch.randn(2, IMAGES[1])), dy)
    yield from _cases_of_module(triton_norm.BatchNorm2d(IMAGES[1]), images, dy)
    yield from _cases_of_module(triton_norm.BatchNorm2d(IMAGES[1]).eval(), images, dy, " in evaluation")
    yield from _of_samples(images, dy)


def _of_samples(images: Tensor, dy: Tensor) -> Iterator[Case]:
    """Yields GroupNorm and InstanceNorm, the latter with running statistics, too."""
    channels, n_groups = IMAGES[1], IMAGES[1] // GROUP

    def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return triton_norm.group_norm(x, n_groups, weight, bias)

    yield from _cases_of("group_norm", group_norm, (images, *torch.randn(2, channels)), dy)
    yield from _cases_of_module(triton_norm.GroupNorm(n_groups, channels), images, dy)
    yield from _cases_of_module(triton_norm.InstanceNorm2d(channels, affine=True), images, dy)
    tracking = triton_norm.InstanceNorm2d(channels, affine=True, track_running_stats=True)
    yield from _cases_of_module(tracking, images, dy, " with running statistics")


def _gated_and_modulated() -> Iterator[Case]:
    """Yields rms_norm with a gate and a weight, and layer_norm with scale and shift of each sample."""
    samples, _, width = SAMPLES
    x, gate, dy = torch.randn(3, *SAMPLES).bfloat16()
    weight, scale, shift = torch.randn(3, samples, width).bfloat16()

    def gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return triton_norm.rms_norm(x, (width,), weight, gate=gate)  # type: ignore[no-any-return]

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return triton_norm.layer_norm(x, (width,), scale=scale, shift=shift)  # type: ignore[no-any-return]

    yield from _cases_of("rms_norm with a gate", gated, (x, gate, weight[0]), dy)
    yield from _cases_of("layer_norm, modulated", modulated, (x, scale, shift), dy)


def _cases_of(name: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> Iterator[Case]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]

    def recorded() -> Tensor:
        return function(*leaves)

    yield Case(f"{name} forward", functools.partial(function, *inputs))
    yield Case(f"{name} forward with gradients", recorded)
    yield Case(f"{name} forward and backward", _both(recorded, leaves, dy), _bare(leaves, dy))


def _cases_of_module(module: Any, x: Tensor, dy: Tensor, how: str = "") -> Iterator[Case]:
    name, leaves = f"{type(module).__name__}{how}", [x.clone().requires_grad_(), *module.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)  # type: ignore[no-any-return]

    yield Case(f"{name} forward", forward)
    yield Case(f"{name} forward and backward", _both(lambda: module(leaves[0]), leaves, dy), _bare(leaves, dy))


def _both(forward: Callable[[], Tensor], leaves: Sequence[Tensor], dy: Tensor) -> Call:
    return lambda: torch.autograd.grad(forward(), leaves, dy)


def _bare(leaves: Sequence[Tensor], dy: Tensor) -> Call:
    return _both(functools.partial(Bare.apply, *leaves), leaves, dy)


def _operators(name: str, x: Tensor, weights: Tensor, dy: Tensor) -> Iterator[Case]:
    """Yields the calls that compiled code makes: of the operators, below autograd."""
    weight, bias = (*weights, None)[:2]
    spec = RowSpec(SHAPE[1], 1e-5, 0.0, name == "layer_norm")
    tensors = RowTensors(x, None, weight, bias)
    gradients = GradientDtypes(x.dtype, None, x.dtype, None if bias is None else x.dtype)

    def both() -> None:
        with torch.no_grad():
            _, _, statistics = operator.forward_op(operator.ForwardCall(tensors, True, spec))
            read = RowBackwardTensors(dy, None, x, weight, statistics)
            operator.backward_op(operator.BackwardCall(read, gradients, spec))

    yield Case(
        f"{name} operator forward",
        lambda: operator.forward_op(operator.ForwardCall(tensors, False, spec)),
        direct=f"{name} forward",
    )
    yield Case(f"{name} operators forward and backward", both, direct=f"{name} forward and backward")


def launches_of(call: Call) -> list[Call]:
    """Returns the launches that a call makes, each as one that starts the compiled kernel with the same arguments."""
    made: list[Call] = []
    start = nvidia.CudaLauncher.__call__

    def noted(launcher: Any, *arguments: Any) -> None:
        plain = list(arguments)
        plain[METADATA_AND_HOOKS] = [None] * 3
        made.append(functools.partial(launcher, *plain))
        start(launcher, *arguments)

    with mock.patch.object(nvidia.CudaLauncher, "__call__", noted):
        call()
    return made


def fastest(calls: Sequence[Call]) -> list[float]:
    """Returns the least µs per call of each: noise only ever adds. Only this thread's own time counts."""
    timers = [timeit.Timer(call, timer=time.thread_time) for call in calls]
    best = [math.inf] * len(calls)
    for _ in range(BATCHES):
        for place, timer in enumerate(timers):
            timer.timeit(WARMUPS)
            best[place] = min(best[place], timer.timeit(CALLS) / CALLS * 1e6)
    return best


class Bare(torch.autograd.Function):
    """Allocates and saves as much as a norm does, and does nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        y, statistics = torch.empty_like(x), x.new_empty(2, 8)
        ctx.save_for_backward(x, *parameters, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        *inputs, _ = ctx.saved_tensors
        return tuple(torch.empty_like(tensor) for tensor in inputs)


def yardstick() -> Call:
    """Returns a call by which machines compare: torch's LayerNorm of 8 elements on the CPU."""
    return functools.partial(F.layer_norm, torch.randn(1, 8), (8,), torch.ones(8), torch.zeros(8))


def measure(case: Case, launches: Callable[[], int]) -> dict[str, Any]:
    for _ in range(WARMUPS):
        case.call()
    before = launches()
    case.call()
    count = launches() - before
    started = launches_of(case.call)
    if len(started) != count:
        raise RuntimeError(f"of {count} launches {len(started)} went through Triton's launcher")
    bare = [] if case.bare is None else [case.bare]
    torch_us, call_us, *rest = fastest([yardstick(), case.call, *bare, *started])
    bare_us, launch_us = (rest[0] if bare else None), sum(rest[len(bare) :])
    figures = {"call_us": call_us, "launch_us": launch_us, "library_us": call_us - launch_us, "bare_us": bare_us}
    return {"launches": count, **figures, "torch_us": torch_us, "direct": case.direct}


def records(folder: Path) -> Iterator[Host]:
    """Yields one record for each case; the stub is built in `folder`."""
    reason = stub_driver.missing()
    if reason:
        yield {"case": "all", "status": "skipped", "message": reason}
        return
    torch.set_num_threads(1)
    with stub_driver.installed(folder) as launches:
        for case in cases():
            try:
                yield made(Host, {"case": case.name, "status": "ok", "message": ""}, measure(case, launches))
            except Exception as error:
                yield made(Host, {"case": case.name}, failed(error))


def ratio(record: Host) -> float | None:
    """Returns the time of a forward and backward over that of the bare autograd.Function; None of other cases."""
    bare_us = record["bare_us"]
    return None if bare_us is None else record["call_us"] / bare_us


def line(record: Host) -> str:
    if record["status"] != "ok":
        return f"{record['case']}: {record['status']}, {record['message']}"
    over = ratio(record)
    bare = "" if over is None else f"; {over:.2f} times an autograd.Function that only allocates and saves as much"
    return (
        f"{record['case']}: {record['library_us']:.1f} µs and {record['launch_us']:.1f} for {record['launches']} bare "
        f"launch{'es' * (record['launches'] != 1)}{bare}; F.layer_norm on the CPU takes {record['torch_us']:.1f}"
    )
