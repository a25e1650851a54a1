"""Wrong calls of layer_norm and rms_norm, and of all that is not a norm, and calls that only look wrong."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.wrong_calls import (
    COMPLEX32,
    FLOAT8,
    INF,
    INPUTS,
    JAGGED,
    NAN,
    NESTED,
    NO_NUMBERS,
    NO_TENSORS,
    ONES,
    QUANTIZED,
    RESIDUALS,
    X,
    check,
    named,
    refused,
)

pytestmark = pytest.mark.unguarded

SHAPES = [
    ((5,), r"normalized_shape=\[5\].*\[\*, 5\].*\[2, 3, 4\]"),
    ((2, 4), r"normalized_shape=\[2, 4\].*\[\*, 2, 4\].*\[2, 3, 4\]"),
    ((1, 2, 3, 4), r"normalized_shape=\[1, 2, 3, 4\].*\[2, 3, 4\]"),
    ((0,), r"normalized_shape=\[0\].*\[2, 3, 4\]"),
    ((-1,), r"normalized_shape=\[-1\].*\[2, 3, 4\]"),
    ((-4,), r"normalized_shape=\[-4\].*\[2, 3, 4\]"),
    ((), "normalized_shape to have at least one dimension"),
    ([], "normalized_shape to have at least one dimension"),
    (4, "'normalized_shape' must be tuple of ints, not int"),
    (4.0, "'normalized_shape' must be tuple of ints, not float"),
    (None, "'normalized_shape' must be tuple of ints, not NoneType"),
    ("4", "'normalized_shape' must be tuple of ints, not str"),
    (range(4, 5), "'normalized_shape' must be tuple of ints, not range"),
    ({4}, "'normalized_shape' must be tuple of ints, not set"),
    (torch.tensor([4]), "'normalized_shape' must be tuple of ints, not Tensor"),
    (np.array([4]), "'normalized_shape' must be tuple of ints, not ndarray"),
    ((4.0,), "'normalized_shape' must be tuple of ints.*type float"),
    ((np.float32(4),), "'normalized_shape' must be tuple of ints.*type float32"),
    ((True,), "'normalized_shape' must be tuple of ints.*type bool"),
    (("4",), "'normalized_shape' must be tuple of ints.*type str"),
    ((None,), "'normalized_shape' must be tuple of ints.*type NoneType"),
    (((4,),), "'normalized_shape' must be tuple of ints.*type tuple"),
    ((torch.tensor(4.0),), "'normalized_shape' must be tuple of ints.*type Tensor"),
]

OF_ROWS = [
    *(({"input": make(4)}, f"'input' must be Tensor, not {kind}", None) for make, kind in NO_TENSORS),
    ({"input": None}, "'input' must be Tensor, not NoneType", None),
    *(({"input": x}, words, None) for x, words in INPUTS),
    ({"input": X.to_mkldnn()}, r"input of layout torch\._mkldnn", None),
    ({"input": torch.tensor(1.0)}, r"size \[\]", None),
    ({"input": torch.ones(3)}, r"normalized_shape=\[4\].*\[\*, 4\].*\[3\]", None),
    ({"input": torch.ones(2, 0)}, r"normalized_shape=\[4\].*\[\*, 4\].*\[2, 0\]", None),
    *(({"normalized_shape": shape}, words, None) for shape, words in SHAPES),
    *(({"weight": make(4)}, f"'weight' must be Tensor, not {kind}", None) for make, kind in NO_TENSORS),
    ({"weight": torch.ones(3)}, r"weight of shape \[3\] and normalized_shape=\[4\]", None),
    ({"weight": torch.ones(4, 1)}, r"weight of shape \[4, 1\] and normalized_shape=\[4\]", None),
    ({"weight": torch.tensor(1.0)}, r"weight of shape \[\] and normalized_shape=\[4\]", None),
    ({"weight": torch.ones(0)}, r"weight of shape \[0\] and normalized_shape=\[4\]", None),
    ({"weight": torch.ones(4, device="meta")}, "input is on cpu and weight is on meta", None),
    ({"weight": ONES.to_sparse()}, r"weight of layout torch\.sparse_coo", None),
    ({"weight": ONES.to_mkldnn()}, r"weight of layout torch\._mkldnn", None),
    ({"weight": NESTED}, "nested weight", None),
    ({"weight": JAGGED}, "nested weight", NotImplementedError),  # torch's is an accident of its own
    ({"weight": QUANTIZED[0, 0]}, r"weight.*torch\.quint8", None),
    ({"weight": ONES.to(FLOAT8)}, r"weight.*torch\.float8_e4m3fn", None),
    # torch's rms_norm multiplies by these, and drops an imaginary part.
    ({"weight": ONES.long()}, r"weight.*torch\.int64", NotImplementedError),
    ({"weight": ONES.bool()}, r"weight.*torch\.bool", NotImplementedError),
    ({"weight": ONES.to(torch.complex64)}, r"weight.*torch\.complex64", NotImplementedError),
    *(({"eps": eps}, f"'eps'.*{words}", None) for eps, words in NO_NUMBERS),
    ({"eps": torch.tensor(1j)}, "'eps'.*cannot be converted", None),
]

ONLY_OF_LAYER_NORM = [
    ({"input": X.to(torch.complex64)}, r"input of torch\.complex64", None),
    ({"input": COMPLEX32}, r"input of torch\.complex32", None),
    ({"input": X.long(), "weight": None, "bias": None}, r"input of torch\.int64", None),
    ({"eps": None}, "'eps' must be float, not NoneType", None),
    *(({"bias": make(4)}, f"'bias' must be Tensor, not {kind}", None) for make, kind in NO_TENSORS),
    ({"bias": torch.ones(4, 1)}, r"bias of shape \[4, 1\] and normalized_shape=\[4\]", None),
    ({"bias": torch.ones(4, device="meta")}, "input is on cpu and bias is on meta", None),
    ({"bias": ONES.to_sparse()}, r"bias of layout torch\.sparse_coo", None),
    ({"bias": ONES.long()}, r"bias.*torch\.int64", None),
    ({"bias": NESTED}, "nested bias", None),
]

ONLY_OF_RMS_NORM = [
    ({"input": NESTED}, "nested input", None),
    ({"bias": ONES}, "unexpected keyword argument 'bias'", None),
    ({"input": X.to(torch.complex64), "weight_offset": 1.0}, r"input of torch\.complex64", NotImplementedError),
]

NO_DTYPES = [
    *((kind, f"must be torch.dtype, not {word}", TypeError) for kind, word in ((float, "type"), (np.float32, "type"))),
    *((kind, f"must be torch.dtype, not {word}", TypeError) for kind, word in (("float32", "str"), (32, "int"))),
    (torch.strided, "must be torch.dtype, not layout", TypeError),
    (ONES, "must be torch.dtype, not Tensor", TypeError),
    *(
        (dtype, f"must be a floating-point type, but got {dtype}", NotImplementedError)
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.quint8, FLOAT8)
    ),
]

FUSED_OF_ROWS = [
    *RESIDUALS,
    *(
        ({name: kind, **({"residual": X} if name == "residual_dtype" else {})}, f"{name}'? {words}", error)
        for name in ("out_dtype", "x_hat_dtype", "residual_dtype")
        for kind, words, error in NO_DTYPES
    ),
    ({"residual_dtype": torch.bfloat16}, "residual_dtype=torch.bfloat16 was given without a residual", ValueError),
    *(
        ({"weight_offset": offset}, f"'weight_offset'.*{words}", error)
        for (offset, words), error in zip(NO_NUMBERS, [TypeError] * 8 + [OverflowError, RuntimeError], strict=True)
    ),
    ({"weight_offset": None}, "'weight_offset' must be float, not NoneType", TypeError),
    ({"weight_offset": ONES}, "'weight_offset' must be float, not Tensor", TypeError),
    ({"weight_offset": NESTED}, "'weight_offset' must be float, not Tensor", TypeError),
    *(
        ({"weight": None, "weight_offset": offset}, f"weight_offset={offset} was given without a weight", ValueError)
        for offset in (1.0, -1.0, NAN, INF)
    ),
    ({"residul": X}, "unexpected keyword argument 'residul'", TypeError),
    ({"epsilon": 1e-5}, "unexpected keyword argument 'epsilon'", TypeError),
    ({"activation": "relu"}, "unexpected keyword argument 'activation'", TypeError),
]


def of_rows(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are right but for these changes."""
    biased = {"bias": ONES.clone()} if name == "layer_norm" else {}
    weight = ONES.clone().requires_grad_()
    return {"input": X.clone(), "normalized_shape": (4,), "weight": weight, **biased, **changes}


