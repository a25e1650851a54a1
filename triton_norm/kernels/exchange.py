"""Lets programs of one launch wait for each other, with no cooperative launch and no occupancy query.

A program takes its place by ticket, so places are held in the order in which programs started. The members of the first
unfinished team have then started or are the next to start, and no program waits for one that can't: whatever the
grid's size, and as long as the teams of all launches that run at once have fewer members than the GPU holds programs.

`sync_ptr` is the first of 2 + n_teams int32: tickets taken, teams that have closed, and each team's arrivals. They are
zeros when a launch begins.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Team(NamedTuple):
    """Names which team a program is of, as which member, how many these are, where they leave what the others read, and
    their counters."""

    index: tl.tensor
    member: tl.tensor
    n_members: tl.tensor
    partials_ptr: tl.tensor
    sync_ptr: tl.tensor


@triton.jit
def take_place(sync_ptr, n_members):
    """Takes this program's ticket; returns its team, and its place there."""
    ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed", scope="gpu")
    return ticket // n_members, ticket % n_members


@triton.jit
def arrive(sync_ptr, team):
    """Makes what this program has stored visible to its team; returns how many arrivals there were before."""
    tl.debug_barrier()
    return tl.atomic_add(sync_ptr + 2 + team, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait(sync_ptr, team, arrivals):
    """Waits until the team has arrived that often; what was stored before is then visible, to volatile loads."""
    while tl.atomic_add(sync_ptr + 2 + team, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def meet(sync_ptr, team, arrivals):
    """Arrives, and waits until the team has arrived that often."""
    arrive(sync_ptr, team)
    wait(sync_ptr, team, arrivals)


@triton.jit
def close(sync_ptr, team, n_teams, count_ptr):
    """Leaves a team's counter as it was found; the last member to arrive calls this.

    The last team to close leaves the others as they were found, too, and adds one to *count_ptr, if any.
    """
    tl.store(sync_ptr + 2 + team, 0)
    if tl.atomic_add(sync_ptr + 1, 1, sem="acq_rel", scope="gpu") == n_teams - 1:
        tl.store(sync_ptr, 0)
        tl.store(sync_ptr + 1, 0)
        if count_ptr is not None:
            tl.store(count_ptr, tl.load(count_ptr) + 1)
