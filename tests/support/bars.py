"""Records of kernels from a process of their own, and the faults of machine code, for tests of bars."""

import json
import re

import pytest

from perf.ops import BULK
from support import processes

TARGETS = pytest.mark.parametrize(
    ("target", "dtypes", "which"),
    [
        ("sm_90", ("bf16",), "quick"),
        pytest.param("sm_80", ("bf16", "fp32"), "all", marks=pytest.mark.thorough),
        pytest.param("sm_90", ("bf16", "fp32"), "all", marks=pytest.mark.thorough),
        pytest.param("sm_100", ("bf16", "fp32"), "all", marks=pytest.mark.thorough),
    ],
)


def records(code, *arguments, **environment):
    """Returns the list `made_records` that `code` makes, run where TRITON_INTERPRET is not set but by `environment`.

    The binaries stay in Triton's cache, for the other tests and the report.
    """
    script = f"import json, sys\n{code}\nfor record in made_records:\n    print(json.dumps(record))"
    printed = processes.output("-c", script, *arguments, OMP_NUM_THREADS="1", **environment)
    return [json.loads(line) for line in printed.splitlines()]


def wanting(record, bits):
    """Returns the faults of a kernel's machine code; `bits` is the width of each access to x, y and their like.

    PTX says through which argument an access goes, and has the widths that the machine code has. Statistics, weights
    and sums may be narrower. Of AMD's machine code the arguments are not known.
    """
    if record["status"] != "ok":
        return [record["message"]]
    result = []
    if record["spill_stores"] or record["spill_loads"]:
        result.append(f"{record['spill_stores']} registers are stored and {record['spill_loads']} loaded back")
    if not 0 < record["resident_warps"] <= record["possible_warps"]:
        result.append(f"{record['resident_warps']} warps are resident")
    if not_integers := [kind for kind in record["atomics"] if not re.fullmatch(r"[bsu]\d+", kind)]:
        result.append(f"atomics of {not_integers}, whose order decides on the sum's bits")
    for kind in ("load", "store") if record["accesses"] else ():
        widths = {name: set(access.get(kind, {})) for name, access in record["accesses"].items()}
        if set().union(*widths.values()) != set(record[f"{kind}s"]):
            result.append(f"{kind}s of {widths} bits in PTX, of {record[f'{kind}s']} in machine code")
        others = {name: sorted(widths[name] - {str(bits)}) for name in widths if name in BULK}
        result += [f"{kind}s of {name} of {other} bits" for name, other in others.items() if other]
    return result


def moved(result):
    """Returns the arguments through which the kernels of all records load and store."""
    return {(name, kind) for record in result for name, access in record["accesses"].items() for kind in access}
