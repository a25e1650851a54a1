"""More scenarios of test_sync_batch_norm.py: programs that are recorded, and trained later."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.fx.experimental.proxy_tensor import make_fx

import triton_norm
from support.sync_scenarios import Block
from support.worlds import World


def _step(module: nn.Module, function: Callable[[Tensor], Tensor], batch: Tensor) -> list[Tensor]:
    """Returns y, all gradients and the buffers behind a training step."""
    module.zero_grad()
    x = batch.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(parameter.grad for parameter in module.parameters()),
        *map(Tensor.clone, module.buffers()),
    ]


def _functional(module: nn.Module) -> Callable[..., Tensor]:
    """Returns the module as a function of x and its parameters and buffers by name."""
    return lambda tensors, x: torch.func.functional_call(module, tensors, (x,))


def compiled_and_recorded(world: World) -> None:
    """Exported, strictly or not, with gradients or without, and by make_fx: each trains as eager, two steps long."""
    for momentum in (0.1, None):
        start = Block().to(world.device)
        start.norm.momentum = momentum
        batches = torch.randn(2, world.size, 3, 6, 5, device=world.device)[:, world.rank]
        eager = copy.deepcopy(start)
        expected = [_step(eager, eager, batch) for batch in batches]

        def check(module: nn.Module, function: Callable[[Tensor], Tensor], expected=expected, batches=batches) -> None:
            for batch, reference in zip(batches, expected, strict=True):
                torch.testing.assert_close(_step(module, function, batch), reference, rtol=1e-5, atol=1e-5)

        for strict, grad in ((False, True), (True, False)):
            with torch.set_grad_enabled(grad):
                program = torch.export.export(copy.deepcopy(start), (batches[0],), strict=strict)
            assert "triton_norm.sync_batch_norm_apply.default" in {str(node.target) for node in program.graph.nodes}
            module = program.module()
            check(module, module)
        for pre_dispatch in (False, True):
            module = copy.deepcopy(start)
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            # In its mode "real" torch itself waits forever for a collective that is recorded before dispatch.
            graph = make_fx(_functional(module), tracing_mode="fake", pre_dispatch=pre_dispatch)(tensors, batches[0])
            check(module, lambda x, graph=graph, tensors=tensors: graph(tensors, x))


def compiled_without_a_function_of_autograd(world: World) -> None:
    """The change is one that torch's caches of compiled code would know nothing of."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    block = Block().to(world.device)
    torch.compile(block, fullgraph=True, backend=keep)(torch.randn(3, 6, 5, device=world.device, requires_grad=True))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert not any("autograd" in target for target in targets), targets
    assert any("sync_batch_norm_apply" in target for target in targets)
    assert triton_norm.OPERATORS[-1] in [node.target for node in graph.graph.nodes]


def compiled_pipeline(world: World) -> None:
    """A stage a process, each exported: every parameter has the gradient that it has in one process."""
    if world.size != 2:
        return
    halves = [nn.Sequential(nn.Linear(8, 8), triton_norm.LayerNorm(8), triton_norm.BatchNorm1d(8)) for _ in range(2)]
    model = nn.Sequential(*halves).to(world.device)
    exact = copy.deepcopy(model)
    x, target = torch.randn(2, 4, 8, device=world.device)

    def loss_of(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().sum()

    with triton_norm.backend("auto"):
        pipe = pipelining.pipeline(model, (x,), split_spec={"1": pipelining.SplitPoint.BEGINNING})
    schedule = pipelining.ScheduleGPipe(pipe.build_stage(world.rank, torch.device(world.device)), 1, loss_of)
    if world.rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=target)
    loss_of(exact(x), target).backward()
    expected = {name: parameter.grad for name, parameter in exact.named_parameters()}
    actual = {name: parameter.grad for name, parameter in pipe.get_stage_module(world.rank).named_parameters()}
    assert len(actual) == 6
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
