"""The one place that launches: chooses the config, stands on the tensors' device, starts the kernel."""

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import tuning
from triton_norm.tuning import Config, Space

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton interprets kernels in this process; read once, as Triton itself reads it."""

INT32_END = 2**31

Programs = Callable[..., int]
"""The number of programs for a config's keywords and a call's own integers."""
MOVED = ("running_mean_ptr", "running_var_ptr", "num_batches_tracked_ptr")
"""What kernels move in place."""

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


@functools.cache
def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return tuning.INTERPRETED_SMS


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Of the cache that all multiprocessors share."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return tuning.INTERPRETED_CACHE


for _remembers in (multiprocessors, cache_bytes):
    tuning.when_forgotten(_remembers.cache_clear)

_zeros: dict[tuple[int, int], Tensor] = {}

_starting: threading.RLock
"""Held by the one thread that searches, compiles or interprets: Triton's interpreter keeps its place in globals, and a
search times launches."""


def _make_lock() -> None:
    """Anew in a forked child, where the thread that held it may not exist."""
    global _starting
    _starting = threading.RLock()


_make_lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_lock)


def elsewhere(index: int | None) -> bool:
    """Whether this is a GPU's index and not the current one's. Triton launches on that, whatever the arguments."""
    return index is not None and index >= 0 and index != current_device()


def zeros(n: int, device: torch.device) -> Tensor:
    """At least n int32 zeros, for a kernel that leaves them zeros: kept for each stream, where kernels run in turn.

    A captured graph has its own, since it may be replayed on any stream.
    """
    if elsewhere(device.index):
        with torch.cuda.device(device):
            return zeros(n, device)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    stream = current_stream(device.index)
    kept = _zeros.get((device.index, stream))
    if kept is None or kept.numel() < n:
        size = tuning.next_power_of_2(max(n, tuning.LEAST_ZEROS))
        kept = _zeros[device.index, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    return kept


def start(kernel: Any, count: int, arguments: Sequence[Any], constants: Mapping[str, Any], config: Config) -> Any:
    """Through Triton's own launch, which compiles what it has not compiled yet; returns the compiled kernel."""
    return kernel[(count,)](*arguments, **constants, **config.keywords)


class Launcher:
    """One kernel with one set of constants on one device, for tensors and integers of one kind.

    Whoever makes it says by what it makes it that all calls' tensors have the same types, with None in the same places,
    and that the scalars behind a call's own integers, on which no kernel specialises, are always `scalars`. Then the
    kernel that was compiled for the first call whose tensors all lie on 16 bytes is started directly by every other
    one: Triton's own look-up, several times as long as the start itself, would find the same.
    """

    def __init__(
        self,
        kernel: Any,
        space: Space,
        device: torch.device,
        n_programs: Programs,
        scalars: Sequence[float],
        **constants: Any,
    ) -> None:
        self.space, self._scalars = space, tuple(scalars)
        self._kernel, self._device, self._n_programs, self._constants = kernel, device, n_programs, constants
        self._gpu = gpu_name(device)
        self._index = -1 if device.index is None else device.index
        self._config = tuning.chosen(space, self._gpu)
        self._ready: tuple[Any, ...] | None = None

    def __call__(self, integers: tuple[int, ...], *tensors: Tensor | None) -> None:
        """Starts the programs for these integers, the first being the greatest, on the device's current stream."""
        if elsewhere(self._index):
            with torch.cuda.device(self._device):
                self(integers, *tensors)
            return
        if self._ready is not None and integers[0] < INT32_END:
            run, function, metadata, hooks, keywords, behind = self._ready
            addresses: list[int | None] = []
            bits = 0
            for tensor in tensors:
                if tensor is None:
                    addresses.append(None)
                else:
                    address = tensor.data_ptr()
                    bits |= address
                    addresses.append(address)
            if not (bits % tuning.VECTOR_BYTES or hooks[0] or hooks[1]):
                count = self._n_programs(keywords, *integers)
                stream = current_stream(self._index)
                run(count, 1, 1, stream, function, metadata, None, None, None, *addresses, *integers, *behind)
                return
        self._start(integers, tensors)

    @property
    def config(self) -> Config:
        """What the last call was launched with."""
        assert self._config is not None
        return self._config

    def _start(self, integers: tuple[int, ...], tensors: Sequence[Tensor | None]) -> None:
        arguments = (*tensors, *integers, *self._scalars)
        with _starting:
            if self._config is None:
                self._config = tuning.chosen(self.space, self._gpu)  # which another launcher may have found by now
            if self._config is None:
                assert self._gpu is not None
                count_of = self._n_programs
                self._config = search(
                    self._kernel, self.space, lambda config: count_of(config, *integers), arguments, self._constants
                )
                tuning.choose(self.space, self._gpu, self._config)
            count = self._n_programs(self._config.keywords, *integers)
            compiled = start(self._kernel, count, arguments, self._constants, self._config)
        aligned = all(tensor is None or tensor.data_ptr() % tuning.VECTOR_BYTES == 0 for tensor in tensors)
        if aligned and integers[0] < INT32_END and hasattr(compiled, "run") and not self._kernel.pre_run_hooks:
            named = {**self._constants, **self._config.keywords}
            constants = (named[name] for name in self._kernel.arg_names[len(arguments) :])
            behind = (*self._scalars, *constants)
            function, metadata = compiled.function, compiled.packed_metadata
            self._ready = compiled.run, function, metadata, _hooks(), self._config.keywords, behind


@functools.cache
def _hooks() -> tuple[Sequence[Any], Sequence[Any]]:
    """Whom Triton's launches tell of themselves, such as a profiler; the lists are theirs, and change."""
    from triton import knobs

    return knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls


def search(
    kernel: Any, space: Space, n_programs: Callable[[Any], int], arguments: Sequence[Any], constants: Mapping[str, Any]
) -> Config:
    """The fastest config for these arguments, by `triton.autotune`, which keeps what it finds on disk.

    A kernel writes its outputs from inputs that it leaves alone, and so may run any number of times, but that it begins
    with zeros in its `sync_ptr`, if any, which are made anew, and that it moves some tensors in place: copies, here.
    """
    import triton
    from triton.testing import do_bench

    timed = functools.partial(do_bench, warmup=tuning.SEARCH_WARMUP_MS, rep=tuning.SEARCH_MS)
    candidates = [
        triton.Config(
            dict(config.blocks), num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg
        )
        for config in space.configs
    ]
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    for name in MOVED:
        if given.get(name) is not None:
            given[name] = given[name].clone()
    zeros = [name for name in ("sync_ptr",) if given.get(name) is not None]
    tuner = triton.autotune(candidates, key=[], do_bench=timed, cache_results=True, reset_to_zero=zeros)(kernel)
    tuner[lambda meta: (n_programs(meta),)](*given.values(), **constants)
    for name in zeros:
        given[name].zero_()
    best = tuner.best_config
    return tuning.config(best.num_warps, best.num_stages, best.maxnreg, **best.kwargs)
