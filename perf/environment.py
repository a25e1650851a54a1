"""Describes the machine and the versions: enough to repeat a measurement, nothing that names a machine or its user."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
GPU_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "SM clock as read",
    "clocks.mem": "memory clock as read",
    "clocks.max.sm": "SM clock, maximum",
    "clocks.max.mem": "memory clock, maximum",
    "power.limit": "power limit",
}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=HERE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Returns the checkout's commit, with "+ changes" where files differ from it; "unknown" outside a checkout."""
    name = _output("git", "rev-parse", "--short=12", "HEAD")
    if not name:
        return "unknown"
    return f"{name} + changes" if _output("git", "status", "--porcelain") else name


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gpu() -> dict[str, str]:
    """Returns name, size, driver and clocks of the GPU that would be measured; nothing without one."""
    if not has_gpu():
        return {}
    import torch

    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "GPU": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "GPU memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "CUDA": str(torch.version.cuda or torch.version.hip),
    }
    if shutil.which("nvidia-smi"):
        query = f"--query-gpu={','.join(GPU_FIELDS)}"
        this_one = f"--id=GPU-{str(properties.uuid).removeprefix('GPU-')}"
        line = _output("nvidia-smi", query, "--format=csv,noheader", this_one)
        values = [value.strip() for value in line.split(",")] if line else []
        if len(values) == len(GPU_FIELDS):
            facts |= dict(zip(GPU_FIELDS.values(), values, strict=True))
    return facts


def describe() -> dict[str, str]:
    return {
        **gpu(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "platform": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": version("torch"),
        "triton": version("triton"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def machine(environment: dict[str, str]) -> str:
    """Returns one line for the foot of a picture."""
    device = environment.get("GPU") or "no GPU"
    return f"{device} · torch {environment['torch']} · triton {environment['triton']} · {environment['date']}"
