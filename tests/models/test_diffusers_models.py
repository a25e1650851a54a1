"""Adaptive norms of Hugging Face's diffusers inside models: hooks, parents and parts, reports."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import triton_norm as tn
from support.adaptive_norms import COLUMNS, FORMS, SINGLE, ZERO, agree, converted, drawn, made, results

diffusers = pytest.importorskip("diffusers")


def test_hooks_of_every_part_run_once(device):
    """A hook on the norm takes the module to its own forward."""
    ours = converted(made(ZERO, device=device))
    x, emb = torch.randn(2, 7, COLUMNS, device=device), torch.randn(2, COLUMNS, device=device)
    y, *_ = ours(x, emb=emb)
    ran = []
    hooked = {"": ours} | {name: getattr(ours, name) for name in ("silu", "linear", "norm")}
    handles = {
        name: part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in hooked.items()
    }
    ours(x, emb=emb)
    assert ran == ["silu", "linear", "norm", ""]
    assert tn.explain(ours, x, emb=emb).reason.startswith("its norm has hooks")
    with tn.backend("triton"), pytest.raises(RuntimeError, match="its norm has hooks"):
        ours(x, emb=emb)
    handles["norm"].remove()
    ran.clear()
    with tn.backend("triton"):
        assert torch.equal(ours(x, emb=emb)[0], y)
    assert ran == ["silu", "linear", ""]


def test_a_norm_that_was_exchanged_is_called(device):
    ours = converted(made(ZERO, device=device))
    x, emb = torch.randn(2, 7, COLUMNS, device=device), torch.randn(2, COLUMNS, device=device)
    ours.norm = nn.Identity()
    theirs = copy.deepcopy(ours)
    tn.revert(theirs)
    assert torch.equal(ours(x, emb=emb)[0], theirs(x, emb=emb)[0])
    report = tn.convert(theirs)
    assert report.skipped[""] == "its norm is a Identity, whose forward may differ"


def test_parents_and_children():
    """A parent is known after its norm was converted, and is skipped with a norm that is excluded."""
    model = nn.Sequential(made(ZERO))
    assert list(tn.convert(model, include="0.norm").converted) == ["0.norm"]
    assert list(tn.convert(model).converted) == ["0"]
    assert tn.revert(model) == ("0", "0.norm")
    report = tn.convert(model, exclude=nn.LayerNorm)
    assert report.skipped == {"0": "its norm is excluded", "0.norm": "excluded"}
    parametrizations.weight_norm(model[0].linear)
    report = tn.convert(model, include=type(model[0]))
    assert (list(report.converted), type(model[0].norm)) == (["0"], nn.LayerNorm)


def test_a_subclass_or_another_version_is_skipped(monkeypatch):
    module = made(ZERO)

    class Own(type(module)):
        pass

    assert tn.convert(Own(COLUMNS)).skipped[""] == (
        "Own is a subclass of diffusers.AdaLayerNormZero: its forward may differ"
    )
    monkeypatch.setattr(type(module), "forward", lambda self, x, emb: self.norm(x))
    assert "could not be tried on a few numbers" in tn.convert(module).skipped[""]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_copies_pickles_and_reverts(form):
    theirs = made(form)
    ours = converted(theirs)
    arguments = drawn(theirs, form, SINGLE, "cpu")
    expected = results(ours, arguments)[1]
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert all(torch.equal(*pair) for pair in zip(results(other, arguments)[1], expected, strict=True))
        assert tn.revert(copy.deepcopy(other))[0] == ""


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", [FORMS[5], FORMS[9], FORMS[10]], ids=str)
def test_it_compiles_without_a_break(form, device):
    theirs = made(form, device=device)
    ours, arguments = converted(theirs), drawn(theirs, form, SINGLE, device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(**arguments), ours(**arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_and_its_report():
    """Flux: the blocks modulate their second norms by themselves."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    drawn = {
        name: torch.randn(2, *shape)
        for name, shape in {
            "hidden_states": (4, 8),
            "encoder_hidden_states": (3, 32),
            "pooled_projections": (32,),
        }.items()
    }
    inputs = drawn | {"timestep": torch.rand(2), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    result = [model(**inputs).sample]
    result.append(torch.autograd.grad(result[0].square().mean(), model.x_embedder.weight)[0])
    report = tn.convert(model)
    y = model(**inputs).sample
    agree([y, torch.autograd.grad(y.square().mean(), model.x_embedder.weight)[0]], result, SINGLE)
    adaptive = [name for name, change in report.converted.items() if "AdaLayerNorm" in change]
    assert adaptive == [
        "transformer_blocks.0.norm1",
        "transformer_blocks.0.norm1_context",
        "single_transformer_blocks.0.norm",
        "norm_out",
    ]
    assert report.skipped == {
        "transformer_blocks.0": "FluxTransformerBlock multiplies by 1 + scale_mlp, 1 + c_scale_mlp outside of its norms"
    }


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT = {"sample_size": 8, "in_channels": 4, "num_layers": 1}
MODELS = {
    "SD3Transformer2DModel": TEXT
    | HEADS
    | {"joint_attention_dim": 8, "caption_projection_dim": 32, "pooled_projection_dim": 8}
    | {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "CogVideoXTransformer3DModel": HEADS
    | {"num_layers": 1, "time_embed_dim": 8, "text_embed_dim": 8, "in_channels": 4, "max_text_seq_length": 3}
    | {"sample_width": 8, "sample_height": 8, "sample_frames": 5},
    "Lumina2Transformer2DModel": TEXT
    | {"hidden_size": 32, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "cap_feat_dim": 8}
    | {"axes_dim_rope": (4, 4, 8), "axes_lens": (30, 16, 16)},
}


@pytest.mark.parametrize(("name", "n_adaptive"), list(zip(MODELS, (5, 3, 3), strict=True)))
def test_models_compute_the_same(name, n_adaptive, device):
    """SD3's last block has AdaLayerNormContinuous for its text; Lumina's refiner of the text has no modulation."""
    model = getattr(diffusers, name)(**MODELS[name]).to(device).eval()
    x = torch.randn((2, 2, 4, 8, 8) if "3D" in name else (2, 4, 8, 8), device=device)
    inputs = {"hidden_states": x, "encoder_hidden_states": torch.randn(2, 3, 8, device=device)}
    inputs["timestep"] = torch.tensor([3.0, 5.0], device=device)
    if name.startswith("SD3"):
        inputs["pooled_projections"] = torch.randn(2, 8, device=device)
    if name.startswith("Lumina"):
        inputs["encoder_attention_mask"] = torch.ones(2, 3, dtype=torch.bool, device=device)
    with torch.no_grad():
        expected = model(**inputs).sample
        report = tn.convert(model)
        with tn.backend("triton"):
            agree([model(**inputs).sample], [expected], SINGLE)
    adaptive = [
        change for change in report.converted.values() if "Ada" in change or "Zero" in change or "Cont" in change
    ]
    assert len(adaptive) == n_adaptive
    assert all("outside of its norms" in reason for reason in report.skipped.values())


@pytest.mark.parametrize("norm_type", ["layer_norm", "ada_norm_zero", "ada_norm_single"])
def test_blocks_that_modulate_their_norms_are_reported(norm_type):
    attention = importlib.import_module("diffusers.models.attention")
    block = attention.BasicTransformerBlock(16, 2, 8, num_embeds_ada_norm=4, norm_type=norm_type)
    reported = "BasicTransformerBlock multiplies by 1 + scale_msa, 1 + scale_mlp outside of its norms"
    assert tn.convert(block).skipped == ({} if norm_type == "layer_norm" else {"": reported})


def test_a_group_norm_is_reported():
    normalization = importlib.import_module("diffusers.models.normalization")
    report = tn.convert(normalization.AdaGroupNorm(8, 8, 2))
    assert report.skipped == {"": "AdaGroupNorm calls torch.nn.functional.group_norm as a function"}
