"""Stores hashes of the kernels' code, and tells which kernels compile to other code later.

A change that should only rename or move things in the kernels leaves every hash as it was. The process must not have
TRITON_INTERPRET=1 set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import triton

from perf import assembly
from perf.points import Point
from perf.records import Refused
from perf.resources import Target, compile_point

Code = dict[str, dict[str, str]]  # by point and target, then by place and name of a launch: the SHA-256 of its code


def _hash(kernel: Any) -> str:
    """Returns the hash of a compiled kernel's PTX, or of its assembly on AMD, without debug information."""
    if "ptx" in kernel.asm:
        text = assembly.without_debug(kernel.asm["ptx"], comment="//")
    else:
        text = assembly.without_debug(kernel.asm["amdgcn"], comment=";")
    return sha256(text.encode()).hexdigest()


def hashes(points: Sequence[Point], targets: Sequence[Target], every_config: bool = False) -> Code:
    """Compiles the launches of all points for all targets, of the first or of every config; returns their hashes."""
    code: Code = {}
    for target in targets:
        for point in points:
            compiled = compile_point(point, target, every_config)
            code[f"{target.name} {point}"] = {
                f"{place} {launch.kernel.__name__}": _hash(kernel) for place, (launch, kernel) in enumerate(compiled)
            }
    return code


def save(path: Path, code: Code, say: Callable[[str], None]) -> None:
    """Writes the hashes with the versions that they are of."""
    stored = {"torch": torch.__version__, "triton": triton.__version__, "code": code}
    path.write_text(json.dumps(stored, indent=1) + "\n")
    say(f"{sum(map(len, code.values()))} kernels at {len(code)} points stored in {path}")


def load(path: Path) -> Code:
    """Reads stored hashes; raises Refused where they are of another Triton, whose code is another one anyway."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path} can't be read: {error}") from error
    if stored["triton"] != triton.__version__:
        raise Refused(f"{path} is of Triton {stored['triton']}, and this is {triton.__version__}")
    code: Code = stored["code"]
    return code


def compare(before: Code, now: Code, say: Callable[[str], None]) -> int:
    """Says which kernels at the points that are compiled now differ from before; returns how many do.

    A kernel that is there only before or only now differs.
    """
    equal = different = 0
    for where, launches in now.items():
        known = before.get(where, {})
        for launch in sorted({*known, *launches}):
            if known.get(launch) == launches.get(launch):
                equal += 1
            else:
                different += 1
                why = "is new" if launch not in known else "is gone" if launch not in launches else "differs"
                say(f"{where}: {launch} {why}")
    rest = len(before.keys() - now.keys())
    say(f"{equal} kernels equal, {different} different" + (f"; {rest} stored points were not compiled" if rest else ""))
    return different
