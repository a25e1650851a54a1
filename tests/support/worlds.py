"""Processes that each hold their share of a batch."""

import contextlib
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import triton_norm
from support import processes
from support.patience import LIMIT_S
from triton_norm.tuning.limits import INTERPRETED


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: str

    def share(self, tensor: Tensor, sizes: dict[int, tuple[int, ...]]) -> Tensor:
        """Returns this process's samples of a tensor that all have drawn alike."""
        return tensor.split(sizes[self.size])[self.rank]

    def everyones(self, value: Any) -> list[Any]:
        result: list[Any] = [None] * self.size
        dist.all_gather_object(result, value)
        return result


def start(
    folder: Path,
    size: int,
    kernels: bool,
    scenarios: Sequence[Callable[[World], None]],
    backend: str = "gloo",
    preload: Sequence[str] = (),
) -> None:
    """Starts processes that go through these scenarios; raises the error of one of them, with its traceback.

    Args:
        folder: Holds the file by which the processes find each other.
        size: The number of processes.
        kernels: Whether the kernels serve, or torch's path.
        backend: gloo on CPUs, nccl on GPUs.
        preload: Modules that the processes import anyway, for the first call to import once for all of them.
    """
    multiprocessing.set_forkserver_preload(["numpy", "torch", "triton", *preload])
    arguments = size, backend, str(folder / "store"), kernels, scenarios
    method = "forkserver" if backend == "gloo" else "spawn"
    environment = mock.patch.dict(os.environ, TRITON_INTERPRET=str(int(backend == "gloo")))
    with environment, processes.ending_children():
        started = torch.multiprocessing.start_processes(enter, arguments, nprocs=size, join=False, start_method=method)
        give_up = time.monotonic() + LIMIT_S
        while not started.join(max(0.0, give_up - time.monotonic())):
            assert time.monotonic() < give_up, f"the processes still ran after {LIMIT_S:.0f} seconds"


def enter(
    rank: int, size: int, backend: str, file: str, kernels: bool, scenarios: Sequence[Callable[[World], None]]
) -> None:
    """Goes through the scenarios in one process of the world."""
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(device)  # which gathering of objects goes through
    world = World(rank, size, device)
    limit = timedelta(seconds=LIMIT_S)
    dist.init_process_group(backend, init_method=f"file://{file}", timeout=limit, rank=rank, world_size=size)
    guarded: Any = contextlib.nullcontext
    if kernels and INTERPRETED:
        from triton_norm.testing.guards import guarded
    try:
        for scenario in scenarios:
            torch.manual_seed(0)
            with warnings.catch_warnings(), triton_norm.backend("triton" if kernels else "torch"):
                quiet = scenario.__name__.startswith("compiled")
                warnings.simplefilter("ignore" if quiet else "error")
                with contextlib.nullcontext() if scenario.__name__ == "compiled_by_inductor" else guarded():
                    scenario(world)
    except RuntimeError as error:
        if "by peer" in str(error):  # whose error is the one to tell
            time.sleep(LIMIT_S)
        raise
    finally:
        dist.destroy_process_group()
