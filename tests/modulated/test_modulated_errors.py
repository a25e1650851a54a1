"""Wrong calls with a gate or a modulation: who is named, in which words, and nothing launched or changed."""

from typing import Any

import numpy as np
import pytest
import torch

import triton_norm
from support.wrong_calls import (
    BACKENDS,
    FLOAT8,
    JAGGED,
    NESTED,
    NO_NUMBERS,
    NO_TENSORS,
    ONES,
    QUANTIZED,
    X,
    check,
    named,
    refused,
)

pytestmark = pytest.mark.unguarded
OUTER = ("scale", "shift", "residual_gate")
FUNCTIONS = pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])


def of_any_tensor(name: str) -> list[tuple[dict[str, Any], str, type[Exception]]]:
    shape = "shape of input|same shape as input" if name == "gate" else "expected"
    return [
        *(({name: make(4)}, f"'{name}' must be Tensor, not {kind}", TypeError) for make, kind in NO_TENSORS),
        ({name: X[0]} if name == "gate" else {name: X.transpose(0, 1)}, rf"{shape}.*{name} of shape", RuntimeError),
        ({name: X[..., :1]}, rf"{name} of shape \[2, 3, 1\] and input of size \[2, 3, 4\]", RuntimeError),
        ({name: torch.tensor(1.0)}, rf"{name} of shape \[\] and input of size \[2, 3, 4\]", RuntimeError),
        ({name: torch.ones(1, 2, 3, 4)}, rf"{name} of shape \[1, 2, 3, 4\] and input of size", RuntimeError),
        ({name: torch.ones(0, 4)}, rf"{name} of shape \[0, 4\] and input of size", RuntimeError),
        ({name: right(name).to("meta")}, f"input is on cpu and {name} is on meta", RuntimeError),
        ({name: right(name).to_sparse()}, rf"{name} of layout torch\.sparse_coo", NotImplementedError),
        ({name: right(name).to_mkldnn()}, rf"{name} of layout torch\._mkldnn", NotImplementedError),
        ({name: NESTED}, f"nested {name}", NotImplementedError),
        ({name: JAGGED}, f"nested {name}", NotImplementedError),
        ({name: right(name).long()}, rf"{name}.*torch\.int64", NotImplementedError),
        ({name: right(name).to(FLOAT8)}, rf"{name}.*torch\.float8_e4m3fn", NotImplementedError),
        ({name: right(name).to(torch.complex64)}, rf"{name}.*torch\.complex64", NotImplementedError),
        ({name: QUANTIZED if name == "gate" else QUANTIZED[0]}, rf"{name}|of shape", Exception),
    ]


def right(name: str) -> torch.Tensor:
    shapes = {"gate": (2, 3, 4), "head_weight": (3, 4)}
    return torch.ones(shapes.get(name, (2, 4)))


OUTER_SHAPES = [
    ({name: torch.ones(shape)}, rf"{name} to be of input's shape.*{list(shape)}".replace("[", r"\["), RuntimeError)
    for name in OUTER
    for shape in ((3,), (3, 4), (2, 2, 4), (2, 4, 3), (2, 3), (2, 1, 3, 4), (4, 1))
]
GATES = [
    *(
        ({"gate_activation": name}, rf"_norm\(\): gate_activation must be one of.*{name!r}", ValueError)
        for name in ("relu", "gelu", "")
    ),
    *(
        ({"gate_activation": value}, f"'gate_activation' must be str or None, not {type(value).__name__}", TypeError)
        for value in (3, True, torch.sigmoid, ["silu"], b"silu", torch.tensor(1), np.ones(2))
    ),
    *(
        ({"gate_first": value}, f"'gate_first' must be bool, not {type(value).__name__}", TypeError)
        for value in (None, 0, 1, "yes", torch.tensor(True), np.True_, np.ones(2))
    ),
    ({"product_dtype": "bfloat16"}, "'product_dtype' must be torch.dtype, not str", TypeError),
    ({"product_dtype": torch.int32}, r"product_dtype must be a floating-point type, but got torch\.int32", None),
    (
        {"product_dtype": torch.bfloat16, "gate_first": True},
        "product_dtype=torch.bfloat16 needs a gate behind",
        ValueError,
    ),
    ({"gate": None, "gate_first": True}, "gate_first=True was given without a gate", ValueError),
    ({"gate": None, "product_dtype": torch.half}, "product_dtype=torch.float16 was given without a gate", ValueError),
    ({"residual": None}, "residual_gate was given without a residual", ValueError),
    ({"head_weight": torch.ones(3, 4)}, "head_weight was given with scale", ValueError),
]
HEADS = [
    ({"weight": ONES}, "head_weight was given with weight, which it replaces", ValueError),
    (
        {"head_weight": torch.ones(3, 4), "input": torch.ones(4)},
        r"head_weight of shape \[3, 4\] and input of size \[4\]",
        RuntimeError,
    ),
    ({"head_weight": torch.ones(2, 3, 4)}, r"head_weight \[H, 4\].*head_weight of shape \[2, 3, 4\]", RuntimeError),
    ({"head_weight": torch.ones(4)}, r"head_weight \[H, 4\].*head_weight of shape \[4\]", RuntimeError),
    ({"head_weight": torch.ones(1, 4)}, r"head_weight of shape \[1, 4\] and input of size \[2, 3, 4\]", RuntimeError),
    *(({"weight_offset": value}, f"'weight_offset'.*{words}", None) for value, words in NO_NUMBERS[:7]),
]


