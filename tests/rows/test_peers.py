"""Rows that several programs share: the same results, in whatever order the programs start and take their turns."""

import functools

import pytest
import torch
from torch.nn import functional as F

import triton_norm
from support import spaces
from support.gpus import H100, changed
from support.oracle import run
from support.row_norms import LAYER_NORM
from support.turns import backwards, shuffled
from triton_norm.tuning import row_spaces
from triton_norm.tuning.configs import config, next_power_of_2
from triton_norm.tuning.limits import INTERPRETED
from triton_norm.tuning.row_spaces import RowWork

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU starts its programs in its own order")

if INTERPRETED:
    from support.turns import place_by_program_id
    from triton_norm.kernels import rows as forward_kernels
    from triton_norm.testing.interleave import DeadlockError, interleaved


SPAN = 32


ORDERS = {"in order": None, "backwards": backwards, "shuffled": shuffled}


@pytest.fixture
def share(numbers, monkeypatch):
    """Sets how rows are shared: pieces of 32 columns, as many a program as said, rows exchanged so many at a time."""

    def use(columns: int, pieces: int = 1, at_once: int = 1, multiprocessors: int = 6) -> None:
        width = next_power_of_2(columns)
        peers = width // (SPAN * pieces)
        forward = config(4, BLOCK_M=1, BLOCK_N=SPAN, PIECES=pieces, PEERS=peers, STAGES=0)
        backward = config(4, BLOCK_M=at_once, BLOCK_N=SPAN, PEERS=width // SPAN, STAGES=1, HOLD_WEIGHT=False)
        spaces.force_rows(monkeypatch, forward, backward)
        # A program a multiprocessor, for many turns.
        numbers(multiprocessors=multiprocessors, rows_backward_elements_per_sm=1)

    with triton_norm.backend("triton"):
        yield use


@pytest.mark.parametrize(("columns", "pieces", "at_once"), [(128, 1, 1), (90, 1, 2), (129, 2, 1), (256, 4, 2)])
def test_matches_fp64(norm, columns, pieces, at_once, share, device):
    share(columns, pieces, at_once)
    with interleaved():
        norm.against_oracle(*norm.drawn((13, columns), 1, torch.float32, device))
        norm.against_oracle(*norm.drawn((1, columns), 1, torch.bfloat16, device))


ADVERSE = [
    ("in order", 4, None),
    ("in order", None, 0),
    ("backwards", 7, 2),
    ("shuffled", 4, 0),
]
"""An order of the programs, how many are held at once, and which is delayed."""


def test_the_bits_do_not_depend_on_the_programs_order(share, device):
    """Four programs a row, and no more of them at once than are needed for one row."""
    share(128)
    inputs = LAYER_NORM.drawn((6, 128), 1, torch.float32, device)
    with interleaved():
        expected = run(LAYER_NORM.ours((128,)), *inputs)
    for order, resident, delayed in ADVERSE:
        with interleaved(resident=resident, order=ORDERS[order], delayed=delayed):
            actual = run(LAYER_NORM.ours((128,)), *inputs)
        assert all(map(torch.equal, actual.tensors(), expected.tensors())), (order, resident, delayed)


def test_places_by_program_id_hang_where_tickets_do_not(share, monkeypatch, device):
    """The programs start backwards, and run together in a number that a row's peers fit into, and two rows' do not."""
    share(100)
    x = torch.randn(5, 100, device=device)
    adverse = functools.partial(
        interleaved, resident=4, order=lambda n: [2, 6, 10, 14, *set(range(n)) - {2, 6, 10, 14}]
    )
    with adverse():
        torch.testing.assert_close(triton_norm.layer_norm(x, (100,)), F.layer_norm(x, (100,)))
    monkeypatch.setattr(forward_kernels, "take_place", place_by_program_id)
    with adverse(), pytest.raises(DeadlockError):
        triton_norm.layer_norm(x, (100,))


def test_nothing_is_shared_that_one_program_can_hold(guard, share, device):
    share(32)
    LAYER_NORM.against_oracle(*LAYER_NORM.drawn((5, 32), 1, torch.float32, device))
    assert all("sync_ptr" not in launched.arguments for launched in guard.launches)


@pytest.mark.parametrize("multiprocessors", [1, 8, 20, 46, 108, 132, 304])
@pytest.mark.parametrize("compute_bytes", [4, 8])
def test_a_rows_peers_leave_most_multiprocessors_to_others(multiprocessors, compute_bytes):
    gpu = changed(H100, multiprocessors=multiprocessors)
    for n_cols in (40000, 65536, 262144, 2**20):
        work = RowWork(n_cols, ("x",), compute_bytes, compute_bytes)
        for space in (
            row_spaces.rows_forward(work, gpu),
            row_spaces.rows_backward(work, gpu),
        ):
            for result in space.configs:
                assert result["PEERS"] * result.span >= n_cols
                assert result["PEERS"] <= max(1, multiprocessors // gpu.limits.sms_per_peer)
