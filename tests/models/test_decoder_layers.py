"""Layers of transformers, converted with fuse=True: a residual's addition and the norm of the sum are one launch."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import triton_norm as tn
from support import inductor
from support.decoders import (
    MODELS,
    fused,
    inputs_of,
    model_of,
    run,
    run_layer,
    transformers,
    unfused,
)
from support.layers import class_at, layer_at
from support.models import TINY, assert_same_bits, built, expected, step
from support.operators import Operators
from triton_norm.converting import layers
from triton_norm.converting.layer_lists import LAYERS

if TYPE_CHECKING:
    from triton_norm.testing.guards import Guard


FLOAT, HALF = torch.float32, torch.bfloat16

# Rounding of its own kind, a weight's offset, a multiple of the addend, LayerNorm, the sum that nothing else takes.
KINDS = [("llama", FLOAT), ("llama", HALF), ("gemma2", HALF), ("granite", HALF), ("vit", FLOAT), ("bert", HALF)]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_outputs_have_the_bits_of_the_parts(kind, dtype, device, launched):
    """Gradients are added up in float32 by a kernel, and by autograd in their own type."""
    model = model_of(kind, device, dtype)
    inputs = inputs_of(model)
    results, forwards = [], []
    for each in (unfused(model), fused(model)):
        launched.clear()
        with tn.backend("triton"):
            results.append(run(each, inputs))
        forwards.append(launched.count("rows_forward_kernel"))
    (expected_y, grads), (y, actual_grads) = results
    assert torch.equal(y, expected_y)
    assert forwards[0] == forwards[1] >= 4
    coarse = 64 * torch.finfo(dtype).eps
    # A bias of the keys has no effect, and the rounding errors of others for a gradient.
    largest = max(gradient.abs().max().item() for gradient in grads.values())
    torch.testing.assert_close(actual_grads, grads, rtol=coarse, atol=coarse / 8 * largest)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_on_torchs_path(kind):
    """Bits are those of the model as it was, and operators those of the model with norms converted alone."""
    model = model_of(kind)
    inputs, (_, norms) = inputs_of(model), MODELS[kind]
    before = [(name, type(module)) for name, module in model.named_modules()]
    ours = copy.deepcopy(model)
    report = tn.convert(ours, fuse=True)
    unlisted = {"embeddings": "addition + LayerNorm: BertEmbeddings is not on the list"}
    assert report.skipped == (unlisted if kind == "bert" else {})
    assert sorted(report.fused.values()) == sorted(f"addition + {name}" for name in 2 * norms)
    assert all(isinstance(ours.get_submodule(name), cls) for name, cls in before)
    results, operators = [], []
    for each in (ours, unfused(model), model):
        with tn.backend("torch"), Operators() as dispatched:
            results.append(run(each, inputs))
        operators.append(sorted(dispatched.names))
    (y, grads), _, (expected_y, expected_grads) = results
    assert torch.equal(y, expected_y)
    assert_same_bits(grads, expected_grads)
    assert operators[0] == operators[1]
    assert tn.convert(ours, fuse=True).fused == {}
    assert set(tn.revert(ours)) == {*report.converted, *report.fused}
    assert [(name, type(module)) for name, module in ours.named_modules()] == before


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_a_step_is_as_near_to_fp64_as_torchs(name: str, device: str, guard: Guard | None) -> None:
    model, inputs = built(name, TINY, device)
    reference = expected(model, inputs)
    with tn.backend("triton"):
        reference.check(step(fused(model), inputs))


SOME = ("llama.LlamaDecoderLayer", "gemma3.Gemma3DecoderLayer", "qwen2_vl.Qwen2VLVisionBlock", "bert.BertSelfOutput")


@pytest.mark.parametrize("path", [*SOME, *(pytest.param(path, marks=pytest.mark.thorough) for path in sorted(LAYERS))])
def test_every_listed_layer_is_the_one_that_is_known(path):
    if class_at(path) is None:
        pytest.skip("transformers has no such class")
    layer = layer_at(path)
    assert layers.mismatch(layer) is None
    report = tn.convert(layer, fuse=True)
    assert "" in report.fused


def test_what_is_computed_otherwise_is_not_fused(monkeypatch):
    model = model_of("llama")
    cls = type(model.model.layers[0])

    def forward(self, hidden_states, **named):
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        hidden_states = self.post_attention_layernorm(hidden_states)
        return residual + self.mlp(residual + hidden_states)

    monkeypatch.setattr(cls, "forward", forward)
    reason = "its version of LlamaDecoderLayer adds and normalizes elsewhere than the one that is known"
    assert tn.convert(model, fuse=True).skipped == dict.fromkeys(
        (f"model.layers.{place}" for place in (0, 1)), f"addition + post_attention_layernorm: {reason}"
    )


def test_a_rewriting_that_computes_something_else_is_noticed(monkeypatch):
    layer = model_of("llama").model.layers[0]
    monkeypatch.setattr(layers.sums, "add_and_normalize", lambda norm, x, y: (norm(x - y), x + y))
    assert layers.mismatch(layer) == "its rewritten forward computes something else than LlamaDecoderLayer's"
    monkeypatch.setattr(layers.sums, "add_and_normalize", lambda norm, x, y: (norm(x + y), x))
    assert layers.mismatch(layer) == "its rewritten forward computes something else than LlamaDecoderLayer's"


def test_norms_that_are_not_converted():
    model = model_of("llama")
    parametrizations.weight_norm(model.model.layers[0].post_attention_layernorm, dim=None)
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda *arguments: None)
    report = tn.convert(model, fuse=True)
    join = "addition + post_attention_layernorm"
    assert report.fused == {}
    assert report.skipped == {
        "model.layers.0": f"{join}: the norm stays ParametrizedLlamaRMSNorm",
        "model.layers.0.post_attention_layernorm": "parametrized",
        "model.layers.1": f"{join}: LlamaRMSNorm has hooks or another forward",
    }
    model = model_of("llama")
    assert tn.convert(model, exclude="*.post_attention_layernorm", fuse=True).skipped == {
        f"model.layers.{place}{part}": reason
        for place in (0, 1)
        for part, reason in (
            ("", f"{join}: the norm stays LlamaRMSNorm"),
            (".post_attention_layernorm", "excluded"),
        )
    }


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_addition_less_for_each_norm_of_a_sum(kind, device):
    model = model_of(kind, device)
    inputs = inputs_of(model)
    names = []
    for each in (unfused(model), fused(model)):
        with torch.no_grad(), Operators() as operators:
            each(**inputs)
        names.append(operators.names)
    before, after = names
    _, norms = MODELS[kind]
    additions = before.count("aten.add.Tensor") - after.count("aten.add.Tensor")
    assert additions == len(before) - len(after) == 2 * len(norms)


@pytest.mark.filterwarnings("ignore")  # of Inductor
def test_inductor_makes_no_more_kernels(device, fresh_dynamo):
    layer = model_of("llama", device).train().model.layers[0]
    counts, results = [], []
    for each in (unfused(layer), fused(layer)):
        with inductor.generated() as codes:
            results.append(run_layer(each, torch.compile(each, fullgraph=True)))
        counts.append([inductor.launches(code) for code in codes])
    (forward, backward), (fused_forward, fused_backward) = counts
    assert fused_forward <= forward
    assert fused_backward <= backward
    torch.testing.assert_close(*results)


def test_generation_with_a_cache(device):
    model = model_of("llama", device).eval()
    inputs = inputs_of(model)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(inputs["input_ids"])}
    assert torch.equal(fused(model).generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(use_reentrant, device, launched):
    model = model_of("llama", device)
    inputs = inputs_of(model)
    plain, checkpointed = fused(model), fused(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    results, counts = [], []
    for each in (plain, checkpointed):
        launched.clear()
        results.append(run(each.train(), inputs))
        counts.append(launched.count("rows_forward_kernel"))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])
    assert counts == [5, 5 + 4]


def test_copies_pickles_and_saved_models(tmp_path, device):
    model = model_of("llama", device).eval()
    inputs = inputs_of(model)
    ours = fused(model)
    y = ours(**inputs).logits
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(part) for part in other.modules()] == [type(part) for part in ours.modules()]
        assert torch.equal(other(**inputs).logits, y)
        tn.revert(other)
        assert [type(part) for part in other.modules()] == [type(part) for part in model.modules()]
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert [type(part) for part in loaded.modules()] == [type(part) for part in model.modules()]
    torch.testing.assert_close(loaded(**inputs).logits, y)


def test_hidden_states_and_attentions_are_recorded(device):
    model = model_of("llama", device).eval()
    model.set_attn_implementation("eager")
    inputs = inputs_of(model)
    options = {"output_hidden_states": True, "output_attentions": True}
    actual, expected_outputs = fused(model)(**inputs, **options), unfused(model)(**inputs, **options)
    for name in ("hidden_states", "attentions"):
        assert len(actual[name]) == len(expected_outputs[name]) > 0
        assert all(map(torch.equal, actual[name], expected_outputs[name]))


def test_accelerates_hooks_on_a_layer(device):
    hooks = pytest.importorskip("accelerate.hooks")
    model = model_of("llama", device)
    inputs = inputs_of(model)
    before, after = copy.deepcopy(model), fused(model)
    expected_y = unfused(model)(**inputs).logits
    for each in (before, after):
        hooks.add_hook_to_module(each.model.layers[0], hooks.AlignDevicesHook(device, io_same_device=True))
        hooks.add_hook_to_module(each.model.layers[1].post_attention_layernorm, hooks.AlignDevicesHook(device))
    assert list(tn.convert(before, fuse=True).fused) == ["model.layers.0"]
    for each in (before, after):
        assert torch.equal(each(**inputs).logits, expected_y)
        tn.revert(each)
        assert torch.equal(each(**inputs).logits, model(**inputs).logits)
        hooks.remove_hook_from_module(each, recurse=True)
        assert torch.equal(each(**inputs).logits, model(**inputs).logits)


class Block(nn.Module):
    """Adds and normalizes as a listed layer does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.mlp, self.norm1, self.norm2 = nn.Linear(4, 4), norm, nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.mlp(x))
        return self.norm2(x + self.mlp(x))


def test_layers_that_are_not_listed_are_named():
    model = nn.Sequential(Block(nn.LayerNorm(4)), Block(nn.GroupNorm(2, 4)), nn.TransformerEncoderLayer(4, 2))
    report = tn.convert(model, fuse=True)
    assert report.fused == {}
    assert report.skipped["0"] == "addition + norm1: Block is not on the list"
    assert "1" not in report.skipped
    assert "addition + norm1: TransformerEncoderLayer is not on the list" in report.skipped["2"]
    assert not any("not on the list" in text for text in tn.convert(nn.Sequential(*model)).skipped.values())


def test_a_subclass_is_left():
    model = model_of("llama")
    layer = model.model.layers[1]
    layer.__class__ = type("Own", (type(layer),), {})
    report = tn.convert(model, fuse=True)
    assert list(report.fused) == ["model.layers.0"]
    assert report.skipped == {
        "model.layers.1": "addition + post_attention_layernorm: "
        "Own is a subclass of transformers.LlamaDecoderLayer: its forward may differ"
    }
