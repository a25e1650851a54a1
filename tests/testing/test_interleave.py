"""Programs that wait for each other end and are right; those that can't all be resident at once are found to hang."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from support.turns import backwards, one_of_each, shuffled
from triton_norm.testing import interpreter
from triton_norm.testing.guards import RaceError
from triton_norm.testing.interleave import PATIENCE, DeadlockError, interleaved

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the kernels run on a GPU")

RESERVED = 1  # the ticket counter, before the teams' counters


@triton.jit
def wait(count_ptr, n, SEM: tl.constexpr):
    while tl.atomic_add(count_ptr, 0, sem=SEM, scope="gpu") < n:
        pass


@triton.jit
def store_sum(y_ptr, x):
    tl.store(y_ptr, tl.sum(x, 0))


@triton.jit
def team_sum_kernel(
    x_ptr,
    sync_ptr,
    place_ptr,
    y_ptr,
    n_members,
    TICKETS: tl.constexpr,
    ARRIVE: tl.constexpr = "acq_rel",
    WAIT: tl.constexpr = "acquire",
    STRAY: tl.constexpr = -1,
    BLOCK: tl.constexpr = 32,
):
    """Each member of a team publishes a number, then the sum of its team's; the one at place `STRAY` out of bounds."""
    pid = tl.program_id(0)
    place = tl.atomic_add(sync_ptr, 1, sem="relaxed") if TICKETS else pid
    tl.store(place_ptr + pid, place)
    tl.store(x_ptr + place, place * place)
    count_ptr = sync_ptr + 1 + place // n_members
    tl.atomic_add(count_ptr, 1, sem=ARRIVE, scope="gpu")
    wait(count_ptr, n_members, WAIT)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place // n_members * n_members + i, mask=i < n_members, other=0)
    if place == STRAY:
        y_ptr += 1000
    store_sum(y_ptr + place, x)


def team_sums(n_teams: int, n_members: int, tickets: bool = True, **constants: str | int) -> list[int]:
    """Checked; returns each program's place."""
    n = n_teams * n_members
    x, y, place = (torch.empty(n, dtype=torch.int32) for _ in range(3))
    sync = torch.zeros(RESERVED + n_teams, dtype=torch.int32)
    team_sum_kernel[(n,)](x, sync, place, y, n_members, TICKETS=tickets, **constants)
    squares = torch.arange(n).square().reshape(n_teams, n_members)
    assert torch.equal(y.reshape(n_teams, n_members).long(), squares.sum(1, keepdim=True).expand_as(squares))
    return place.tolist()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.mark.parametrize("tickets", [False, True])
def test_barrier_of_the_whole_grid(tickets):
    with interleaved():
        assert team_sums(1, 32, tickets) == list(range(32))


@pytest.mark.parametrize("order", [None, backwards, shuffled, one_of_each])
@pytest.mark.parametrize("resident", [None, 12, 5, 4])
def test_tickets_need_no_more_programs_than_a_team_has_members(order, resident):
    with interleaved(resident, order):
        places = team_sums(3, 4)
    started = order(12) if order else range(12)
    assert [places[number] for number in started] == list(range(12))


@pytest.mark.parametrize("resident", [4, 8, 9])
def test_places_by_program_id_deadlock_if_programs_start_in_an_adverse_order(resident):
    n_threads = threading.active_count()
    with interleaved(resident, one_of_each), pytest.raises(DeadlockError) as error:
        team_sums(3, 4, tickets=False)
    assert threading.active_count() == n_threads
    assert str(error.value) == (
        f"team_sum_kernel: deadlock: {resident} of 12 programs have started, 0 have ended, and {resident} wait"
    )
    with interleaved(resident, one_of_each):
        team_sums(3, 4)


def test_places_by_program_id_pass_in_order_or_all_at_once():
    with interleaved(4):
        team_sums(3, 4, tickets=False)
    with interleaved(order=one_of_each):
        team_sums(3, 4, tickets=False)


