"""Memory that a training step keeps and that a call takes meanwhile, to the byte; none grows with their number."""

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import triton_norm
from support.activations import MASKED
from support.allocations import allocations
from support.channel_norms import ACTIVATIONS, SHAPES, bits_of, laid, running_statistics
from support.launchers import made_launchers
from support.pairwise import pairwise
from triton_norm import distributed, launch, plans
from triton_norm.specs import BatchNormOptions, BatchNormTensors
from triton_norm.tuning import memory

pytest.importorskip("triton")

from triton_norm.testing.stub_driver import H100, as_on_gpu

pytestmark = [pytest.mark.unguarded, pytest.mark.usefixtures("through_the_kernels")]

Saved = list[Tensor]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def saved_by(call: Callable[[], Any]) -> tuple[Any, Saved]:
    """Returns the call's result, and the tensors that it saves for a backward."""
    saved: Saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        return call(), saved


def check(saved: Saved, referred: list[Tensor | None], own: list[tuple[torch.dtype, int]]) -> None:
    """Asserts that nothing is saved but the memory of `referred`, and tensors of these types and bytes."""
    known = {storage(tensor) for tensor in referred if tensor is not None}
    assert {storage(tensor) for tensor in saved} >= known
    others = [tensor for tensor in saved if storage(tensor) not in known]
    sizes = [(tensor.dtype, tensor.untyped_storage().nbytes()) for tensor in others]
    assert sorted(sizes, key=str) == sorted(own, key=str)


def request_gradients(requested: str, **tensors: Tensor | None) -> None:
    """Has the named tensor need a gradient, or all where the name is "all"."""
    for name, tensor in tensors.items():
        if tensor is not None:
            tensor.requires_grad_(requested in (name, "all"))


