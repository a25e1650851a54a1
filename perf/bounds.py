"""Lower bounds on the time of each op on GPUs that are not here: computed from what the kernels must move, never
measured. No call is faster; how much slower one is, only a GPU tells.

A bound is of a call that begins with cold caches, as the suite times it (an MI300X's Infinity Cache included), and ends
while what it wrote may still be in cache. Of what a call moves it counts the bytes that must cross the memory bus:

- what it loads, each address once, though of x and its like no more than the op's inputs: what the call wrote before it
  loads it may be in cache. Where several launches load the inputs again, what is more than the cache holds between two;
- what it stores, each address once, less the cache's size; not its partial sums, which need never leave the cache.

The bus takes no less time than its peak bandwidth allows. Nor do loads take less than Little's law allows: bytes in
flight ÷ latency. In flight are at most the destinations that the resident programs' loads have: a load instruction
waits for the one before it to the same registers, and copies in flight to shared memory fit in there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from perf.findings import Record
from perf.points import BULK, ITEMSIZE, floor_of
from perf.resources import TARGETS


@dataclass(frozen=True)
class Gpu:
    """Peak bandwidth of its memory in GB/s, and bytes of all cache that programs share."""

    name: str
    target: str
    peak_gbps: float
    cache: int


# Bandwidth and cache from the vendors' data sheets and white papers; the larger where they give several.
GPUS = (
    Gpu("A100 SXM 80 GB", "sm_80", 2039, 40 << 20),  # NVIDIA A100 data sheet: 2,039 GB/s
    Gpu("H100 SXM", "sm_90", 3350, 50 << 20),  # NVIDIA H100 data sheet: 3.35 TB/s
    Gpu("H200", "sm_90", 4800, 50 << 20),  # NVIDIA H200 data sheet: 4.8 TB/s
    Gpu("B200", "sm_100", 8000, 126 << 20),  # NVIDIA DGX B200 data sheet: 64 TB/s for 8 GPUs; elsewhere 7.7 each
    Gpu("MI300X", "gfx942", 5300, (256 + 32) << 20),  # AMD MI300X data sheet: 5.3 TB/s; Infinity Cache and L2
)
# The least that is published of these GPUs, rounded down: 290 cycles of an A100 at 1.41 GHz are 206 ns (Abdelkhalik
# and others 2022, arXiv 2208.11174, pointer chasing). Others find more: 479 cycles of an H100 (arXiv 2402.13499).
LATENCY_NS = 200.0

KEY = ("op", "mode", "dtype", "shape", "layout")
BANDWIDTH, OCCUPANCY, LATENCY = "memory bandwidth", "occupancy", "latency"


def _key(record: Record) -> tuple[object, ...]:
    return tuple(str(record[name]) for name in KEY)


def must_load(traffic: Record, cache: int, launches: Sequence[str]) -> int:
    """`launches`: the kernels that this GPU would run. Only where they are those counted are second readings told."""
    reads = sum(name in BULK for name in floor_of(traffic["op"], traffic["mode"]).reads)
    inputs = reads * prod(traffic["shape"]) * ITEMSIZE[traffic["dtype"]]
    footprint = {group: ways["loaded"] for group, ways in traffic["footprint"].items()}
    bulk = min(footprint["bulk"], inputs)
    counted = [launch["kernel"] for launch in traffic["launches"]]
    if footprint["bulk"] <= inputs and counted == list(launches):
        by_launch = traffic["bytes"]["bulk"]["loaded"] - traffic["again"]["bulk"]
        bulk = max(bulk, min(by_launch, len(counted) * bulk) - (len(counted) - 1) * cache)
    return int(bulk + footprint["bits"] + footprint["parameters"])


def must_store(traffic: Record, cache: int) -> int:
    stored = sum(ways["stored"] for group, ways in traffic["footprint"].items() if group != "partials")
    return max(0, int(stored) - cache)


def in_flight(kernel: Record) -> int:
    """Bytes of loads that all resident programs of a launch can have under way at once, at most."""
    target = TARGETS[kernel["target"]]
    threads = kernel["warps"] * target.gpu.warp_size
    loads = threads * sum(int(bits) // 8 * count for bits, count in kernel["loads"].items())
    program = min(loads, threads * 4 * kernel["registers"])
    program += kernel["shared_bytes"] if kernel["asynchronous_copies"] else 0
    resident = kernel["resident_warps"] // kernel["warps"] * target.multiprocessors
    return int(min(kernel["programs"], resident) * program)


def bound(traffic: Record, kernels: Sequence[Record], gpu: Gpu) -> Record:
    """The bytes, and the least time for them with what limits it."""
    loaded = must_load(traffic, gpu.cache, [kernel["kernel"] for kernel in kernels])
    size = loaded + must_store(traffic, gpu.cache)
    flying = max(map(in_flight, kernels))
    limits = {BANDWIDTH: size / gpu.peak_gbps / 1e3}
    if flying < loaded:
        limits[OCCUPANCY] = loaded / flying * LATENCY_NS / 1e3
    else:
        limits[LATENCY] = LATENCY_NS / 1e3
    limit = max(limits, key=lambda name: limits[name])
    return {
        "bytes": size,
        "bytes_in_flight": flying,
        "bandwidth_gbps": size / limits[limit] / 1e3,
        "limited_by": limit,
        "bound_us": limits[limit],
    }


def _why_not(traffic: Record, kernels: Sequence[Record]) -> str:
    """What is wanting for a bound, or nothing."""
    if traffic["status"] != "ok":
        return f"bytes not counted: {traffic['status']}, {traffic['message']}"
    if not kernels:
        return "not compiled"
    failed = [f"{kernel['status']}, {kernel['message']}" for kernel in kernels if kernel["status"] != "ok"]
    if failed:
        return f"not compiled: {failed[0]}"
    return "" if all(kernel["resident_warps"] for kernel in kernels) else "cannot be launched"


def records(traffic: Sequence[Record], resources: Sequence[Record]) -> Iterator[Record]:
    """One for each point whose bytes were counted, and each GPU."""
    compiled: dict[tuple[object, ...], list[Record]] = {}
    for record in resources:
        compiled.setdefault((record["target"], *_key(record)), []).append(record)
    for counted in traffic:
        for gpu in GPUS:
            kernels = compiled.get((gpu.target, *_key(counted)), [])
            about = {name: counted[name] for name in KEY} | {"target": gpu.target, "gpu": gpu.name}
            message = _why_not(counted, kernels)
            about |= {"status": "skipped" if message else "ok", "message": message}
            yield about if message else about | bound(counted, kernels, gpu)
