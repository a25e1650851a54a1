"""PTX read back: through which argument of a kernel each access to global memory goes, and how wide it is; and of which
types its atomics are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\];")
_DERIVED = re.compile(r"^\s*(?:@!?%p\d+ )?\w[\w.:]*\s+(%rd\d+), (.*);", re.MULTILINE)
_ACCESS = re.compile(r"\b(ld|st)(?:\.volatile)?\.global(\.[\w.:]+)\s(.*);")
_COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global\S*\s+\[.*?\], \[ *(%rd\d+).*?\], (0x\w+)")
_ATOMIC = re.compile(r"\b(?:atom|red)[\w.:]*\.global[\w.:]*\.([a-z]+\d+(?:x\d)?)\s")
_BARRIER = re.compile(r"^\s*(?:@!?%p\d+ )?(?:bar\.sync|barrier\.)")
_CLUSTER_BARRIER = re.compile(r"\bbarrier\.cluster\.wait\b")
_LABEL = re.compile(r"(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
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


def _pointers(signature: Mapping[str, str]) -> dict[int, str]:
    """Returns the names of a kernel's pointers by their places among the parameters."""
    arguments = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    return {place: name.removesuffix("_ptr") for place, (name, kind) in enumerate(arguments) if kind.startswith("*")}


def _accesses(ptx: str) -> list[tuple[str, str, int]]:
    """Returns "load" or "store", the address's register and the width in bits of each instruction."""
    accesses = [("load", register, 8 * int(size, 16)) for register, size in _COPY.findall(ptx)]
    for kind, modifiers, operands in _ACCESS.findall(ptx):
        width, address = _WIDTH.search(modifiers), _ADDRESS.search(operands)
        assert width is not None and address is not None, operands
        accesses.append(("load" if kind == "ld" else "store", address[1], int(width[1] or 1) * int(width[2])))
    return accesses


def _name_of(register: str, origins: Mapping[str, set[int]], pointers: Mapping[int, str]) -> str:
    (name,) = [pointers[place] for place in origins.get(register, ()) if place in pointers] or [UNKNOWN]
    return name


def accesses(ptx: str, signature: Mapping[str, str]) -> Accesses:
    """Returns, by argument, "load" and "store" with the number of instructions by their width in bits, without
    atomics.

    UNKNOWN are those whose addresses threads have exchanged through shared memory.

    Args:
        signature: the types of the kernel's arguments in Triton's words, in order.
    """
    pointers, origins = _pointers(signature), _origins(ptx)
    by_argument: Accesses = {}
    for kind, register, bits in _accesses(ptx):
        name = _name_of(register, origins, pointers)
        widths = by_argument.setdefault(name, {}).setdefault(kind, {})
        widths[bits] = widths.get(bits, 0) + 1
    return by_argument


def _gone_through(lines: Sequence[str]) -> Iterator[str]:
    """Yields the lines in order, and those of each loop once more at its end."""
    labels: dict[str, int] = {}
    for place, line in enumerate(lines):
        yield line
        if label := _LABEL.match(line):
            labels[label[1]] = place
        if (branch := _BRANCH.search(line)) and branch[1] in labels:
            yield from lines[labels[branch[1]] : place]


def loaded_back(ptx: str, signature: Mapping[str, str]) -> list[str]:
    """Returns the arguments through which a kernel loads behind a barrier, and has stored before it.

    In a cluster that is a race: `bar.sync` is one block's own. Loops are gone through twice.

    Args:
        signature: as in `accesses`.
    """
    pointers, origins = _pointers(signature), _origins(ptx)
    since_barrier: set[str] = set()
    before_barrier: set[str] = set()
    result: set[str] = set()
    for line in _gone_through(ptx.splitlines()):
        if _BARRIER.search(line):
            before_barrier |= since_barrier
        for kind, register, _ in _accesses(line):
            name = _name_of(register, origins, pointers)
            if kind == "store":
                since_barrier.add(name)
            elif name in before_barrier:
                result.add(name)
    return sorted(result)


def order(ptx: str, signature: Mapping[str, str], argument: str) -> list[str]:
    """Returns "load" for loads through an argument, "barrier" for those of a cluster, and "atomic", in their order;
    neighbours of one kind are told once.

    Args:
        signature: as in `accesses`.
    """
    pointers, origins = _pointers(signature), _origins(ptx)
    result: list[str] = []
    for line in ptx.splitlines():
        loads = [register for kind, register, _ in _accesses(line) if kind == "load"]
        kinds = {
            "load": any(_name_of(register, origins, pointers) == argument for register in loads),
            "barrier": _CLUSTER_BARRIER.search(line),
            "atomic": _ATOMIC.search(line),
        }
        result += [kind for kind, present in kinds.items() if present and result[-1:] != [kind]]
    return result


def atomics(ptx: str) -> list[str]:
    """Returns the types of elements that atomics read and write in global memory, such as "s32"."""
    return sorted(set(_ATOMIC.findall(ptx)))
