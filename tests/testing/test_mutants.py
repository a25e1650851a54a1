"""The suite's own checks of the kernels, each against mutants that it has to catch, wrong in one place."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import triton_norm
from support.activations import assert_kinks_are_torchs
from support.channel_norms import SPLIT, drawn, running_statistics, share
from support.modulated_checks import MODULATED_CHECKS
from support.oracle import run, ulp
from support.row_checks import ROW_CHECKS, far
from triton_norm.channels import layout, plan, running
from triton_norm.specs import BatchNormSpec, BatchNormTensors
from triton_norm.tuning.limits import INTERPRETED, ByKind

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the guards are the interpreter's")

if INTERPRETED:
    from support.mutants import MUTANTS, mutated
    from triton_norm.testing import interleave, interpreter
    from triton_norm.testing.guards import Extent, RaceError
    from triton_norm.testing.interleave import DeadlockError, interleaved
else:
    MUTANTS = []


class BarrierError(AssertionError):
    """A program's threads use stores of its other threads, or tell other programs of them, with no barrier."""


class _Barriers(interpreter.Observer if INTERPRETED else object):
    """Asserts a barrier between a program's store and its load of the same place, or its next atomic that releases.

    One thread alone stores to `sync_ptr` and does the atomics.
    """

    def __init__(self) -> None:
        self._stored: dict[Any, list[Any]] = defaultdict(list)
        self._sync: Extent | None = None

    def launch_begins(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self._stored.clear()
        self._sync = Extent(tensors["sync_ptr"]) if "sync_ptr" in tensors else None

    def access(self, kind: str, addresses: Any, itemsize: int, program: Any) -> None:
        if not addresses.size or (self._sync is not None and self._sync.contains_address(int(addresses[0]))):
            return
        if kind == "store":
            self._stored[program].append(addresses)
        elif kind == "load" and any(np.isin(addresses, stored).any() for stored in self._stored[program]):
            raise BarrierError(f"program {program} loads what it has stored with no barrier in between")

    def synchronizes(self, addresses: Any, acquires: bool, releases: bool, program: Any) -> None:
        if releases and self._stored[program]:
            raise BarrierError(f"program {program} releases what it has stored with no barrier in between")

    def barrier(self, builder: Any) -> None:
        self._stored[builder.grid_idx].clear()


@pytest.fixture(autouse=True)
def _checked(monkeypatch):
    monkeypatch.setattr(interleave, "PATIENCE", 2)
    barriers = _Barriers()
    monkeypatch.setattr(interpreter.BUILDER, "create_barrier", lambda builder: barriers.barrier(builder))
    with triton_norm.backend("triton"), interpreter.observe(barriers), interleaved(delayed=1):
        yield


def groups(
    numbers,
    monkeypatch,
    n_groups: int = 2,
    last: bool = False,
    shape: tuple[int, ...] = (9, 4, 3, 5),
    tile: int | None = None,
    expanded: bool = False,
    clusters: bool = False,
) -> None:
    """More samples than the backward adds at a time, with statistics that differ from sample to sample.

    With a `tile`, programs share a group, or clusters have one in the backward. The gradient of y may be expanded over
    positions.
    """
    if tile is not None:
        share(numbers, tile, multiprocessors=12)
    if clusters:
        numbers(most_blocks=8, cluster_group_elements=1)
    x, dy = torch.randn(2, *shape) * torch.linspace(1, 3, shape[0]).view(-1, 1, 1, 1)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    if expanded:
        dy = dy[..., :1, :1].expand(shape)
    leaves = [tensor.requires_grad_() for tensor in (x, *torch.randn(2, shape[1]))]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, exact = triton_norm.group_norm(leaves[0], n_groups, *leaves[1:]), F.group_norm(wide[0], n_groups, *wide[1:])
    actual, expected = (
        (one, *torch.autograd.grad(one, of, dy.to(one.dtype))) for one, of in ((y, leaves), (exact, wide))
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def instances(numbers, monkeypatch) -> None:
    """Running statistics of more samples than a launch adds at a time, whose means are large and not representable."""
    x = torch.randn(9, 4, 3) + 1e4
    ours, exact = ([torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)] for dtype in (torch.float32, torch.double))
    triton_norm.instance_norm(x, *ours, momentum=1.0)
    F.instance_norm(x.double(), *exact, momentum=1.0)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1.2e-7, atol=0)


