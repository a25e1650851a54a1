"""Batches are counted as torch counts them; statistics and counter move together, whatever else goes wrong."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import triton_norm
from support.every_op import PATHS
from support.pairwise import pairwise

COUNTERS = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.float32,
    torch.float64,
    torch.bfloat16,
]


def state(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pairwise(
    {
        "use_reentrant": [False, True],
        "norm_dtype": [torch.float64, torch.float32],
        "momentum": [0.1, None],
        "path": ["triton", "torch"],
    }
)
def test_checkpoints_move_both_as_often(use_reentrant, norm_dtype, momentum, path, device):
    """torch counts before it normalizes. A checkpoint that need not be whole ends its second forward as soon as it has
    saved all it needs, and must not have moved the statistics, and not yet counted, by then."""
    result = []
    for library in (nn, triton_norm):
        torch.manual_seed(0)
        linear = nn.Linear(3, 4, device=device, dtype=torch.float64)
        norm = library.BatchNorm1d(4, momentum=momentum, device=device, dtype=torch.float64)
        if library is triton_norm:
            norm.to(norm_dtype)
        x = torch.randn(6, 3, dtype=torch.float64, device=device).requires_grad_()
        with triton_norm.backend(path):
            y = checkpoint(nn.Sequential(linear, norm), x, use_reentrant=use_reentrant)
            y.pow(3).sum().backward()
        result.append({"x": x.grad, **{name: buffer.double() for name, buffer in norm.named_buffers()}})
    torch.testing.assert_close(*result, rtol=1e-5, atol=1e-5)


@pairwise({"counter": COUNTERS, "momentum": [0.1, None], "backend": ["triton", "torch"]})
def test_counters_of_every_type_count(counter, momentum, backend, device):
    """Averaged checkpoints have them, and soups of models."""
    theirs, ours = (library.BatchNorm1d(4, momentum=momentum, device=device) for library in (nn, triton_norm))
    for module in (theirs, ours):
        module.num_batches_tracked = torch.tensor(2, dtype=counter, device=device)
    for _ in range(3):
        x = torch.randn(5, 4, device=device)
        with triton_norm.backend(backend):
            ours(x.clone().requires_grad_())
        theirs(x)
    torch.testing.assert_close(state(ours), state(theirs))
    assert ours.num_batches_tracked.dtype == counter


@PATHS
def test_a_soup_of_models_counts_what_is_between_integers(path, device):
    theirs, ours = (library.BatchNorm1d(4, momentum=None, device=device) for library in (nn, triton_norm))
    soup = {"running_mean": torch.zeros(4), "running_var": torch.ones(4), "num_batches_tracked": torch.tensor(2.5)}
    x = torch.randn(5, 4, device=device)
    results = []
    for module in (theirs, ours):
        buffers = {name: buffer.to(device, copy=True) for name, buffer in soup.items()}
        with triton_norm.backend(path):
            torch.func.functional_call(module, buffers, x)
        results.append(buffers)
    torch.testing.assert_close(*results)
    assert results[1]["num_batches_tracked"] == 3.5


class Stopped(Exception):
    pass


@pairwise(
    {
        "types": [torch.float32, torch.float64],
        "counter": [torch.int64, torch.int16, torch.float32],
        "saved": [0, 1, 2],
        "path": ["triton", "torch"],
    }
)
def test_a_hook_that_raises_leaves_all_moved_or_nothing(types, counter, saved, path, device):
    """Whichever tensor it raises at: torch saves some before it moves the statistics."""
    module = triton_norm.BatchNorm1d(4, device=device, dtype=types)
    module.num_batches_tracked = module.num_batches_tracked.to(counter)
    before = state(module)
    x = torch.randn(5, 4, device=device, requires_grad=True)
    remaining = [None] * saved

    def pack(tensor):
        if not remaining:
            raise Stopped
        return remaining.pop() or tensor

    with triton_norm.backend(path), saved_tensors_hooks(pack, lambda tensor: tensor), pytest.raises(Stopped):
        module(x, activation="silu")
    moved = module.num_batches_tracked == 1
    assert moved or path == "torch"
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]) != moved


def test_what_torch_refuses_leaves_neither_moved(monkeypatch, device):
    """Memory may run out in torch's own function, before it writes."""
    module = triton_norm.BatchNorm1d(4, device=device)
    before = state(module)

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(F, "batch_norm", out_of_memory)
    with triton_norm.backend("torch"), pytest.raises(torch.OutOfMemoryError):
        module(torch.randn(5, 4, device=device))
    torch.testing.assert_close(state(module), before, rtol=0, atol=0)


@pairwise(
    {
        "statistics": ["tracked", "without a counter", "untracked"],
        "activation": [None, "relu"],
        "path": ["triton", "torch"],
    }
)
def test_mutation_of_saved_tensors(activation, statistics, path, device):
    """A mode of torch's that follows writes, and clones saved tensors before them."""
    result = []
    for library in (nn, triton_norm):
        module = library.BatchNorm1d(3, track_running_stats=statistics != "untracked", device=device)
        if statistics == "without a counter":
            module.num_batches_tracked = None
        x = torch.linspace(-1, 3, 15, device=device).view(5, 3).square().requires_grad_()
        with allow_mutation_on_saved_tensors(), triton_norm.backend(path):
            h = x * 1
            if library is nn:
                y = module(h) if activation is None else F.relu(module(h))
            else:
                y = module(h, activation=activation)
            h.add_(1)
            y.pow(3).sum().backward()
        result.append({"dx": x.grad, **state(module)})
    torch.testing.assert_close(*result, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@PATHS
def test_modules_that_were_made_under_inference_mode(path, gradients, training, device):
    """Outside it, torch's refuses to count, and to save their tensors for a backward; ours has moved nothing then."""
    x = torch.randn(5, 3, device=device)
    with torch.inference_mode():
        theirs, ours = (library.BatchNorm1d(3, device=device).train(training) for library in (nn, triton_norm))
        before = state(ours)

    def call(module):
        with torch.set_grad_enabled(gradients), triton_norm.backend(path):
            return module(x).detach()

    if training or gradients:
        for module in (theirs, ours):
            with pytest.raises(RuntimeError, match="nference"):
                call(module)
        torch.testing.assert_close(state(ours), before, rtol=0, atol=0)
    else:
        torch.testing.assert_close(call(ours), call(theirs))


@PATHS
@pytest.mark.parametrize("stored", [torch.float32, torch.float64], ids=["one type", "two types"])
def test_statistics_that_were_made_under_inference_mode(stored, path, device):
    """torch's function moves them; where this library writes them by torch's own means, it can't, and moves neither."""
    with torch.inference_mode():
        ours, theirs = ([torch.zeros(3, device=device), torch.ones(3, device=device)] for _ in range(2))
        ours = [statistic.to(stored) for statistic in ours]
    x = torch.randn(5, 3, device=device)
    F.batch_norm(x, *theirs, training=True)
    with triton_norm.backend(path):
        if path == "torch" and stored == torch.float64:
            with pytest.raises(RuntimeError, match="nference"):
                triton_norm.batch_norm(x, *ours, training=True)
            assert ours[0].sum() == 0
            return
        triton_norm.batch_norm(x, *ours, training=True)
    torch.testing.assert_close([statistic.float() for statistic in ours], theirs)
