"""The one place that launches: chooses the config, stands on the tensor's device, starts the kernel."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from triton_norm import tuning
from triton_norm.tuning import Config, Space

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton interprets kernels in this process; read once, as Triton itself reads it."""

Grid = Callable[[Config | Mapping[str, Any]], int]
"""The number of programs for a config, or for the block sizes by name."""


@functools.cache
def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return tuning.INTERPRETED_SMS


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device current where it isn't: Triton launches on the current device, whatever its arguments."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def launch(
    kernel: Any,
    space: Space,
    n_programs: Grid,
    device: torch.device,
    *arguments: Any,
    **constants: Any,
) -> int:
    """Starts n_programs(config) programs of a kernel on the device's current stream; returns their number."""
    with on(device):
        gpu = gpu_name(device)
        config = tuning.chosen(space, gpu)
        if config is None:
            assert gpu is not None
            config = search(kernel, space, n_programs, arguments, constants)
            tuning.choose(space, gpu, config)
        count = n_programs(config)
        kernel[(count,)](*arguments, **constants, **config.keywords)
    return count


def search(
    kernel: Any, space: Space, n_programs: Grid, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Config:
    """The fastest config for these arguments, by `triton.autotune`, which keeps what it finds on disk.

    Every kernel with more than one config writes its outputs from inputs that it leaves alone: it may run any number
    of times.
    """
    import triton
    from triton.testing import do_bench

    timed = functools.partial(do_bench, warmup=tuning.SEARCH_WARMUP_MS, rep=tuning.SEARCH_MS)
    candidates = [
        triton.Config(dict(config.blocks), num_warps=config.num_warps, num_stages=config.num_stages)
        for config in space.configs
    ]
    tuner = triton.autotune(candidates, key=[], do_bench=timed, cache_results=True)(kernel)
    tuner[lambda meta: (n_programs(meta),)](*arguments, **constants)
    best = tuner.best_config
    return tuning.config(best.num_warps, best.num_stages, **best.kwargs)