def channels(
    numbers, monkeypatch, kind: str, one_launch: bool = True, shape: tuple[int, ...] | None = None, **requested: Any
) -> None:
    """Two programs a channel, each with two tiles, the last not full unless there is another `shape`."""
    usual, tile = SPLIT[kind]
    shape = shape or usual
    share(numbers, tile, one_launch)
    drawn(shape, kind, "cpu", **requested).against_oracle()


def far_samples(numbers, monkeypatch) -> None:
    x = far((2, 4, 16), 2**31 + 64, 16, 1)
    F.batch_norm(x, None, None, training=True)
    y = triton_norm.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, F.batch_norm(x.contiguous(), None, None, training=True), rtol=1e-3, atol=1e-3)


def far_channels(numbers, monkeypatch) -> None:
    x = far((2, 2, 16), 16, 2**31 + 64, 1)
    y = triton_norm.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, F.batch_norm(x.contiguous(), None, None, training=True), rtol=1e-3, atol=1e-3)


def off_centre_channels(numbers, monkeypatch, kind: str = "flat", one_launch: bool = True) -> None:
    """Both ways; dweight is held to dy's size, and not to x's."""
    shape, tile = SPLIT[kind]
    share(numbers, tile, one_launch)
    _off_centre(shape, kind)


def off_centre_folded_clusters(numbers, monkeypatch) -> None:
    small_clusters(numbers)
    _off_centre(FOLDED_IN_CLUSTERS, "folded")


def _off_centre(shape: tuple[int, ...], kind: str) -> None:
    x, dy, weight = 1e6 + torch.randn(shape), torch.randn(shape), torch.ones(shape[1])
    if kind == "last":
        x, dy = (tensor.to(memory_format=torch.channels_last) for tensor in (x, dy))
    actual = run(lambda x, w, b: triton_norm.batch_norm(x, None, None, w, b, True), x, weight, None, dy)
    exact = run(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), x.double(), weight.double(), None, dy.double())
    for one, other, ulps in ((actual.y, exact.y, 4), (actual.dweight, exact.dweight, 64)):
        excess = (one - other).abs().max() / other.abs().max()
        assert excess <= ulps * torch.finfo(torch.float32).eps, "off centre"


def statistics_move(
    numbers, monkeypatch, one_launch: bool = True, momentum: float | None = 0.1, dtype: torch.dtype = torch.float32
) -> None:
    shape, tile = SPLIT["flat"]
    share(numbers, tile, one_launch)
    _moves_statistics(monkeypatch, shape, momentum, dtype)


def cumulative_clusters(numbers, monkeypatch) -> None:
    small_clusters(numbers)  # two channels, each of a program: both read the counter before it moves
    _moves_statistics(monkeypatch, (3, 2, 20, 20), None, torch.float32)


def _moves_statistics(monkeypatch, shape: tuple[int, ...], momentum: float | None, dtype: torch.dtype) -> None:
    """Twice; the counter counts, and the zeros that launches begin with are left zeros."""
    saved = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(plan, "zeros", lambda n, device: saved[:n])
    moved = *running_statistics(shape[1], "cpu", dtype), torch.tensor(0)
    exact = nn.BatchNorm2d(shape[1], momentum=momentum, dtype=torch.float64)
    exact.running_mean, exact.running_var = (tensor.to(torch.float64, copy=True) for tensor in moved[:2])
    for step in range(2):
        x = step + torch.randn(shape, dtype=dtype)
        triton_norm.batch_norm(x, *moved[:2], training=True, momentum=momentum, num_batches_tracked=moved[2])
        exact(x.double())
        assert not saved.any(), "zeros are left"
        assert moved[2] == step + 1, "the counter"
    same_statistics(moved, exact, 64 * torch.finfo(dtype).eps)


def same_statistics(moved: tuple[torch.Tensor, ...], exact: nn.Module, tolerance: float) -> None:
    for actual, expected in zip(moved, (exact.running_mean, exact.running_var), strict=False):
        assert torch.allclose(actual.double(), expected, rtol=tolerance, atol=tolerance), "moved otherwise"


FOLDED_IN_CLUSTERS = (10, 16, 5, 5)  # two blocks of eight channels; three tiles of four rows, the third not full


def small_clusters(numbers) -> None:
    few = ByKind(flat=8, last=8, folded=12)
    numbers(most_blocks=8, cluster_least_bytes=0, cluster_elements=few, thread_resident_bytes=ByKind(32, 32, 64))


