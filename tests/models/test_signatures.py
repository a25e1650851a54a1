"""Signatures of Hugging Face's norms after convert, from which torch's tools read the names of arguments."""

import inspect

import pytest
import torch
from torch import nn

import triton_norm as tn
from support.adaptive_norms import FORMS, SINGLE, Form, converted, drawn, made
from support.layers import class_at
from triton_norm.converting import hugging_face

ADAPTIVE = list({form.path: form for form in FORMS}.values())
ROWS = ["llama.LlamaRMSNorm", "gemma.GemmaRMSNorm", "t5.T5LayerNorm", "llama4.Llama4TextL2Norm"]
GATED = ["qwen3_next.Qwen3NextRMSNormGated", "kimi_linear.KimiLinearRMSNormGated"]
COLUMNS = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]+. is "),
    pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning:torch[.]"),
]


def of_transformers(path: str) -> nn.Module:
    pytest.importorskip("transformers")
    cls = class_at(path)
    if cls is None:
        pytest.skip("transformers has no such class")
    first, *_ = inspect.signature(cls).parameters
    return cls() if first == "eps" else cls(COLUMNS)


def of_diffusers(form: Form) -> nn.Module:
    pytest.importorskip("diffusers")
    return made(form)


def assert_traced_alike(theirs, arguments):
    ours = converted(theirs)
    assert isinstance(ours, type(theirs))
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    results = []
    for module in (ours, theirs):
        traced = torch.jit.trace(module, example_kwarg_inputs=arguments, check_trace=False)
        results.append(traced(**arguments))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("path", [*ROWS, *GATED])
def test_norms_are_traced_by_keyword(path):
    theirs = of_transformers(path)
    names = inspect.signature(theirs.forward).parameters
    assert_traced_alike(theirs, {name: torch.randn(2, 3, COLUMNS) for name in names})


@pytest.mark.parametrize("form", ADAPTIVE[:1] + ADAPTIVE[3:5], ids=str)
def test_adaptive_norms_are_traced_by_keyword(form):
    theirs = of_diffusers(form)
    arguments = drawn(theirs, form, SINGLE, "cpu")
    assert_traced_alike(theirs, {name: each for name, each in arguments.items() if name != "hidden_dtype"})


@pytest.mark.parametrize("form", ADAPTIVE, ids=str)
def test_adaptive_norms_keep_their_signatures(form):
    cls = type(of_diffusers(form))
    assert inspect.signature(hugging_face.counterpart(cls).forward) == inspect.signature(cls.forward)


def test_a_reverted_module_has_the_forward_of_its_class():
    """A wrapper of the forward that was set while the module was converted is still called."""
    module = of_transformers("llama.LlamaRMSNorm")
    own = type(module).forward
    tn.convert(module)
    wrapped = module.forward
    module.forward = lambda *inputs, **named: wrapped(*inputs, **named)
    tn.revert(module)
    x = torch.randn(3, COLUMNS)
    assert type(module).forward is own
    torch.testing.assert_close(module(hidden_states=x), own(module, x))
