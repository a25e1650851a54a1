"""Results such as the suite would give; every figure in them is made up."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perf import workloads
from perf.findings import Findings
from perf.ops import FAMILY
from perf.points import PASSES, Point
from perf.records import FORMAT, dumped

Record = dict[str, Any]
HERE = {"torch": "0", "triton": "0", "date": "never"}
SHARES = {"triton_norm": 0.9, "torch": 0.5, "torch.compile": 0.75, "other": 0.6}
STEPS = {
    "triton_norm": 0.9,
    "torch": 1.0,
    "torch.compile": 0.93,
    "triton_norm, compiled": 0.88,
    "triton_norm, compiled, kernels forced": 0.91,
}


def write(path: Path, run: Record, **others: Sequence[Record]) -> Path:
    """Writes a results file of a timed run, and of records of other kinds."""
    facts = {name: value for name, value in run.items() if name not in ("records", "steps")}
    lines = [dumped("facts", {"format": FORMAT, **facts})]
    kinds = {"timing": run.get("records", []), "step": run.get("steps", []), **others}
    lines += [dumped(kind, record) for kind, records in kinds.items() for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def findings() -> Findings:
    return Findings(environment=dict(HERE))


def _timed(point: Point, contender: str, generator: torch.Generator) -> Record:
    record = {**point.describe(), "contender": contender, "status": "ok", "message": ""}
    if contender == "other" and point.op != "rms_norm":
        return record | {"status": "unsupported", "message": "made up"}
    if contender == "torch.compile" and not point.workload.landmark:
        return record | {"status": "skipped", "message": "made up, and long enough to be broken into several lines"}
    if contender == "torch" and point.workload.shape[-1] == 1023:
        return record | {"status": "wrong", "message": "made up"}
    noise = 0.95 + 0.1 * float(torch.rand((), generator=generator))
    gbps = 3000 * SHARES[contender] * noise * point.floor_bytes / (point.floor_bytes + (8 << 20))
    median = point.floor_bytes / gbps / 1e3
    record |= {"median_us": median, "p20_us": 0.97 * median, "p80_us": 1.05 * median, "host_us": 9.0}
    record |= {"gbps": gbps, "repetitions": 11, "errors": {"y": 1e-3}}
    return record | {"kernels": [f"made_up_{contender}_{point.op}_{point.mode}<float, 4>(float*, int)"] * 2}


def _steps() -> list[Record]:
    about = {"source": "batch 32", "dtype": "bf16", "status": "ok", "message": ""}
    times = {"host_us": 8e3, "without_norms_us": 7.5e3, "norms": 49}
    spread = {"p20_us": 0.98e4, "median_us": 1e4, "p80_us": 1.03e4}
    return [
        about | times | {"model": model, "contender": contender} | {name: fraction * us for name, us in spread.items()}
        for model in ("BERT base, one layer", "ResNet-50")
        for contender, fraction in STEPS.items()
    ]


def timing(points: Sequence[Point] | None = None, seed: int = 0) -> Record:
    """A timed run on a GPU, of all passes of everything that a quick one times."""
    generator = torch.Generator().manual_seed(seed)
    points = workloads.points(modes=PASSES) if points is None else points
    environment = {"GPU": "made-up GPU", **HERE}
    return {
        "format": FORMAT,
        "environment": environment,
        "copy_gbps": 3000.0,
        "contenders": {
            "triton_norm": "triton 0",
            "torch": "torch 0",
            "QuACK": "missing (ModuleNotFoundError: made up)",
        },
        "records": [_timed(point, contender, generator) for point in points for contender in SHARES],
        "steps": _steps(),
        "unreached": [],
    }


def _about(op: str, mode: str, dtype: str, shape: tuple[int, ...]) -> Record:
    point = Point(op, mode, dtype, workloads.Workload(FAMILY[op], "bars", shape, "made up"))
    return {**point.describe(), "status": "ok", "message": ""}


def traffic(op: str = "layer_norm", mode: str = "forward", shape: tuple[int, ...] = (1024, 4096)) -> Record:
    """A call that loads its input one and a half times, half of it again from cache."""
    record = _about(op, mode, "bf16", shape)
    floor, bulk = record["floor_bytes"], 2 * math.prod(shape) * 2
    nothing = {"loaded": 0, "stored": 0}
    parts = {name: dict(nothing) for name in ("bits", "parameters", "statistics", "partials")}
    moved = {"bulk": {"loaded": bulk * 3 // 4, "stored": bulk // 2}, **parts}
    moved["parameters"] = {"loaded": floor - bulk, "stored": 0}
    once = {**moved, "bulk": {"loaded": bulk // 2, "stored": bulk // 2}}
    total = sum(size for group in moved.values() for size in group.values())
    launches = [{"kernel": "made_up_kernel", "programs": 132, "loaded": total // 2, "stored": total // 2}]
    record |= {"launches": launches, "bytes": moved, "footprint": once}
    again = {"bulk": bulk // 4, "bits": 0}
    return record | {"again": again, "again_bytes": bulk // 4, "total_bytes": total, "footprint_bytes": floor}


def resources(target: str = "sm_90", spill_stores: int = 0, shape: tuple[int, ...] = (1024, 4096)) -> Record:
    record = _about("layer_norm", "forward", "bf16", shape)
    record |= {"target": target, "kernel": "made_up_kernel", "config": {}, "programs": 1024, "registers": 40}
    record |= {"spill_stores": spill_stores, "spill_loads": 2 * spill_stores, "instructions": 1396}
    record |= {"loads": {"128": 6}, "stores": {"128": 2}, "accesses": {"x": {"load": {"128": 2}}}}
    record |= {"shared_bytes": 8, "warps": 2}
    return record | {"resident_warps": 50, "possible_warps": 64, "limited_by": "registers"}


def numerics(data: str = "normal", ours: float | None = 0.501, torchs: float | None = 0.6) -> Record:
    about = {"op": "rms_norm", "dtype": "bf16", "columns": 64, "status": "ok", "message": "", "data": data}
    return about | {output: {"triton_norm": ours, "torch": torchs} for output in ("y", "dx")}