def folded_clusters(numbers, monkeypatch) -> None:
    small_clusters(numbers)
    drawn(FOLDED_IN_CLUSTERS, "folded", "cpu").against_oracle()


def clusters(numbers, monkeypatch) -> None:
    """Two tiles a channel, of which the second is not full; two channels."""
    small_clusters(numbers)
    drawn((3, 2, 20, 20), "flat", "cpu").against_oracle()
    count, x = torch.tensor(0), torch.randn(3, 2, 20, 20)
    triton_norm.batch_norm(x, torch.zeros(2), torch.ones(2), training=True, num_batches_tracked=count)


def bits(numbers, monkeypatch) -> None:
    """One for each element, which is 1 where y is not 0; the last block's lanes are whole bytes and half idle."""
    call = drawn((3, 24, 3, 5), "last", "cpu", residual=torch.float32, activation="relu")
    spec = BatchNormSpec(True, 0.1, 1e-5, "relu")
    y, _, result = plan.forward(spec, BatchNormTensors(*call.inputs()), "last")
    assert torch.equal(layout.mask_of_bits(result, call.x, "last"), y > 0), "other bits"


def kinks(numbers, monkeypatch, activation: str, added: bool) -> None:
    assert_kinks_are_torchs(activation, torch.float32, added, "cpu")


