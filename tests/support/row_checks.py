"""The suite's own checks of the kernels of rows, which fail if a kernel is wrong in one place."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

import triton_norm
from support import spaces
from support.oracle import run
from support.row_norms import LAYER_NORM, RMS_NORM, Norm
from triton_norm.tuning.configs import config


def small_rows(numbers: Callable[..., None]) -> None:
    """Several rows a tile, several tiles a program, and several tiles a long row."""
    numbers(interpreted_tile_elements=128, multiprocessors=2, whole_row_bytes=512)


def rows(numbers, monkeypatch, norm: Norm = LAYER_NORM, columns: int = 33, **changed: float) -> None:
    """`changed`: eps, or an `offset` and a `scale` of the input."""
    small_rows(numbers)
    x, weight, bias, dy = norm.drawn((9, columns), 1, torch.float32, "cpu")
    x = x * changed.get("scale", 1) + changed.get("offset", 0)
    norm.against_oracle(x, weight, bias, dy, eps=changed.get("eps", 1e-5))


def shared_rows(numbers, monkeypatch, dtype: torch.dtype = torch.float32) -> None:
    """Three programs a row, which exchange sums of two rows at a time; two teams."""
    forward = config(4, BLOCK_M=1, BLOCK_N=32, PIECES=1, PEERS=4, STAGES=0)
    backward = config(4, BLOCK_M=2, BLOCK_N=32, PEERS=4, STAGES=1, HOLD_WEIGHT=False)
    spaces.force_rows(monkeypatch, forward, backward)
    numbers(multiprocessors=6)
    LAYER_NORM.against_oracle(*LAYER_NORM.drawn((5, 90), 1, dtype, "cpu"))


def rows_in_turn(numbers, monkeypatch) -> None:
    """Two programs take two rows at a time, one after another; a group of rows at the end is not full."""
    forward = config(32, BLOCK_M=2, BLOCK_N=128, PIECES=1, PEERS=1, STAGES=3)
    backward = config(4, BLOCK_M=2, BLOCK_N=128, PEERS=1, STAGES=1, HOLD_WEIGHT=False)
    spaces.force_rows(monkeypatch, forward, backward)
    numbers(multiprocessors=2)
    LAYER_NORM.against_oracle(*LAYER_NORM.drawn((9, 90), 1, torch.float32, "cpu"))


def far(shape: tuple[int, ...], *strides: int) -> torch.Tensor:
    """Drawn numbers in a storage that is reserved and not touched between them."""
    reach = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    x = torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(2 * reach), 0, shape, strides)
    return x.copy_(torch.randn(shape))


def far_rows(numbers, monkeypatch) -> None:
    LAYER_NORM.against_oracle(far((2, 64), 2**31 + 64, 1), None, None, far((2, 64), 2**31 + 64, 1))


def rows_along_axes(numbers, monkeypatch) -> None:
    """Rows along three axes, those of x and dy in another order."""
    small_rows(numbers)
    x, dy = torch.randn(4, 3, 5, 48).transpose(0, 1)[..., :24], torch.randn(5, 4, 3, 24).permute(2, 1, 0, 3)
    LAYER_NORM.against_oracle(x, *torch.randn(2, 24), dy)


def long_sums(numbers, monkeypatch) -> None:
    """Rows of several tiles, added to a residual; the sum is rounded, and has a gradient of its own."""
    small_rows(numbers)
    x, weight, bias, dy = LAYER_NORM.drawn((5, 300), 1, torch.float32, "cpu")
    residual, dtotal = torch.randn(2, 5, 300).bfloat16()
    y, total = LAYER_NORM.ours((300,), residual=residual)(x.requires_grad_(), weight, bias)
    (dx,) = torch.autograd.grad((y, total), x, (dy, dtotal))
    exact = (x + residual).bfloat16().detach().double().requires_grad_()
    exact_y = LAYER_NORM.theirs((300,))(exact, weight.double(), bias.double())
    (of_y,) = torch.autograd.grad(exact_y, exact, dy.double())
    for actual, expected in ((total, exact), (y, exact_y), (dx, of_y + dtotal)):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


def weight_offset(numbers, monkeypatch) -> None:
    small_rows(numbers)
    x, weight, _, dy = RMS_NORM.drawn((9, 40), 1, torch.float32, "cpu")
    result = run(RMS_NORM.ours((40,), weight_offset=0.5), x, weight, None, dy)
    RMS_NORM.check(result, x, weight.double() + 0.5, None, dy)


def rounded_x_hat(numbers, monkeypatch) -> None:
    x, weight, bias, _ = LAYER_NORM.drawn((9, 40), 1, torch.float32, "cpu")
    y = LAYER_NORM.ours((40,), x_hat_dtype=torch.bfloat16)(x, weight, bias)
    close = torch.isclose(y, LAYER_NORM.theirs((40,))(x).bfloat16() * weight + bias, rtol=1e-6, atol=1e-6)
    assert (~close).double().mean() < 0.01, "not close"


def expanded_rows(numbers, monkeypatch) -> None:
    x = torch.randn(6, 40)
    LAYER_NORM.against_oracle(x, None, None, torch.randn(6, 1).expand(6, 40))


def off_centre_rows(numbers, monkeypatch, columns: int) -> None:
    """Means of 1e6 standard deviations leave no error of their own size, constant rows none at all."""
    small_rows(numbers)
    constant = torch.linspace(0.1, 1e6, 16)[:, None].expand(16, columns).contiguous()
    assert not triton_norm.layer_norm(constant, (columns,)).any(), "off centre"
    x = 1e6 + torch.randn(4, columns)
    exact = F.layer_norm(x.double(), (columns,))
    excess = (triton_norm.layer_norm(x, (columns,)) - exact).abs().max() / exact.abs().max()
    assert excess <= 4 * torch.finfo(torch.float32).eps, "off centre"


_of = functools.partial
ROW_CHECKS: dict[str, Callable[..., None]] = {
    "short rows": rows,
    "long rows": _of(rows, columns=300),
    "long rows, no mean": _of(rows, norm=RMS_NORM, columns=300),
    "large eps": _of(rows, scale=1e-3, eps=0.5),
    "off-centre sums": _of(rows, offset=1e4),
    "off-centre rows": _of(off_centre_rows, columns=115),
    "off-centre long rows": _of(off_centre_rows, columns=300),
    "shared rows": shared_rows,
    "shared half rows": functools.partial(shared_rows, dtype=torch.float16),
    "rows in turn": rows_in_turn,
    "far rows": far_rows,
    "rows along axes": rows_along_axes,
    "long sums": long_sums,
    "weight offset": weight_offset,
    "rounded x_hat": rounded_x_hat,
    "expanded rows": expanded_rows,
}
