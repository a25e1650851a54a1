"""SyncBatchNorm in processes of its own that talk over gloo, and in one process alone."""

import functools

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support import operator_calls, sync_between, sync_captured, sync_scenarios, worlds
from support.pairwise import pairwise
from triton_norm.channels.running import move_op
from triton_norm.sync import operator as synchronized

SCENARIOS = [
    sync_scenarios.plain_in_every_layout,
    sync_scenarios.every_type_and_what_is_fused,
    sync_scenarios.a_large_mean_leaves_no_error_of_its_own_size,
    sync_scenarios.few_values,
    sync_scenarios.only_the_requested_gradients,
    sync_scenarios.one_exchange_forward_and_one_backward,
    sync_scenarios.second_derivatives,
    sync_between.between_forward_and_backward,
    sync_between.counters_of_every_type,
    sync_scenarios.evaluation_exchanges_nothing,
    sync_scenarios.a_group_of_its_own,
    sync_scenarios.distributed_data_parallel,
]
RECORDED = [
    sync_captured.compiled_and_recorded,
    sync_captured.compiled_without_a_function_of_autograd,
    sync_captured.compiled_pipeline,
]
PATHS = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])


@pytest.fixture
def processes(tmp_path):
    return functools.partial(worlds.start, tmp_path)


@pytest.mark.long
@PATHS
@pytest.mark.parametrize("size", [2, 3])
def test_equals_batch_norm_over_the_joined_batch(size, kernels, processes):
    processes(size, kernels, SCENARIOS)


@PATHS
def test_what_is_compiled_or_recorded_trains(kernels, processes):
    compiled = sync_scenarios.compiled_by_aot_eager if kernels else sync_scenarios.compiled_by_inductor
    processes(2, kernels, [compiled, *RECORDED])


@pytest.mark.gpu
@PATHS
def test_over_nccl(kernels, processes):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    compiled = [sync_scenarios.compiled_by_aot_eager, sync_scenarios.compiled_by_inductor]
    processes(2, kernels, [*SCENARIOS, *RECORDED, *compiled], backend="nccl")


def test_a_failing_process_is_heard_of(processes):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="AssertionError: rank 1"):
        processes(2, False, [sync_scenarios.one_that_fails])


def packed(x: Tensor) -> Tensor:
    """A share [N, C] in the format that processes exchange."""
    mean = x.mean(0)
    return torch.cat((mean, torch.zeros_like(mean), (x - mean).square().sum(0), x.new_full((1,), len(x))))


@pairwise(
    {
        "empty": [(), (0, 4, 18), range(19)],
        "saved": [torch.float32, torch.bfloat16, torch.float64],
        "momentum": [0.1, None],
        "n_channels": [5, 1100],
        "kernels": [True, False],
    }
)
def test_merges_the_shares_of_many(empty, saved, momentum, n_channels, kernels, device):
    """Shares are more than are read at a time, and channels those of one program or two. An empty share is not read."""
    lengths = [0 if rank in empty else 1 + rank % 4 for rank in range(19)]
    parts = [100 + torch.randn(length, n_channels, dtype=torch.float64) for length in lengths]
    gathered = torch.stack([packed(part) for part in parts]).float().to(device)
    mean, var, counter = torch.randn(n_channels).to(saved), (torch.rand(n_channels) + 0.5).to(saved), torch.tensor(3)
    exact = nn.BatchNorm1d(n_channels, momentum=momentum, dtype=torch.float64)
    exact.running_mean, exact.running_var, exact.num_batches_tracked = mean.double(), var.double(), counter.clone()
    moved = [tensor.to(device, copy=True) for tensor in (mean, var, counter)]
    merged = move_op(gathered, moved[:2], moved[2:], momentum, 1e-5, kernels).cpu()
    assert merged[-1] == sum(lengths)
    assert moved[2] == 4
    if sum(lengths) == 0:
        assert torch.equal(moved[0].cpu(), mean)
        assert torch.equal(moved[1].cpu(), var)
        return
    batch = torch.cat(parts)
    exact(batch)
    rstd = torch.rsqrt(batch.var(0, correction=0) + 1e-5)
    roundoff = torch.finfo(torch.float32).eps
    results = merged[:-1].double().view(3, -1)
    # Each share's mean, of about 100, was rounded once.
    torch.testing.assert_close(results[0] + results[1], batch.mean(0), rtol=2 * roundoff, atol=0)
    torch.testing.assert_close(results[2], rstd, rtol=1e-3, atol=0)
    tolerance = torch.finfo(saved).eps if saved == torch.bfloat16 else 16 * roundoff
    torch.testing.assert_close(moved[0].cpu().double(), exact.running_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moved[1].cpu().double(), exact.running_var, rtol=max(tolerance, 1e-3), atol=tolerance)


