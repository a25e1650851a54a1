"""Scenarios of test_sharded_rows.py: processes normalize rows of DTensors, and hold them to fp64 and to torch's own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import save_on_cpu
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import triton_norm
from support.pairwise import cases
from support.row_norms import LAYER_NORM, NORMS, RMS_NORM, Norm
from support.worlds import World
from triton_norm import reference
from triton_norm.specs import RowSpec

COLUMNS = 8
ROUNDINGS = 16
"""Roundings of an element of the result's type, relative to the largest: some 4 of y, dx and each of 4 partial sums."""

SHARDS = (Shard(0), Shard(1), Replicate())
GRADIENTS = (None, Shard(0), Shard(1), Shard(2), Replicate(), Partial())
"""None: placed as x."""

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bare": {},
    "residual": {"residual_dtype": torch.float32},
    "offset": {"weight_offset": 1.0, "out_dtype": torch.float32},
}
TOKENS = (8, 5)
"""Tokens that all processes have alike, and unlike: the last of four has none of five."""


def placed(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """Returns a DTensor without a history; where it is partial, each process has an equal share."""
    tensor = tensor.to(mesh.device_type)
    if all(placement.is_partial() for placement in placements):
        return DTensor.from_local(tensor / mesh.size(), mesh, placements)
    return distribute_tensor(tensor, mesh, placements)


class Leaves(NamedTuple):
    x: Any
    residual: Any
    weight: Any
    bias: Any


class Run(NamedTuple):
    """Holds results of a call and its gradients, and the collectives of forward and backward."""

    tensors: list[Any]
    collectives: list[dict[Any, int]]

    @property
    def placements(self) -> list[Any]:
        return [tensor.placements for tensor in self.tensors]

    def whole(self) -> list[Tensor]:
        return [tensor.full_tensor() for tensor in self.tensors]


def drawn(tokens: int, form: str, norm: Norm, dtype: torch.dtype) -> tuple[Leaves, Tensor, Tensor]:
    """Returns whole leaves, and the gradients of y and of the total."""
    shape = 4, tokens, COLUMNS
    x, residual, dy, dtotal = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = (torch.rand(COLUMNS).to(dtype) for _ in range(2))
    has_weight, has_bias = form != "bare", norm.has_bias and form != "bare"
    leaves = Leaves(x, residual if form == "residual" else None, weight if has_weight else None, None)
    return leaves._replace(bias=bias if has_bias else None), dy, dtotal.float()


def ours(norm: Norm, form: str) -> Callable[[Leaves], Any]:
    def call(leaves: Leaves) -> Any:
        function = norm.ours((COLUMNS,), residual=leaves.residual, **FORMS[form])
        return function(leaves.x, leaves.weight, leaves.bias)

    return call


def theirs(norm: Norm) -> Callable[[Leaves], Any]:
    return lambda leaves: norm.theirs((COLUMNS,))(leaves.x, leaves.weight, leaves.bias)


def run(call: Callable[[Leaves], Any], leaves: Leaves, gradients: tuple[Any, ...], counts: bool = True) -> Run:
    """Returns the results of a call and its gradients. Counting goes by a mode, under which operators are called."""
    mode = CommDebugMode if counts else contextlib.nullcontext
    own = Leaves._make(None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves)
    with mode() as forward:
        results = call(own)
    results = results if isinstance(results, tuple) else (results,)
    with mode() as backward:
        torch.autograd.backward(results, gradients[: len(results)])
    tensors = [*(result.detach() for result in results), *(leaf.grad for leaf in own if leaf is not None)]
    return Run(tensors, [dict(mode.get_comm_counts()) for mode in (forward, backward) if counts])


def exact(norm: Norm, form: str, leaves: Leaves, gradients: tuple[Any, ...]) -> list[Tensor]:
    """Returns results and gradients of whole tensors in fp64."""
    options = {name: value for name, value in FORMS[form].items() if name == "weight_offset"}
    wide = Leaves._make(None if leaf is None else leaf.double().requires_grad_() for leaf in leaves)
    total = wide.x if wide.residual is None else wide.x + wide.residual
    spec = RowSpec(COLUMNS, 1e-5, options.get("weight_offset", 0.0), norm.has_bias, None, None, None)
    y = reference.normalize(total, (COLUMNS,), wide.weight, wide.bias, spec)
    results = (y,) if wide.residual is None else (y, total)
    torch.autograd.backward(results, [gradient.double() for gradient in gradients[: len(results)]])
    return [*(result.detach() for result in results), *(leaf.grad for leaf in wide if leaf is not None)]


def check_values(actual: list[Tensor], expected: list[Tensor], least: torch.dtype) -> None:
    for own, whole in zip(actual, expected, strict=True):
        truth = whole.to(own.device)
        assert own.shape == truth.shape
        eps = max(torch.finfo(own.dtype).eps, torch.finfo(least).eps)
        error, largest = (own.double() - truth).abs().max(), truth.abs().max()
        assert error <= ROUNDINGS * eps * largest, f"{error:.2e} of {largest:.2e}"


def _moved(leaves: Leaves, mesh: DeviceMesh, x_at: tuple[Placement, ...]) -> Leaves:
    everywhere = (Replicate(),) * mesh.ndim
    at = Leaves(x_at, x_at, everywhere, everywhere)
    return Leaves._make(
        None if leaf is None else placed(leaf, mesh, *own) for leaf, own in zip(leaves, at, strict=True)
    )


def check_case(
    mesh: DeviceMesh, norm: Norm, form: str, x_at: tuple[Placement, ...], dy_at: tuple[Placement, ...], *shape: Any
) -> None:
    """Asserts fp64's values, the placements of torch's norm, no more collectives, and a mode's bits.

    Args:
        shape: tokens and dtype.
    """
    tokens, dtype = shape
    leaves, dy, dtotal = drawn(tokens, form, norm, dtype)
    moved, call = _moved(leaves, mesh, x_at), ours(norm, form)
    y_dtype = FORMS[form].get("out_dtype", dtype)
    gradients = placed(dy.to(y_dtype), mesh, *dy_at), placed(dtotal, mesh, *dy_at)
    explained = triton_norm.explain(norm.function, moved.x, (COLUMNS,), moved.weight)
    assert "on local tensors" in explained.reason or explained.backend == "torch"
    actual, counted = run(call, moved, gradients, counts=False), run(call, moved, gradients)
    check_values(actual.whole(), exact(norm, form, leaves, gradients=(dy, dtotal)), dtype)
    if explained.backend == "triton":
        for one, other in zip(actual.tensors, counted.tensors, strict=True):
            assert torch.equal(one.to_local(), other.to_local())
    assert actual.placements == counted.placements
    if form in ("plain", "bare"):
        expected = run(theirs(norm), moved, gradients)
        stays = [own.is_replicate() and to.is_shard() and to.dim < 2 for own, to in zip(x_at, dy_at, strict=True)]
        if any(stays):  # as in torch from 2.13 on; 2.11 gathers dy
            at = tuple(to if stay else own for own, to, stay in zip(x_at, dy_at, stays, strict=True))
            summed = tuple(Partial() if own.is_shard() else own for own in at)
            assert actual.placements == [x_at, at, *[summed] * (len(actual.tensors) - 2)]
        else:
            assert actual.placements == expected.placements, (actual.placements, expected.placements)
        # torch composes an RMSNorm without a weight of several functions, each of which moves its gradient.
        few = [sum(counts.values()) for counts in counted.collectives]
        assert few <= [sum(counts.values()) for counts in expected.collectives]
    assert counted.collectives[0] == {}


def along_one_axis(world: World) -> None:
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    factors = {
        "x": SHARDS,
        "dy": GRADIENTS,
        "form": tuple(FORMS),
        "tokens": TOKENS,
        "norm": NORMS,
        "dtype": (torch.float32, torch.bfloat16),
    }
    for x_at, dy_at, form, tokens, norm, dtype in cases(factors):
        check_case(mesh, norm, form, (x_at,), (x_at if dy_at is None else dy_at,), tokens, dtype)


def along_two_axes(world: World) -> None:
    mesh = init_device_mesh(torch.device(world.device).type, (2, world.size // 2))
    for x_at, dy_at, form, norm in (
        ((Shard(0), Shard(1)), (Shard(0), Shard(1)), "plain", LAYER_NORM),
        ((Shard(1), Shard(1)), (Replicate(), Shard(1)), "residual", RMS_NORM),
        ((Replicate(), Shard(1)), (Partial(), Partial()), "offset", LAYER_NORM),
        ((Shard(1), Replicate()), (Shard(1), Shard(0)), "plain", RMS_NORM),
    ):
        check_case(mesh, norm, form, x_at, dy_at, 5, torch.float32)


def check_as_torchs(actual: Any, expected: Any) -> None:
    """Asserts placements, and values but for some roundings of fp32."""
    for own, other in zip(actual, expected, strict=True):
        assert own.placements == other.placements
        check_values([own.full_tensor()], [other.full_tensor().double()], torch.float32)


def among_torchs_tools(world: World) -> None:
    """Differentiated twice or in parts, behind checkpoints and hooks, and on tensors that a collective still writes."""
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    (x, _, weight, bias), dy, _ = drawn(8, "plain", LAYER_NORM, torch.float32)

    def leaves() -> list[Any]:
        placements = Shard(1), Replicate(), Replicate()
        return [placed(own, mesh, at).requires_grad_() for own, at in zip((x, weight, bias), placements, strict=True)]

    def norm(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, weight, bias: function(x, (COLUMNS,), weight, bias)

    def twice(y: Any, own: list[Any], dy: Any) -> list[Any]:
        dx, dweight, _ = torch.autograd.grad(y, own, dy, create_graph=True)
        if isinstance(dx, DTensor):
            dx, dweight = dx.full_tensor(), dweight.full_tensor()
        return list(torch.autograd.grad(dx.square().sum() + dweight.square().sum(), [*own[:2], dy]))

    own, moved = leaves(), placed(dy, mesh, Shard(1)).requires_grad_()
    wide = [tensor.double().requires_grad_() for tensor in (x, weight, bias, dy)]
    exact = twice(F.layer_norm(wide[0], (COLUMNS,), *wide[1:3]), wide[:3], wide[3])
    second = twice(triton_norm.layer_norm(own[0], (COLUMNS,), *own[1:]), own, moved)
    check_values([tensor.full_tensor() for tensor in second], exact, torch.float32)

    moved = moved.detach()
    expected = torch.autograd.grad(norm(F.layer_norm)(*own), own, moved)
    ours_of = norm(triton_norm.layer_norm)
    policy = functools.partial(create_selective_checkpoint_contexts, list(triton_norm.OPERATORS))
    for options in ({}, {"context_fn": policy}):
        y = checkpoint(ours_of, *own, use_reentrant=False, **options)
        check_as_torchs(torch.autograd.grad(y, own, moved), expected)
    with save_on_cpu():
        y = ours_of(*own)
    check_as_torchs(torch.autograd.grad(y, own, moved, retain_graph=True), expected)
    check_as_torchs(torch.autograd.grad(y, own[1:], moved), expected[1:])
    with torch.inference_mode():
        check_as_torchs([ours_of(*own)], [norm(F.layer_norm)(*own)])

    with torch.inference_mode():
        frozen = placed(x, mesh, Shard(1))
    check_as_torchs(torch.autograd.grad(ours_of(frozen, *own[1:]), own[1:], moved), expected[1:])

    partial = placed(x, mesh, Partial()).redistribute(placements=[Shard(1)], async_op=True)
    assert isinstance(partial.to_local(), AsyncCollectiveTensor)
    check_as_torchs([ours_of(partial, *own[1:])], [norm(F.layer_norm)(*own)])
    added, frozen_x = placed(x, mesh, Shard(1)), own[0].detach()
    y, total = triton_norm.layer_norm(frozen_x, (COLUMNS,), *own[1:], residual=added)
    assert (y.requires_grad, total.requires_grad) == (True, False)
    before = own[0] * 1
    y = ours_of(before, *own[1:])
    before.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(moved)


def elsewhere_by_torch(world: World) -> None:
    """Other placements go to torch, and so do its errors; backend "triton" raises the reason."""
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    (x, residual, weight, bias), _, _ = drawn(8, "residual", LAYER_NORM, torch.float32)
    everywhere = [placed(own, mesh, Replicate()) for own in (weight, bias)]
    sharded, columns = (placed(x, mesh, Shard(axis)) for axis in (1, 2))
    short = placed(x[:, :1].contiguous(), mesh, Shard(1))
    weight_sharded = [placed(weight, mesh, Shard(0)), everywhere[1]]
    for reason, own, parameters in (
        ("sharded along axis 2, which is normalized", columns, everywhere),
        ("partial sums", placed(x, mesh, Partial()), everywhere),
        ("more shards along axis 1 than elements", short, everywhere),
        ("the weight is a DTensor that is not replicated", sharded, weight_sharded),
    ):
        explained = triton_norm.explain(triton_norm.layer_norm, own, (COLUMNS,), *parameters)
        assert explained.backend == "torch"
        assert reason in explained.reason
        with triton_norm.backend("auto"):
            actual = triton_norm.layer_norm(own, (COLUMNS,), *parameters)
        check_as_torchs([actual], [F.layer_norm(own, (COLUMNS,), *parameters)])
        with triton_norm.backend("triton"), pytest.raises(RuntimeError, match=reason):
            triton_norm.layer_norm(own, (COLUMNS,), *parameters)
    for own, parameters in ((sharded, [weight, bias]), (x, everywhere)):
        with triton_norm.backend("auto"), pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            triton_norm.layer_norm(own, (COLUMNS,), *parameters)
        explained = triton_norm.explain(triton_norm.layer_norm, own, (COLUMNS,), *parameters)
        assert "DTensor, but the" in explained.reason
    residual = placed(residual, mesh, Replicate())
    explained = triton_norm.explain(triton_norm.layer_norm, sharded, (COLUMNS,), *everywhere, residual=residual)
    assert "different placements" in explained.reason
    with triton_norm.backend("auto"), pytest.raises(RuntimeError, match=r"but got input of size \[4, 8, 8\]"):
        triton_norm.layer_norm(sharded, (COLUMNS + 1,), *everywhere)


def compiled_without_a_break(world: World) -> None:
    """Compiled forwards record an operator on the local tensors and no collective, and train as eager."""
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    for x_at, form, norm in ((Shard(1), "plain", LAYER_NORM), (Replicate(), "residual", RMS_NORM)):
        torch._dynamo.reset()
        leaves, dy, dtotal = drawn(8, form, norm, torch.float32)
        moved, gradients = _moved(leaves, mesh, (x_at,)), (placed(dy, mesh, x_at), placed(dtotal, mesh, x_at))
        call = ours(norm, form)
        compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        graphs.clear()
        actual, expected = (run(each, moved, gradients, counts=False) for each in (compiled, call))
        check_as_torchs(actual.tensors, expected.tensors)
        whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
        with torch._dynamo.compiled_autograd._enable(whole):  # of an eager forward; torch 2.11 adds up partial sums
            again = run(call, moved, gradients, counts=False)
        check_values(again.whole(), [tensor.double() for tensor in expected.whole()], torch.float32)
        targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
        assert any("triton_norm" in target for target in targets), targets
        assert not any("c10d" in target for target in targets), targets
