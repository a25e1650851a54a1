"""Scenarios of test_sync_batch_norm.py: exact results and exchanges of processes that share a batch."""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import triton_norm
from support.channel_norms import SHARED, Call, drawn, laid
from support.gpus import with_numbers
from support.oracle import Results
from support.turns import taking_turns
from support.worlds import World
from triton_norm import dispatch
from triton_norm.tuning.limits import INTERPRETED

EVEN = {2: (3, 3), 3: (2, 2, 2)}
UNEVEN = {2: (5, 2), 3: (1, 4, 2)}
ONE_EMPTY = {2: (0, 6), 3: (3, 0, 4)}
"""Together fewer samples than are folded."""
MANY = {2: (9, 20), 3: (12, 9, 17)}


class CollectiveCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.__name__:
            self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def small_tiles() -> contextlib.AbstractContextManager[None]:
    """Interpreted with several programs a channel."""
    return with_numbers(**SHARED) if INTERPRETED else contextlib.nullcontext()


def module_of(call: Call, momentum: float | None = 0.1, **options: Any) -> triton_norm.SyncBatchNorm:
    dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    module = triton_norm.SyncBatchNorm(call.x.shape[1], momentum=momentum, dtype=dtype, device=call.x.device, **options)
    # Halves that each process rounds its gradients to would not add up to the exact ones.
    module.weight, module.bias = (
        nn.Parameter(parameter.to(dtype, copy=True)) for parameter in (call.weight, call.bias)
    )
    return module


def share_of(world: World, call: Call, sizes: dict[int, tuple[int, ...]]) -> Call:
    x, residual, dy = (
        None if tensor is None else world.share(tensor, sizes) for tensor in (call.x, call.residual, call.dy)
    )
    return call.of(x=x, residual=residual, dy=dy)


def found_by(module: nn.Module, call: Call) -> Results:
    x = call.x.detach().requires_grad_()
    residual = None if call.residual is None else call.residual.detach().requires_grad_()
    y = module(x, residual=residual, activation=call.activation, negative_slope=call.slope)
    leaves = [leaf for leaf in (x, residual, module.weight, module.bias) if leaf is not None]
    dx, *rest = torch.autograd.grad(y, leaves, call.dy)
    dresidual = None if residual is None else rest.pop(0)
    for made in (y, dx):
        assert made.shape == x.shape
        assert made.dtype == x.dtype
        assert x.numel() == 0 or made.stride() == x.stride()
    return Results(y.detach(), None, dx, dresidual, *rest)


def joined(world: World, mine: Results) -> Results:
    y, _, dx, dresidual, dweight, dbias = zip(*world.everyones(tuple(mine)), strict=True)
    residuals = None if mine.dresidual is None else torch.cat(dresidual)
    return Results(torch.cat(y), None, torch.cat(dx), residuals, sum(dweight), sum(dbias))


def check_running(world: World, module: nn.Module, batches: list[Tensor]) -> None:
    """Compares with torch's module in fp64, on whole batches."""
    exact = nn.BatchNorm1d(batches[0].shape[1], momentum=module.momentum, dtype=torch.float64, device=world.device)
    for x in batches:
        exact(x.double().flatten(2) if x.dim() > 2 else x.double())
    tolerance = 16 * torch.finfo(module.running_mean.dtype).eps
    for name in ("running_mean", "running_var"):
        ours = getattr(module, name).double()
        torch.testing.assert_close(ours, getattr(exact, name), rtol=tolerance, atol=3 * tolerance)
    assert module.num_batches_tracked.item() == len(batches)
    for state in world.everyones({name: buffer.cpu() for name, buffer in module.named_buffers()}):
        assert all(torch.equal(buffer.cpu(), state[name]) for name, buffer in module.named_buffers())


def check(world: World, sizes: dict[int, tuple[int, ...]], call: Call, momentum: float | None = 0.1) -> None:
    """Two steps, the second of which is held to BatchNorm in fp64 over the joined batch."""
    module = module_of(call, momentum)
    part = share_of(world, call, sizes)
    with torch.no_grad():
        module(part.x + 1)
    call.check(joined(world, found_by(module, part)))
    check_running(world, module, [call.x + 1, call.x])


def shape_of(sizes: dict[int, tuple[int, ...]], world: World, *rest: int) -> tuple[int, ...]:
    return (sum(sizes[world.size]), *rest)