def of_modulation(changes: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments that are right but for these changes."""
    tensors = {name: right(name).requires_grad_() for name in ("gate", *OUTER)}
    return {"input": X.clone(), "normalized_shape": (4,), "residual": X.clone(), **tensors, **changes}


def of_heads(changes: dict[str, Any]) -> dict[str, Any]:
    return {"input": X.clone(), "normalized_shape": (4,), "head_weight": torch.ones(3, 4).requires_grad_(), **changes}


@pytest.fixture(scope="module", autouse=True)
def _after_right_calls():
    """A wrong call must not be taken for one like these, which are not checked again."""
    for function in (triton_norm.layer_norm, triton_norm.rms_norm):
        function(**of_modulation({}))
        function(**of_heads({}))


def refuse(function: str, arguments: dict[str, Any], words: str, error: type[Exception] | None) -> None:
    check(function, arguments, words, error or (TypeError, NotImplementedError, OverflowError, RuntimeError))


@FUNCTIONS
@pytest.mark.parametrize(
    ("changes", "words", "error"),
    [*(case for name in ("gate", *OUTER) for case in of_any_tensor(name)), *OUTER_SHAPES, *GATES],
    ids=named,
)
def test_gates_and_modulations(changes, words, error, function):
    refuse(function, of_modulation(changes), words, error)


@FUNCTIONS
@pytest.mark.parametrize(("changes", "words", "error"), [*of_any_tensor("head_weight"), *HEADS], ids=named)
def test_weights_of_heads(changes, words, error, function):
    refuse(function, of_heads(changes), words, error)


def test_a_bias_beside_weights_of_heads():
    words = "head_weight was given with bias, which it replaces"
    refuse("layer_norm", of_heads({"bias": ONES}), words, ValueError)


@pytest.mark.parametrize(
    ("changes", "words", "error"),
    [
        ({"weight": ONES, "weight_offset": 1.0, "bias": torch.ones(3)}, "bias of shape", RuntimeError),
        ({"input": X.long()}, r"input of torch\.int64", NotImplementedError),
        ({"input": X.to(torch.complex64)}, r"input of torch\.complex64", NotImplementedError),
        ({"input": JAGGED, "residual": None, "residual_gate": None}, "nested input", NotImplementedError),
        ({"normalized_shape": (3, 3)}, r"normalized_shape=\[3, 3\]", RuntimeError),
        ({"weight_offset": 1.0}, "weight_offset=1.0 was given without a weight", ValueError),
        ({"residual": X[:1]}, r"residual of shape \[1, 3, 4\]", RuntimeError),
        ({"scalee": X}, "unexpected keyword argument 'scalee'", TypeError),
    ],
    ids=named,
)
def test_the_other_arguments_are_checked_too(changes, words, error):
    refuse("layer_norm", of_modulation(changes), words, error)


def test_rms_norm_of_complex_numbers_takes_no_gate():
    x = X.to(torch.complex64)
    refuse(
        "rms_norm", {"input": x, "normalized_shape": (4,), "gate": X}, r"input of torch\.complex64", NotImplementedError
    )


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    ("own", "error", "words"),
    [
        ({"gate": X[:1]}, RuntimeError, r"gate of shape \[1, 3, 4\] and input of size \[2, 3, 4\]"),
        ({"scale": [1.0]}, TypeError, "'scale' must be Tensor, not list"),
        ({"residual_gate": torch.ones(2, 4)}, ValueError, "residual_gate was given without a residual"),
        ({"head_weight": torch.ones(3, 4)}, ValueError, "head_weight was given with weight"),
        ({"gate": X, "gate_activation": "relu"}, ValueError, "gate_activation must be one of"),
        ({"gated": X}, TypeError, "gated"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_layers(own, error, words, kind):
    layer = getattr(triton_norm, kind)(4)
    for backend in BACKENDS:
        with triton_norm.backend(backend), refused(error, words, layer, X):
            layer(X, **own)
        with triton_norm.backend(backend), refused(error, words, layer, X):
            triton_norm.explain(layer, X, **own)


@FUNCTIONS
@pytest.mark.parametrize(
    ("dtype", "total", "most"),
    [
        (torch.float32, None, 8192),
        (torch.bfloat16, None, 8192),
        (torch.float64, None, 4096),
        (torch.float32, torch.float64, 4096),
    ],
)
def test_rows_that_are_longer_than_a_program_holds(dtype, total, most, function, device):
    """A program has this many columns at once, in the type that is computed in."""
    call = getattr(triton_norm, function)
    for n in (most, most + 1):
        x, scale = torch.randn(2, n, device=device, dtype=dtype), torch.randn(n, device=device)
        options = {"scale": scale} if total is None else {"scale": scale, "residual": x, "residual_dtype": total}
        assert triton_norm.explain(call, x, (n,), **options).backend == "triton"
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        with triton_norm.backend("triton"):
            result = call(leaf, (n,), **options)
        with triton_norm.backend("torch"):
            theirs = call(exact, (n,), **options)
        result, theirs = (y if total is None else y[0] for y in (result, theirs))
        dy = torch.randn_like(x)
        (dx,), (exact_dx,) = torch.autograd.grad(result, leaf, dy), torch.autograd.grad(theirs, exact, dy.double())
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        for ours, right in ((result, theirs), (dx, exact_dx)):
            torch.testing.assert_close(ours, right.to(dtype), rtol=tolerance, atol=tolerance)


X3 = torch.randn(2, 3, 4)
COPIED = [
    ({"gate": X3.mT.contiguous().mT}, ["gate"], "columns are not adjacent"),
    ({"gate": torch.randn(2, 3, 8)[..., :4]}, [], ""),
    ({"scale": torch.randn(2, 8)[:, ::2]}, ["scale"], "its columns are not adjacent"),
    ({"scale": torch.randn(2, 24).chunk(6, -1)[1], "shift": torch.randn(2, 24).chunk(6, -1)[2]}, [], ""),
    ({"scale": torch.randn(2, 1, 4), "shift": torch.randn(2, 4)}, [], ""),
    ({"scale": torch.randn(2, 4), "shift": torch.randn(1, 3, 4)}, ["scale", "shift"], "other axes"),
    ({"scale": torch.randn(2, 4), "shift": torch.randn(2, 3, 4)}, ["scale"], "other axes"),
    ({"scale": torch.randn(2, 4), "shift": torch.randn(4)}, ["shift"], "other axes"),
    ({"residual": X3, "residual_gate": torch.randn(2, 5, 4)[:, :1]}, [], ""),
    ({"shift": torch.randn(2, 5, 4)[:, :3]}, ["shift"], "its rows have no common stride"),
    ({"head_weight": torch.randn(4, 3).T}, ["head_weight"], "columns are not adjacent"),
    ({"head_weight": torch.randn(3, 4), "shift": torch.randn(2, 4)}, ["head_weight", "shift"], "other axes"),
    ({"gate": X3.mT.contiguous().mT, "scale": torch.randn(4, 2).T}, ["gate", "scale"], "not adjacent"),
]


@FUNCTIONS
@pytest.mark.parametrize(("own", "copied", "words"), COPIED)
def test_explain_names_copies(own, copied, words, function):
    explained = triton_norm.explain(getattr(triton_norm, function), X3, (4,), **own)
    assert explained.backend == "triton"
    assert [copy.partition(":")[0] for copy in explained.copies] == [f"the {name}" for name in copied]
    assert all(words in copy for copy in explained.copies)


def test_explain_names_copies_for_autograd():
    weight = torch.ones(4, requires_grad=True)
    with torch.inference_mode():
        x, gate = X3.clone(), X3.clone()
    for own, copied in (
        ({"gate": gate}, ["input", "gate"]),
        ({"gate": gate, "residual": x}, ["gate"]),
        ({"gate": gate, "residual": X3, "residual_gate": weight}, ["gate", "input"]),
    ):
        explained = triton_norm.explain(triton_norm.rms_norm, x, (4,), weight, **own)
        assert sorted(copy.partition(":")[0] for copy in explained.copies) == sorted(f"the {name}" for name in copied)
        assert all("inference_mode" in copy for copy in explained.copies)
        with torch.no_grad():
            assert triton_norm.explain(triton_norm.rms_norm, x, (4,), weight, **own).copies == ()
