"""The one place that launches: chooses the config, stands on the tensors' device, starts the kernel."""

import atexit
import functools
import os
import shutil
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from triton_norm.tuning import choices, configs
from triton_norm.tuning.configs import Config, Space, next_power_of_2
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of

T = TypeVar("T")

INT32_END = 2**31

Programs = Callable[..., int]
"""The number of programs for a config's keywords and a call's own integers."""
MOVED = ("running_mean_ptr", "running_var_ptr", "num_batches_tracked_ptr")
"""What kernels move in place."""

COMPILE_OPTIONS: Mapping[str, Any] = MappingProxyType({"enable_fp_fusion": True})
"""Options that every kernel is compiled with. Triton's own defaults differ by version: from 3.10 on it contracts no
products and sums to fused multiply-adds unless asked to, which would change a norm's bits and its machine code."""

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


# A stream keeps at least this many zeros, enough for most launches.
LEAST_ZEROS = 4096
# At most this many streams keep zeros: a process may make streams without end.
MOST_STREAMS = 1024
# A search runs each config for the first of these times before it times it for the second.
SEARCH_WARMUP_MS, SEARCH_MS = 10, 40

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


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def zeros(n: int, device: torch.device) -> Tensor:
    """At least n int32 zeros, for a kernel that leaves them zeros: kept for each stream, where kernels run in turn.

    A captured graph has its own, since it may be replayed on any stream.
    """
    index = device.index
    if not _has_streams(device):
        return torch.zeros(n, dtype=torch.int32, device=device)
    if index != current_device():
        with torch.cuda.device(index):
            return zeros(n, device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    stream = current_stream(index)
    kept = _zeros.get((index, stream))
    if kept is None or kept.numel() < n:
        size = next_power_of_2(max(n, LEAST_ZEROS))
        if len(_zeros) >= MOST_STREAMS:
            _zeros.clear()  # what comes to lie in their memory is their own streams', and so comes after their kernels
        kept = _zeros[index, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    return kept


def start(kernel: Any, count: int, arguments: Sequence[Any], constants: Mapping[str, Any], config: Config) -> Any:
    """Through Triton's own launch, which compiles what it has not compiled yet; returns the compiled kernel."""
    return kernel[(count,)](*arguments, **constants, **config.keywords, **COMPILE_OPTIONS)


class Launcher:
    """One kernel with one set of constants on one device, for arguments of one signature: each call's tensors have the
    same dtypes, with None in the same places, and the scalars behind a call's own integers are always `scalars`.

    The kernel that was compiled for the first call whose tensors all lie on 16 bytes is therefore the right one for
    every other such call, and `Launch` starts it without Triton's own look-up, which takes several times as long.

    Args:
        n_programs: the number of programs for a config's keywords and a call's integers.
        scalars: arguments on whose values no kernel specialises.
        constants: the kernel's constexpr arguments, but for those of the config.
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
        self.space, self.n_programs = space, n_programs
        self._kernel, self._scalars, self._constants = kernel, tuple(scalars), constants
        self._gpu = gpu_of(device).name
        self.index = -1 if device.index is None else device.index
        self._config = choices.chosen(space, self._gpu)
        self.ready: tuple[Any, ...] | None = None

    @property
    def candidates(self) -> Sequence[Config]:
        """The configs that the next call may launch."""
        return self.space.configs if self._config is None else [self._config]

    @functools.cached_property
    def span(self) -> int:
        """The fewest columns of a row that a program may own."""
        return min(config.span for config in self.candidates)

    @property
    def config(self) -> Config | None:
        """The config that was chosen, None before the first launch of a kernel that has to be searched for."""
        return self._config

    def start(self, integers: tuple[int, ...], tensors: Sequence[Tensor | None]) -> None:
        """Starts the kernel as Triton does, on the current device, with its config chosen and compiled first."""
        arguments = (*tensors, *integers, *self._scalars)
        with _starting:
            compiled = _with_a_cache(self._kernel, lambda: self._choose_and_start(integers, arguments))
        assert self._config is not None
        aligned = all(tensor is None or tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
        if aligned and integers[0] < INT32_END and hasattr(compiled, "run") and not self._kernel.pre_run_hooks:
            named = {**self._constants, **self._config.keywords}
            constants = (named[name] for name in self._kernel.arg_names[len(arguments) :])
            behind = (*self._scalars, *constants)
            self.ready = compiled.run, compiled.function, compiled.packed_metadata, _hooks(), behind

    def _choose_and_start(self, integers: tuple[int, ...], arguments: Sequence[Any]) -> Any:
        if self._config is None:
            self._config = choices.chosen(self.space, self._gpu)  # which another launcher may have found by now
        if self._config is None:
            assert self._gpu is not None
            count_of = self.n_programs
            self._config = search(
                self._kernel, self.space, lambda config: count_of(config, *integers), arguments, self._constants
            )
            choices.choose(self.space, self._gpu, self._config)
        count = self.n_programs(self._config.keywords, *integers)
        return start(self._kernel, count, arguments, self._constants, self._config)


class Launch:
    """A launcher's kernel on the grid of one set of integers, of which the first is the greatest."""

    def __init__(self, launcher: Launcher, *integers: int) -> None:
        self.launcher, self._integers, self._index = launcher, integers, launcher.index
        self._start: Callable[..., bool] | None = None
        self._hooks: tuple[Sequence[Any], Sequence[Any]] = ((), ())

    def __call__(self, *tensors: Tensor | None) -> None:
        """Starts the programs on the current stream of the tensors' device."""
        if 0 <= self._index != current_device():  # Triton launches on the current one, whatever the arguments
            with torch.cuda.device(self._index):
                self(*tensors)
            return
        start = self._start or self._bind(tensors)
        if start is not None:
            entered, left = self._hooks
            if not (entered or left) and start(current_stream(self._index), *tensors):
                return
        self.launcher.start(self._integers, tensors)

    def _bind(self, tensors: Sequence[Tensor | None]) -> Callable[..., bool] | None:
        launcher, integers = self.launcher, self._integers
        if launcher.ready is not None and launcher.config is not None and integers[0] < INT32_END:
            run, function, metadata, self._hooks, behind = launcher.ready
            count = launcher.n_programs(launcher.config.keywords, *integers)
            bind = _starting_on(tuple(tensor is not None for tensor in tensors))
            self._start = bind(run, count, function, metadata, (*integers, *behind))
        return self._start


@functools.cache
def _starting_on(present: tuple[bool, ...]) -> Callable[..., Callable[..., bool]]:
    """Returns a function of a compiled kernel, which returns a function of a stream and tensors. That starts the kernel
    on their addresses and returns True, or returns False where one is not a multiple of 16 bytes.

    It is written for the places where there are tensors. A loop over 13 arguments, 9 of them tensors, took 1.4 µs more
    of 3.7; an extension in C took 0.2 to 0.3 µs less than the loop, since data_ptr() itself is what takes the time.
    """
    places = range(len(present))
    there = [place for place in places if present[place]]
    source = f"""
def bind(run, count, function, metadata, behind):
    def start(stream, {", ".join(f"tensor_{place}" for place in places)}):
        {"; ".join(f"address_{place} = tensor_{place}.data_ptr()" for place in there)}
        if ({" | ".join(f"address_{place}" for place in there)}) % {VECTOR_BYTES}:
            return False
        run(count, 1, 1, stream, function, metadata, None, None, None,
            {", ".join(f"address_{place}" if present[place] else "None" for place in places)}, *behind)
        return True
    return start
"""
    written: dict[str, Any] = {}
    exec(source, written)
    bind: Callable[..., Callable[..., bool]] = written["bind"]
    return bind


_UNUSABLE = OSError, ValueError, TypeError, LookupError
"""What Triton raises where a file of its cache can't be written, or holds something else than it wrote."""

_CACHING = {"triton.compiler.compiler", "triton.runtime.cache", "triton.runtime.build"}
"""Modules of Triton's that read and write it; all before a kernel is launched."""

_told: list[BaseException] = []


def _tell_of_cache(error: BaseException) -> None:
    """Once in a process."""
    if not _told:
        _told.append(error)
        message = "triton_norm: Triton's cache on disk can't be used, and nothing is kept for the next process"
        warnings.warn(f"{message}: {error!r}", stacklevel=2)


@functools.cache
def _folder() -> str:
    """For what Triton must write to be able to compile, until this process ends."""
    folder = tempfile.mkdtemp(prefix="triton_norm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _with_a_cache(kernel: Any, act: Callable[[], T]) -> T:
    """What `act` returns, which launches the kernel; where Triton's cache stands in its way, with another meanwhile.

    A RuntimeError is how a GPU refuses to load what was compiled. Triton would launch nothing in its place next time.
    """
    try:
        return act()
    except (*_UNUSABLE, RuntimeError) as error:
        if _CACHING.isdisjoint(frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        from triton import knobs

        kernel.device_caches.clear()
        try:
            with knobs.cache.scope():
                knobs.cache.dir = _folder()
                found = act()
        except (*_UNUSABLE, RuntimeError):
            kernel.device_caches.clear()
            raise error from None
        _tell_of_cache(error)
        return found


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
    with zeros in its `sync_ptr`, if any, which are made anew, and that it moves some tensors in place: copies, here. A
    result that can't be written, or one on disk that is none of these configs, is as if there were no disk.
    """
    import triton
    from triton.testing import do_bench

    timed = functools.partial(do_bench, warmup=SEARCH_WARMUP_MS, rep=SEARCH_MS)
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

    def known(chosen: Any) -> Config:
        keywords = configs.config(chosen.num_warps, chosen.num_stages, chosen.maxnreg, **chosen.kwargs).keywords
        found = space.find(keywords)
        if found is None:
            raise ValueError(f"{keywords} is none of the configs of {space.kernel}")
        return found

    def best(kept: bool) -> Config:
        options: dict[str, Any] = {"do_bench": timed, "cache_results": kept, "reset_to_zero": zeros}
        tuner: Any = triton.autotune(candidates, key=[], **options)(kernel)
        look_up = tuner.check_disk_cache

        def check_disk_cache(*arguments: Any) -> Any:
            found = look_up(*arguments)
            for chosen in tuner.cache.values():  # what is launched next
                known(chosen)
            return found

        tuner.check_disk_cache = check_disk_cache
        tuner[lambda meta: (n_programs(meta),)](*given.values(), **constants, **COMPILE_OPTIONS)
        return known(tuner.best_config)

    try:
        return best(kept=True)
    except _UNUSABLE as error:
        found = best(kept=False)
        _tell_of_cache(error)
        return found
    finally:
        for name in zeros:
            given[name].zero_()
