"""Each guard catches a kernel that is wrong in its one way, and lets the right twin of that kernel pass."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from triton_norm.testing.guards import Extent, RaceError, guarded

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the kernels run on a GPU")


@triton.jit
def copy_kernel(x_ptr, y_ptr, n_masked, BLOCK: tl.constexpr, GUARD_LOAD: tl.constexpr = True):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n_masked, other=0.0) if GUARD_LOAD else tl.load(x_ptr + i)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < n_masked)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, HAS_OTHER: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0) if HAS_OTHER else tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr, tl.sum(x, 0))


@triton.jit
def strided_copy_kernel(x_ptr, y_ptr, x_row_stride, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row_stride + i, mask=i < n_cols, other=0.0)
    tl.store(y_ptr + row * n_cols + i, x, mask=i < n_cols)


def run_copy(x: torch.Tensor, n_masked: int, **constants: bool) -> torch.Tensor:
    y = torch.empty_like(x)
    copy_kernel[(triton.cdiv(n_masked, 16),)](x, y, n_masked, BLOCK=16, **constants)
    return y


def test_right_copy_passes():
    x = torch.randn(100)
    assert torch.equal(run_copy(x, 100), x)


def test_mask_off_by_one():
    with pytest.raises(IndexError) as error:
        run_copy(torch.randn(100), 101)
    assert str(error.value) == (
        "copy_kernel, program (6, 0, 0): load of 4 bytes out of bounds in 1 of 5 lanes; "
        "the nearest is 4 bytes past the end of x_ptr (float32 [100], strides [1])"
    )


@triton.jit
def load_pair(x_ptr, i):
    return tl.load(x_ptr + i) + tl.load(x_ptr + i + 1)


@triton.jit
def helped_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, load_pair(x_ptr, tl.program_id(0)))


def test_error_inside_a_helper_comes_out_as_itself():
    with pytest.raises(IndexError, match="helped_kernel, program"):
        helped_kernel[(1,)](torch.ones(1), torch.empty(1))


def test_store_out_of_bounds_is_caught_before_it_happens():
    whole = torch.zeros(32)
    with pytest.raises(IndexError, match="store of 4 bytes out of bounds in 16 of 16 lanes"):
        copy_kernel[(2,)](torch.ones(32), whole[:16], 32, BLOCK=16)
    assert whole.tolist() == [1.0] * 16 + [0.0] * 16


def test_unmasked_load_past_the_end():
    with pytest.raises(IndexError, match="load of 2 bytes out of bounds in 12 of 16 lanes"):
        run_copy(torch.randn(100, dtype=torch.float16), 100, GUARD_LOAD=False)


def test_load_before_the_start():
    x = torch.randn(64)
    with pytest.raises(IndexError, match="in 16 of 16 lanes; the nearest is 4 bytes before the start of x_ptr"):
        strided_copy_kernel[(2,)](x[32:], torch.empty(2, 16), -16, 16, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_masked_load_without_other(dtype):
    x = torch.ones(10, dtype=dtype)
    right, wrong = torch.empty(1), torch.empty(1)
    sum_kernel[(1,)](x, right, 10, BLOCK=16, HAS_OTHER=True)
    sum_kernel[(1,)](x, wrong, 10, BLOCK=16, HAS_OTHER=False)
    assert right.item() == 10
    assert wrong.isnan()


def test_masked_integer_load_without_other():
    x, out = torch.ones(15, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    sum_kernel[(1,)](x, out, 15, BLOCK=16, HAS_OTHER=False)
    assert out.item() != 15


@pytest.mark.parametrize("n_cols", [10, 16])
def test_strided_rows(n_cols):
    x = torch.randn(4, 16)[:, :10]
    y = torch.empty(4, n_cols)
    if n_cols == 10:
        strided_copy_kernel[(4,)](x, y, x.stride(0), n_cols, BLOCK=16)
        assert torch.equal(x, y)
    else:
        with pytest.raises(IndexError, match="in 6 of 16 lanes; the nearest is in a gap between the elements of x_ptr"):
            strided_copy_kernel[(4,)](x, y, x.stride(0), n_cols, BLOCK=16)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:, 1:3],
        lambda x: x[::2, :, ::3],
        lambda x: x.permute(2, 0, 1)[1:],
        lambda x: x[:1].expand(5, 4, 6),
        lambda x: x[0, 0, :0],
        lambda x: x[1, 2, 3],
        lambda x: x.as_strided((5, 4), (3, 1)),
        lambda x: x.as_strided((3, 2, 2), (12, 6, 2)),
    ],
)
def test_extent_of_views(view):
    x = torch.arange(5 * 4 * 6).reshape(5, 4, 6)
    tensor = view(x)
    addresses = (np.arange(-4, x.numel() + 4) * 8 + x.data_ptr()).astype(np.uint64)
    resident = Extent(tensor).contains(addresses, 8)
    assert sorted(set(tensor.flatten().tolist())) == (np.flatnonzero(resident) - 4).tolist()


@triton.jit
def hidden_store_kernel(x_ptr, address):
    tl.store(address.to(tl.int64).to(tl.pointer_type(tl.float32)), tl.load(x_ptr))


def test_store_to_memory_that_was_not_passed():
    hidden = torch.zeros(1)
    with pytest.raises(IndexError, match=r"hidden_store_kernel.*store of 4 bytes out of bounds in 1 of 1 lanes"):
        hidden_store_kernel[(1,)](torch.ones(1), hidden.data_ptr())
    assert hidden.item() == 0


@triton.jit
def gather_two_kernel(a_ptr, b_ptr, y_ptr):
    i = tl.arange(0, 16)
    tl.store(y_ptr + i, tl.load(tl.where(i < 10, a_ptr, b_ptr) + i))


def test_one_load_from_two_tensors(guard):
    a, b, y = torch.randn(10), torch.randn(16), torch.empty(16)
    gather_two_kernel[(1,)](a, b, y)
    assert torch.equal(y, torch.cat([a, b[10:]]))
    assert (guard.loaded(a), guard.loaded(b)) == (40, 24)


@triton.jit
def store_kernel(y_ptr, STEP: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, 16)
    tl.store(y_ptr + i, i)


def test_racing_stores():
    store_kernel[(4,)](torch.empty(64, dtype=torch.int32), STEP=16)
    with pytest.raises(RaceError) as error:
        store_kernel[(4,)](torch.empty(64, dtype=torch.int32), STEP=15)
    assert str(error.value) == (
        "store_kernel: race between the store of program (0, 0, 0) and the store of program (1, 0, 0) "
        "at offset 15 of y_ptr (int32 [64], strides [1]), and at 2 more places"
    )


@triton.jit
def shift_kernel(x_ptr, SHIFT: tl.constexpr):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(x_ptr + i, tl.load(x_ptr + i + SHIFT) + 1)


def test_read_write_race():
    x = torch.zeros(65)
    shift_kernel[(4,)](x, SHIFT=0)
    assert x.tolist() == [1.0] * 64 + [0.0]
    with pytest.raises(RaceError, match=r"load of program .* and the store of program"):
        shift_kernel[(4,)](x, SHIFT=1)


def test_race_through_two_views_of_one_tensor():
    x = torch.zeros(48)
    copy_kernel[(2,)](x[:32], x[:32], 32, BLOCK=16)
    with pytest.raises(RaceError):
        copy_kernel[(2,)](x[:32], x[16:], 32, BLOCK=16)


@triton.jit
def mixed_width_kernel(wide_ptr, narrow_ptr, OFFSET: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(wide_ptr, 1)
    else:
        tl.store(narrow_ptr + OFFSET, 1)


def test_race_between_accesses_of_different_width():
    memory = torch.zeros(4, dtype=torch.int32)
    mixed_width_kernel[(2,)](memory, memory.view(torch.int16), OFFSET=2)
    with pytest.raises(RaceError):
        mixed_width_kernel[(2,)](memory, memory.view(torch.int16), OFFSET=1)


@triton.jit
def last_arriver_kernel(partial_ptr, count_ptr, out_ptr, n_programs, SEM: tl.constexpr, PUBLISH_FIRST: tl.constexpr):
    pid = tl.program_id(0)
    if PUBLISH_FIRST:
        tl.store(partial_ptr + pid, pid + 1)
    arrived = tl.atomic_add(count_ptr, 1, sem=SEM)
    if not PUBLISH_FIRST:
        tl.store(partial_ptr + pid, pid + 1)
    if arrived == n_programs - 1:
        i = tl.arange(0, 8)
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + i, mask=i < n_programs, other=0), 0))
        tl.store(count_ptr, 0)


def run_last_arriver(sem: str, publish_first: bool) -> tuple[int, int]:
    partial, out = torch.empty(5, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    count = torch.zeros(1, dtype=torch.int32)
    last_arriver_kernel[(5,)](partial, count, out, 5, SEM=sem, PUBLISH_FIRST=publish_first)
    return out.item(), count.item()


def test_atomics_order_programs():
    assert run_last_arriver("acq_rel", publish_first=True) == (15, 0)


@pytest.mark.parametrize(
    ("sem", "publish_first"), [("acq_rel", False), ("relaxed", True), ("acquire", True), ("release", True)]
)
def test_atomics_that_order_nothing(sem, publish_first):
    with pytest.raises(RaceError, match="last_arriver_kernel: race"):
        run_last_arriver(sem, publish_first)


@triton.jit
def atomic_sum_kernel(out_ptr, PEEK: tl.constexpr):
    tl.atomic_add(out_ptr, 1, sem="relaxed")
    if PEEK:
        tl.store(out_ptr + 1 + tl.program_id(0), tl.load(out_ptr))


def test_atomics_do_not_race_with_atomics_but_with_loads(guard):
    out = torch.zeros(5, dtype=torch.int32)
    atomic_sum_kernel[(4,)](out, PEEK=False)
    assert out[0] == 4
    assert guard.launches[-1].bytes("atomic", out) == 16
    with pytest.raises(RaceError, match=r"race between the (load of .* and the atomic|atomic of .* and the load) of"):
        atomic_sum_kernel[(4,)](out, PEEK=True)


@triton.jit
def row_offset_kernel(y_ptr, row, stride, WIDE: tl.constexpr):
    offset = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(y_ptr + offset - row.to(tl.int64) * stride, 1.0)


def test_int32_offset_overflow():
    y = torch.empty(1)
    row_offset_kernel[(1,)](y, 70_000, 65_536, WIDE=True)
    assert y.item() == 1
    with pytest.raises(AssertionError, match="int32 overflow detected for operation mul"):
        row_offset_kernel[(1,)](y, 70_000, 65_536, WIDE=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_output_left_unwritten(dtype):
    x = torch.zeros(32)
    for y in (
        torch.empty(32, dtype=dtype),
        torch.empty_like(x, dtype=dtype),
        x.new_empty(32, dtype=dtype),
        torch.empty_strided((32,), (1,), dtype=dtype),
    ):
        copy_kernel[(1,)](x, y, 16, BLOCK=16)
        assert y.float().isnan().tolist() == [False] * 16 + [True] * 16


def test_integer_output_left_unwritten():
    assert torch.empty(3, dtype=torch.int32).tolist() == [2**31 - 1] * 3


@pytest.mark.unguarded
def test_unguarded(guard):
    assert guard is None
    assert not torch.are_deterministic_algorithms_enabled()
    x = torch.ones(8)
    y = torch.zeros(8)
    copy_kernel[(1,)](x, y, 8, BLOCK=16)
    assert torch.equal(x, y)


def test_guards_nest(guard):
    x = torch.randn(32)
    with guarded() as inner:
        run_copy(x, 32)
    run_copy(x, 32)
    assert inner.kernels == ["copy_kernel"]
    assert inner.loaded(x) == 128
    assert guard.kernels == ["copy_kernel"] * 2
    assert guard.loaded(x) == 256


def test_byte_counts(guard):
    x, y = torch.randn(100, dtype=torch.bfloat16), torch.empty(100)
    copy_kernel[(7,)](x, y, 100, BLOCK=16)
    (launch,) = guard.launches
    assert launch.kernel == "copy_kernel"
    assert (launch.bytes("load", "x_ptr"), launch.bytes("store", "x_ptr")) == (200, 0)
    assert (launch.bytes("load", y), launch.bytes("store", y)) == (0, 400)
    assert (launch.bytes("load"), launch.bytes("store"), launch.bytes("atomic")) == (200, 400, 0)
    assert (guard.loaded(x), guard.stored(y), guard.loaded(torch.empty(100))) == (200, 400, 0)


def test_bytes_of_interleaved_views(guard):
    both = torch.randn(4, 32)
    left, right = both[:, :16], both[:, 16:]
    strided_copy_kernel[(4,)](left, torch.empty(4, 16), 32, 16, BLOCK=16)
    strided_copy_kernel[(3,)](right, torch.empty(4, 16), 32, 16, BLOCK=16)
    assert (guard.loaded(left), guard.loaded(right), guard.loaded(both)) == (256, 192, 448)


def test_freed_memory_is_not_taken_for_its_successor(guard):
    x = torch.randn(32)
    address = run_copy(x, 32).data_ptr()
    successors = [torch.empty(32) for _ in range(8)]
    assert sum(guard.stored(y) for y in successors) == 0, f"reused {address}"
