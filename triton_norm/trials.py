"""Chooses between ways to run a call that differ in more than the config of one kernel, by their times."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from triton_norm import launch
from triton_norm.tuning import choices
from triton_norm.tuning.configs import Config, Space
from triton_norm.tuning.limits import gpu_of

Runs = Mapping[Config, Callable[[], None]]
"""Each way of a space, and a function that runs it. It may be run any number of times."""


def choose(space: Space, kernel: Any, device: torch.device, runs: Runs) -> Config:
    """Returns the way to run a call: chosen earlier, measured by the project, or searched for.

    Args:
        kernel: the kernel of all ways, whose source is part of the key on disk.
    """
    gpu = gpu_of(device).name
    with launch.starting():
        chosen = choices.chosen(space, gpu)
        if chosen is None:
            assert gpu is not None
            # Times are taken on the current device's stream, whichever device the tensors are on.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                chosen = fastest(space, kernel, gpu, runs)
            choices.choose(space, gpu, chosen)
        return chosen


def fastest(space: Space, kernel: Any, gpu: str, runs: Runs) -> Config:
    """Returns the fastest way. As Triton's search does, keeps the times in Triton's cache on disk, if it can be used.

    Clusters that can't be launched take forever, and cause one warning.
    """
    import triton
    from triton.runtime.cache import get_cache_manager

    known = f"{triton.__version__} {gpu} {kernel.cache_key} {space}"
    manager = get_cache_manager(hashlib.sha256(known.encode()).hexdigest())
    file = f"{kernel.__name__}.form.json"
    try:
        stored = manager.get_file(file)
        if stored is not None:
            with open(stored) as times:
                result = space.find(json.load(times)["fastest"])
            if result is not None:
                return result
    except launch.UNUSABLE as error:
        launch.warn_of_cache(error)
    times_ms = {way: _time(way, run) for way, run in runs.items()}
    result = min(times_ms, key=times_ms.__getitem__)
    stored_times = {"fastest": result.keywords, "times_ms": [[way.keywords, time] for way, time in times_ms.items()]}
    try:
        manager.put(json.dumps(stored_times), file, binary=False)
    except launch.UNUSABLE as error:
        launch.warn_of_cache(error)
    return result


def _time(way: Config, run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    try:
        run()
        return float(do_bench(run, warmup=launch.SEARCH_WARMUP_MS, rep=launch.SEARCH_MS))
    except Exception as error:
        if not way.keywords.get("CLUSTERS") or isinstance(error, torch.OutOfMemoryError):
            raise
        launch.warn_of_cluster("the clusters of whole channels", error)
        return float("inf")