@PATHS
def test_equal_means_merge_to_themselves(kernels, device):
    one = torch.tensor([1e4 / 3, 0.0, 2.0, 3.0])
    gathered = torch.stack((torch.zeros(4), one, one, one)).to(device)
    merged = move_op(gathered, [], [], 0.1, 1e-5, kernels).cpu()
    assert merged[:2].tolist() == one[:2].tolist()
    assert merged[3] == 9


@pytest.mark.parametrize("name", operator_calls.synchronized("cpu"))
def test_opcheck(name, device):
    arguments = torch.utils._pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(device), operator_calls.synchronized(device)[name]
    )
    operator = getattr(torch.ops.triton_norm, f"sync_batch_norm_{name.partition(',')[0]}")
    torch.library.opcheck(operator.default, arguments)


class Mixed(nn.Module):
    """BatchNorm of every kind; one layer has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3, eps=1e-3, momentum=None)
        self.again = self.first
        self.body = nn.Sequential(triton_norm.BatchNorm1d(4, affine=False), nn.Linear(4, 4), nn.SyncBatchNorm(4))
        self.last = nn.BatchNorm3d(5, track_running_stats=False, dtype=torch.float64)
        self.absent = None


def test_convert():
    model = Mixed()
    model.body.eval()
    model.first.qconfig = "qconfig"
    names = model.state_dict().keys()
    before = dict(model.named_modules(remove_duplicate=False))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    group = object()
    converted = triton_norm.SyncBatchNorm.convert_sync_batchnorm(model, group)
    assert converted is model
    assert converted.state_dict().keys() == names
    for name, tensor in (*converted.named_parameters(), *converted.named_buffers()):
        assert tensor is tensors[name]
    for name in ("first", "again", "body.0", "body.2", "last"):
        module = converted.get_submodule(name)
        assert type(module) is triton_norm.SyncBatchNorm
        assert module.process_group is group
        for attribute in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
            assert getattr(module, attribute) == getattr(before[name], attribute)
    assert converted.first.qconfig == "qconfig"
    assert isinstance(converted.body[1], nn.Linear)


def test_converts_what_is_itself_a_layer():
    layer = triton_norm.BatchNorm2d(3)
    converted = triton_norm.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(converted) is triton_norm.SyncBatchNorm
    assert converted.weight is layer.weight
    assert str(converted) == str(nn.SyncBatchNorm(3))


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_batch_norm(training, device):
    ours, theirs = triton_norm.SyncBatchNorm(4, device=device), triton_norm.BatchNorm2d(4, device=device)
    ours.load_state_dict(nn.SyncBatchNorm(4).state_dict())
    x = torch.randn(3, 4, 5, 6, device=device)
    for module in (ours, theirs):
        module.train(training)
    assert torch.equal(ours(x, activation="relu"), theirs(x, activation="relu"))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert triton_norm.explain(ours, x).function == "batch_norm"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), "expected at least 2D input"),
        ((4, 0, 3), "number of input channels should be non-zero"),
        ((1, 4), "Expected more than 1 value per channel"),
    ],
)
def test_errors_are_torchs(shape, message):
    for module in (triton_norm.SyncBatchNorm(4), nn.SyncBatchNorm(4)):
        with pytest.raises(ValueError, match=message):
            module(torch.randn(shape))


@PATHS
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_relu_stops_whatever_gradient_comes_to_it(poison, kernels, device):
    x, dy = torch.tensor([[-3.0], [1.0], [2.0]], device=device), torch.tensor([[poison], [1.0], [0.5]], device=device)
    merged = move_op(synchronized.moments_op(x, kernels)[None], [], [], 0.1, 1e-5, kernels)
    inputs = dy, x, None, None, None, None, merged
    ops, relu = torch.ops.triton_norm, ("relu", 0.0, kernels)
    _, _, sums = ops.sync_batch_norm_sums(*inputs, None, None, None, *relu)
    dx, _ = ops.sync_batch_norm_gradient(*inputs, sums, None, None, *relu)
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.batch_norm(leaf, None, None, training=True).relu(), leaf, dy.double())
    assert exact.isfinite().all()
    torch.testing.assert_close(dx.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_number_of_features_is_checked():
    with pytest.raises(RuntimeError, match="should contain 5 elements"):
        triton_norm.SyncBatchNorm(4)(torch.randn(3, 5))