def test_team_larger_than_the_gpu():
    with interleaved(3), pytest.raises(DeadlockError, match="3 of 8 programs have started, 0 have ended, and 3 wait"):
        team_sums(2, 4)


@triton.jit
def barrier_kernel(count_ptr, n_members, n_arrivals):
    if tl.program_id(0) < n_members:
        tl.atomic_add(count_ptr, 1, sem="acq_rel")
        wait(count_ptr, n_arrivals, "acquire")


def run_barrier(n_programs: int, n_members: int, n_arrivals: int) -> None:
    barrier_kernel[(n_programs,)](torch.zeros(1, dtype=torch.int32), n_members, n_arrivals)


def test_deadlock_after_some_have_ended():
    with interleaved(4), pytest.raises(DeadlockError, match="12 of 12 programs have started, 9 have ended, and 3 wait"):
        run_barrier(12, n_members=3, n_arrivals=4)


@pytest.mark.unguarded
def test_deadlock_comes_out_as_itself_without_guards():
    with interleaved(), pytest.raises(DeadlockError, match="barrier_kernel: deadlock"):
        run_barrier(2, n_members=2, n_arrivals=3)


@pytest.mark.parametrize("delayed", [0, 2, 7])
def test_delayed_program_goes_last(delayed):
    with interleaved(delayed=delayed):
        places = team_sums(1, 8)
    assert places == [number - (number > delayed) if number != delayed else 7 for number in range(8)]


def test_delayed_program_that_waits_itself():
    with interleaved(delayed=1), pytest.raises(DeadlockError, match="and 3 wait"):
        run_barrier(3, n_members=3, n_arrivals=4)
    with interleaved(delayed=0):
        run_barrier(1, n_members=1, n_arrivals=1)


@triton.jit
def tickets_kernel(count_ptr, tickets_ptr, n_each):
    for i in range(n_each):
        ticket = tl.atomic_add(count_ptr, 1, sem="relaxed")
        tl.store(tickets_ptr + tl.program_id(0) * n_each + i, ticket)


def take_tickets(n_programs: int, n_each: int) -> list[list[int]]:
    count, tickets = torch.zeros(1, dtype=torch.int32), torch.empty(n_programs, n_each, dtype=torch.int32)
    tickets_kernel[(n_programs,)](count, tickets, n_each)
    return tickets.tolist()


