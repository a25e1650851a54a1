"""Reads machine code back: a compiled kernel's instructions, and how wide its accesses to memory are."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import triton

from perf.records import Code

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_WIDTH = re.compile(r"\.[SU]?(8|16|64|128|256)(?=\.|$)")
_GCN = re.compile(r"^\s+((?:v|s|global|buffer|ds|flat|scratch)_\w+)", re.MULTILINE)
_DEBUG = re.compile(r"\.(loc|file)\s|[.$]L_*(tmp|func_begin|func_end)\d+:")
_GCN_NARROW = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _text_section(cubin: bytes) -> bytes:
    """Returns the instructions of an ELF file with one kernel."""
    (section_table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, section_table + i * size) for i in range(count)]
    names = sections[names_index][4]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", names + name):
            return cubin[offset : offset + length]
    raise ValueError("no code in the compiled kernel")


def disassemble(cubins: Sequence[bytes], capability: int) -> list[list[str]]:
    """Returns each kernel's mnemonics. nvdisasm takes half a second to start, so it starts once for all of them."""
    texts = [_text_section(cubin) for cubin in cubins]
    if not texts:
        return []  # nvdisasm fails on an empty file
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        architecture = f"SM{capability}{'a' if capability >= 90 else ''}"
        instructions = [
            (int(at, 16), name) for at, name in _SASS.findall(_run("nvdisasm", "-b", architecture, file.name))
        ]
    code: list[list[str]] = [[] for _ in texts]
    ends = list(accumulate(map(len, texts)))
    for at, name in instructions:
        code[bisect(ends, at)].append(name)
    return code


def without_debug(text: str, comment: str) -> str:
    """Returns the lines of an assembly without those that only debuggers and readers use.

    Args:
        text: PTX, or AMD's assembly.
        comment: the beginning of a comment, "//" in PTX and ";" in AMD's assembly.
    """
    lines, in_debug = [], False
    for whole in text.splitlines():
        line = whole.partition(comment)[0].strip()
        if line.startswith((".section", ".text", ".amdgpu_metadata")):
            in_debug = line.startswith(".section") and ".debug_" in line
        if line and not in_debug and not _DEBUG.match(line):
            lines.append(line)
    return "\n".join(lines)


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    return {name: int(value) for name, value in re.findall(r"\b(REG):(\d+)", usage)}


def _sass_bits(instruction: str) -> int:
    width = _SASS_WIDTH.search(instruction)
    return int(width[1]) if width else 32


def nvidia(cubin: bytes, code: Sequence[str]) -> Code:
    usage = _usage(cubin)
    mnemonics = [instruction.partition(".")[0] for instruction in code]

    def widths(*names: str) -> dict[int, int]:
        return dict(Counter(_sass_bits(i) for i, name in zip(code, mnemonics, strict=True) if name in names))

    return {
        "registers": usage["REG"],
        "instructions": sum(name != "NOP" for name in mnemonics),
        "spill_stores": mnemonics.count("STL"),
        "spill_loads": mnemonics.count("LDL"),
        "loads": widths("LDG", "LDGSTS"),
        "stores": widths("STG"),
    }


def _gcn_bits(instruction: str) -> int:
    multiple = re.search(r"dwordx(\d)", instruction)
    if multiple:
        return 32 * int(multiple[1])
    return next((bits for name, bits in _GCN_NARROW.items() if name in instruction), 32)


def amd(assembly: str) -> Code:
    code = _GCN.findall(assembly)

    def field(name: str) -> int:
        entry = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(entry[1]) if entry else 0

    def widths(kind: str) -> dict[int, int]:
        return dict(Counter(_gcn_bits(i) for i in code if re.match(rf"(global|buffer|flat)_{kind}_", i)))

    return {
        "registers": field("vgpr_count"),
        "instructions": len(code),
        "spill_stores": sum(i.startswith("scratch_store") for i in code),
        "spill_loads": sum(i.startswith("scratch_load") for i in code),
        "loads": widths("load"),
        "stores": widths("store"),
    }