@pytest.fixture(scope="module", autouse=True)
def _after_right_calls():
    """A wrong call must not be taken for one like these, which are not checked again."""
    triton_norm.layer_norm(X, (4,), ONES.clone().requires_grad_(), ONES)
    triton_norm.rms_norm(X, (4,), ONES.clone().requires_grad_())


@pytest.mark.parametrize(("changes", "words", "stated"), [*OF_ROWS, *FUSED_OF_ROWS, *ONLY_OF_LAYER_NORM], ids=named)
def test_layer_norm(changes, words, stated):
    check("layer_norm", of_rows("layer_norm", changes), words, stated)


@pytest.mark.parametrize(("changes", "words", "stated"), [*OF_ROWS, *FUSED_OF_ROWS, *ONLY_OF_RMS_NORM], ids=named)
def test_rms_norm(changes, words, stated):
    check("rms_norm", of_rows("rms_norm", changes), words, stated)


@pytest.mark.parametrize(
    "make",
    [
        lambda norms: norms.LayerNorm(-1),
        lambda norms: norms.LayerNorm(4.0),
        lambda norms: norms.LayerNorm(None),
        lambda norms: norms.LayerNorm(4, dtype=torch.int64),
        lambda norms: norms.LayerNorm(4, epsilon=1.0),
        lambda norms: norms.LayerNorm(4, device="nowhere"),
        lambda norms: norms.LayerNorm(4)(),
        lambda norms: norms.LayerNorm(4)(X, X),
        lambda norms: norms.LayerNorm(4)(X, residul=X),
        lambda norms: norms.LayerNorm(4)(X, weight=ONES),
        lambda norms: norms.LayerNorm(())(X),
        lambda norms: norms.RMSNorm(5)(X),
        lambda norms: norms.RMSNorm(4)(torch.tensor(1.0)),
        lambda norms: norms.RMSNorm(4, bias=True),
        lambda norms: norms.BatchNorm1d(-3),
        lambda norms: norms.BatchNorm1d("3"),
        lambda norms: norms.BatchNorm1d(3, dtype=torch.int64),
        lambda norms: norms.BatchNorm2d(3, momentun=0.1),
        lambda norms: norms.BatchNorm1d(3).train(None),
        lambda norms: norms.BatchNorm1d(3).load_state_dict(norms.BatchNorm1d(4).state_dict()),
    ],
)
def test_constructors_and_rows_as_torchs(make):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        make(nn)
    with refused(theirs.type, None, X):
        make(triton_norm)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.layer_norm(),
        lambda f: f.layer_norm(X),
        lambda f: f.layer_norm(X, (4,), None, None, 1e-5, False, X),
        lambda f: f.layer_norm(X, (4,), weight=None, normalized_shape=(4,)),
        lambda f: f.rms_norm(X, (4,), None, 1e-5, X),
        lambda f: f.batch_norm(X),
        lambda f: f.batch_norm(X, None, None, None, None, True, 0.1, 1e-5, None),
        lambda f: f.group_norm(X),
        lambda f: f.group_norm(X, 3, None, None, 1e-5, None),
        lambda f: f.instance_norm(),
        lambda f: f.instance_norm(X, None, None, None, None, True, 0.1, 1e-5, None),
    ],
)
def test_too_many_arguments_and_too_few(call):
    for functions in (F, triton_norm):
        with refused(TypeError, "argument", X):
            call(functions)


