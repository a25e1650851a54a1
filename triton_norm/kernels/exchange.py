"""Implements a barrier among programs of one launch, without a cooperative launch or an occupancy query.

Programs draw tickets, so they are assigned to teams in the order in which they start. The unfinished team with the
lowest index therefore has all its members running or next to start, and no program waits for one that can't start. This
holds for any grid size, if the teams of all concurrent launches have fewer members than the GPU has program slots.

`sync_ptr` points to 2 + n_teams int32, zero when a launch begins: tickets drawn, teams closed, each team's arrivals.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Team(NamedTuple):
    """Bundles a program's index in its team with the team's workspace of partial results and counters."""

    index: tl.tensor
    member: tl.tensor
    n_members: tl.tensor
    partials_ptr: tl.tensor
    sync_ptr: tl.tensor


@triton.jit
def take_place(sync_ptr, n_members):
    """Draws a ticket. Returns this program's team index and its member index there."""
    ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed", scope="gpu")
    return ticket // n_members, ticket % n_members


@triton.jit
def arrive(sync_ptr, team):
    """Makes this program's stores visible to its team, and counts an arrival. Returns the earlier arrivals."""
    tl.debug_barrier()
    return tl.atomic_add(sync_ptr + 2 + team, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait(sync_ptr, team, arrivals):
    """Waits until the team's counter reaches `arrivals`. Volatile loads then see the members' stores."""
    while tl.atomic_add(sync_ptr + 2 + team, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def meet(sync_ptr, team, arrivals):
    """Arrives, and waits until the team's counter reaches `arrivals`."""
    arrive(sync_ptr, team)
    wait(sync_ptr, team, arrivals)


@triton.jit
def close(sync_ptr, team, n_teams, count_ptr):
    """Resets a team's counter to 0; called by the last member to arrive.

    The last team to close also resets the two shared counters, and adds one to *count_ptr unless that is None.
    """
    tl.store(sync_ptr + 2 + team, 0)
    if tl.atomic_add(sync_ptr + 1, 1, sem="acq_rel", scope="gpu") == n_teams - 1:
        tl.store(sync_ptr, 0)
        tl.store(sync_ptr + 1, 0)
        if count_ptr is not None:
            tl.store(count_ptr, tl.load(count_ptr) + 1)
