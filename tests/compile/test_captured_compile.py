"""Norms under torch.compile where sizes depend on data, in control flow, and where others decide on the saved tensors:
as torch's own layers in eager mode."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import triton_norm
from support.captured import (
    BACKENDS,
    CASES,
    EVERY_CASE,
    TOLERANCE,
    WIDTH,
    Batch,
    Compiled,
    assert_as_torchs,
    batches,
    pair,
    trained,
)
from support.pairwise import pairwise

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # Dynamo's own, on every autograd.Function that it traces.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]
RECORDING = pytest.mark.parametrize("backend", ["auto", "triton"])


@BACKENDS
@EVERY_CASE
def test_compiled_with_dynamic_shapes(kind, training, backend):
    with triton_norm.backend(backend):
        assert_as_torchs(kind, training, lambda module, _: Compiled(module, dynamic=True), (6, 5, 7))


class Selected(nn.Module):
    """The norm of those samples whose first feature is not 0: how many there are, data tell."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.norm, self.whole = module.norm, module

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        mask = x[:, 0] != 0
        return self.whole(x[mask], residual[mask])


def selected(batch: Batch, n: int) -> Batch:
    """Returns a batch of which `Selected` takes n samples."""
    x, residual = batch
    x[n:, 0] = 0
    return x, residual


@pairwise({"kind, training": CASES, "backend": ["auto", "triton", "torch"], "empty": [False, True]})
def test_sizes_that_depend_on_data(kind, training, backend, empty):
    """An empty selection, of which torch's BatchNorm in training makes an empty batch, gives gradients of 0."""
    ours, theirs = pair(kind, training)
    data = [selected(batch, n) for batch, n in zip(batches(6, 6, 6), (4, 0 if empty else 3, 5), strict=True)]
    with triton_norm.backend(backend):
        compiled = Compiled(Selected(ours))
        actual = trained(compiled, compiled, data)
    torch.testing.assert_close(actual, trained(Selected(theirs), theirs, data), **TOLERANCE)
    if empty:
        assert actual["y 1"].shape == (0, WIDTH)
        assert not actual["gradient of norm.weight 1"].any()


def without_statistics(module: nn.Module) -> nn.Module:
    module.norm.track_running_stats = False
    module.norm.running_mean = module.norm.running_var = module.norm.num_batches_tracked = None
    return module


Run = Callable[..., Tensor]


def in_a_branch(module: nn.Module) -> Run:
    def run(x: Tensor, residual: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, module, lambda x, residual: x * residual, (x, residual))

    return run


def if_positive(module: nn.Module) -> Run:
    return lambda x, residual: module(x, residual) if x.sum() > 0 else x * residual


def in_a_loop(module: nn.Module) -> Run:
    loop = torch._higher_order_ops.while_loop

    def run(x: Tensor, residual: Tensor) -> Tensor:
        turns = torch.zeros((), dtype=torch.int64, device=x.device)
        return loop(lambda turn, y: turn < 2, lambda turn, y: (turn + 1, module(y, residual)), (turns, x))[1]

    return run


def in_regions(module: nn.Module) -> Run:
    return twice(torch.compiler.nested_compile_region(lambda x, residual: module(x, residual)))


def twice(module: Run) -> Run:
    return lambda x, residual: module(module(x, residual), residual)


FLOWS = {"branch": (in_a_branch, if_positive), "loop": (in_a_loop, twice), "regions": (in_regions, twice)}


@pairwise(
    {
        "flow": list(FLOWS),
        "kind, training": [case for case in CASES if case != ("BatchNorm1d, cumulative", True)],
        "backend": ["auto", "triton", "torch"],
    }
)
def test_in_control_flow(flow, kind, training, backend):
    """Running statistics stay: torch's operators of control flow take no writes, and there is nothing to accumulate."""
    ours, theirs = pair(kind, training)
    if training and "Batch" in kind:
        ours, theirs = map(without_statistics, (ours, theirs))
    data = batches(6, 6)
    data[1] = tuple(-tensor for tensor in data[0])  # the other branch
    captured, plain = FLOWS[flow]
    with triton_norm.backend(backend), torch.set_grad_enabled(flow != "loop"):  # which torch doesn't differentiate
        compiled, expected = Compiled(ours, captured(ours)), plain(theirs)
        if flow == "loop":
            torch.testing.assert_close([compiled(*batch) for batch in data], [expected(*batch) for batch in data])
        else:
            torch.testing.assert_close(trained(compiled, compiled, data), trained(expected, theirs, data), **TOLERANCE)