COMPILED = [
    (lambda x, w: triton_norm.layer_norm(x, (5,), w), r"normalized_shape=\[5\].*\[2, 3, 4\]"),
    (lambda x, w: triton_norm.rms_norm(x, (4,), w[:3]), r"weight of shape \[3\] and normalized_shape=\[4\]"),
    (lambda x, w: triton_norm.rms_norm(x, (4,), w, residual=x[0]), r"residual of shape \[3, 4\].*\[2, 3, 4\]"),
    (lambda x, w: triton_norm.batch_norm(x, w, w), r"running_mean should contain 3 elements.*\[4\]"),
    (
        lambda x, w: triton_norm.batch_norm(x, None, None, training=True, activation="new"),
        "activation must be one of",
    ),
]


@pytest.mark.parametrize(("call", "words"), COMPILED)
def test_compiled(call, words):
    x, weight = X.clone(), ONES.clone()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with refused(Exception, words, x, weight):
        compiled(x, weight)


@pytest.mark.parametrize(
    "dy",
    [torch.ones(2, 3, 3), torch.ones(4), X.to("meta"), X.to_sparse(), X + 0j, [1.0], X.numpy(), None],
)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
def test_gradients(name, dy):
    """The engine keeps most of them from us."""
    errors = []
    for norms in (nn, triton_norm):
        module, x = getattr(norms, name)(3 if name == "BatchNorm1d" else 4), X.clone().requires_grad_()
        y = module(x)
        with refused(errors[0] if errors else Exception, None, module, x, y.detach()) as error:
            y.backward(dy)
        errors.append(RuntimeError if issubclass(error.type, RuntimeError) else error.type)


