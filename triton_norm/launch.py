"""Launches kernels: chooses the config, selects the tensors' device, starts the compiled kernel."""

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
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from triton_norm.tuning import choices, configs
from triton_norm.tuning.configs import Config, Space, next_power_of_2
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of

T = TypeVar("T")

INT32_END = 2**31

Programs = Callable[..., int]
"""Functions of this type return the number of programs, from a config's keywords and a call's integers."""
MOVED = ("running_mean_ptr", "running_var_ptr", "num_batches_tracked_ptr")
"""Kernels update these arguments in place."""

COMPILE_OPTIONS: Mapping[str, Any] = MappingProxyType({"enable_fp_fusion": True})
"""Every kernel is compiled with these options. Triton's defaults differ by version: from 3.10 on it fuses no
multiply-adds by default, which would change the bits of a norm and its machine code."""

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


# The workspace of a stream has at least this many int32 zeros, enough for most launches.
LEAST_ZEROS = 4096
# At most this many streams have a workspace of zeros: a process may create streams without end.
MOST_STREAMS = 1024
# A search warms up each config for the first of these times, and measures it for the second.
SEARCH_WARMUP_MS, SEARCH_MS = 10, 40

_zeros: dict[tuple[int, int], Tensor] = {}

_starting: threading.RLock
"""The thread that searches, compiles or interprets holds this lock: Triton's interpreter keeps its state in globals,
and a search measures times."""


def _make_lock() -> None:
    """Creates the lock anew in a forked child, where the thread that held it may not exist."""
    global _starting
    _starting = threading.RLock()


_make_lock()


def starting() -> threading.RLock:
    """Returns the lock of the thread that searches, compiles or interprets."""
    return _starting


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_lock)


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def zeros(n: int, device: torch.device) -> Tensor:
    """Returns at least n int32 zeros, for a kernel that resets them to zeros.

    They belong to the current stream, whose kernels run in order. A captured graph has its own: any stream may run it.
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
    result = _zeros.get((index, stream))
    if result is None or result.numel() < n:
        size = next_power_of_2(max(n, LEAST_ZEROS))
        if len(_zeros) >= MOST_STREAMS:
            _zeros.clear()  # safe: a stream's memory is reused on that stream alone, after its kernels
        result = _zeros[index, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    return result


def start(kernel: Any, count: int, arguments: Sequence[Any], constants: Mapping[str, Any], config: Config) -> Any:
    """Starts the kernel by Triton's own launch, which compiles it if necessary. Returns the compiled kernel."""
    return kernel[(count,)](*arguments, **constants, **config.keywords, **COMPILE_OPTIONS)


class Compiled(NamedTuple):
    """Holds a compiled kernel for `Launch`, which starts it without Triton's own launch.

    Args:
        run: Triton's launcher in C.
        function: the kernel's handle.
        metadata: the launch options, packed for `run`.
        hooks: Triton's lists of launch enter and exit hooks.
        behind: the arguments after a call's tensors and integers.
    """

    run: Callable[..., Any]
    function: Any
    metadata: Any
    hooks: tuple[Sequence[Any], Sequence[Any]]
    behind: tuple[Any, ...]