def plain_in_every_layout(world: World) -> None:
    for kind in ("flat", "last"):
        check(world, EVEN, drawn(shape_of(EVEN, world, 3, 6, 8), kind, world.device))
        with small_tiles():
            check(world, UNEVEN, drawn(shape_of(UNEVEN, world, 4, 5, 8), kind, world.device))
    check(world, MANY, drawn(shape_of(MANY, world, 6, 3, 3), "folded", world.device))
    check(world, MANY, drawn(shape_of(MANY, world, 7), "last", world.device))
    check(world, UNEVEN, drawn(shape_of(UNEVEN, world, 4, 2, 4, 6), "last", world.device), momentum=0.0)


def every_type_and_what_is_fused(world: World) -> None:
    fused = (
        (torch.bfloat16, "flat", UNEVEN, None, "silu"),
        (torch.bfloat16, "last", EVEN, torch.float32, "leaky_relu"),
        (torch.float16, "last", UNEVEN, torch.float16, None),
        (torch.float64, "flat", ONE_EMPTY, None, None),
        (torch.float32, "last", ONE_EMPTY, torch.float32, "relu"),
        (torch.float32, "flat", ONE_EMPTY, torch.bfloat16, "silu"),
        (torch.float32, "flat", UNEVEN, None, "relu"),
    )
    for dtype, kind, sizes, residual, activation in fused:
        shape = shape_of(sizes, world, 6, 7, 4)
        call = drawn(shape, kind, world.device, dtype, residual=residual, activation=activation, slope=0.2)
        check(world, sizes, call, momentum=None)


def a_large_mean_leaves_no_error_of_its_own_size(world: World) -> None:
    for sizes in (UNEVEN, ONE_EMPTY):
        x = 1e4 + torch.randn(shape_of(sizes, world, 3, 9, 10), device=world.device)
        exact = F.batch_norm(x.double(), None, None, training=True)
        module = triton_norm.SyncBatchNorm(3, affine=False, device=world.device)
        error = (module(world.share(x, sizes)) - world.share(exact, sizes)).abs()
        assert error.numel() == 0 or error.max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        check_running(world, module, [x])


def few_values(world: World) -> None:
    """One a channel on each process, or in all, or none."""
    shares = {2: (1, 1), 3: (1, 1, 1)}
    x = torch.randn(shape_of(shares, world, 4), device=world.device)
    module = triton_norm.SyncBatchNorm(4, device=world.device)
    torch.testing.assert_close(
        module(world.share(x, shares)), world.share(F.batch_norm(x, None, None, training=True), shares)
    )
    check_running(world, module, [x])
    assert triton_norm.explain(module, world.share(x, shares)).function == "sync_batch_norm"
    for alone in (1, 0):
        module = triton_norm.SyncBatchNorm(4, device=world.device)
        mine = x[:alone] if world.rank == world.size - 1 else x[:0]
        y = module(mine)
        y.sum().backward()
        assert torch.equal(y, torch.zeros_like(mine))
        torch.testing.assert_close(module.running_mean, alone * 0.1 * x[0])
        assert torch.equal(module.running_var, torch.ones(4, device=world.device))
        assert module.num_batches_tracked.item() == 1
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def only_the_requested_gradients(world: World) -> None:
    for activation in (None, "relu"):
        call = drawn(
            shape_of(ONE_EMPTY, world, 5, 4), "flat", world.device, residual=torch.float32, activation=activation
        )
        part = share_of(world, call, ONE_EMPTY)
        module = module_of(part)
        everything = found_by(module, part).gradients
        for requested in ((0,), (1,), (2, 3), (0, 2), (3,)):
            leaves = [part.x.detach(), part.residual.detach(), module.weight.detach(), module.bias.detach()]
            for i, leaf in enumerate(leaves):
                leaf.requires_grad_(i in requested)
            state = {"weight": leaves[2], "bias": leaves[3]}
            y = torch.func.functional_call(module, state, leaves[0], {"residual": leaves[1], "activation": activation})
            grads = torch.autograd.grad(y, [leaves[i] for i in requested], part.dy)
            assert all(map(torch.equal, grads, [everything[i] for i in requested]))


def one_exchange_forward_and_one_backward(world: World) -> None:
    call = drawn(shape_of(ONE_EMPTY, world, 5, 4), "flat", world.device)
    part = share_of(world, call, ONE_EMPTY)
    module = module_of(part)
    x = part.x.detach().requires_grad_()
    with CollectiveCounter() as forward:
        y = module(x)
    with CollectiveCounter() as backward:
        y.backward(part.dy)
    assert forward.names == ["all_gather_into_tensor"]
    assert backward.names == ["all_reduce"]


