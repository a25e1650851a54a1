"""What the library costs on the host for each call, on top of the launches that the call makes.

Triton compiles, loads and launches as on a GPU, but over `stub_cuda.c`, a driver that computes nothing; the tensors are
on the CPU. The process must be one of its own, without TRITON_INTERPRET=1: its libcuda is the stub from then on.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sysconfig
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

import triton_norm
from perf.findings import in_a_line
from perf.stand_in import H100, as_on_gpu
from triton_norm import functional
from triton_norm.ops import launch

Record = dict[str, Any]
Call = Callable[[], object]

STUB = Path(__file__).with_name("stub_cuda.c")
TARGET = GPUTarget("cuda", 90, 32)
GPU = replace(H100, name="stub")
SHAPE = (8, 1024)
IMAGES = (8, 64, 16, 16)
BATCHES, CALLS = 300, 20  # the shorter a batch, the more run undisturbed on a busy machine
WARMUPS = 5  # calls before each batch: the caches hold what the others left
METADATA_AND_HOOKS = slice(6, 9)  # of a launcher's arguments


def missing() -> str:
    """What stands in the way of building the stub and Triton's launchers, and of using them, or nothing."""
    if torch.cuda.is_available():
        return "torch has loaded the driver of this machine's GPU, which a stub can't stand in for then"
    if _compiler() is None:
        return "there is no C compiler ($CC, cc, gcc or clang)"
    header = Path(sysconfig.get_config_var("INCLUDEPY") or "", "Python.h")
    return "" if header.exists() else f"there is no {header}"


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def load_stub(folder: Path) -> Callable[[], int]:
    """Makes the stub this process's libcuda, built in `folder`; returns what counts the launches so far."""
    compiler, library = _compiler(), folder / "libcuda.so.1"
    assert compiler is not None
    headers = Path(nvidia.__file__).with_name("include")
    build = [compiler, "-O2", "-shared", "-fPIC", f"-I{headers}", f"-Wl,-soname,{library.name}", str(STUB)]
    subprocess.run([*build, "-o", str(library)], check=True)
    os.environ |= {"CC": compiler, "TRITON_LIBCUDA_PATH": str(folder)}
    # Triton asks the loader for libcuda.so.1, which finds what is loaded under that name.
    count: Any = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).launch_count
    count.restype = ctypes.c_ulonglong
    return lambda: int(count())


class StubDriver:
    """Triton's driver for NVIDIA, but for what it asks torch.cuda."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def served_as_on_gpu() -> Iterator[None]:
    """CPU tensors go where CUDA's go; what asks torch.cuda is replaced by what takes as long to answer."""
    with ExitStack() as replaced:
        replaced.enter_context(as_on_gpu(GPU))
        for module, name, stand_in in (
            (functional, "_autocasts", lambda operator, x: x.is_cpu and torch.is_autocast_enabled("cuda")),
            (launch, "current_device", lambda: -1),  # the index of a device without one, to launch.Launcher
            (launch, "current_stream", lambda device: 0),
            (launch, "search", lambda kernel, space, *arguments: space.configs[0]),
        ):
            replaced.enter_context(mock.patch.object(module, name, stand_in))
        yield


def cases() -> Iterator[tuple[str, Call]]:
    """The public functions by what is asked of them."""
    x, dy = torch.randn(2, *SHAPE).bfloat16()
    for name, parameters in (("layer_norm", 2), ("rms_norm", 1)):
        function: Any = getattr(triton_norm, name)
        weights = torch.randn(parameters, SHAPE[1]).bfloat16()
        yield from _cases_of(name, lambda x, *weights, f=function: f(x, SHAPE[1:], *weights), x, weights, dy)
    x, dy = torch.randn(2, *IMAGES).bfloat16()
    mean, var, counter = torch.zeros(IMAGES[1]), torch.ones(IMAGES[1]), torch.tensor(0)

    def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return triton_norm.batch_norm(x, mean, var, weight, bias, True, num_batches_tracked=counter)

    yield from _cases_of("batch_norm", batch_norm, x, torch.randn(2, IMAGES[1]), dy)


def _cases_of(
    name: str, function: Callable[..., Tensor], x: Tensor, weights: Tensor, dy: Tensor
) -> Iterator[tuple[str, Call]]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
    forward = functools.partial(function, x, *weights)
    recorded = functools.partial(function, *leaves)
    yield f"{name} forward", forward
    yield f"{name} forward with gradients", recorded
    yield f"{name} forward and backward", lambda: torch.autograd.grad(recorded(), leaves, dy)


def launches_of(call: Call) -> list[Call]:
    """The launches that a call makes, each as one that starts the compiled kernel with the same arguments."""
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
    """µs per call of each, at best: noise only ever adds. Of this thread's own time: others' turns do not count."""
    timers = [timeit.Timer(call, timer=time.thread_time) for call in calls]
    best = [math.inf] * len(calls)
    for _ in range(BATCHES):
        for place, timer in enumerate(timers):
            timer.timeit(WARMUPS)
            best[place] = min(best[place], timer.timeit(CALLS) / CALLS * 1e6)
    return best


class Bare(torch.autograd.Function):
    """Allocates and saves as much as a norm's forward does, and does nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, statistics = torch.empty_like(x), x.new_empty(2, 8)
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        return None, None, None


def yardsticks() -> tuple[Call, Call]:
    """What this machine needs for one call of a function of torch's, LayerNorm of 8 elements on the CPU, and for one of
    an autograd.Function that computes nothing."""
    x, weight, bias = torch.randn(1, 8), torch.ones(8), torch.zeros(8)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    return functools.partial(F.layer_norm, x, (8,), weight, bias), functools.partial(Bare.apply, *leaves)


def measure(call: Call, launches: Callable[[], int]) -> Record:
    for _ in range(WARMUPS):
        call()
    before = launches()
    call()
    count = launches() - before
    started = launches_of(call)
    if len(started) != count:
        raise RuntimeError(f"of {count} launches {len(started)} went through Triton's launcher")
    call_us, torch_us, function_us, *launch_us = fastest([call, *yardsticks(), *started])
    figures = {"call_us": call_us, "launch_us": sum(launch_us), "library_us": call_us - sum(launch_us)}
    return {"launches": count, **figures, "torch_us": torch_us, "function_us": function_us}


def records(folder: Path) -> Iterator[Record]:
    """One for each case; what is built lies in `folder`."""
    reason = missing()
    if reason:
        yield {"case": "all", "status": "skipped", "message": reason}
        return
    torch.set_num_threads(1)
    launches = load_stub(folder)
    triton.runtime.driver.set_active(StubDriver())
    with served_as_on_gpu():
        for name, call in cases():
            try:
                yield {"case": name, "status": "ok", "message": "", **measure(call, launches)}
            except Exception as error:
                yield {"case": name, "status": "error", "message": in_a_line(error)}


def line(record: Record) -> str:
    if record["status"] != "ok":
        return f"{record['case']}: {record['status']}, {record['message']}"
    return (
        f"{record['case']}: {record['library_us']:.1f} µs and {record['launch_us']:.1f} for {record['launches']} bare "
        f"launch{'es' * (record['launches'] != 1)}; F.layer_norm on the CPU takes {record['torch_us']:.1f}, an "
        f"autograd.Function that does nothing {record['function_us']:.1f}"
    )
