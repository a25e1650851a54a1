"""Compiles the kernels exactly as they would be launched on other GPUs, disassembles them, and counts what they cost.

The process must not have TRITON_INTERPRET=1 set. Nothing runs: the ops are called with CPU tensors, and the one
function through which they launch is replaced by one that compiles.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from perf import assembly, ptx
from perf.calls import bind, candidate, make_inputs
from perf.ops import triton_norm_functions
from perf.points import Point
from perf.records import Code, Refused, Resources, failed, made, task_name
from triton_norm.launch import COMPILE_OPTIONS
from triton_norm.testing.stub_driver import as_on_gpu
from triton_norm.tuning import choices
from triton_norm.tuning.channel_clusters import APART, CLUSTERS
from triton_norm.tuning.configs import Config, Space
from triton_norm.tuning.limits import CLUSTERS_SINCE, PORTABLE_BLOCKS, Gpu, most_blocks_of

OPS = triton_norm_functions()


@dataclass(frozen=True)
class Target:
    """Describes a GPU, and the capacity of each of its multiprocessors (NVIDIA: SM, AMD: CU).

    Args:
        cache: bytes of L2, as the driver tells them: of an MI300X those of one XCD, which its programs share.
        blocks: blocks that a multiprocessor holds at once.
        cluster_blocks: most blocks of a cluster, where this version of Triton compiles clusters for the GPU.
    """

    name: str
    example: str
    gpu: GPUTarget
    multiprocessors: int
    cache: int
    warps: int
    registers: int
    register_unit: int
    shared: int
    shared_reserved: int
    blocks: int
    threads_per_block: int = 1024
    cluster_blocks: int = PORTABLE_BLOCKS

    @property
    def most_blocks(self) -> int:
        """Returns the most blocks of a cluster with this version of Triton; 1 without clusters."""
        capability = divmod(self.gpu.arch, 10) if self.gpu.backend == "cuda" else None
        return min(self.cluster_blocks, most_blocks_of(capability))


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", GPUTarget("cuda", 80, 32), 108, 40 << 20, 64, 65536, 256, 164 << 10, 1 << 10, 32),
        Target("sm_90", "H100, H200", GPUTarget("cuda", 90, 32), 132, 50 << 20, 64, 65536, 256, 228 << 10, 1 << 10, 32),
        Target("sm_100", "B200", GPUTarget("cuda", 100, 32), 148, 126 << 20, 64, 65536, 256, 228 << 10, 1 << 10, 32),
        Target("gfx942", "MI300X", GPUTarget("hip", "gfx942", 64), 304, 4 << 20, 32, 131072, 512, 64 << 10, 0, 32),
    )
}


def targets_of(names: Collection[str], blocks: int | None = None) -> list[Target]:
    """Returns targets by their names.

    Args:
        blocks: the most blocks of a cluster; None: as many as this version of Triton compiles.

    Raises:
        Refused: a name is no target's, or no target can have clusters of several blocks.
    """
    if unknown := [name for name in names if name not in TARGETS]:
        raise Refused(f"{unknown[0]!r} is none of the targets {', '.join(TARGETS)}")
    targets = [replace(TARGETS[name], cluster_blocks=blocks or PORTABLE_BLOCKS) for name in names]
    if blocks and blocks > 1:
        require_clusters()
        if all(target.most_blocks == 1 for target in targets):
            raise Refused(f"none of {', '.join(names)} has clusters")
    return targets


def require_clusters() -> None:
    """Raises Refused where Triton is too old to compile clusters."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < CLUSTERS_SINCE:
        since = ".".join(map(str, CLUSTERS_SINCE))
        raise Refused(f"clusters of several blocks take Triton {since} or later, and this is {triton.__version__}")