RIGHT = [
    *({"eps": eps} for eps in (0.5, 1, True, NAN, INF, np.float32(0.5), torch.tensor(0.5), torch.tensor(1))),
    {"input": X.mT.contiguous().mT},
    {"input": X[:1, :1].expand(2, 3, 4)},
    {"input": nn.Parameter(X)},
    {"input": torch.complex(X, X).conj().imag},
    {"input": torch.ones(2, 0, 4)},
    {"input": torch.ones(0, 4)},
    {"input": X.as_subclass(type("Tagged", (Tensor,), {}))},
    {"weight": torch.ones(8)[::2]},
    {"weight": torch.ones(1).expand(4)},
    {"weight": torch.complex(ONES, ONES).conj().imag},
    {"weight": None},
    *({"normalized_shape": shape} for shape in ([4], torch.Size([4]), (np.int64(4),), (torch.tensor(4),))),
    {"eps": -1.0},
    {"eps": 0.0},
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of eps below 0, from the interpreter
@pytest.mark.parametrize("changes", RIGHT, ids=named)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_what_torch_takes_is_taken(name, changes):
    arguments = of_rows(name, changes)
    expected = getattr(F, name)(**arguments)
    for backend in ("auto", "torch"):
        with triton_norm.backend(backend):
            actual = getattr(triton_norm, name)(**arguments)
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_complex_and_nested_input_as_torch():
    x, weight = torch.complex(X, X + 1), ONES + 1
    for parameter in (weight, weight.to(x.dtype)):
        torch.testing.assert_close(triton_norm.rms_norm(x, (4,), parameter), F.rms_norm(x, (4,), parameter))
    for ragged in (NESTED, JAGGED):
        actual, expected = (f.layer_norm(ragged, (4,), weight, ONES).unbind() for f in (triton_norm, F))
        torch.testing.assert_close(actual, expected)


def test_a_number_in_a_tensor_is_read_each_time():
    eps, offset = torch.tensor(0.5), torch.tensor(1.0)
    for value in (0.5, 8.0):
        eps.fill_(value), offset.fill_(value)
        result = triton_norm.layer_norm(X, (4,), ONES, None, eps, weight_offset=offset)
        torch.testing.assert_close(result, F.layer_norm(X, (4,), ONES + value, None, value))


CONV, NORM, LINEAR = nn.Conv2d(3, 6, 1).eval(), triton_norm.BatchNorm2d(6).eval(), nn.Linear(3, 6).eval()
NET = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(3))
PARAMETRIZED = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 1)).eval()


def altered(**attributes: Any) -> nn.Module:
    norm = copy.deepcopy(NORM)
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


