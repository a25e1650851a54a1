"""The interpreter, patched, against torch's arithmetic bit for bit, and its reports to an observer."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from triton_norm.testing import interpreter

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the kernels run on a GPU")


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0), 0))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def every_kind_of_float32() -> torch.Tensor:
    """Random bits, and around every bf16: itself, the tie above it and that tie's neighbours."""
    random = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64)
    exact = torch.arange(1 << 16) << 16
    around = torch.cat([exact + offset for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    around = torch.where(around >= 2**31, around - 2**32, around)
    return torch.cat([random, around]).to(torch.int32).view(torch.float32)


def cast_by_kernel(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.numel(), dtype=dtype)
    cast_kernel[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return y


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(bits(actual)[~nan], bits(expected)[~nan])


def test_float32_to_bfloat16():
    x = every_kind_of_float32()
    assert_same_bits(cast_by_kernel(x, torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bfloat16_widens_exactly(dtype):
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(cast_by_kernel(x, dtype), x.to(dtype))


def test_float16_to_bfloat16():
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    assert_same_bits(cast_by_kernel(x, torch.bfloat16), x.to(torch.bfloat16))


def test_float64_to_bfloat16_rounds_once():
    tie = 1 + 2**-8
    x = torch.tensor([tie, tie + 2**-40, tie - 2**-40, -tie - 2**-40, 1e39, 1e-60, np.inf, np.nan], dtype=torch.float64)
    expected = [1, 1 + 2**-7, 1, -1 - 2**-7, np.inf, 0, np.inf, np.nan]
    assert_same_bits(cast_by_kernel(x, torch.bfloat16), torch.tensor(expected, dtype=torch.bfloat16))
    random = every_kind_of_float32().double()
    assert_same_bits(cast_by_kernel(random, torch.bfloat16), random.to(torch.bfloat16))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + BLOCK + i, x * y)
    tl.store(out_ptr + 2 * BLOCK + i, tl.where((x < y) & (x != 0), x, y - 1.0))
    tl.store(out_ptr + 3 * BLOCK + i, (x < y).to(tl.bfloat16))


def test_bfloat16_arithmetic_rounds_each_result():
    x, y = torch.randn(2, 256).bfloat16()
    x[0] = -0.0
    out = torch.empty(4, 256, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, BLOCK=256)
    expected = [x + y, x * y, torch.where((x < y) & (x != 0), x, y - 1), (x < y).bfloat16()]
    assert_same_bits(out, torch.stack(expected))


def test_bfloat16_sum_rounds_each_partial_sum():
    # 256 + 1 is a tie, and rounds to 256.
    x, out = torch.ones(512).bfloat16(), torch.empty(1)
    sum_kernel[(1,)](x, out, 512, BLOCK=512)
    assert out.item() == 256


@triton.jit
def scalar_kernel(eps, momentum, out_ptr):
    tl.store(out_ptr, (eps.to(tl.float32) + 1.0) - momentum)
    tl.store(out_ptr + 1, eps + momentum)


def test_float_arguments_are_float32():
    out = torch.empty(2, dtype=torch.float64)
    scalar_kernel[(1,)](1e-5, 0.1, out)
    eps, momentum = torch.tensor([1e-5, 0.1])
    assert out.tolist() == [((eps + 1) - momentum).item(), (eps + momentum).item()]


@triton.jit
def nan_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, tl.maximum(x, 0.0))
    tl.store(out_ptr + 1, tl.clamp(x, 1.0, 2.0))
    tl.store(out_ptr + 2, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


def test_maximum_drops_nan_unless_told_otherwise():
    out = torch.empty(3)
    nan_kernel[(1,)](torch.tensor([float("nan")]), out)
    assert out[:2].tolist() == [0, 1]
    assert out[2].isnan()


@triton.jit
def fma_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, tl.fma(x, x, -1.0))


def test_fma_rounds_once():
    x, out = torch.tensor([1 + 2**-12]), torch.empty(1)
    fma_kernel[(1,)](x, out)
    assert out.item() == 2**-11 + 2**-24


@triton.jit
def overflow_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, (x * x).to(tl.float16))
    tl.store(out_ptr + 1, (x - x) / (x - x))


def test_special_values_do_not_warn():
    out = torch.empty(2, dtype=torch.float16)
    overflow_kernel[(1,)](torch.tensor([1e30]), out)
    assert out[0] == torch.inf
    assert out[1].isnan()


class Diary(interpreter.Observer):
    def __init__(self):
        self.lines = []

    def launch_begins(self, kernel, tensors):
        self.lines.append((kernel, {name: list(tensor.shape) for name, tensor in tensors.items()}))

    def access(self, kind, addresses, itemsize, program):
        self.lines.append((kind, len(addresses), itemsize, program))

    def synchronizes(self, addresses, acquires, releases, program):
        self.lines.append((len(addresses), acquires, releases, program))

    def launch_ends(self):
        self.lines.append("end")


@triton.jit
def tuple_kernel(xs, count_ptr, n):
    i = tl.arange(0, 4)
    tl.store(xs[1] + i, tl.load(xs[0] + i, mask=i < n, other=0.0), mask=i < n)
    tl.atomic_add(count_ptr, 1, sem="release")


def test_observer_is_told_of_launches_accesses_and_semantics():
    diary = Diary()
    with interpreter.observe(diary):
        tuple_kernel[(1,)]((torch.zeros(3), torch.zeros(3)), torch.zeros(1, dtype=torch.int64), 3)
    first = (0, 0, 0)
    assert diary.lines == [
        ("tuple_kernel", {"xs[0]": [3], "xs[1]": [3], "count_ptr": [1]}),
        ("load", 3, 4, first),
        ("store", 3, 4, first),
        ("atomic", 1, 8, first),
        (1, False, True, first),
        "end",
    ]


@triton.jit
def failing_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "x is positive")


def test_device_assert_is_checked_and_a_failed_launch_does_not_end():
    diary = Diary()
    with interpreter.observe(diary), pytest.raises(AssertionError, match="x is positive"):
        failing_kernel[(1,)](torch.zeros(1))
    assert diary.lines[-1] == ("load", 1, 4, (0, 0, 0))
