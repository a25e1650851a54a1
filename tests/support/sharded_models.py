"""Scenarios of test_sharded_rows.py: steps of training of a small model whose sequence and weights are sharded.

The model is held to the same one with torch's norms, parallelized alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import triton_norm
from support.worlds import World

WIDTH, TOKENS, SAMPLES = 16, 8, 4
FEW_ULP = 64 * torch.finfo(torch.float32).eps
"""Bounds a tensor's error per its largest value: two steps through three norms and two products of 32 terms."""

PLAN = {
    "first": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    "second": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1)),
}

Parallel = Callable[[nn.Module], nn.Module]


class Block(nn.Module):
    """A feed-forward block between two norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.first(x))))
        return self.head(self.second(x)).tanh()  # FSDP warns of views


class Trained(NamedTuple):
    """Holds the results of steps of training, and the collectives of the first one."""

    tensors: list[Tensor]
    collectives: dict[object, int]


def drawn_block(device: torch.device) -> Block:
    torch.manual_seed(1)
    block = Block()
    with torch.no_grad():
        for norm in (block.first, block.second):  # SequenceParallel takes for granted that processes have them alike
            norm.weight.uniform_(0.5, 1.5)
    return block.to(device)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(model: nn.Module, call: Callable[[Tensor], Tensor], batch: Tensor, mesh: DeviceMesh) -> Trained:
    """Takes two steps of SGD.

    Args:
        batch: this process's samples, with all tokens.
        mesh: the mesh that the tokens are sharded over.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results, counted = [], CommDebugMode()
    local = batch.chunk(mesh.size(), 1)[mesh.get_local_rank()]
    for number in range(2):
        x = DTensor.from_local(local, mesh, [Shard(1)]).requires_grad_()
        with counted if number == 0 and call is model else torch.enable_grad():
            y = call(x)
            y.square().mean().backward()
        results += [y.detach(), whole(x.grad), *(whole(parameter.grad) for parameter in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    results += [whole(parameter) for parameter in model.parameters()]
    return Trained(results, dict(counted.comm_counts))


def check(actual: Trained, expected: Trained) -> None:
    for own, other in zip(actual.tensors, expected.tensors, strict=True):
        assert own.shape == other.shape
        torch.testing.assert_close(own, other, rtol=0, atol=FEW_ULP * float(other.abs().max()))


def check_steps(parallel: Parallel, batch: Tensor, mesh: DeviceMesh, compiles: str | None = None) -> None:
    """Asserts that a converted model trains as torch's, converted before it is parallelized, and after if not compiled.

    Args:
        compiles: backend of torch.compile, or None.
    """
    theirs = parallel(drawn_block(batch.device))
    expected = trained(theirs, theirs, batch, mesh)
    for converts_first in (True, False) if compiles is None else (True,):
        model = drawn_block(batch.device)
        report = triton_norm.convert(model if converts_first else (model := parallel(model)))
        assert list(report.converted) == ["first", "second"], report
        model = parallel(model) if converts_first else model
        call = model if compiles is None else torch.compile(model, fullgraph=True, backend=compiles)
        actual = trained(model, call, batch, mesh)
        check(actual, expected)
        if compiles is None:
            assert actual.collectives == expected.collectives, (actual.collectives, expected.collectives)
        assert triton_norm.revert(model) == ("first", "second")


def _batch(world: World) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(SAMPLES, TOKENS, WIDTH, device=world.device)


def a_sequence_in_parallel(world: World) -> None:
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    check_steps(lambda model: parallelize_module(model, mesh, PLAN), _batch(world), mesh)


def on_torchs_path(world: World) -> None:
    with triton_norm.backend("torch"):
        a_sequence_in_parallel(world)


def compiled_sequence_in_parallel(world: World) -> None:
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    torch._dynamo.reset()
    check_steps(lambda model: parallelize_module(model, mesh, PLAN), _batch(world), mesh, "aot_eager")


def _sharded_on_both_axes(mesh: DeviceMesh, model: nn.Module) -> nn.Module:
    return fully_shard(parallelize_module(model, mesh["sequence"], PLAN), mesh=mesh["batch"])


def fully_sharded_with_a_sequence_in_parallel(world: World, compiles: str | None = None) -> None:
    """Shards weights over one axis of the mesh, and the sequence over the other."""
    mesh = init_device_mesh(torch.device(world.device).type, (2, world.size // 2), mesh_dim_names=("batch", "sequence"))
    samples = _batch(world).chunk(2)[mesh["batch"].get_local_rank()]
    check_steps(functools.partial(_sharded_on_both_axes, mesh), samples, mesh["sequence"], compiles)


def compiled_fully_sharded(world: World) -> None:
    torch._dynamo.reset()
    fully_sharded_with_a_sequence_in_parallel(world, "aot_eager")
