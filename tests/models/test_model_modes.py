"""Converted models of Hugging Face's transformers copied, saved, checkpointed, under autocast, and generating."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import triton_norm as tn
from support.models import FULL, TINY, assert_same_step, built, convert, expected, loss_of, norms_of, step
from support.steps import saved_and_loaded

pytestmark = pytest.mark.usefixtures("few_programs")


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(norm) for name, norm in norms_of(model).items()}


@pytest.mark.parametrize("name", ["bert", "llama", "resnet", "convnext"])
def test_copies_of_a_converted_model(name: str, device: str) -> None:
    """They are converted too, can be reverted alone, and share nothing with it."""
    model, inputs = built(name, TINY, device)
    before = classes(model)
    convert(model)
    converted = classes(model)
    others = {way: copied(model) for way, copied in COPIES.items()}
    with tn.backend("triton"):
        expected = step(model, inputs)
    for other in others.values():
        assert classes(other) == converted
        with tn.backend("triton"):
            assert_same_step(step(other, inputs), expected)
        assert tn.revert(other) == tuple(before)
        assert classes(other) == before
    assert classes(model) == converted
    tn.revert(model)
    expected = step(model, inputs)
    for other in others.values():
        assert_same_step(step(other, inputs), expected)


@pytest.mark.parametrize("name", ["bert", "llama", "resnet", "convnext"])
def test_a_model_saved_by_hugging_face(name: str, tmp_path: Path, device: str) -> None:
    """A loaded model has its own classes, whatever was saved."""
    model, inputs = built(name, TINY, device)
    before = classes(model)
    convert(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).to(device).train()
    assert classes(loaded) == before
    convert(loaded)
    with tn.backend("triton"):
        assert_same_step(step(loaded, inputs), step(model, inputs))


BLOCKS: dict[str, Callable[[nn.Module], nn.ModuleList]] = {
    "bert": lambda model: model.bert.encoder.layer,
    "llama": lambda model: model.model.layers,
    "convnext": lambda model: model.convnext.encoder.stages,
    "resnet": lambda model: model.resnet.encoder.stages,
}


def checkpointed_step(model: nn.Module, inputs: dict[str, Tensor], name: str, use_reentrant: bool) -> dict[str, Tensor]:
    for block in BLOCKS[name](model):
        block.forward = functools.partial(_recomputed, block.forward, use_reentrant)
    result = step(model, inputs, hidden_states=False)
    for block in BLOCKS[name](model):
        del block.forward
    return result


def _recomputed(forward: Callable[..., Any], use_reentrant: bool, *inputs: Any, **named: Any) -> Any:
    return checkpoint(functools.partial(forward, **named), *inputs, use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "convnext"])
def test_blocks_that_are_computed_again(name: str, use_reentrant: bool, device: str) -> None:
    model, inputs = built(name, TINY, device)
    convert(model)
    again = copy.deepcopy(model)
    with tn.backend("triton"):
        result = checkpointed_step(again, inputs, name, use_reentrant)
        assert_same_step(result, step(model, inputs, hidden_states=False))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_batch_norms_that_are_computed_again(use_reentrant: bool, device: str) -> None:
    """Their running statistics move twice, as torch's do."""
    model, inputs = built("resnet", TINY, device)
    take = functools.partial(checkpointed_step, name="resnet", use_reentrant=use_reentrant)
    reference = expected(model, inputs, take, take)
    convert(model)
    with tn.backend("triton"):
        actual = take(model, inputs)
    reference.check(actual)
    assert {int(count) for key, count in actual.items() if key.endswith("num_batches_tracked")} == {1, 2}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_hugging_faces_gradient_checkpointing(name: str, use_reentrant: bool, device: str) -> None:
    model, inputs = built(name, TINY, device)
    convert(model)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in again.modules())
    with tn.backend("triton"):
        assert_same_step(step(again, inputs), step(model, inputs))


Types = dict[str, tuple[torch.dtype, ...]]


def types_of(model: nn.Module, take: Callable[[nn.Module], Any]) -> tuple[Types, Any]:
    """Returns the types of each norm's input and output, and the results of `take`."""
    types: Types = {}

    def record(name: str, norm: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        types[name] = arguments[0].dtype, y.dtype

    hooks = [norm.register_forward_hook(functools.partial(record, name)) for name, norm in norms_of(model).items()]
    result = take(model)
    for hook in hooks:
        hook.remove()
    return types, result


def autocast_step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return step(model, inputs)


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gemma", "t5", "resnet", "convnext"])
def test_autocast_on_a_cpu(name: str) -> None:
    """The sums of transformers' blocks stay in fp32; results of convolutions are in bf16."""
    model, inputs = built(name, TINY)
    reference = expected(model, inputs, autocast_step)
    theirs, _ = types_of(copy.deepcopy(model), lambda model: autocast_step(model, inputs))
    convert(model)
    ours, actual = types_of(model, lambda model: autocast_step(model, inputs))
    assert ours == theirs
    assert any(torch.bfloat16 in types for types in theirs.values()) == (name in ("resnet", "convnext"))
    reference.check(actual, torch.bfloat16)


def scaled_step(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    # So low a scale that the first step overflows nowhere.
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cuda", dtype=dtype):
        loss = loss_of(model(**inputs).logits)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gemma", "t5", "resnet", "convnext", "mobilenet_v2"])
def test_autocast_on_a_gpu(name: str, dtype: torch.dtype, device: str) -> None:
    model, inputs = built(name, FULL, device)
    theirs, _ = types_of(copy.deepcopy(model), lambda model: scaled_step(model, inputs, dtype))
    convert(model)
    before = copy.deepcopy(model.state_dict())
    with tn.backend("triton"):
        ours, _ = types_of(model, lambda model: scaled_step(model, inputs, dtype))
    assert ours == theirs
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_generation(name: str, device: str) -> None:
    """Greedily and with a cache: calls of the prompt's length, then of one token."""
    model, inputs = built(name, TINY, device)
    model.eval()
    generate = functools.partial(
        model.generate,
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    theirs = generate()
    convert(model)
    with tn.backend("triton"):
        ours = generate()
    assert theirs.shape == (TINY.batch, TINY.tokens + 6)
    assert torch.equal(ours, theirs)
