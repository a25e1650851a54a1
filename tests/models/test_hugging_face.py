"""Every listed norm of Hugging Face's transformers, of the version installed, against its own forward."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from packaging import version
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import triton_norm as tn
from support.layers import class_at
from triton_norm.converting import hugging_face
from triton_norm.converting.hugging_face import (
    ARITHMETIC,
    GEMMA,
    LAYER_NORMS,
    LLAMA,
    LLAMA_4,
    MOSHI,
    NANO_CHAT,
    OLMO_2,
    T5,
)

VERSION = version.Version(pytest.importorskip("transformers").__version__)
FAMILIES = {
    "llama.LlamaRMSNorm": LLAMA,
    "llama4.Llama4TextRMSNorm": LLAMA_4,
    "olmo2.Olmo2RMSNorm": OLMO_2,
    "gemma3n.Gemma3nRMSNorm": MOSHI,
    "gemma.GemmaRMSNorm": GEMMA,
    "t5.T5LayerNorm": T5,
    "llama4.Llama4TextL2Norm": NANO_CHAT,
}
SINCE = {"deepseek_v4.DeepseekV4RMSNorm": "5.20", "nemotron_h.NemotronHRMSNorm": "5.18"}
"""Releases before which a class computed something else."""

HALF, SINGLE = torch.bfloat16, torch.float32
TYPES = [*itertools.product((HALF, SINGLE), repeat=2), (torch.float16, torch.float16), (torch.float16, SINGLE)]
COLUMNS = 48


def made(cls: type[nn.Module], columns: int = COLUMNS) -> nn.Module:
    """Makes a norm of the class; its weight, if it has one, is random."""
    first, *_ = inspect.signature(cls).parameters
    module = cls() if first == "eps" else cls(columns)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def converted(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    assert list(tn.convert(other).converted) == [""]
    return other


@pytest.mark.parametrize("arithmetic", FAMILIES.values(), ids=FAMILIES)
def test_every_class_computes_what_the_list_says(arithmetic):
    classes = {path: class_at(path) for path, listed in ARITHMETIC.items() if listed == arithmetic}
    there = {path: cls for path, cls in classes.items() if cls is not None}
    assert there
    others = [path for path, cls in there.items() if hugging_face.mismatch(made(cls)) is not None]
    assert others == [path for path in there if version.Version(SINCE.get(path, "0")) > VERSION]


@pytest.mark.parametrize(("path", "arithmetic"), FAMILIES.items(), ids=FAMILIES)
def test_another_arithmetic_is_noticed(path, arithmetic, monkeypatch):
    module = made(class_at(path))
    others = {other._replace(eps=arithmetic.eps) for other in FAMILIES.values()} - {arithmetic}
    if not arithmetic.weighted:
        others.clear()  # which differ in what they do with a weight
    for other in (*others, arithmetic._replace(eps="training")):
        monkeypatch.setattr(hugging_face.counterpart(type(module)), "arithmetic", other)
        assert hugging_face.mismatch(module) is not None, other


def test_a_version_that_computes_something_else_is_skipped(monkeypatch):
    llama, gemma = class_at("llama.LlamaRMSNorm"), class_at("gemma.GemmaRMSNorm")
    monkeypatch.setattr(llama, "forward", lambda self, x: torch.rms_norm(x, (x.shape[-1],), self.weight, 1e-6))
    model = nn.Sequential(llama(4), gemma(4), gemma(4))
    model[2].epsilon = model[2].__dict__.pop("eps")
    report = tn.convert(model)
    assert list(report.converted) == ["1"]
    assert list(report.skipped) == ["0", "2"]
    assert report.skipped["0"] == "its version of LlamaRMSNorm computes something else than the one that is known"


@pytest.mark.parametrize("path", ["axk2.AXK2GatedRMSNorm", "cohere.CohereLayerNorm", "xlstm.xLSTMRMSNorm"])
def test_what_is_not_listed_is_skipped(path):
    cls = class_at(path)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    assert tn.convert(module).skipped == {"": f"{cls.__name__} is not among the classes that are known"}


def test_a_subclass_is_skipped():
    class Own(class_at("llama.LlamaRMSNorm")):
        pass

    assert tn.convert(Own(4)).skipped == {"": "Own is a subclass of transformers.LlamaRMSNorm: its forward may differ"}


def test_a_parametrized_norm_is_skipped():
    module = class_at("llama.LlamaRMSNorm")(4)
    parametrizations.weight_norm(module, dim=None)
    assert tn.convert(module).skipped == {"": "parametrized"}


def bits_agree(actual: Tensor, expected: Tensor) -> None:
    """But where fp32 roundoff moves a value over the middle between two neighbours of a narrower type."""
    assert actual.dtype == expected.dtype
    fp32 = torch.finfo(SINGLE).eps
    same = torch.isclose(actual.double(), expected.double(), rtol=8 * fp32, atol=8 * fp32)
    assert same.double().mean() > 0.98
    coarse = max(torch.finfo(actual.dtype).eps, torch.finfo(HALF).eps)
    torch.testing.assert_close(actual, expected, rtol=2 * coarse, atol=8 * fp32)


@pytest.mark.parametrize(("x_dtype", "dtype"), TYPES)
@pytest.mark.parametrize("path", FAMILIES)
def test_the_kernels_compute_the_same(path, x_dtype, dtype, device, guard):
    theirs = made(class_at(path)).to(device, dtype)
    ours = converted(theirs)
    x, dy = (3 * torch.randn(2, 2, 5, COLUMNS, device=device)).to(x_dtype)
    result = []
    for module, backend in ((ours, "triton"), (theirs, "torch")):
        leaf = x.clone().requires_grad_()
        with tn.backend(backend):
            y = module(leaf)
        grads = torch.autograd.grad(y, [leaf, *module.parameters()], dy.to(y.dtype))
        result.append((y, *grads))
    (y, *grads), (expected, *expected_grads) = result
    bits_agree(y, expected)
    assert guard is None or len(guard.launches) >= 2
    # In torch the gradient is rounded to x_hat's type on its way, and each row's dweight before they are summed.
    coarse = max(torch.finfo(t).eps for t in (x_dtype, dtype))
    for actual, exact in zip(grads, expected_grads, strict=True):
        assert actual.dtype == exact.dtype
        torch.testing.assert_close(actual, exact, rtol=8 * coarse, atol=8 * coarse * exact.abs().max().item())


@pytest.mark.parametrize("path", FAMILIES)
def test_what_the_kernels_dont_compute_goes_to_its_own_forward(path, device):
    """The norm computes in float32 of float64, and takes weights of more dimensions."""
    theirs = made(class_at(path)).to(device)
    ours = converted(theirs)
    x = torch.randn(3, COLUMNS, device=device)
    assert tn.explain(ours, x).backend == "triton"
    assert torch.equal(ours(x.double()), theirs(x.double()))
    with tn.backend("triton"), pytest.raises(RuntimeError, match="own forward computes something else"):
        ours(x.double())
    assert tn.explain(ours, x.double()).backend == "torch"
    with tn.backend("torch"):
        assert torch.equal(ours(x), theirs(x))
    for module in (ours, theirs):
        if getattr(module, "weight", None) is not None:
            module.weight = nn.Parameter(module.weight.detach().expand(3, COLUMNS).clone())
    assert torch.equal(ours(x), theirs(x)) or path == "llama4.Llama4TextL2Norm"


@pytest.mark.parametrize("path", [*FAMILIES, "convnext.ConvNextLayerNorm"])
def test_the_kernels_take_the_classes_argument_by_its_name(path, device, guard):
    theirs = made(class_at(path)).to(device)
    ours = converted(theirs)
    (name,) = inspect.signature(theirs.forward).parameters
    x = torch.randn(2, 1, 1, COLUMNS, device=device)
    with tn.backend("triton"):
        assert torch.equal(ours(**{name: x}), ours(x))
    assert guard is None or len(guard.launches) == 2
    assert tn.explain(ours, **{name: x}) == tn.explain(ours, x)
    assert tn.explain(ours, x).backend == "triton"


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("path", [*FAMILIES, "convnext.ConvNextLayerNorm"])
def test_wrong_arguments_are_the_classes_own_error(path, backend, device):
    theirs = made(class_at(path)).to(device)
    ours = converted(theirs)
    (name,) = inspect.signature(theirs.forward).parameters
    x = torch.randn(2, 1, 1, COLUMNS, device=device)
    for inputs, named in (((), {}), ((), {"nonsense": x}), ((x,), {name: x}), ((x, x), {}), ((x,), {"residual": x})):
        with pytest.raises(TypeError) as expected:
            theirs(*inputs, **named)
        with tn.backend(backend):
            with pytest.raises(TypeError) as actual:
                ours(*inputs, **named)
            with pytest.raises(TypeError):
                tn.explain(ours, *inputs, **named)
        assert str(actual.value) == str(expected.value)


def test_a_weight_of_another_length_is_an_error(device):
    ours = converted(made(class_at("llama.LlamaRMSNorm"))).to(device)
    with pytest.raises(RuntimeError, match=r"weight of shape|expected input with shape \[\*, 48\].*\[3, 47\]"):
        ours(torch.randn(3, 47, device=device))


@pytest.mark.parametrize("path", FAMILIES)
def test_copies_and_pickles(path):
    theirs = made(class_at(path))
    ours = converted(theirs)
    assert isinstance(ours, type(theirs))
    assert str(ours) == str(theirs)
    x = torch.randn(3, COLUMNS)
    pickled = [pickle.loads(pickle.dumps(ours, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (copy.copy(ours), copy.deepcopy(ours), *pickled):
        assert type(other) is type(ours)
        assert torch.equal(other(x), ours(x))
        assert tn.revert(other) == ("",)
        assert type(other) is type(theirs)
        assert vars(other).keys() == vars(theirs).keys()


def test_a_gemma3n_norm_without_a_weight(device):
    """The flag decides, whatever weight the norm has since."""
    theirs = class_at("gemma3n.Gemma3nRMSNorm")(COLUMNS, with_scale=False).to(device)
    ours = converted(theirs)
    x = torch.randn(3, COLUMNS, device=device).bfloat16()
    for module in (theirs, ours, theirs):
        with tn.backend("triton"):
            bits_agree(ours(x), theirs(x))
        module.weight = nn.Parameter(torch.full((COLUMNS,), 3.0, device=device))


@pytest.mark.parametrize("path", [path for path, arithmetic in FAMILIES.items() if arithmetic.weighted])
def test_a_missing_weight_is_the_classes_own_error(path, device):
    theirs = made(class_at(path)).to(device)
    ours = converted(theirs)
    x = torch.randn(3, COLUMNS, device=device)
    for module in (theirs, ours):
        module.weight = None
    with pytest.raises((AttributeError, TypeError)) as expected:
        theirs(x)
    with pytest.raises(expected.type) as actual:
        ours(x)
    assert str(actual.value) == str(expected.value)
    for backend in ("auto", "triton", "torch"):
        del ours.weight
        with tn.backend(backend), pytest.raises(AttributeError, match="has no attribute 'weight'"):
            ours(x)
        with pytest.raises(AttributeError, match="has no attribute 'weight'"):
            tn.explain(ours, x)
        ours.weight = None


@pytest.mark.parametrize("path", [path for path, arithmetic in FAMILIES.items() if arithmetic.weighted])
def test_a_norm_that_lacks_its_weight_is_skipped(path):
    module = made(class_at(path))
    del module.weight
    (reason,) = tn.convert(module).skipped.values()
    assert f"raised AttributeError: '{type(module).__name__}' object has no attribute 'weight'" in reason


@pytest.mark.parametrize("path", sorted(LAYER_NORMS))
def test_every_layer_norm_calls_torchs_forward(path, monkeypatch):
    """A class that calls torch's forward calls this library's once it is converted."""
    cls = class_at(path)
    if cls is None:
        pytest.skip("transformers has no such class")
    module = converted(cls(6))
    calls = []
    monkeypatch.setattr(tn.LayerNorm, "forward", lambda self, x: calls.append(x.shape) or x)
    module(torch.randn(2, 3, 4, 6))
    module.data_format = "channels_first"
    module(torch.randn(2, 6, 3, 4))
    assert calls == [(2, 3, 4, 6), (2, 3, 4, 6)]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_layer_norm_of_convnext(data_format, device, guard):
    theirs = class_at("convnext.ConvNextLayerNorm")(6, data_format=data_format)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    theirs.to(device)
    ours = converted(theirs)
    x = torch.randn((2, 3, 4, 6) if data_format == "channels_last" else (2, 6, 3, 4), device=device)
    with tn.backend("triton"):
        y = ours(x)
    expected = theirs(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    assert guard is None or len(guard.launches) == 1
    explained = tn.explain(ours, x)
    assert explained.backend == "triton"
    assert len(explained.copies) == (data_format == "channels_first")
    other = pickle.loads(pickle.dumps(ours))
    assert tn.revert(other) == ("",)
    assert type(other) is type(theirs)
