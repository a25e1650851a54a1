"""Forwards whose programs take one row after another, and load the next one while they sum this one."""

import pytest
import torch

import triton_norm
from support import spaces
from support.gpus import H100
from support.row_norms import LAYER_NORM
from triton_norm.tuning.configs import config
from triton_norm.tuning.limits import INTERPRETED
from triton_norm.tuning.row_spaces import rows_forward_programs

COLUMNS = 90


@pytest.fixture
def take(numbers, monkeypatch):
    """Gives two programs all rows, some at a time, or with no stages each program one group of rows."""

    def use(at_once: int, stages: int = 3) -> None:
        forward = config(32, BLOCK_M=at_once, BLOCK_N=128, PIECES=1, PEERS=1, STAGES=stages)
        backward = config(4, BLOCK_M=at_once, BLOCK_N=128, PEERS=1, STAGES=1, HOLD_WEIGHT=True)
        spaces.force_rows(monkeypatch, forward, backward)
        numbers(multiprocessors=2)

    with triton_norm.backend("triton"):
        yield use


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("n_rows", [1, 2, 7])
def test_matches_fp64(norm, at_once, n_rows, take, device):
    """One of two programs has more rows than the other, or none; the last group of rows is not full."""
    take(at_once)
    for dtype in (torch.float32, torch.bfloat16):
        norm.against_oracle(*norm.drawn((n_rows, COLUMNS), 1, dtype, device))


def test_parameters_of_other_types(norm, take, device):
    """They stay in registers in their own types, and an offset is added in the type of the arithmetic."""
    take(1)
    x, weight, bias, _ = norm.drawn((5, COLUMNS), 1, torch.bfloat16, device)
    weight, bias = weight.half(), None if bias is None else bias.float()
    for scale, shift in ((weight, bias), (weight, None), (None, None)):
        options = {} if scale is None else {"weight_offset": 1.0}
        y = norm.ours((COLUMNS,), **options)(x, scale, shift)
        wide = None if scale is None else 1 + scale.double()
        exact = norm.theirs((COLUMNS,))(x.double(), wide, None if shift is None else shift.double())
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_the_bits_are_those_of_one_row_a_program(norm, take, device):
    """Also of a sum, of strided rows, and with x_hat rounded; a row's bits don't depend on the others."""
    x, weight, bias, _ = norm.drawn((7, 2 * COLUMNS), 1, torch.float32, device)
    x, residual, weight = x[:, :COLUMNS], x[:, COLUMNS:], weight[:COLUMNS]
    bias = None if bias is None else bias[:COLUMNS]
    results = []
    for stages in (0, 3, 3):
        take(1, stages)
        rows = 4 if len(results) == 2 else 7
        outputs = norm.ours((COLUMNS,), residual=residual[:rows])(x[:rows], weight, bias)
        results.append((*outputs, norm.ours((COLUMNS,), x_hat_dtype=torch.bfloat16)(x[:rows], weight, bias)))
    for first, second, fewer in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[:4], fewer)


@pytest.mark.skipif(not INTERPRETED, reason="accesses are counted by the interpreter")
def test_parameters_are_read_once_a_program(take):
    from triton_norm.testing import interpreter

    class Reads(interpreter.Observer):
        """Counts the bytes that are loaded within a tensor."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self._begin, self._end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            self.n_bytes = 0

        def access(self, kind, addresses, itemsize, program) -> None:
            inside = (addresses >= self._begin) & (addresses < self._end)
            self.n_bytes += int(inside.sum()) * itemsize if kind == "load" else 0

    take(1)
    x, weight, bias, _ = LAYER_NORM.drawn((7, COLUMNS), 1, torch.float32, "cpu")
    for tensor, n_times in ((weight, 2), (bias, 2), (x, 1)):
        reads = Reads(tensor)
        with interpreter.observe(reads), torch.no_grad():
            triton_norm.layer_norm(x, (COLUMNS,), weight, bias)
        assert reads.n_bytes == n_times * tensor.nbytes


def test_programs_are_as_many_as_run_at_once():
    """A multiprocessor runs 1024 threads with 64 registers each: here four blocks of 8 warps, two of them a program."""
    whole = {"BLOCK_M": 1, "BLOCK_N": 4096, "PIECES": 1, "PEERS": 1}
    persistent = config(8, num_ctas=2, **whole, STAGES=3).keywords
    assert rows_forward_programs(persistent, 10**6, 4096, H100) == 132 * 4 // 2
    assert rows_forward_programs(persistent, 5, 4096, H100) == 5
    assert rows_forward_programs(config(8, num_ctas=2, **whole, STAGES=0).keywords, 10**6, 4096, H100) == 10**6