@BACKENDS
@EVERY_CASE
def test_a_checkpoint_within(kind, training, backend):
    """torch.compile computes again without moving statistics twice, of torch's layers too."""

    def capture(module: nn.Module, _: Batch) -> nn.Module:
        return Compiled(module, lambda *inputs: checkpoint(module, *inputs, use_reentrant=False))

    with triton_norm.backend(backend):
        assert_as_torchs(kind, training, capture)


class Network(nn.Module):
    """Convolutions, each with a norm and ReLU behind it: one of each kind."""

    def __init__(self, norms: Any) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(3))
        self.norms = nn.ModuleList((norms.LayerNorm(WIDTH), norms.BatchNorm1d(WIDTH), norms.RMSNorm(WIDTH)))
        self.double()  # four features may be close together

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x.unsqueeze(-1)).squeeze(-1)).relu() * residual
        return x


def assert_trains(capture: Callable[[Network], Callable[..., Tensor]]) -> None:
    ours, theirs = (Network(norms) for norms in (triton_norm, nn))
    ours.load_state_dict(theirs.state_dict())
    data = [(x.double(), residual.double()) for x, residual in batches(6, 6)]
    expected = trained(theirs, theirs, data)
    torch.testing.assert_close(trained(capture(ours), ours, data), expected, **TOLERANCE)


@RECORDING
@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_a_budget_of_what_is_saved(budget, backend):
    """The partitioner computes norms again in the backward."""
    compiled = functools.partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
    with triton_norm.backend(backend), torch._functorch.config.patch(activation_memory_budget=budget):
        assert_trains(compiled)


# torch's own, of gradients that it looks for where there are none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("forward", "backend"),
    [
        ("eager", "triton"),
        ("compiled", "auto"),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in (("eager", "auto"), ("compiled", "triton"))),
    ],
)
def test_compiled_autograd(forward, backend):
    """`compiled_autograd` has the whole backward, also of an eager forward."""
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)

    def capture(module: Network) -> Callable[..., Tensor]:
        return compiled(module) if forward == "compiled" else module

    enabled = torch._dynamo.compiled_autograd._enable(compiled)
    with triton_norm.backend(backend), enabled:
        assert_trains(capture)


def saves_operators(ctx, operator, *arguments, **named):
    return CheckpointPolicy.MUST_SAVE if operator in triton_norm.OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def saves_all(ctx, operator, *arguments, **named):
    return CheckpointPolicy.MUST_SAVE


def saves_what_is_moved(ctx, operator, *arguments, **named):
    moves = operator.__name__.startswith("move_running_statistics")
    return CheckpointPolicy.MUST_SAVE if moves else CheckpointPolicy.PREFER_RECOMPUTE


@pairwise(
    {
        "policy": [saves_operators, saves_what_is_moved, saves_all],
        "compiles": [False, True],
        "backend": ["auto", "triton"],
    }
)
def test_a_policy_of_what_is_saved(policy, compiles, backend):
    """Saved results are not computed again: running statistics and the counter move once."""
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def capture(module: Network) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)

        return torch.compile(run, backend="aot_eager_decomp_partition", fullgraph=True) if compiles else run

    with triton_norm.backend(backend):
        assert_trains(capture)


@RECORDING
@pytest.mark.parametrize(("kind", "training"), CASES)
def test_what_is_compiled_can_be_stored(kind, training, backend, tmp_path, monkeypatch):
    """Dynamo has no guard that it can't keep for other processes; test_captured_processes.py loads them there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stored = torch._dynamo.config.patch(caching_precompile=True, strict_precompile=True)
    with triton_norm.backend(backend), stored:
        assert_as_torchs(kind, training, lambda module, _: Compiled(module, backend="eager"))
    torch._dynamo.precompile_context.PrecompileContext.clear()
