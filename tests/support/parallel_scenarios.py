"""Scenarios of test_parallel_models.py: processes take a step of training of a model whose batch they share.

It is held to the step in fp64 of one process without this library, on the whole batch. It may be twice as far from that
as the same step in single precision is, whose sums are of another order, and a few ulp more for each norm.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import triton_norm
from support import models
from support.worlds import World

HALVES = {2: (8, 8)}  # so many that the interpreter has several channels in a program
_TEXT = models.Size(layers=2, width=16, batch=16, tokens=5, image=0)
_PICTURES = models.Size(layers=1, width=8, batch=16, tokens=0, image=16)
SIZES = {"bert": _TEXT, "llama": _TEXT, "resnet": _PICTURES}
BLOCKS = ("BertLayer", "LlamaDecoderLayer", "ResNetStage")
FEW_ULP = 32 * torch.finfo(torch.float32).eps  # some 4 for each of a model's 5 or 9 norms
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)

Wrap = Callable[[World, nn.Module], nn.Module]
Named = dict[str, Tensor]


class Step(NamedTuple):
    """Returns the results of a step of training by name, of the whole batch and whole parameters."""

    outputs: Named
    gradients: Named
    state: Named


class Case(NamedTuple):
    """A model as transformers has it, a batch, and the results of one process."""

    model: nn.Module
    batch: Named
    norms: tuple[str, ...]
    exact: Step
    theirs: Step


@functools.cache
def case_of(name: str, device: str) -> Case:
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # TF32's rounding would hide everything else's
    torch.manual_seed(1)
    size = SIZES[name]
    model, batch = models.built(name, size, device)
    batch = {key: tensor.contiguous() for key, tensor in batch.items()}  # for each wrap to choose the layout
    drawn = torch.randint(models.CLASSES, (size.batch,), device=device)
    batch["labels"] = batch["input_ids"] if name == "llama" else drawn
    theirs = step(copy.deepcopy(model), batch)
    return Case(model, batch, tuple(models.norms_of(model)), step(models.widened(model), widened(batch)), theirs)


def widened(batch: Named) -> Named:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def whole(tensor: Tensor) -> Tensor:
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().to("cpu", torch.float64, copy=True)


def step(model: nn.Module, batch: Named, world: World | None = None) -> Step:
    """Takes a step of SGD; with a world, on this process's share of the batch."""
    named = model.module if isinstance(model, DistributedDataParallel) else model
    if world is not None:
        batch = {name: world.share(tensor, HALVES) for name, tensor in batch.items()}
    actual = model(**batch)
    actual.loss.backward()
    outputs = {"loss": whole(actual.loss)[None], "logits": whole(actual.logits)}
    if world is not None:
        outputs = {name: torch.cat(world.everyones(output)) for name, output in outputs.items()}
    outputs["loss"] = outputs["loss"].mean()
    gradients = {name: whole(parameter.grad) for name, parameter in named.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return Step(outputs, gradients, {name: whole(tensor) for name, tensor in named.state_dict().items()})


def errors(actual: Named, exact: Named) -> Named:
    """The largest in each tensor, per its largest value; of values that cancel but for rounding, as the gradient of a
    key's bias in attention, per a tenth of the largest value of all."""
    assert actual.keys() == exact.keys()
    largest = {name: tensor.abs().max() for name, tensor in exact.items()}
    least = max(largest.values()) / 10
    return {name: (actual[name] - exact[name]).abs().max() / max(largest[name], least) for name in exact}


def check(actual: Step, exact: Step, theirs: Step, few_ulp: float = FEW_ULP) -> None:
    for ours, others, truth in zip(actual, theirs, exact, strict=True):
        bound = 2 * max(errors(others, truth).values()) + few_ulp
        for name, error in errors(ours, truth).items():
            assert error <= bound, f"{name}: {error:.2e}, where {bound:.2e} is allowed"


def data_parallel(world: World, model: nn.Module) -> nn.Module:
    """A network of convolutions in channels last."""
    model.to(memory_format=torch.channels_last)
    return DistributedDataParallel(model, device_ids=None if world.device == "cpu" else [world.device])


def fully_sharded(
    world: World, model: nn.Module, norms: tuple[str, ...] = (), policy: MixedPrecisionPolicy | None = None
) -> nn.Module:
    """Shards these norms, blocks, and the whole. fully_shard takes no parameters in channels last."""
    model.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(world.device.partition(":")[0], (world.size,))
    options: dict[str, Any] = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    for module in (*map(model.get_submodule, norms), *blocks):
        fully_shard(module, **options)
    return fully_shard(model, **options)


WRAPS: tuple[Wrap, ...] = (data_parallel, fully_sharded)


def converted(case: Case, model: nn.Module, **options: Any) -> nn.Module:
    """All norms of the case."""
    report = triton_norm.convert(model, **options)
    assert [name.removeprefix("module.") for name in report.converted] == list(case.norms)
    assert report.skipped == {}
    return model


def wrapped(world: World, case: Case, wrap: Wrap, convert_first: bool = True, **options: Any) -> nn.Module:
    model = copy.deepcopy(case.model)
    if convert_first:
        return wrap(world, converted(case, model, **options))
    return converted(case, wrap(world, model), **options)


def check_step(world: World, case: Case, wrap: Wrap, convert_first: bool = True, **options: Any) -> nn.Module:
    """Asserts that a step is that of one process."""
    model = wrapped(world, case, wrap, convert_first, **options)
    check(step(model, case.batch, world), case.exact, case.theirs)
    return model


def check_reverts(case: Case, model: nn.Module) -> None:
    names = triton_norm.revert(model)
    assert [name.removeprefix("module.") for name in names] == list(case.norms)
    for name in names:
        original = case.model.get_submodule(name.removeprefix("module."))
        assert type(model.get_submodule(name)) is type(original)
    assert triton_norm.revert(model) == ()


def bert_in_parallel(world: World) -> None:
    case = case_of("bert", world.device)
    for wrap in WRAPS:
        for convert_first in (True, False):
            check_reverts(case, check_step(world, case, wrap, convert_first))


def llama_fully_sharded(world: World) -> None:
    case = case_of("llama", world.device)
    for convert_first in (True, False):
        check_reverts(case, check_step(world, case, fully_sharded, convert_first))


def in_mixed_precision(world: World) -> None:
    """No further from fp64 than twice as far as without this library under the same policy, and a few bfloat16 ulp."""
    for name in ("bert", "llama"):
        case = case_of(name, world.device)
        wrap = functools.partial(fully_sharded, policy=HALF)
        theirs = step(wrap(world, copy.deepcopy(case.model)), case.batch, world)
        actual = step(wrapped(world, case, wrap), case.batch, world)
        check(actual, case.exact, theirs, few_ulp=4 * torch.finfo(torch.bfloat16).eps)


def norms_sharded_before_the_conversion(world: World) -> None:
    """These stay as they are, and say why; the others are converted."""
    for name, norm in (("bert", "torch.nn.LayerNorm"), ("llama", "transformers.LlamaRMSNorm")):
        case = case_of(name, world.device)
        sharded, others = case.norms[1::2], case.norms[::2]
        model = fully_sharded(world, copy.deepcopy(case.model), sharded)
        report = triton_norm.convert(model)
        assert list(report.converted) == list(others)
        assert list(report.skipped) == list(sharded)
        reason = f"FSDP{norm.rpartition('.')[2]} is a subclass of {norm}"
        assert all(each.startswith(reason) and "its forward may differ" in each for each in report.skipped.values())
        check(step(model, case.batch, world), case.exact, case.theirs)
        assert triton_norm.revert(model) == others


def norms_sharded_after_the_conversion(world: World) -> None:
    """These can't be reverted, and nothing is then."""
    for name in ("bert", "llama"):
        case = case_of(name, world.device)
        sharded = case.norms[1::2]
        model = check_step(world, case, functools.partial(fully_sharded, norms=sharded))
        classes = [type(module) for module in model.modules()]
        check_refuses_to_revert(model, sharded[0])
        report = triton_norm.convert(model)
        assert report.converted == {}
        assert report.skipped == dict.fromkeys(case.norms, "is triton_norm's already")
        assert [type(module) for module in model.modules()] == classes


def check_refuses_to_revert(model: nn.Module, name: str) -> None:
    try:
        triton_norm.revert(model)
    except RuntimeError as error:
        assert str(error).startswith(f"revert(): {name!r} was converted, but is a FSDP")  # noqa: PT017
    else:
        raise AssertionError("reverted")


def resnet_in_parallel(world: World) -> None:
    """BatchNorm is that of the joined batch, in the state that it leaves too."""
    case = case_of("resnet", world.device)
    for wrap, convert_first in ((data_parallel, True), (data_parallel, False), (fully_sharded, True)):
        check_step(world, case, wrap, convert_first, sync_batch_norm=True)


def resnet_in_a_group(world: World) -> None:
    """The group is given: of all, in which BatchNorm is that of the joined batch, and of each process alone."""
    case = case_of("resnet", world.device)
    everyone = dist.new_group(list(range(world.size)))
    check_step(world, case, data_parallel, sync_batch_norm=True, process_group=everyone)
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    check_apart(world, case, sync_batch_norm=True, process_group=alone)


def resnet_without_synchronization(world: World) -> None:
    check_apart(world, case_of("resnet", world.device))


def check_apart(world: World, case: Case, **options: Any) -> None:
    """BatchNorm is each process's own, as it is under DistributedDataParallel without this library."""
    exact = step(data_parallel(world, models.widened(case.model)), widened(case.batch), world)
    theirs = step(data_parallel(world, copy.deepcopy(case.model)), case.batch, world)
    actual = step(wrapped(world, case, data_parallel, **options), case.batch, world)
    check(actual, exact, theirs)
    name = f"{case.norms[0]}.running_mean"
    mine, other = world.everyones(actual.state[name])
    assert not torch.equal(mine, other)


def the_same_state(world: World) -> None:
    """State dicts have the same names, and each loads the other's."""
    for name in SIZES:
        case = case_of(name, world.device)
        for wrap in WRAPS:
            ours, theirs = wrapped(world, case, wrap), wrap(world, copy.deepcopy(case.model))
            check_loads(ours, theirs)
            check_loads(theirs, ours)


def check_loads(model: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    assert list(model.state_dict()) == list(expected)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    model.load_state_dict(expected)
    for actual, tensor in zip(model.state_dict().values(), expected.values(), strict=True):
        assert type(actual) is type(tensor)
        assert torch.equal(whole(actual), whole(tensor))