OTHERS = [
    (lambda tn: tn.fold_batch_norm(None, NORM), TypeError, "'layer' must be a convolution or Linear, not NoneType"),
    (lambda tn: tn.fold_batch_norm(nn.Conv2d, NORM), TypeError, "'layer' must be a convolution or Linear, not type"),
    (lambda tn: tn.fold_batch_norm(NORM, CONV), TypeError, "'batch_norm' must be BatchNorm, not Conv2d"),
    (lambda tn: tn.fold_batch_norm(CONV, NORM, transpose=True), TypeError, "'transpose'"),
    (lambda tn: tn.fold_batch_norm(PARAMETRIZED, NORM), RuntimeError, "layer is parametrized"),
    (lambda tn: tn.fold_batch_norm(nn.LazyConv2d(6, 1).eval(), NORM), RuntimeError, "must have their parameters"),
    (lambda tn: tn.fold_batch_norm(CONV, nn.LazyBatchNorm2d().eval()), RuntimeError, "must have their parameters"),
    (
        lambda tn: tn.fold_batch_norm(CONV, altered().to("meta")),
        RuntimeError,
        "cpu and batch_norm.running_mean is on met",
    ),
    (lambda tn: tn.fold_batch_norm(LINEAR, altered(num_features=7)), RuntimeError, "7 features"),
    (lambda tn: tn.fold_batch_norm(CONV, altered(running_mean=None)), RuntimeError, "no running statistics"),
    (lambda tn: tn.fold_batch_norm(CONV, altered(running_var=torch.ones(5))), RuntimeError, r"running_var.*6.*\[5\]"),
    (lambda tn: tn.fold_batch_norm(CONV, altered(bias=nn.Parameter(ONES))), RuntimeError, r"bias.*6.*\[4\]"),
    (lambda tn: tn.convert(), TypeError, "'model'"),
    (
        lambda tn: tn.convert(nn.LayerNorm),
        TypeError,
        r"convert\(\): argument 'model' must be torch.nn.Module, not type",
    ),
    (lambda tn: tn.convert(X), TypeError, "'model' must be torch.nn.Module, not Tensor"),
    (lambda tn: tn.revert(None), TypeError, r"revert\(\): argument 'model' must be torch.nn.Module, not NoneType"),
    (lambda tn: tn.revert(NET, "0"), TypeError, "positional argument"),
    (lambda tn: tn.convert(NET, inclde="0"), TypeError, "'inclde'"),
    (lambda tn: tn.convert(NET, include="2"), ValueError, "no module named '2'"),
    (lambda tn: tn.convert(NET, include=NET[0]), TypeError, "'include' must hold names and classes"),
    (lambda tn: tn.convert(NET, include=[["0"]]), TypeError, "'include' must hold names and classes"),
    (lambda tn: tn.convert(NET, include=b"0"), TypeError, "'include' must hold names and classes"),
    (lambda tn: tn.convert(NET, exclude=None), TypeError, "'exclude' must hold names and classes"),
    (lambda tn: tn.convert(NET, exclude=object), TypeError, "'exclude' must hold names and classes"),
    (lambda tn: tn.convert(NET, sync_batch_norm="no"), TypeError, "'sync_batch_norm' must be bool, not str"),
    (lambda tn: tn.convert(NET, sync_batch_norm=None), TypeError, "'sync_batch_norm' must be bool, not NoneType"),
    (lambda tn: tn.convert(NET, sync_batch_norm=True, process_group="all"), TypeError, "'process_group' must be"),
    (lambda tn: tn.SyncBatchNorm.convert_sync_batchnorm(X), TypeError, "'module' must be torch.nn.Module, not Tensor"),
    (lambda tn: tn.explain(), TypeError, "'target'"),
    (lambda tn: tn.explain(F.layer_norm, X, (4,)), TypeError, "expected a function or module of triton_norm"),
    (lambda tn: tn.explain(tn.LayerNorm, X), TypeError, "expected a function or module of triton_norm"),
    (lambda tn: tn.explain(tn.backend, "auto"), TypeError, "expected a function or module of triton_norm"),
    (lambda tn: tn.explain(NET, X), TypeError, "expected a function or module of triton_norm"),
    (lambda tn: tn.explain(tn.layer_norm), TypeError, r"layer_norm\(\): missing.*'input'"),
    (lambda tn: tn.explain(tn.rms_norm, X, (4,), None, None, X), TypeError, r"rms_norm\(\): too many"),
    (lambda tn: tn.explain(tn.LayerNorm(4)), TypeError, "'input'"),
    *(
        (
            lambda tn, name=name: tn.backend(name).__enter__(),
            ValueError,
            "backend must be one of 'auto', 'triton', 'torch'",
        )
        for name in ("Triton", "", None, 0, ["auto"], b"auto", torch.tensor(1), np.array(["auto", "torch"]))
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), OTHERS)
def test_what_is_not_a_norm(call, error, words):
    with refused(error, words, CONV, NORM, LINEAR, NET, PARAMETRIZED, X):
        call(triton_norm)
    assert [type(module) for module in NET] == [nn.LayerNorm, nn.BatchNorm1d]
