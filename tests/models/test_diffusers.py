"""Every listed adaptive norm of Hugging Face's diffusers, of the version installed, against its own forward."""

import pytest
import torch
from torch import Tensor

import triton_norm as tn
from support.adaptive_norms import (
    COLUMNS,
    FORMS,
    HALF,
    SINGLE,
    WIDTH,
    ZERO,
    Form,
    agree,
    converted,
    drawn,
    made,
    results,
)
from triton_norm.converting import hugging_face
from triton_norm.converting.adaptive import ADAPTIVE

pytest.importorskip("diffusers")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_class_computes_what_the_list_says(form):
    assert hugging_face.mismatch(made(form)) is None


def test_every_listed_class_is_tried():
    assert {form.path for form in FORMS} == set(ADAPTIVE)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_another_arithmetic_is_noticed(form, monkeypatch):
    module = made(form)
    adaptive = ADAPTIVE[form.path]
    part = adaptive.modulated[-1]
    place = adaptive.results.index(part)
    others = [part._replace(scale=(part.scale + 1) % adaptive.n_chunks)] if adaptive.n_chunks > 1 else []
    others += [part._replace(shift=None)] if part.shift is not None else [part._replace(shift=part.scale)]
    for other in others:
        changed = (*adaptive.results[:place], other, *adaptive.results[place + 1 :])
        batched = adaptive.batched and adaptive.batched._replace(results=changed)
        wrong = adaptive._replace(results=changed, batched=batched)
        monkeypatch.setattr(hugging_face.counterpart(type(module)), "adaptive", wrong)
        assert hugging_face.mismatch(module) is not None, other


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_kernels_compute_the_same(form, dtype, device, guard):
    theirs = made(form, dtype, device)
    ours = converted(theirs)
    arguments = drawn(theirs, form, dtype, device)
    assert str(ours) == str(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with tn.backend("triton"), torch.no_grad():
        ours(**arguments)
    assert guard is None or len(guard.launches) == form.parts
    with tn.backend("triton"):
        whole, ys, grads = results(ours, arguments)
    launched = None if guard is None else len(guard.launches)
    # One without gradients, one forward, and backward one and its finalising one: a modulation by row has no sums.
    by_row = form.path.endswith("Flux3AdaLayerNorm")
    assert guard is None or launched == (3 if by_row else 4) * form.parts
    with tn.backend("torch"):
        expected_whole, expected, expected_grads = results(theirs, arguments)
        assert all(torch.equal(*pair) for pair in zip(results(ours, arguments)[1], expected, strict=True))
    assert launched is None or len(guard.launches) == launched
    assert type(whole) is type(expected_whole)
    agree(ys, expected, dtype)
    agree(grads, expected_grads, dtype)


def test_types_are_promoted_as_in_torch(device):
    """A projection in float32 makes the result float32; an inner RMSNorm rounds to its weight's type."""
    x = torch.randn(2, 7, COLUMNS, device=device).to(HALF)
    rms = Form("normalization.AdaLayerNormContinuous", (COLUMNS, WIDTH), {"norm_type": "rms_norm"})
    for form, width, of_norm in ((ZERO, COLUMNS, SINGLE), (FORMS[5], COLUMNS, SINGLE), (rms, WIDTH, HALF)):
        theirs = made(form, SINGLE, device)
        if of_norm is HALF:
            theirs.linear.to(HALF)  # the norm's weight stays in float32, and so does its result
        ours = converted(theirs)
        emb = torch.randn(2, width, device=device)
        inputs = (x, emb) if form is rms else (x, None, None, None, emb)
        with tn.backend("triton"):
            result = ours(*inputs)
        expected = theirs(*inputs)
        result, expected = (result[0], expected[0]) if isinstance(result, tuple) else (result, expected)
        assert result.dtype == expected.dtype == SINGLE
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("form", [ZERO, FORMS[4], FORMS[7], FORMS[10]], ids=str)
def test_what_the_kernels_dont_compute_goes_to_torch(form, device):
    theirs = made(form, device=device)
    ours = converted(theirs)
    arguments = drawn(theirs, form, SINGLE, device)
    explained = tn.explain(ours, **arguments)
    assert (explained.backend, explained.copies) == ("triton", ())
    double = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    if "hidden_dtype" in double:
        double["hidden_dtype"] = torch.float64
    for module in (ours, theirs):
        module.double()
    assert tn.explain(ours, **double).backend == "torch"
    for one, other in zip(ours(**double), theirs(**double), strict=True):
        torch.testing.assert_close(one, other)
    with tn.backend("triton"), pytest.raises(RuntimeError, match="own forward computes something else"):
        ours(**double)


def test_other_shapes_are_torchs(device):
    """torch aligns axes from the last one: in [B, F, T, D] the conditioning belongs to the frames."""
    theirs = made(ZERO, device=device)
    ours = converted(theirs)
    emb = torch.randn(3, COLUMNS, device=device)
    for shape in ((3, 3, 7, COLUMNS), (1, 7, COLUMNS), (7, COLUMNS)):
        x = torch.randn(shape, device=device)
        assert tn.explain(ours, x, emb=emb).backend == "torch"
        for one, other in zip(ours(x, emb=emb), theirs(x, emb=emb), strict=True):
            torch.testing.assert_close(one, other)
        with tn.backend("triton"), pytest.raises(RuntimeError, match="own forward computes something else"):
            ours(x, emb=emb)
    for wrong, named in (((), {}), ((x,) * 6, {}), ((x,), {"x": x}), ((x,), {"nonsense": x})):
        with pytest.raises(TypeError) as expected:
            theirs(*wrong, **named)
        with pytest.raises(TypeError) as result:
            ours(*wrong, **named)
        assert str(result.value) == str(expected.value)


NORMS = [
    Form("normalization.RMSNorm", (COLUMNS, 1e-5)),
    Form("normalization.RMSNorm", (COLUMNS, 1e-5), {"elementwise_affine": False}),
    Form("normalization.MochiRMSNorm", (COLUMNS, 1e-5)),
    Form("normalization.MochiRMSNorm", (COLUMNS, 1e-5), {"elementwise_affine": False}),
    Form("normalization.FP32LayerNorm", (COLUMNS, 1e-5)),
    Form("normalization.FP32LayerNorm", (COLUMNS, 1e-5), {"elementwise_affine": False}),
]
TYPES = [(HALF, HALF), (HALF, SINGLE), (SINGLE, HALF), (SINGLE, SINGLE)]


@pytest.mark.parametrize(("x_dtype", "dtype"), TYPES)
@pytest.mark.parametrize("form", NORMS, ids=str)
def test_norms_without_a_modulation(form, x_dtype, dtype, device):
    theirs = made(form, dtype, device)
    ours = converted(theirs)
    arguments = {"hidden_states": (3 * torch.randn(2, 7, COLUMNS, device=device)).to(x_dtype)}
    if "LayerNorm" in form.path:
        arguments["inputs"] = arguments.pop("hidden_states")
    assert tn.explain(ours, **arguments).backend == "triton"
    with tn.backend("triton"):
        _, (y,), grads = results(ours, arguments)
    _, (expected,), expected_grads = results(theirs, arguments)
    assert (y == expected).double().mean() > 0.98 or y.dtype == SINGLE
    coarse = HALF if HALF in (x_dtype, dtype) else SINGLE
    agree([y, *grads], [expected, *expected_grads], coarse)


def test_a_bias_of_an_rms_norm_is_added_by_its_own_forward(device):
    theirs = made(Form("normalization.RMSNorm", (COLUMNS, 1e-5), {"bias": True}), device=device)
    ours = converted(theirs)
    x = torch.randn(2, COLUMNS, device=device)
    assert torch.equal(ours(x), theirs(x))
    with tn.backend("triton"), pytest.raises(RuntimeError, match="own forward computes something else"):
        ours(x)