@pytest.mark.parametrize(
    ("resident", "order", "expected"),
    [
        (1, None, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        (2, None, [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]),
        (None, None, [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]),
        (None, backwards, [[3, 7, 11], [2, 6, 10], [1, 5, 9], [0, 4, 8]]),
    ],
)
def test_programs_take_turns_atomic_by_atomic(resident, order, expected):
    with interleaved(resident, order):
        assert take_tickets(4, 3) == expected


def test_many_atomics_that_change_memory_are_no_deadlock():
    n_each = 3 * PATIENCE
    with interleaved():
        assert take_tickets(2, n_each) == [list(range(number, 2 * n_each, 2)) for number in range(2)]


@triton.jit
def locked_sum_kernel(lock_ptr, sum_ptr, UNLOCK: tl.constexpr):
    for _ in range(3):
        while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") == 1:
            pass
        tl.store(sum_ptr, tl.load(sum_ptr) + tl.program_id(0))
        if UNLOCK:
            tl.atomic_xchg(lock_ptr, 0, sem="release")


def test_lock():
    lock, total = torch.zeros(2, dtype=torch.int32)[:, None]
    with interleaved():
        locked_sum_kernel[(5,)](lock, total, UNLOCK=True)
    assert (lock.item(), total.item()) == (0, 30)
    with interleaved(), pytest.raises(DeadlockError, match="5 of 5 programs have started, 0 have ended, and 5 wait"):
        locked_sum_kernel[(5,)](lock, total, UNLOCK=False)


@triton.jit
def maximum_kernel(x_ptr, max_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(5):
        tl.atomic_max(max_ptr + i % 2, tl.load(x_ptr + i), mask=i % 4 < 3)


def test_atomics_of_many_lanes_that_change_nothing_are_no_deadlock():
    x, maximum = torch.full((64,), -1.0), torch.zeros(2)
    with interleaved():
        maximum_kernel[(4,)](x, maximum, BLOCK=16)
    assert maximum.tolist() == [0, 0]


@pytest.mark.parametrize("stray", [0, 5])
def test_access_out_of_bounds_ends_the_launch(stray):
    with (
        interleaved(),
        pytest.raises(IndexError, match=rf"team_sum_kernel, program \({stray}, 0, 0\): store of 4 bytes"),
    ):
        team_sums(2, 4, STRAY=stray)


@pytest.mark.parametrize(("arrive", "wait"), [("relaxed", "relaxed"), ("relaxed", "acquire"), ("release", "relaxed")])
def test_barriers_that_order_nothing(arrive, wait):
    with interleaved(), pytest.raises(RaceError, match="team_sum_kernel: race between the store of program"):
        team_sums(2, 4, ARRIVE=arrive, WAIT=wait)
    with interleaved():
        team_sums(2, 4, ARRIVE="release", WAIT="acquire")


@triton.jit
def grid_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    z, y, x = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    program = (z * tl.num_programs(1) + y) * tl.num_programs(2) + x
    i = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.exp(tl.load(x_ptr + i)) * program)


@pytest.mark.parametrize("grid", [(24,), (3, 8), (2, 3, 4), (0,)])
def test_launch_without_atomics(grid, guard):
    n = 16 * int(np.prod(grid))
    x, plain, inside = 100 * torch.randn(n), torch.zeros(n), torch.zeros(n)
    grid_kernel[grid](x, plain, BLOCK=16)
    with interleaved(5, shuffled):
        grid_kernel[grid](x, inside, BLOCK=16)
    assert torch.equal(plain.nan_to_num(), inside.nan_to_num())
    assert [guard.launches[i].bytes("store") for i in (0, 1)] == [4 * n] * 2


@triton.jit
def exp_kernel(x_ptr, y_ptr, count_ptr):
    tl.atomic_add(count_ptr, 1, sem="relaxed")
    tl.store(y_ptr + tl.program_id(0), tl.exp(tl.load(x_ptr)))


def test_no_program_warns():
    y = torch.empty(3)
    with interleaved():
        exp_kernel[(3,)](torch.full((1,), 1000.0), y, torch.zeros(1, dtype=torch.int32))
    assert y.isinf().all()


@triton.jit
def overflow_kernel(y_ptr, n):
    tl.store(y_ptr, n * n)


class Programs(interpreter.Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def access(self, kind, addresses, itemsize, program):
        self.seen.append((kind, program[0]))


@pytest.mark.unguarded
@pytest.mark.parametrize("position", range(5))
def test_composes_in_any_order(position):
    programs = Programs()
    contexts = [
        interpreter.fast_launches(),
        interpreter.correct_rounding(),
        interpreter.int32_overflow_is_an_error(),
        interpreter.observe(programs, poison_masked_loads=True),
    ]
    contexts.insert(position, interleaved(order=backwards))
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        team_sums(2, 4)
        to_the_second_atomic = [(kind, number) for number in backwards(8) for kind in ("store", "store", "atomic")]
        assert programs.seen[:32] == [("atomic", number) for number in backwards(8)] + to_the_second_atomic
        with pytest.raises(AssertionError, match="int32 overflow detected for operation mul"):
            overflow_kernel[(2,)](torch.empty(1, dtype=torch.int32), 1 << 20)


def test_innermost_of_nested_contexts_holds():
    with interleaved(resident=1), interleaved(order=backwards, delayed=7):
        assert team_sums(1, 8) == [6, 5, 4, 3, 2, 1, 0, 7]


@pytest.mark.parametrize("order", [lambda n: range(n - 1), lambda n: [0] * n])
def test_order_that_is_none(order):
    with interleaved(order=order), pytest.raises(ValueError, match="does not name each of 8 programs once"):
        team_sums(1, 8)


def test_no_room_for_a_program():
    with pytest.raises(ValueError, match="resident must be at least 1"), interleaved(0):
        pass