def second_derivatives(world: World) -> None:
    for residual, activation in ((None, None), (torch.float64, "relu"), (None, "silu")):
        shape = shape_of(ONE_EMPTY, world, 3, 4)
        call = drawn(shape, "flat", world.device, torch.float64, residual=residual, activation=activation)
        part = share_of(world, call, ONE_EMPTY)
        module = module_of(part)
        mine = _penalized(functools.partial(y_of_share, module, part), part)
        whole = _penalized(call.composed, call)
        for ours, exact in zip(mine[:2], whole[:2], strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, world.share(exact, ONE_EMPTY), rtol=1e-8, atol=1e-8)
        for i in (2, 3):
            if whole[i] is not None:
                torch.testing.assert_close(sum(world.everyones(mine[i])), whole[i], rtol=1e-8, atol=1e-8)


def y_of_share(
    module: nn.Module, call: Call, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor
) -> Tensor:
    fused = {"residual": residual, "activation": call.activation, "negative_slope": call.slope}
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, x, fused)


def _penalized(function: Callable[..., Tensor], call: Call) -> list[Tensor | None]:
    """The gradients of Σ y · dy + Σ dx²."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in call.inputs()]
    y = function(*leaves)
    (dx,) = torch.autograd.grad(y, leaves[0], call.dy, create_graph=True)
    penalty = (y * call.dy).sum() + dx.square().sum()
    requested = [leaf for leaf in leaves if leaf is not None]
    result = iter(torch.autograd.grad(penalty, requested, allow_unused=True))
    return [None if leaf is None else next(result) for leaf in leaves]


def evaluation_exchanges_nothing(world: World) -> None:
    x = torch.randn(4, 5, 3, device=world.device)
    module = triton_norm.SyncBatchNorm(5, device=world.device)
    module(x)
    module.eval()
    if world.rank == 0:  # the others don't come
        expected = F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)
        torch.testing.assert_close(module(x), expected)


def a_group_of_its_own(world: World) -> None:
    """Whoever is not in it has a batch of its own."""
    group = dist.new_group([0, 1])
    x = torch.randn(world.size, 4, 5, 6, device=world.device)
    module = triton_norm.SyncBatchNorm(5, process_group=group, device=world.device)
    with taking_turns():
        y = module(x[world.rank])
    batch = x[:2].flatten(0, 1) if world.rank < 2 else x[world.rank]
    expected = F.batch_norm(batch, None, None, training=True)
    torch.testing.assert_close(y, expected.split(4)[world.rank if world.rank < 2 else 0])


class Network(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), norm(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def distributed_data_parallel(world: World) -> None:
    """Two steps, those of one process on whole batches; in channels last, which the layers keep."""
    torch.manual_seed(1)
    whole = Network().double().to(world.device)
    ours = triton_norm.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
    strides: list[bool] = []
    ours.body[1].register_forward_hook(
        lambda module, args, y: strides.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    ours = ours.to(memory_format=torch.channels_last)
    ours = DistributedDataParallel(ours, device_ids=None if world.device == "cpu" else [world.device])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, ours)]
    for sizes in (UNEVEN, EVEN):
        x = laid(torch.randn(shape_of(sizes, world, 3, 8, 8), dtype=torch.float64, device=world.device), "last")
        for optimizer in optimizers:
            optimizer.zero_grad()
        whole(x).square().sum().backward()
        (ours(world.share(x, sizes)).square().sum() * world.size).backward()  # gradients are averaged
        for optimizer in optimizers:
            optimizer.step()
    assert strides == [True, True]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], tensor, rtol=1e-10, atol=1e-12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = triton_norm.SyncBatchNorm(6, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.sin(), residual=x, activation="silu").cos()


def compiled(world: World, backend: str, lengths: tuple[int, ...]) -> None:
    """Compiled steps have no graph break and are as eager; batch sizes change."""
    torch._dynamo.reset()
    eager = Block().to(world.device)
    block = copy.deepcopy(eager)
    run = torch.compile(block, fullgraph=True, backend=backend)
    for length in lengths:
        batch = torch.randn(world.size, length + world.rank, 6, 5, device=world.device)[world.rank]
        result = []
        for module, function in ((eager, eager), (block, run)):
            module.zero_grad()
            x = batch.clone().requires_grad_()
            y = function(x)
            y.square().sum().backward()
            grads = [x.grad, *(parameter.grad for parameter in module.parameters())]
            result.append([y.detach(), *grads, *module.buffers()])
        for one, other in zip(*result, strict=True):
            if backend == "aot_eager" and dispatch.backend_in_force() == "triton":
                assert torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def compiled_by_aot_eager(world: World) -> None:
    compiled(world, "aot_eager", (2, 3, 5))


def compiled_by_inductor(world: World) -> None:
    compiled(world, "inductor", (2, 3))


def one_that_fails(world: World) -> None:
    assert world.rank != 1, f"rank {world.rank}"
    dist.barrier()
