"""PTX read back: through which argument of a kernel each access to global memory goes, and how wide it is; and of which
types its atomics are."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\];")
_DERIVED = re.compile(r"^\s*(?:@!?%p\d+ )?\w[\w.:]*\s+(%rd\d+), (.*);", re.MULTILINE)
_ACCESS = re.compile(r"\b(ld|st)(?:\.volatile)?\.global(\.[\w.:]+)\s(.*);")
_COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global\S*\s+\[.*?\], \[ *(%rd\d+).*?\], (0x\w+)")
_ATOMIC = re.compile(r"\b(?:atom|red)[\w.:]*\.global[\w.:]*\.([a-z]+\d+(?:x\d)?)\s")
_ADDRESS = re.compile(r"\[ *(%rd\d+)")
_REGISTER = re.compile(r"%rd\d+")
_WIDTH = re.compile(r"(?:\.v(\d))?\.[busf](\d+)$")

UNKNOWN = "unknown"
Accesses = dict[str, dict[str, dict[int, int]]]


def _origins(ptx: str) -> dict[str, set[int]]:
    """Returns, for each 64-bit register, the parameters that its value is computed from."""
    origins: dict[str, set[int]] = {register: {int(place)} for register, place in _PARAMETER.findall(ptx)}
    derived = [(target, _REGISTER.findall(sources)) for target, sources in _DERIVED.findall(ptx)]
    grown = True
    while grown:  # a loop's variables are written below their use
        grown = False
        for target, sources in derived:
            known = origins.setdefault(target, set())
            size = len(known)
            known.update(*(origins.get(source, set()) for source in sources))
            grown |= len(known) > size
    return origins


def _accesses(ptx: str) -> list[tuple[str, str, int]]:
    """Returns "load" or "store", the address's register and the width in bits of each instruction."""
    accesses = [("load", register, 8 * int(size, 16)) for register, size in _COPY.findall(ptx)]
    for kind, modifiers, operands in _ACCESS.findall(ptx):
        width, address = _WIDTH.search(modifiers), _ADDRESS.search(operands)
        assert width is not None and address is not None, operands
        accesses.append(("load" if kind == "ld" else "store", address[1], int(width[1] or 1) * int(width[2])))
    return accesses


def accesses(ptx: str, signature: Mapping[str, str]) -> Accesses:
    """Returns, by argument, "load" and "store" with the number of instructions by their width in bits, without
    atomics.

    UNKNOWN are those whose addresses threads have exchanged through shared memory.

    Args:
        signature: the types of the kernel's arguments in Triton's words, in order.
    """
    arguments = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    pointers = {
        place: name.removesuffix("_ptr") for place, (name, kind) in enumerate(arguments) if kind.startswith("*")
    }
    origins = _origins(ptx)
    by_argument: Accesses = {}
    for kind, register, bits in _accesses(ptx):
        (name,) = [pointers[place] for place in origins.get(register, ()) if place in pointers] or [UNKNOWN]
        widths = by_argument.setdefault(name, {}).setdefault(kind, {})
        widths[bits] = widths.get(bits, 0) + 1
    return by_argument


def atomics(ptx: str) -> list[str]:
    """Types of the elements that atomics read and write in global memory, such as "s32"."""
    return sorted(set(_ATOMIC.findall(ptx)))