def occupancy(target: Target, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Returns the warps that a multiprocessor holds at once, and their limit. No warps: the block cannot be
    launched."""
    if warps * target.gpu.warp_size > target.threads_per_block:
        return 0, f"{target.threads_per_block} threads a block"
    per_warp = -(-registers * target.gpu.warp_size // target.register_unit) * target.register_unit
    limits = {
        "threads": min(target.warps // warps, target.blocks),
        "registers": target.registers // max(per_warp, 1) // warps,
        "shared memory": target.shared // (shared + target.shared_reserved) if shared else target.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit] * warps, limit


def inspect(compiled: Sequence[Any], target: Target) -> list[Code]:
    """Returns registers, spills, widths of global accesses (bits: how many instructions) and occupancy of compiled
    kernels.

    For NVIDIA the accesses are told apart by argument too, as they are in PTX: there, before the compiler's last
    step, which neither splits nor joins them but may write a loop's body more than once.
    """
    if target.gpu.backend == "cuda":
        cubins = [kernel.asm["cubin"] for kernel in compiled]
        mnemonics = assembly.disassemble(cubins, int(target.gpu.arch))
        codes = [assembly.nvidia(cubin, names) for cubin, names in zip(cubins, mnemonics, strict=True)]
    else:
        codes = [assembly.amd(kernel.asm["amdgcn"]) for kernel in compiled]
    for record, kernel in zip(codes, compiled, strict=True):
        shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
        resident, limit = occupancy(target, record["registers"], shared, warps)
        record |= {"shared_bytes": shared, "warps": warps, "resident_warps": resident}
        record |= {"possible_warps": target.warps, "limited_by": limit}
        n_blocks = kernel.metadata.num_ctas
        record |= {"blocks": n_blocks, "clusters": resident // warps * target.multiprocessors // n_blocks}
        text = kernel.asm.get("ptx")
        record["accesses"] = ptx.accesses(text, kernel.src.signature) if text else {}
        record["atomics"] = ptx.atomics(text) if text else []
    return codes


class CompileOnlyDriver:
    """A driver of Triton's that can only compile."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_current_device(self) -> str:
        return self._target.name

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    """Describes a launch on a GPU that is not known yet, with the first of `space`'s configs."""

    kernel: Any
    programs: int
    arguments: Sequence[Any]
    constants: dict[str, Any]
    config: Config
    space: Space

    def compile(self) -> Any:
        named = {**self.constants, **self.config.keywords, **COMPILE_OPTIONS}
        return self.kernel.warmup(*self.arguments, grid=(self.programs,), **named)

    def describe(self) -> dict[str, Any]:
        return {"kernel": self.kernel.__name__, "config": self.config.keywords, "programs": self.programs}


@contextmanager
def compiling_for(target: Target, clusters: bool | None = None) -> Iterator[list[Launch]]:
    """Lists every launch made inside, to be compiled for the target before the end; none is run.

    Args:
        clusters: whether channels are launched as clusters, where they can be; None: where this is the best guess.
    """
    launches: list[Launch] = []
    spaces: dict[int, Space] = {}
    forms = None if clusters is None else CLUSTERS if clusters else APART

    def choose_first(space: Space, _: object) -> Config:
        if forms is not None and forms in space.configs:
            return forms
        spaces[id(space.configs[0])] = space
        return space.configs[0]

    def list_only(kernel: Any, count: int, arguments: Sequence[Any], constants: dict[str, Any], config: Config) -> None:
        launches.append(Launch(kernel, count, arguments, constants, config, spaces[id(config)]))

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(CompileOnlyDriver(target))
    try:
        gpu = Gpu(None, target.multiprocessors, target.cache, target.gpu.warp_size, most_blocks=target.most_blocks)
        with as_on_gpu(gpu, start=list_only), mock.patch.object(choices, "chosen", choose_first):
            yield launches
    finally:
        driver._active = before


@contextmanager
def launches_of(point: Point, target: Target, clusters: bool | None = None) -> Iterator[list[Launch]]:
    """Lists the launches of one op's pass in one direction, in order, to be compiled before the end."""
    inputs = make_inputs(point, "cpu", blank=True)
    forward = bind(point, OPS, inputs)
    assert forward is not None
    call = candidate("triton_norm", point, forward, inputs)
    with compiling_for(target, clusters) as launches:
        state = call.prepare()
        launches.clear()
        call.run(state)
        yield launches


def compile_point(point: Point, target: Target, every_config: bool = False) -> list[tuple[Launch, Any]]:
    """Returns the launches of one op's pass in one direction, in order, and their kernels.

    Args:
        every_config: also the launches that a search would try.
    """
    compiled: dict[Any, tuple[Launch, Any]] = {}
    for clusters in (False, True) if every_config else (None,):
        with launches_of(point, target, clusters) as launches:
            for place, launch in enumerate(launches):
                for config in launch.space.configs if every_config else [launch.config]:
                    key = place, launch.kernel.__name__, launch.space, config
                    if key not in compiled:
                        one = replace(launch, config=config)
                        compiled[key] = one, one.compile()
    return list(compiled.values())


def _some(points: Sequence[Point], target: Target, known: dict[str, Code], every_config: bool) -> Iterator[Resources]:
    """Yields records of some points.

    Args:
        known: the code of kernels by their hashes; one kernel serves many shapes.
    """
    compiled_kernels: list[tuple[dict[str, Any], Any]] = []
    for point in points:
        described = {**point.describe(), "target": target.name}
        try:
            for launch, kernel in compile_point(point, target, every_config):
                compiled_kernels.append(({**described, **launch.describe(), "status": "ok", "message": ""}, kernel))
        except Exception as error:
            yield made(Resources, described, {"kernel": ""}, failed(error))
    new = {kernel.hash: kernel for _, kernel in compiled_kernels if kernel.hash not in known}
    known |= dict(zip(new, inspect(list(new.values()), target), strict=True))
    for description, kernel in compiled_kernels:
        yield made(Resources, description, known[kernel.hash])


def records(
    points: Sequence[Point], targets: Sequence[Target], at_once: int = 8, every_config: bool = False
) -> Iterator[Resources]:
    """Yields records of the config that is tried first on a GPU not known yet, or of every one that a search would
    try."""
    known: dict[str, dict[str, Code]] = {target.name: {} for target in targets}
    for start in range(0, len(points), at_once):
        for target in targets:
            yield from _some(points[start : start + at_once], target, known[target.name], every_config)


def line(record: Resources) -> str:
    name = f"{record['target']} {record['kernel']} of {task_name(record)}"
    if record["status"] != "ok":
        return f"{name}: {record['status']}, {record['message']}"
    code = f"{record['registers']} registers, {record['spill_stores']} spilled, loads {record['loads']}"
    if record["blocks"] > 1:
        code += f", {record['blocks']} blocks a cluster, {record['clusters']} clusters at once"
    return f"{name}: {code}"