class Launcher:
    """Starts one kernel with one set of constants on one device, for arguments of one signature.

    All calls pass tensors of the same dtypes, None in the same positions, and the same `scalars` behind their own
    integers. The kernel compiled for the first call with tensors aligned to 16 bytes therefore fits every other such
    call, and `Launch` starts it without Triton's own look-up of arguments, which takes several times as long.

    Args:
        n_programs: returns the number of programs.
        scalars: arguments whose values no kernel is specialised for.
        constants: constexpr arguments other than the config's.
    """

    def __init__(
        self,
        kernel: Any,
        space: Space,
        device: torch.device,
        n_programs: Programs,
        scalars: Sequence[float | None],
        **constants: Any,
    ) -> None:
        self.space, self.n_programs = space, n_programs
        self._kernel, self._scalars, self._constants = kernel, tuple(scalars), constants
        self._gpu = gpu_of(device).name
        self.index = -1 if device.index is None else device.index
        self._config = choices.chosen(space, self._gpu)
        self.compiled: Compiled | None = None

    @property
    def candidates(self) -> Sequence[Config]:
        return self.space.configs if self._config is None else [self._config]

    @property
    def span(self) -> int:
        """Returns the fewest columns of a row that a program may own."""
        return min(config.span for config in self.candidates)

    @property
    def config(self) -> Config | None:
        """Returns the chosen config, or None before the first launch of a kernel that has to be searched for."""
        return self._config

    def start(self, integers: tuple[int, ...], tensors: Sequence[Tensor | None]) -> None:
        """Starts the kernel by Triton's own launch, on the current device; chooses its config and compiles it first."""
        arguments = (*tensors, *integers, *self._scalars)
        with _starting:
            compiled = _with_a_cache(self._kernel, lambda: self._choose_and_start(integers, arguments))
        assert self._config is not None
        aligned = all(tensor is None or tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
        if aligned and integers[0] < INT32_END and hasattr(compiled, "run") and not self._kernel.pre_run_hooks:
            named = {**self._constants, **self._config.keywords}
            constants = (named[name] for name in self._kernel.arg_names[len(arguments) :])
            behind = (*self._scalars, *constants)
            self.compiled = Compiled(compiled.run, compiled.function, compiled.packed_metadata, _hooks(), behind)

    def _choose_and_start(self, integers: tuple[int, ...], arguments: Sequence[Any]) -> Any:
        if self._config is None:
            self._config = choices.chosen(self.space, self._gpu)  # another launcher may have chosen it by now
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
    """Launches a launcher's kernel on the grid of one set of integers, the first of which is the greatest."""

    def __init__(self, launcher: Launcher, *integers: int) -> None:
        self.launcher, self._integers, self._index = launcher, integers, launcher.index
        self._start: Callable[..., bool] | None = None
        self._hooks: tuple[Sequence[Any], Sequence[Any]] = ((), ())

    def starts(self, *tensors: Tensor | None) -> bool:
        """Starts the compiled kernel, or returns False if only a call can: before the first one, on another device than
        the current, for tensors that are not aligned, and under Triton's hooks."""
        start, (entered, left) = self._start, self._hooks
        if start is None or entered or left or 0 <= self._index != current_device():
            return False
        return start(current_stream(self._index), *tensors)

    def __call__(self, *tensors: Tensor | None) -> None:
        if 0 <= self._index != current_device():  # Triton launches on the current device, whatever the arguments
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
        launcher, compiled, integers = self.launcher, self.launcher.compiled, self._integers
        if compiled is not None and launcher.config is not None and integers[0] < INT32_END:
            self._hooks = compiled.hooks
            count = launcher.n_programs(launcher.config.keywords, *integers)
            bind = _starting_on(tuple(tensor is not None for tensor in tensors))
            self._start = bind(compiled.run, count, compiled.function, compiled.metadata, (*integers, *compiled.behind))
        return self._start


@functools.cache
def _starting_on(present: tuple[bool, ...]) -> Callable[..., Callable[..., bool]]:
    """Returns bind(parts of a compiled kernel) → start(stream, *tensors), for tensors that are None unless `present`.

    start launches the kernel and returns True, or returns False if an address is not a multiple of 16 bytes.

    The function is generated: a loop over 13 arguments, 9 of them tensors, takes 0.3 µs more of 1.9. An extension in C
    gained no more than that, since data_ptr() itself dominates.
    """
    places = range(len(present))
    tensors = [place for place in places if present[place]]
    source = f"""
def bind(run, count, function, metadata, behind):
    def start(stream, {", ".join(f"tensor_{place}" for place in places)}):
        {"; ".join(f"address_{place} = tensor_{place}.data_ptr()" for place in tensors)}
        if ({" | ".join(f"address_{place}" for place in tensors)}) % {VECTOR_BYTES}:
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


UNUSABLE = OSError, ValueError, TypeError, LookupError
"""Triton raises these errors if a file of its cache can't be written, or has unexpected content."""

_CACHING = {"triton.compiler.compiler", "triton.runtime.cache", "triton.runtime.build"}
"""These modules of Triton read and write its cache, always before a kernel is launched."""

_warned: set[str] = set()
"""This process has been warned of these subjects."""


def _warn_once(subject: str, message: str, error: BaseException) -> None:
    if subject not in _warned:
        _warned.add(subject)
        warnings.warn(f"triton_norm: {message}: {error!r}", stacklevel=3)


def warn_of_cache(error: BaseException) -> None:
    _warn_once("cache", "Triton's cache on disk can't be used, and nothing is stored for the next process", error)


def warn_of_cluster(which: str, error: BaseException) -> None:
    _warn_once("cluster", f"{which} could not be launched as a cluster, and is left out", error)


@functools.cache
def _folder() -> str:
    """Returns a temporary folder for Triton's files, deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="triton_norm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _with_a_cache(kernel: Any, act: Callable[[], T]) -> T:
    """Returns the result of `act`, which launches the kernel; if Triton's cache is unusable, with a temporary cache.

    Loading a damaged binary raises RuntimeError. Triton would then silently launch nothing, so its caches are cleared.
    """
    try:
        return act()
    except (*UNUSABLE, RuntimeError) as error:
        if _CACHING.isdisjoint(frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        from triton import knobs

        kernel.device_caches.clear()
        try:
            with knobs.cache.scope():
                knobs.cache.dir = _folder()
                result = act()
        except (*UNUSABLE, RuntimeError):
            kernel.device_caches.clear()
            raise error from None
        warn_of_cache(error)
        return result


@functools.cache
def _hooks() -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns Triton's lists of launch enter and exit hooks. They are live: a profiler may add to them at any time."""
    from triton import knobs

    return knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls


def _without_failed_clusters(bench: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a search's measurement in which a cluster that can't be compiled or launched takes forever."""

    def measure(*arguments: Any, config: Any, **meta: Any) -> Any:
        try:
            return bench(*arguments, config=config, **meta)
        except Exception as error:
            if config.num_ctas == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            warn_of_cluster(f"a config of {config.num_ctas} blocks", error)
            return [float("inf")] * 3

    return measure


def _for_triton(config: Config) -> Any:
    """Returns the config as a triton.Config."""
    import triton

    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "num_ctas": config.num_ctas}
    return triton.Config(dict(config.blocks), **options, maxnreg=config.maxnreg)


def search(
    kernel: Any, space: Space, n_programs: Callable[[Any], int], arguments: Sequence[Any], constants: Mapping[str, Any]
) -> Config:
    """Returns the fastest config for these arguments, by `triton.autotune`, which caches its result on disk.

    Repeated runs are harmless: a kernel doesn't write its inputs, `sync_ptr` is reset to zeros, and tensors that are
    updated in place are copied. A result that can't be written to disk, or that is none of these configs, is ignored.
    """
    import triton
    from triton.testing import do_bench

    timed = functools.partial(do_bench, warmup=SEARCH_WARMUP_MS, rep=SEARCH_MS)
    candidates = [_for_triton(config) for config in space.configs]
    named_arguments = dict(zip(kernel.arg_names, arguments, strict=False))
    for name in MOVED:
        if named_arguments.get(name) is not None:
            named_arguments[name] = named_arguments[name].clone()
    zeroed = [name for name in ("sync_ptr",) if named_arguments.get(name) is not None]

    def matching(chosen: Any) -> Config:
        own = chosen.num_warps, chosen.num_stages, chosen.maxnreg, chosen.num_ctas
        keywords = configs.config(*own, **chosen.kwargs).keywords
        result = space.find(keywords)
        if result is None:
            raise ValueError(f"{keywords} is none of the configs of {space.kernel}")
        return result

    def best(cached: bool) -> Config:
        options: dict[str, Any] = {"do_bench": timed, "cache_results": cached, "reset_to_zero": zeroed}
        tuner: Any = triton.autotune(candidates, key=[], **options)(kernel)
        look_up = tuner.check_disk_cache

        def check_disk_cache(*arguments: Any) -> Any:
            result = look_up(*arguments)
            for chosen in tuner.cache.values():  # launched next
                matching(chosen)
            return result

        tuner.check_disk_cache = check_disk_cache
        tuner._bench = _without_failed_clusters(tuner._bench)
        tuner[lambda meta: (n_programs(meta),)](*named_arguments.values(), **constants, **COMPILE_OPTIONS)
        return matching(tuner.best_config)

    try:
        return best(cached=True)
    except UNUSABLE as error:
        result = best(cached=False)
        warn_of_cache(error)
        return result
    finally:
        for name in zeroed:
            named_arguments[name].zero_()
