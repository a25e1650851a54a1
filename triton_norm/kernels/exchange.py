"""Programs of one launch that wait for each other, with no cooperative launch and no occupancy query.

A program takes its place by ticket, so places are held in the order in which programs started. The members of the first
unfinished team have then started or are the next to start, and no program waits for one that can't: whatever the
grid's size, and as long as the teams of all launches that run at once have fewer members than the GPU holds programs.
"""

import triton
import triton.language as tl


@triton.jit
def take_place(sync_ptr, n_members):
    """(team, member) of this program; sync_ptr is the first of 1 + n_teams int32 zeros made for this launch."""
    ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed", scope="gpu")
    return ticket // n_members, ticket % n_members


@triton.jit
def meet(sync_ptr, team, arrivals):
    """Makes what this program has stored visible to its team, and waits until its members have arrived that often."""
    arrived_ptr = sync_ptr + 1 + team
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
