"""BatchNorm's running statistics and the count of batches, which kernels move in place."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.channel_norms import KINDS, SPLIT, drawn, running_statistics, share
from support.gpus import with_numbers
from support.oracle import differentiated
from support.spaces import GPU
from support.turns import taking_turns
from triton_norm.tuning import channel_spaces
from triton_norm.tuning.choices import begun_anew
from triton_norm.tuning.limits import INTERPRETED

pytestmark = pytest.mark.usefixtures("through_the_kernels")

HALF = torch.bfloat16


@pytest.fixture(params=["one program", "one launch", "two launches"])
def form(request, numbers):
    """Sets how the programs of SPLIT's shapes share the work, when called with a kind; returns the launches of a
    training step's forward."""

    def use(kind: str) -> int:
        if request.param != "one program":
            share(numbers, SPLIT[kind][1], one_launch=request.param == "one launch")
        return 2 if request.param == "two launches" else 1

    return use


def _must_not(self, *arguments, **named):
    raise AssertionError("waits for the GPU, or launches a kernel of torch's")


@pytest.mark.parametrize(("momentum", "counts"), [(0.1, torch.int64), (None, torch.int64), (None, torch.int32)])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_counted_in_the_kernel_and_never_read_back(
    kind, counts, momentum, form, guard, monkeypatch, device
):
    launches = form(kind)
    shape, _ = SPLIT[kind]
    mean, var = running_statistics(shape[1], device)
    exact = nn.BatchNorm1d(shape[1], momentum=momentum).to(device, torch.float64)
    exact.running_mean.copy_(mean)
    exact.running_var.copy_(var)
    counter = torch.tensor(0, dtype=counts, device=device)
    for _ in range(2):
        x = drawn(shape, kind, device).x
        exact(x.double().flatten(2))
        with taking_turns(), monkeypatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "add_", "copy_", "fill_"):
                patch.setattr(Tensor, name, _must_not)
            triton_norm.batch_norm(x, mean, var, training=True, momentum=momentum, num_batches_tracked=counter)
    assert counter.item() == 2
    assert guard is None or len(guard.launches) == 2 * launches
    torch.testing.assert_close(mean.double(), exact.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact.running_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_of_another_type_and_stride(kind, form, device):
    form(kind)
    shape, _ = SPLIT[kind]
    call = drawn(shape, kind, device, residual=HALF, activation="relu")
    mean, var = (torch.rand(shape[1], 3, device=device) + 0.5).to(HALF).T[:2]
    neighbour = mean._base.clone()[:, 2]
    wide_mean, wide_var = mean.double(), var.double()
    with taking_turns():
        triton_norm.batch_norm(call.x, mean, var, training=True, residual=call.residual, activation="relu")
    F.batch_norm(call.x.double(), wide_mean, wide_var, training=True)
    torch.testing.assert_close(mean.double(), wide_mean, rtol=2**-8, atol=0)
    torch.testing.assert_close(var.double(), wide_var, rtol=2**-8, atol=0)
    assert torch.equal(mean._base[:, 2], neighbour)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_statistics_in_fp64_stay_so(backend, device):
    """Moved by nothing they keep their bits, and by a little all but those of the batch's share, which is fp32's."""
    x = torch.randn(8, 3, device=device)
    before = torch.randn(2, 3, dtype=torch.float64).abs().to(device)
    batch = x.double().mean(0), x.double().var(0)
    for momentum in (0.0, 2.0**-30):
        moved = before.clone()
        with triton_norm.backend(backend):
            triton_norm.batch_norm(x, *moved.unbind(), training=True, momentum=momentum)
        exact = (1 - momentum) * before + momentum * torch.stack(batch)
        torch.testing.assert_close(moved, exact, rtol=2.0**-50, atol=momentum * 1e-5)


@pytest.fixture
def searched(timings, monkeypatch, tmp_path):
    """A GPU that nothing is known of: each launch is searched for between two configs; returns the launches timed."""

    def two(space):
        (result, *_) = space.configs
        return dataclasses.replace(space, configs=(result, dataclasses.replace(result, num_warps=2 * result.num_warps)))

    channels = channel_spaces.channels
    monkeypatch.setattr(channel_spaces, "channels", lambda work, gpu: two(channels(work, gpu)))
    with with_numbers(name=GPU), begun_anew(tmp_path):
        yield timings


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the search times for real")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["flat", "last"])
def test_a_search_moves_nothing(kind, momentum, form, searched, device):
    """Two configs are run for each launch, and then the launch itself: the call is right, and moves once."""
    launches = form(kind)
    call = drawn(SPLIT[kind][0], kind, device, residual=HALF, activation="relu")
    mean, var = running_statistics(call.x.shape[1], device)
    wide_mean, wide_var = mean.double(), var.double()
    counter = torch.tensor(3, device=device)

    def step(x, residual, weight, bias):
        tracked = {"momentum": momentum, "num_batches_tracked": counter}
        fused = {"residual": residual, "activation": "relu"}
        return triton_norm.batch_norm(x, mean, var, weight, bias, True, **tracked, **fused)

    with taking_turns():
        call.check(differentiated(step, call.inputs(), (call.dy,)))
    assert len(searched) == 2 * 2 * launches  # forward and backward
    F.batch_norm(call.x.double(), wide_mean, wide_var, training=True, momentum=momentum or 1 / 4)
    torch.testing.assert_close(mean.double(), wide_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), wide_var, rtol=1e-6, atol=1e-6)
    assert counter.item() == 4
