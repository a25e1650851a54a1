"""Orders in which programs that wait for each other start and take their turns."""

import contextlib
import random
from contextlib import AbstractContextManager

from triton_norm.tuning.limits import INTERPRETED

if INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def place_by_program_id(sync_ptr, n_members):
        """Returns a team and a place in it, by the program's number instead of a ticket."""
        return tl.program_id(0) // n_members, tl.program_id(0) % n_members


def taking_turns() -> AbstractContextManager[None]:
    """Returns a context in which interpreted programs may wait for each other."""
    if not INTERPRETED:
        return contextlib.nullcontext()
    from triton_norm.testing.interleave import interleaved

    return interleaved()


def backwards(n: int) -> list[int]:
    return list(range(n))[::-1]


def shuffled(n: int) -> list[int]:
    return random.Random(7).sample(range(n), n)


def one_of_each(n: int, n_members: int = 4) -> list[int]:
    """Returns one member of each team after the other's: the teams of most resident programs can't be complete."""
    return [member for first in range(n_members) for member in range(first, n, n_members)]