@pytest.mark.parametrize("requested", ["all", "x", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_save_x_and_statistics(norm, dtype, requested, device):
    x, weight, bias, _ = norm.drawn((6, 16), 1, dtype, device)
    request_gradients(requested, x=x, weight=weight, bias=bias)
    y, saved = saved_by(lambda: norm.ours((16,))(x, weight, bias))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    check(saved, [x, weight], [(statistics, 6 * (1 + norm.has_bias) * statistics.itemsize)])
    assert y.requires_grad


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_rows_save_the_total_once_and_neither_of_its_parts(norm, residual_dtype, device):
    x, weight, bias, _ = norm.drawn((6, 16), 1, torch.bfloat16, device)
    residual = torch.randn(6, 16, device=device).to(residual_dtype)
    request_gradients("all", x=x, weight=weight, bias=bias, residual=residual)
    (_, total), saved = saved_by(lambda: norm.ours((16,), residual=residual)(x, weight, bias))
    assert total.dtype == residual_dtype
    check(saved, [total, weight], [(torch.float32, 6 * (1 + norm.has_bias) * 4)])


@pairwise(
    {
        "kind, shape": SHAPES,
        "training": [True, False],
        "activation": ACTIVATIONS,
        "added": [False, True],
        "requested": ["all", "x", "weight", "bias", "residual"],
    },
    lambda layout, training, activation, added, requested: added or requested != "residual",
)
def test_channels_save_x_statistics_and_a_bit_an_element(kind, shape, training, activation, added, requested, device):
    """There is no activated copy."""
    x, residual = (laid(torch.randn(shape, device=device).bfloat16(), kind) for _ in range(2))
    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    mean, var = running_statistics(shape[1], device)
    residual = residual if added else None
    request_gradients(requested, x=x, weight=weight, bias=bias, residual=residual)
    fused = {"residual": residual, "activation": activation}
    _, saved = saved_by(lambda: triton_norm.batch_norm(x, mean, var, weight, bias, training, **fused))
    by_bits = added and activation in MASKED
    recomputes = activation is not None and not by_bits
    referred = [x, weight, *((bias, residual) if recomputes else ()), *(() if training else (mean, var))]
    bits = [(torch.uint8, bits_of(kind, shape))] if by_bits else []
    check(saved, referred, bits + ([(torch.float32, 3 * shape[1] * 4)] if training else []))


@pytest.mark.parametrize("n_groups", [2, 4])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_groups_save_x_and_statistics(activation, n_groups, device):
    x, residual = torch.randn(2, 3, 4, 2, 4, device=device).unbind()
    x, residual = x.clone(), residual.clone()
    weight, bias = torch.ones(4, device=device), torch.zeros(4, device=device)
    request_gradients("all", x=x, weight=weight, bias=bias, residual=residual)
    fused = {"residual": residual, "activation": activation}
    _, saved = saved_by(lambda: triton_norm.group_norm(x, n_groups, weight, bias, **fused))
    referred = [x, weight, *(() if activation is None else (bias, residual))]
    check(saved, referred, [(torch.float32, 12 * 3 * n_groups)])


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_synchronized_statistics_are_saved_as_a_batchs_own(activation, monkeypatch, device):
    monkeypatch.setattr(distributed, "gather", lambda packed, group: packed[None])
    x, residual = torch.randn(2, 4, 8, 2, 4, device=device).unbind()
    x, residual = x.clone().requires_grad_(), residual.clone()
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    tensors, options = BatchNormTensors(x, residual, weight, bias), BatchNormOptions(True, 0.1, 1e-5, activation)
    _, saved = saved_by(lambda: distributed.sync_batch_norm(tensors, options, distributed.Group("", 1)))
    bits = [(torch.uint8, x.numel() // 8)] if activation == "relu" else []
    referred = [x, weight, *((bias, residual) if activation == "silu" else ())]
    check(saved, referred, [*bits, (torch.float32, (3 * 8 + 1) * 4)])


def calls(device: str) -> dict[str, Callable[..., Any]]:
    """Returns functions of x and a residual, by name: every way to keep something."""
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    mean, var = running_statistics(8, device)
    batch_norm = functools.partial(triton_norm.batch_norm, weight=weight, bias=bias)
    return {
        "layer_norm": lambda x, residual: triton_norm.layer_norm(x, (8,), weight, bias),
        "rms_norm": lambda x, residual: triton_norm.rms_norm(x, (8,), weight),
        "total": lambda x, residual: triton_norm.rms_norm(x, (8,), weight, residual=residual),
        "training": lambda x, residual: batch_norm(x, None, None, training=True),
        "evaluation": lambda x, residual: batch_norm(x, mean, var),
        "relu": lambda x, residual: batch_norm(x, mean, var, training=True, residual=residual, activation="relu"),
        "silu": lambda x, residual: batch_norm(x, mean, var, training=True, residual=residual, activation="silu"),
    }


@pytest.mark.parametrize("name", calls("cpu"))
def test_without_gradients_nothing_is_saved(name, device):
    x, residual = torch.randn(2, 4, 8, device=device).unbind()
    call = calls(device)[name]
    assert saved_by(lambda: call(x, residual))[1] == []
    x.requires_grad_()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert saved_by(lambda: call(x, residual))[1] == []


@pytest.mark.parametrize("name", calls("cpu"))
def test_only_saved_tensors_outlive_the_call(name, device):
    leaf = torch.randn(4, 8, device=device, requires_grad=True)
    x, residual = leaf.clone(), torch.randn(4, 8, device=device)
    result = calls(device)[name](x, residual)
    y, *total = result if isinstance(result, tuple) else (result,)
    made = {"x": x, "residual": residual, "y": y, "total": total[0] if total else None}
    memory = {case: StorageWeakRef(t.untyped_storage()) for case, t in made.items() if t is not None}
    graph = y.sum()  # which keeps no tensor of its own; a grad_fn alone would not keep its node's in every torch
    del x, residual, result, y, total, made
    gc.collect()
    alive = {case for case, reference in memory.items() if not reference.expired()}
    assert graph.grad_fn is not None
    assert alive == {"total": {"total"}, "silu": {"x", "residual"}}.get(name, {"x"})


# What a call takes beside its results and what is saved, on a GPU of 132 multiprocessors.

SMS = H100.multiprocessors
ROW_SHAPES = [  # rows, columns, type; bytes forward and backward
    (16384, 4096, torch.bfloat16, 0, 2 * 264 * 4096 * 4),
    (100, 1000, torch.float32, 0, 2 * 100 * 1000 * 4),
    (512, 65536, torch.bfloat16, 8 + 512 * (4 + 12 * 8), 2 * 16 * 65536 * 4 + 8 + 16 * (8 + 32 * 32)),
    (1, 40000, torch.float64, 8 + 4 + 24 * 10, 2 * 40000 * 8 + 8 + 8 + 64 * 20),
]
CHANNEL_SHAPES = [  # bf16, whether channels lie last; programs that share a channel forward and backward; blocks
    ((32, 64, 56, 56), False, 33, 33, 64),
    ((32, 64, 56, 56), True, 196, 196, 2),
    ((64, 512, 7, 7), False, 8, 8, 13),
    ((8192, 1024), False, 16, 16, 32),
    ((256, 2048, 7, 7), True, 24, 24, 64),
]


@contextlib.contextmanager
def workspace() -> Iterator[Callable[[Sequence[Tensor]], int]]:
    """Yields a function from the tensors that a call leaves to the bytes of all else that it allocated."""
    made: dict[int, Tensor] = {}

    def bytes_beside(left: Sequence[Tensor]) -> int:
        left_over = set(map(storage, left))
        result = sum(t.untyped_storage().nbytes() for address, t in made.items() if address not in left_over)
        made.clear()
        return result

    def note(tensor: Tensor) -> None:
        made[storage(tensor)] = tensor

    with as_on_gpu(H100, start=lambda *_: None), allocations(after=note):
        yield bytes_beside


@pytest.mark.parametrize(("rows", "columns", "dtype", "forward", "backward"), ROW_SHAPES)
def test_rows_take_what_the_docstring_says(rows, columns, dtype, forward, backward):
    leaves = [torch.empty(shape, dtype=dtype).requires_grad_() for shape in ((rows, columns), columns, columns)]
    with workspace() as bytes_beside:
        y, saved = saved_by(lambda: triton_norm.layer_norm(leaves[0], (columns,), *leaves[1:]))
        taken = bytes_beside([y, *saved])
        grads = torch.autograd.grad(y, leaves, torch.empty_like(y))
        assert (taken, bytes_beside(grads)) == (forward, backward)


@pytest.mark.parametrize(("shape", "last", "forward", "backward", "blocks"), CHANNEL_SHAPES)
def test_channels_take_what_the_docstring_says(shape, last, forward, backward, blocks):
    x = torch.empty(shape, dtype=torch.bfloat16)
    if last:
        x = torch.empty_like(x, memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), *(torch.empty(shape[1], requires_grad=True) for _ in range(2))]
    zeros = 4 * (2 + blocks)
    with workspace() as bytes_beside:
        triton_norm.batch_norm(x, None, None, *leaves[1:], training=True)  # the first asks torch how y is to lie
        bytes_beside([])
        y, saved = saved_by(lambda: triton_norm.batch_norm(x, None, None, *leaves[1:], training=True))
        taken = bytes_beside([y, *saved])
        grads = torch.autograd.grad(y, leaves, torch.empty_like(y))
        assert taken == 12 * shape[1] * forward + zeros
        assert bytes_beside(grads) == 8 * shape[1] * (backward + 1) + zeros


# What grows with the number of calls.

N = 5_000
SHAPES = 4_500  # more than any cache has places for


def steps() -> dict[str, Callable[[], Any]]:
    """Training steps by name, of tensors that stay."""
    x = torch.randn(2, 4, 8, requires_grad=True)
    weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
    per_channel = weight[:4].detach().requires_grad_()
    mean, var, counter = torch.zeros(4), torch.ones(4), torch.tensor(0)
    dy = torch.ones_like(x)
    options = {"training": True, "num_batches_tracked": counter, "residual": x, "activation": "relu"}
    return {
        "layer_norm": lambda: torch.autograd.grad(triton_norm.layer_norm(x, (8,), weight, bias), (x, weight, bias), dy),
        "batch_norm": lambda: torch.autograd.grad(
            triton_norm.batch_norm(x, mean, var, per_channel, **options), (x, per_channel), dy
        ),
    }


@pytest.fixture
def launched():
    """Nothing is launched, as if on a GPU."""
    with as_on_gpu(H100, start=lambda *_: None):
        yield


def remembered() -> int:
    """Blocks of memory that Python's objects have."""
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.parametrize("name", steps())
def test_thousands_of_calls_leave_nothing_behind(name, launched):
    step = steps()[name]
    for _ in range(100):
        step()
    before, grown = remembered(), []
    for _ in range(2):
        for _ in range(N // 2):
            step()
        before, grown = remembered(), [*grown, remembered() - before]
    assert min(grown) < N // 8, grown  # what is made once, by anyone, is no growth


def tables() -> Iterator[tuple[str, int, int | None]]:
    """Returns the library's caches by name: their size, and their largest size, None if nothing says."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "triton_norm":
            for attribute, value in vars(module).items():
                if hasattr(value, "cache_info"):
                    yield f"{name}.{attribute}", value.cache_info().currsize, value.cache_info().maxsize
                elif isinstance(value, dict | set | list) and not attribute.startswith("__"):
                    yield f"{name}.{attribute}", len(value), None


NEVER_SEEN = {
    "layer_norm": lambda n: triton_norm.layer_norm(
        torch.empty(1, n), (n,), torch.empty(n, requires_grad=True)
    ).backward(torch.empty(1, n)),
    "batch_norm": lambda n: triton_norm.batch_norm(torch.empty(2, n), None, None, training=True),
}


@pytest.mark.parametrize("name", NEVER_SEEN)
def test_thousands_of_shapes_are_not_all_remembered(name, launched, monkeypatch):
    before, launchers = {where: size for where, size, _ in tables()}, made_launchers(monkeypatch)
    assert max(memory.MOST_REMEMBERED, plans.MOST_KEYS) < SHAPES
    for n in range(4, SHAPES + 4):
        NEVER_SEEN[name](n)
    for where, size, most in tables():
        assert size <= (most or max(plans.MOST_KEYS, before.get(where, 0))), where
    gc.collect()
    assert len(launchers) <= 4 * memory.MOST_REMEMBERED
    memory.forget()
    gc.collect()
    assert len(launchers) <= 8


@pytest.mark.parametrize("name", ["rows", "channels"])
def test_ever_new_strides_are_not_all_remembered(name, launched, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 5)
    for stride in range(4, 104):
        x = torch.empty(2 * stride).as_strided((2, 4), (stride, 1))
        if name == "rows":
            triton_norm.layer_norm(x, (4,))
        else:
            triton_norm.batch_norm(x, None, None, training=True)
    assert max(len(stored) for _, stored in plans._plans.values()) <= 5


def test_no_more_streams_have_zeros_than_numbers_say(monkeypatch):
    """Streams that come and go, each of them new."""
    monkeypatch.setattr(launch, "_zeros", {})
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    for stream in range(N):
        monkeypatch.setattr(launch, "current_stream", lambda device, stream=stream: stream)
        stored = launch.zeros(3, torch.device("cuda", 0))
        assert launch.zeros(2, torch.device("cuda", 0)) is stored
        assert len(launch._zeros) <= launch.MOST_STREAMS