def far_from_zero(
    numbers, monkeypatch, activation: str, farthest: float, exact: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """z is x itself: mean 0, variance 1 and eps 0. Its gradient is finite, however large z is."""
    z = torch.cat((torch.linspace(-farthest, 8, 126), torch.tensor([-1e20, 1e20]))).view(8, 2, 8).requires_grad_()
    y = triton_norm.batch_norm(z, torch.zeros(2), torch.ones(2), eps=0.0, activation=activation)
    true = exact(z.detach().double())
    assert ((y - true).abs() <= (4 if activation == "silu" else 8) * ulp(true, torch.float32)).all(), "not close"
    (dx,) = torch.autograd.grad(y, z, torch.ones_like(y))
    assert dx.isfinite().all(), "not close"


def exact_gelu(z: torch.Tensor) -> torch.Tensor:
    return z * 0.5 * torch.erfc(-math.sqrt(0.5) * z)


def exact_gelu_tanh(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * z * (1 + 0.044715 * z * z))


def shares_of_a_batch(numbers, monkeypatch) -> None:
    """Two programs merge three processes' shares, of which one is empty; means of 1e6 standard deviations."""
    parts = [1e6 + torch.randn(length, 1100, dtype=torch.float64) for length in (3, 0, 4)]
    packed = []
    for part in parts:
        mean = part.mean(0)
        m2, count = (part - mean).square().sum(0), part.new_full((1,), len(part))
        packed.append(torch.cat((mean.float(), mean - mean.float(), m2, count)).float())
    moved = torch.zeros(1100), torch.ones(1100), torch.tensor(0)
    merged = running.move_op(torch.stack(packed), moved[:2], moved[2:], 0.5, 1e-5, True)
    batch, exact = torch.cat(parts), nn.BatchNorm1d(1100, momentum=0.5, dtype=torch.float64)
    exact(batch)
    mean, rest, rstd = merged[:-1].double().view(3, -1)
    torch.testing.assert_close(mean + rest, batch.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(rstd, torch.rsqrt(batch.var(0, correction=0) + 1e-5), rtol=1e-5, atol=0)
    assert (merged[-1], moved[2]) == (7, 1), "the counter"
    same_statistics(moved, exact, 1e-5)


NARROW = (4, 12, 3, 5)  # a block's last lanes idle
_of = functools.partial
_sums: dict[str, Any] = {"residual": torch.float32, "activation": "relu", "training": False}
CHECKS: dict[str, Callable[..., None]] = {
    "clusters": clusters,
    "folded clusters": folded_clusters,
    "off-centre folded clusters": off_centre_folded_clusters,
    "cumulative clusters": cumulative_clusters,
    "flat": _of(channels, kind="flat"),
    "last": _of(channels, kind="last", shape=NARROW),
    "folded": _of(channels, kind="folded"),
    "last, two launches": _of(channels, kind="last", one_launch=False),
    "folded, two launches": _of(channels, kind="folded", one_launch=False),
    "whole tiles": _of(channels, kind="flat", shape=(4, 2, 8, 8)),
    "evaluation": _of(channels, kind="flat", training=False),
    "flat, relu of a sum": _of(channels, kind="flat", **_sums),
    "last, relu of a sum": _of(channels, kind="last", shape=NARROW, **_sums),
    "last, leaky_relu of a sum": _of(channels, kind="last", shape=NARROW, **_sums | {"activation": "leaky_relu"}),
    "bits, last": bits,
    "flat, silu": _of(channels, kind="flat", activation="silu", training=False),
    "flat, gelu": _of(channels, kind="flat", activation="gelu", training=False),
    "flat, gelu_tanh": _of(channels, kind="flat", activation="gelu_tanh", training=False),
    "kinks, relu6": _of(kinks, activation="relu6", added=False),
    "kinks, relu6 of a sum": _of(kinks, activation="relu6", added=True),
    "kinks, hardswish": _of(kinks, activation="hardswish", added=False),
    "far silu": _of(far_from_zero, activation="silu", farthest=87.0, exact=F.silu),
    "far gelu": _of(far_from_zero, activation="gelu", farthest=12.8, exact=exact_gelu),
    "far gelu_tanh": _of(far_from_zero, activation="gelu_tanh", farthest=10.0, exact=exact_gelu_tanh),
    "far samples": far_samples,
    "far channels": far_channels,
    "off-centre flat": off_centre_channels,
    "off-centre last, two launches": _of(off_centre_channels, kind="last", one_launch=False),
    "running statistics": statistics_move,
    "running statistics, two launches": _of(statistics_move, one_launch=False),
    "fp64 statistics": _of(statistics_move, dtype=torch.float64),
    "cumulative statistics": _of(statistics_move, momentum=None),
    "shares of a batch": shares_of_a_batch,
    "groups": _of(groups),
    "groups apart": _of(groups, tile=4),
    "groups apart, last": _of(groups, tile=4, last=True),
    "instances": instances,
    "instances apart": _of(groups, n_groups=4, shape=(9, 4, 3, 7), tile=4),
    "groups of rows": _of(groups, last=True, shape=(9, 4, 2, 3)),
    "odd channels": _of(groups, shape=(9, 8, 3, 3), n_groups=8),
    "groups, expanded": _of(groups, shape=(2, 4, 3, 8), expanded=True),
    "parts of channels": _of(groups, shape=(2, 4, 6, 10), tile=32),
    "shared rows of groups": _of(groups, last=True, n_groups=4, shape=(2, 12, 9, 7), tile=512),
    "shared groups": _of(groups, shape=(3, 16, 7, 7), tile=128),
    "groups of clusters": _of(groups, shape=(2, 6, 8, 12), tile=64, clusters=True),
    "shared groups, last": _of(groups, last=True, shape=(3, 6, 2, 3), tile=8),
}
"""The checks of real tests, of few elements; right kernels pass each."""

assert not CHECKS.keys() & MODULATED_CHECKS.keys()
CHECKS |= ROW_CHECKS | MODULATED_CHECKS


def caught(how: str) -> Any:
    """The error that a mutant's check raises, told by its kind and its words."""
    errors: dict[str, tuple[type[BaseException], str]] = {
        "bounds": (IndexError, "bytes out of bounds"),
        "race": (RaceError, "race between"),
        "barrier": (BarrierError, "with no barrier"),
        "deadlock": (DeadlockError, "deadlock"),
        "overflow": (AssertionError, "^int32 overflow"),
        "value": (AssertionError, r"^[\d.e+]+ times the bound"),
        "unwritten": (AssertionError, "^inf times the bound"),
        "different": (AssertionError, "not close"),
        "off-centre": (AssertionError, "^off centre"),
        "bits": (AssertionError, "^other bits"),
        "moved": (AssertionError, "^moved otherwise"),
        "count": (AssertionError, "^the counter"),
        "zeros": (AssertionError, "^zeros are left"),
    }
    error, words = errors[how]
    return pytest.raises(error, match=words)


@pytest.mark.parametrize("check", CHECKS)
def test_right_kernels_pass(check, numbers, monkeypatch):
    CHECKS[check](numbers, monkeypatch)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_wrong_kernels_are_caught(mutant, numbers, monkeypatch):
    with mutated(mutant), caught(mutant.caught):
        CHECKS[mutant.check](numbers, monkeypatch)
