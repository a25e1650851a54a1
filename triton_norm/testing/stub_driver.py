"""Runs calls of this library without a GPU, launched as on one, over a CUDA driver that computes nothing.

`installed` is for measuring the host's time. Triton compiles, loads and launches as on a GPU; the kernels don't run, so
the contents of results are undefined. It takes a process of its own, without TRITON_INTERPRET=1, and a C compiler:

    from triton_norm.testing import stub_driver

    with tempfile.TemporaryDirectory() as folder, stub_driver.installed(Path(folder)) as launches:
        norm, x = triton_norm.LayerNorm(1024), torch.randn(8, 1024)
        norm(x)  # compiles
        before = launches()
        print(timeit.timeit(lambda: norm(x), number=1000), launches() - before)

`as_on_gpu` alone launches for CPU tensors as on a GPU, and leaves the driver unchanged.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

import triton_norm
from triton_norm import dispatch, launch, trials
from triton_norm.tuning.limits import Gpu, assumed

# This is an H100 without measured choices.
H100 = Gpu(name=None, multiprocessors=132, l2_bytes=50 << 20)
# Launches over the stub are chosen for this GPU, with this compute capability and warp size.
STUB_GPU = replace(H100, name="stub")
STUB_TARGET = GPUTarget("cuda", 90, 32)
STUB_SOURCE = Path(__file__).with_name("stub_cuda.c")


@contextmanager
def as_on_gpu(gpu: Gpu, start: Callable[..., Any] | None = None) -> Iterator[None]:
    """Serves CPU tensors within this context, with the launches chosen for a GPU.

    Args:
        gpu: the GPU.
        start: replaces `triton_norm.launch.start`, through which every launch goes.
    """
    with ExitStack() as replaced:
        replaced.enter_context(triton_norm.backend("triton"))
        replaced.enter_context(mock.patch.object(dispatch, "INTERPRETED", True))
        if start is not None:
            replaced.enter_context(mock.patch.object(launch, "start", start))
        replaced.enter_context(assumed(gpu))
        yield


def missing() -> str:
    """Returns the reason why the stub can't be built or used, or an empty string."""
    if torch.cuda.is_available():
        return "torch has loaded the driver of this machine's GPU, which a stub can't stand in for then"
    if _compiler() is None:
        return "there is no C compiler ($CC, cc, gcc or clang)"
    header = Path(sysconfig.get_config_var("INCLUDEPY") or "", "Python.h")
    return "" if header.exists() else f"there is no {header}"


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def load(folder: Path) -> Callable[[], int]:
    """Builds the stub in `folder`, and makes it this process's libcuda until the process ends.

    Returns:
        A function that returns the number of launches so far.
    """
    compiler, library = _compiler(), folder / "libcuda.so.1"
    assert compiler is not None
    headers = Path(nvidia.__file__).with_name("include")
    build = [compiler, "-O2", "-shared", "-fPIC", f"-I{headers}", f"-Wl,-soname,{library.name}", str(STUB_SOURCE)]
    subprocess.run([*build, "-o", str(library)], check=True)
    os.environ |= {"CC": compiler, "TRITON_LIBCUDA_PATH": str(folder)}
    # Triton asks the loader for libcuda.so.1, which finds the library loaded under that name.
    count: Any = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).launch_count
    count.restype = ctypes.c_ulonglong
    triton.runtime.driver.set_active(_StubDriver())
    return lambda: int(count())


class _StubDriver:
    """Derives Triton's NVIDIA driver, without its queries of torch.cuda."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return STUB_TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def served() -> Iterator[None]:
    """Serves CPU tensors over the loaded stub. Functions that ask torch.cuda are replaced by ones that take as long."""
    with ExitStack() as replaced:
        replaced.enter_context(as_on_gpu(STUB_GPU))
        for module, name, stand_in in (
            (dispatch, "_is_on_gpu", lambda x: x.is_cpu),
            (launch, "current_device", lambda: None),  # the index of a device without one
            (launch, "_has_streams", lambda device: True),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (launch, "current_stream", lambda device: 0),
            (launch, "search", lambda kernel, space, *arguments: space.configs[0]),
            (trials, "fastest", lambda space, *arguments: space.configs[0]),
        ):
            replaced.enter_context(mock.patch.object(module, name, stand_in))
        yield


@contextmanager
def installed(folder: Path) -> Iterator[Callable[[], int]]:
    """Loads the stub and serves CPU tensors over it within this context.

    Args:
        folder: an existing folder for the stub's library.

    Yields:
        A function that returns the number of launches so far.

    Raises:
        RuntimeError: the stub can't be built or used, see `missing`.
    """
    reason = missing()
    if reason:
        raise RuntimeError(reason)
    launches = load(folder)
    with served():
        yield launches
