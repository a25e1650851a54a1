"""Counts and strides past 2^31 and 2^32, by address arithmetic: of huge launches, a few programs run.

All memory is reserved, reads as zeros, and takes place only where it is touched: the other programs would
have read and left zeros, whose results are known as well.
"""

import functools
import math
import mmap
import operator
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_norm
from support.bars import records
from support.channel_norms import share
from triton_norm import launch
from triton_norm.channels import layout
from triton_norm.testing.stub_driver import H100, as_on_gpu
from triton_norm.tuning import choices
from triton_norm.tuning.configs import next_power_of_2
from triton_norm.tuning.limits import INTERPRETED, MOST_ROW_COLUMNS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU runs all programs, in memory of its own")

FACTORIES = [
    *((torch, name) for name in ("empty", "empty_like", "zeros")),
    *((Tensor, name) for name in ("new_empty", "new_empty_strided")),
]
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 has no name for it
MOST_TOUCHED = 512  # MB, of each test
MOST_PROGRAMS = 2**31 - 1  # CUDA's, along the first axis of a grid
ENDS = (2**31, 2**32)


def reserved(shape: Sequence[int], strides: Sequence[int] | None = None, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros in address space."""
    strides = torch.empty(shape, device="meta").stride() if strides is None else strides
    reach = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    memory = mmap.mmap(-1, reach * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.tensor([], dtype=dtype).set_(storage, 0, tuple(shape), tuple(strides))


def reserving(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a function that reserves the memory that `allocate` would allocate."""

    def reserve(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") == "meta":
            return allocate(*args, **kwargs)
        made = allocate(*args, **{**kwargs, "device": "meta"})
        return reserved(made.shape, made.stride(), made.dtype) if made.numel() else allocate(*args, **kwargs)

    return reserve


def touched() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture(autouse=True)
def _reserving(monkeypatch):
    before = touched()
    for owner, name in FACTORIES:
        monkeypatch.setattr(owner, name, reserving(getattr(owner, name)))
    with triton_norm.backend("triton"):
        yield
    assert touched() - before < MOST_TOUCHED


Named = dict[str, Any]
"""A launch's arguments, constants and config by name, the kernel's own name and how many programs it has."""


def named(kernel: Any, count: int, arguments: Sequence[Any], constants: Any, config: Any) -> Named:
    assert 0 < count <= MOST_PROGRAMS
    inputs = dict(zip(kernel.arg_names, arguments, strict=False))
    return {"kernel": kernel.__name__, "count": count, **inputs, **constants, **config.keywords}


@pytest.fixture
def run_only(monkeypatch):
    """Runs the programs of each launch that a function of it returns; returns the launches."""
    from triton_norm.testing.interpreter import BUILDER

    launched: list[Named] = []
    set_grid_dim, set_grid_idx = BUILDER.set_grid_dim, BUILDER.set_grid_idx

    def use(chosen: Callable[[Named], Iterable[int]]) -> list[Named]:
        def start(kernel: Any, count: int, arguments: Sequence[Any], constants: Any, config: Any) -> None:
            launched.append(named(kernel, count, arguments, constants, config))
            programs = sorted(chosen(launched[-1]))
            monkeypatch.setattr(BUILDER, "set_grid_dim", lambda self, *_: set_grid_dim(self, count, 1, 1))
            monkeypatch.setattr(BUILDER, "set_grid_idx", lambda self, x, *_: set_grid_idx(self, programs[x], 0, 0))
            if programs:
                kernel[(len(programs),)](*arguments, **constants, **config.keywords)

        monkeypatch.setattr(launch, "start", start)
        return launched

    return use


def parts_around(places: Iterable[int], size: int, count: int) -> list[int]:
    """Returns the first and the last of `count` parts of `size` each, and those that have the places."""
    return sorted({0, count - 1, *(place // size for place in places if place < size * count)})


BOTH_SIDES = [end + step for end in ENDS for step in (-1, 0)]

ROWS = {
    "elements": (2**26 + 3, 64, 64),
    "rows": (2**32 + 5, 3, 3),
    "stride": (5, 64, 2**31 + 64),
    "rows and stride": (2**31 + 5, 2, 40),
}
"""Rows, columns, and how far apart the inputs' rows lie."""


@pytest.mark.parametrize("case", ROWS)
def test_rows(case, norm, numbers, run_only):
    """Rows of the residual and of the sum's gradient lie as far apart; in the backward each group is a team."""
    n_rows, n_cols, stride = ROWS[case]
    numbers(interpreted_tile_elements=256, multiprocessors=2**40)
    block = 256 // next_power_of_2(n_cols)
    places = BOTH_SIDES + [place // unit for place in BOTH_SIDES for unit in (n_cols, stride)]
    groups = parts_around(places, block, -(-n_rows // block))
    launched = run_only(lambda launch: [] if "finalise" in launch["kernel"] else groups)
    rows = torch.cat([torch.arange(group * block, min((group + 1) * block, n_rows)) for group in groups])
    drawn = torch.randn(4, len(rows), n_cols).half()
    x, residual, dy, dtotal = tensors = [reserved((n_rows, n_cols), (stride, 1)) for _ in range(4)]
    for tensor, values in zip(tensors, drawn, strict=True):
        tensor[rows] = values
    leaves = x.requires_grad_(), torch.randn(n_cols).requires_grad_()
    y, total = norm.ours((n_cols,), residual=residual)(*leaves)
    dx, _ = torch.autograd.grad((y, total), leaves, (dy, dtotal))
    assert [(launch["kernel"], launch["n_rows"]) for launch in launched[:2]] == [
        ("rows_forward_kernel", n_rows),
        ("rows_backward_kernel", n_rows),
    ]
    dweight = launched[1]["dweight_sums_ptr"].view(-1, n_cols)[groups].sum(0)
    exact = (drawn[0] + drawn[1]).double().requires_grad_(), leaves[1].detach().double().requires_grad_()
    exact_y = norm.theirs((n_cols,))(*exact)
    exact_dx, exact_dweight = torch.autograd.grad(exact_y, exact, drawn[2].double())
    assert torch.equal(total[rows], drawn[0] + drawn[1])
    for actual, expected in ((y[rows], exact_y), (dx[rows], exact_dx + drawn[3]), (dweight, exact_dweight)):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)


CHANNELS = {
    "flat": ((5, 2, 2**30), None),
    "flat, one element an access": ((5, 1, 2**30 - 1), None),  # more groups than 2^32
    "flat, stride of samples": ((3, 2, 2**20), (2**32 + 64, 2**20, 1)),
    "flat, stride of channels": ((2, 3, 2**20), (2**20, 2**32 + 64, 1)),
    "last": ((5, 8, 2**28), (2**31, 1, 8)),
    "last, features": ((2**32 + 5, 2), None),
    "last, stride of positions": ((2, 2, 2**20), (2**40, 1, 2**16 + 2)),
    "folded": ((2**31 + 5, 1, 3), None),
}
"""Shapes and strides."""
PER_SPLIT = {"flat": 2**17, "last": 2**16, "folded": 2**16}  # elements of a channel
FILLED = 200  # positions, on either side of a place


def positions_of(offsets: Iterable[int], shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Returns the place in its channel of each offset's element, or of the element before it."""
    n_samples, _, n_positions = shape
    result = []
    for offset in offsets:
        sample = min(offset // strides[0], n_samples - 1)
        position = min(
            (offset - sample * strides[0]) % max(strides[1], strides[2] * n_positions) // strides[2], n_positions - 1
        )
        result.append(sample * n_positions + position)
    return result


def typed_range(first: Any, end: Any, step: Any) -> Iterator[Any]:
    """Counts in tensors, as the loops of compiled code do, whose variable has the type of their bounds."""
    for passed in range(0, operator.index(end) - operator.index(first), operator.index(step)):
        yield first + passed


@pytest.fixture
def _typed_loops(monkeypatch):
    from triton_norm.kernels import channels

    monkeypatch.setattr(channels, "range", typed_range, raising=False)


@pytest.mark.usefixtures("_typed_loops")
@pytest.mark.parametrize("case", CHANNELS)
def test_channels(case, numbers, run_only):
    """relu(batch_norm(x) + residual) and its gradients, of which bits are kept: in launches that reduce and that apply.

    That as many programs as don't run have arrived already lets the last of those that run merge for all.
    """
    shape, strides = CHANNELS[case]
    tensors = [reserved(shape, strides) for _ in range(3)]
    full = [tensor[:, :, None] if tensor.dim() == 2 else tensor for tensor in tensors]
    (n_samples, n_channels, n_positions), x_strides = full[0].shape, full[0].stride()
    count = n_samples * n_positions
    kind = case.split(",")[0]
    programs = max(16, count // PER_SPLIT[kind]) * (n_channels if kind == "flat" else 1)
    share(numbers, 2**16, one_launch=False, most_folded_columns=64, multiprocessors=programs)
    places = [place for place in BOTH_SIDES if place < count] + positions_of(BOTH_SIDES, full[0].shape, x_strides)
    q = torch.cat([torch.arange(max(0, place - FILLED), min(place + FILLED, count)) for place in (*places, 0, count)])
    q = q.unique()

    def chosen(launch: Named) -> list[int]:
        per_group = launch["V"] if launch["AXIS"] is None else launch["columns_per_channel"]
        n_splits = -(-launch["n_groups"] // launch["groups_per_split"])
        n_blocks = launch["count"] // n_splits
        splits = parts_around(q.tolist(), launch["groups_per_split"] * per_group, n_splits)
        if launch["SHARED"]:
            launch["sync_ptr"][2 : 2 + n_blocks] = n_splits - len(splits)
        programs = [split * n_blocks + block for split in splits for block in range(n_blocks)]
        reduces = launch.get("STATISTICS", launch.get("REDUCE"))
        return programs if reduces else [launch["count"] - 1 - program for program in programs]

    def filled(tensor: Tensor) -> Tensor:
        whole = tensor[:, :, None] if tensor.dim() == 2 else tensor
        return whole[q // n_positions, :, q % n_positions].detach()

    launched = run_only(chosen)
    drawn = torch.randn(3, len(q), n_channels).half()
    for tensor, values in zip(full, drawn, strict=True):
        tensor[q // n_positions, :, q % n_positions] = values
    x, residual, dy = tensors
    weight, bias = torch.rand(2, n_channels) + 0.5
    mean, var = torch.zeros(n_channels), torch.zeros(n_channels)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]
    fused = {"residual": residual, "activation": "relu"}
    y = triton_norm.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, **fused)
    dx, dresidual, dweight, dbias = torch.autograd.grad(y, leaves, dy)
    assert [launch["kernel"] for launch in launched] == [
        *["channels_forward_kernel"] * 2,
        *["channels_backward_kernel"] * 2,
    ]

    wide = drawn.double()
    exact_mean = wide[0].sum(0) / count
    m2 = (wide[0] - exact_mean).square().sum(0) + (count - len(q)) * exact_mean.square()
    rstd = torch.rsqrt(m2 / count + 1e-5)
    x_hat = (wide[0] - exact_mean) * rstd
    z = x_hat * weight.detach() + bias.detach() + wide[1]
    dz = wide[2] * (z > 0)
    exact_dweight, exact_dbias = (dz * x_hat).sum(0), dz.sum(0)
    exact_dx = (dz - exact_dbias / count - x_hat * exact_dweight / count) * rstd * weight.detach()
    clear = z.abs() > 0.05
    blur = 1e-3 * (wide[0].abs().sum(0) / count).max().item()
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-3, atol=blur)
    torch.testing.assert_close(var.double(), m2 / (count - 1), rtol=1e-3, atol=0)
    torch.testing.assert_close(filled(y).double(), z.clamp_min(0).detach(), rtol=2e-3, atol=5e-2)
    for actual, expected in ((filled(dx), exact_dx), (filled(dresidual), dz)):
        torch.testing.assert_close(actual.double()[clear], expected[clear], rtol=4e-3, atol=1e-2)
    for actual, expected in ((dweight, exact_dweight), (dbias, exact_dbias)):
        torch.testing.assert_close(actual.double(), expected, rtol=4e-3, atol=1)


LISTED = [
    *((shape[:2], (shape[2], 1)) for shape in ROWS.values()),
    ((2**33, 1), None),
    ((2**16, 2**20), None),
    *CHANNELS.values(),
    ((2, layout.MOST_CHANNELS), None),
    ((1, 2**24, 64), None),
    ((2**20, 2**12, 3), None),
]


@pytest.mark.parametrize("least", [True, False], ids=["smallest tiles", "best guess"])
@pytest.mark.parametrize(("shape", "strides"), LISTED, ids=str)
def test_no_grid_is_larger_than_cuda_takes(shape, strides, least, monkeypatch):
    """Listed, as an H100 would launch them: along one axis, so many programs as `named` allows."""
    if least:
        smallest = functools.partial(min, key=lambda config: math.prod(dict(config.blocks).values()))
        monkeypatch.setattr(choices, "chosen", lambda space, gpu_name: smallest(space.configs))
    launched: list[Named] = []
    x = reserved(shape, strides).requires_grad_()
    dy = reserved(shape, strides)
    with as_on_gpu(H100, start=lambda *launch: launched.append(named(*launch))):
        norms = [lambda: triton_norm.batch_norm(x, None, None, training=True, residual=dy, activation="relu")]
        if shape[-1] <= MOST_ROW_COLUMNS and x.stride(-1) == 1:
            weight = torch.ones(shape[-1], requires_grad=True)
            norms.append(lambda: triton_norm.layer_norm(x, shape[-1:], weight))
        for norm in norms:
            torch.autograd.grad(norm(), x, dy)
    assert len(launched) >= 2 * len(norms)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((1, 2, 2**30 + 1), f"more than {layout.MOST_POSITIONS} positions"),
        ((2, 2**29 + 1), f"more than {layout.MOST_CHANNELS} channels"),
    ],
)
def test_counts_too_large_for_the_kernels_go_to_torch(shape, why):
    x = reserved(shape)
    with pytest.raises(RuntimeError, match=why):
        triton_norm.batch_norm(x, None, None, training=True)
    with triton_norm.backend("auto"):
        result = triton_norm.explain(triton_norm.batch_norm, x, None, None, training=True)
    assert result.backend == "torch"
    assert why in result.reason


COMPILED = """
sys.path[:0] = ["tests", "tests/ops"]
import torch
import test_big
import triton_norm
from perf.resources import TARGETS, compiling_for

for owner, name in test_big.FACTORIES:
    setattr(owner, name, test_big.reserving(getattr(owner, name)))
made_records = []
for shape in (2**31 + 5, 2), (5, 1, 2**30 - 1):
    x, dy = test_big.reserved(shape).requires_grad_(), test_big.reserved(shape)
    norms = [lambda: triton_norm.batch_norm(x, None, None, training=True, residual=dy, activation="relu")]
    if len(shape) == 2:
        weight = torch.ones(2).requires_grad_()
        norms.append(lambda: triton_norm.rms_norm(x, (2,), weight, residual=dy)[0])
    for norm in norms:
        with compiling_for(TARGETS["sm_90"]) as launches:
            torch.autograd.grad(norm(), x, dy)
            made_records += [[launch.kernel.__name__, launch.compile().src.signature] for launch in launches]
"""


def test_compiled_kernels_take_counts_past_32_bits():
    result = [record for record in records(COMPILED) if "finalise" not in record[0]]
    assert {kernel for kernel, _ in result} == {
        f"{family}_{way}_kernel" for family in ("rows", "channels") for way in ("forward", "backward")
    }
    for _, signature in result:
        assert signature.get("n_rows", signature.get("n_groups")) == "i64"
