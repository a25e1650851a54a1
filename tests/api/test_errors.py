"""Wrong calls of batch_norm and of BatchNorm's modules, alone and in a group, and calls that only look wrong."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import triton_norm
from support.wrong_calls import (
    BACKENDS,
    COMPLEX32,
    CSR,
    FLOAT8,
    INF,
    INPUTS,
    JAGGED,
    NAN,
    NESTED,
    NO_NUMBERS,
    NO_TENSORS,
    QUANTIZED,
    RESIDUALS,
    X,
    check,
    named,
    refused,
)

pytestmark = pytest.mark.unguarded
ONES = torch.ones(3)

OF_CHANNELS = [
    case
    for name in ("weight", "bias", "running_mean", "running_var")
    for case in (
        *(({name: make(3)}, f"'{name}' must be Tensor, not {kind}", None) for make, kind in NO_TENSORS),
        ({name: torch.ones(4)}, rf"{name} should contain 3 elements.*\[2, 3, 4\].*{name} of shape \[4\]", None),
        ({name: torch.ones(1)}, rf"{name} should contain 3 elements.*\[2, 3, 4\].*{name} of shape \[1\]", None),
        ({name: torch.tensor(1.0)}, rf"{name} should contain 3 elements.*\[2, 3, 4\].*{name} of shape \[\]", None),
        ({name: torch.ones(0)}, rf"{name} should contain 3 elements.*\[2, 3, 4\].*{name} of shape \[0\]", None),
        ({name: torch.ones(3, device="meta")}, f"input is on cpu and {name} is on meta", None),
        ({name: ONES.long()}, rf"{name}.*torch\.int64", None),
        ({name: ONES.bool()}, rf"{name}.*torch\.bool", None),
        ({name: ONES.to(torch.complex64)}, rf"{name}.*torch\.complex64", None),
        ({name: ONES.to(FLOAT8)}, rf"{name}.*torch\.float8_e4m3fn", None),
        ({name: QUANTIZED[0, :, 0]}, rf"{name}.*torch\.quint8", None),
        ({name: ONES.to_sparse()}, rf"{name} of layout torch\.sparse_coo", None),
        ({name: ONES.to_mkldnn()}, rf"{name} of layout torch\._mkldnn", None),
        ({name: NESTED}, f"nested {name}", None),
        ({name: JAGGED}, f"nested {name}", None),
    )
]

BATCH_NORM = [
    # In training torch's asks for the size before it asks what it is given.
    *(({"input": make(3)}, f"'input' must be Tensor, not {kind}", TypeError) for make, kind in NO_TENSORS),
    ({"input": None}, "'input' must be Tensor, not NoneType", TypeError),
    *(({"input": x}, words, None) for x, words in INPUTS if x is not CSR),
    ({"input": CSR}, r"input of layout torch\.sparse_csr", NotImplementedError),
    ({"input": X.to(torch.complex64)}, r"input of torch\.complex64", None),
    ({"input": COMPLEX32}, r"input of torch\.complex32", None),
    ({"input": NESTED}, "nested input", None),
    ({"input": JAGGED}, "nested input", None),
    ({"input": X.to_mkldnn(), "activation": "relu"}, r"input of layout torch\._mkldnn", NotImplementedError),
    ({"input": X.to_mkldnn(), "residual": X}, r"input of layout torch\._mkldnn", NotImplementedError),
    ({"input": torch.tensor(1.0)}, r"at least 2 dimensions.*\[\]", RuntimeError),  # torch's: IndexError in training
    ({"input": torch.ones(3)}, r"at least 2 dimensions.*\[3\]", None),
    ({"input": torch.ones(2, 4)}, r"running_mean.*4 elements.*\[2, 4\].*\[3\]", None),
    ({"input": torch.ones(4, 0, 2)}, r"running_mean.*0 elements.*\[4, 0, 2\].*\[3\]", RuntimeError),  # torch's: ignored
    *OF_CHANNELS,
    ({"running_mean": torch.ones(3, 1)}, r"running_mean must have one dimension.*\[3, 1\]", None),
    ({"running_var": torch.ones(1, 3)}, r"running_var must have one dimension.*\[1, 3\]", None),
    ({"running_mean": None}, "running_mean and running_var must", None),
    ({"running_var": None}, "running_mean and running_var must", None),
    *(({"eps": eps}, f"'eps'.*{words}", None) for eps, words in NO_NUMBERS),
    ({"eps": None}, "'eps' must be float, not NoneType", None),
    *(({"eps": eps}, "batch_norm eps must be", None) for eps in (-1.0, -1, -1e-30, -INF, torch.tensor(-1.0))),
    *(({"momentum": momentum}, f"'momentum'.*{words}", None) for momentum, words in NO_NUMBERS),
    ({"momentum": None}, "'momentum' must be float, not NoneType", None),
    *(
        ({"training": training}, f"'training' must be bool, not {type(training).__name__}", None)
        for training in (None, 0, 1, 1.5, "yes", "", [], torch.tensor(True), np.True_)
    ),
    ({"training": torch.ones(2)}, "'training' must be bool, not Tensor", TypeError),
    *RESIDUALS,
    *(({"activation": name}, f"activation must be one of.*{name!r}", ValueError) for name in ("new", "ReLU", "")),
    *(
        ({"activation": activation}, "'activation' must be str or None, not", TypeError)
        for activation in (3, True, F.relu, nn.ReLU(), nn.ReLU, ["relu"], b"relu", torch.tensor(1))
    ),
    *(
        ({"activation": "leaky_relu", "negative_slope": slope}, f"'negative_slope'.*{words}", error)
        for (slope, words), error in zip(NO_NUMBERS, [TypeError] * 8 + [OverflowError, RuntimeError], strict=True)
    ),
    ({"negative_slope": None}, "'negative_slope' must be float, not NoneType", TypeError),
    *(
        ({"num_batches_tracked": counter}, rf"num_batches_tracked must be one real number.*torch\.{kind}", RuntimeError)
        for counter, kind in (
            (torch.tensor(False), "bool"),
            (torch.tensor(0j), "complex64"),
            (torch.zeros(2, dtype=torch.int64), "int64"),
            (torch.zeros(0, dtype=torch.int64), "int64"),
        )
    ),
    ({"num_batches_tracked": 0}, "'num_batches_tracked' must be Tensor, not int", TypeError),
    ({"num_batches_tracked": np.array(0)}, "'num_batches_tracked' must be Tensor, not ndarray", TypeError),
    ({"num_batches_tracked": torch.tensor(0, device="meta")}, "num_batches_tracked is on meta", RuntimeError),
    ({"num_batches_tracked": torch.zeros(1).long().to_sparse()}, "num_batches_tracked of layout", NotImplementedError),
    ({"num_batches_tracked": NESTED}, "nested num_batches_tracked", NotImplementedError),
    ({"residul": X}, "unexpected keyword argument 'residul'", TypeError),
    ({"out_dtype": torch.float32}, "unexpected keyword argument 'out_dtype'", TypeError),
]

ONLY_IN_TRAINING = [
    *(
        ({"input": torch.ones(shape)}, r"more than 1 value per channel.*\[1, 3", None)
        for shape in ((1, 3), (1, 3, 1, 1))
    ),
    ({"eps": 0.0}, "eps must be positive", None),
    # torch's makes NaN of the statistics.
    *(
        ({"momentum": momentum}, r"momentum must not be nan.*\[3\]", ValueError)
        for momentum in (NAN, torch.tensor(NAN))
    ),
    # torch's moves the one element of these three times.
    ({"running_mean": torch.zeros(1).expand(3)}, r"running_mean share memory.*\[3\]", RuntimeError),
    ({"running_var": torch.ones(1).expand(3)}, r"running_var share memory.*\[3\]", RuntimeError),
]

ONLY_IN_EVALUATION = [({"running_mean": None, "running_var": None}, "must be defined in evaluation mode", None)]


def of_batch_norm(training: bool, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are right but for these changes."""
    right = {"input": X.clone(), "running_mean": torch.zeros(3), "running_var": ONES.clone(), "training": training}
    return {**right, "weight": ONES.clone().requires_grad_(), "bias": ONES.clone(), **changes}


@pytest.fixture(scope="module", autouse=True)
def _after_right_calls():
    """A wrong call must not be taken for one like these, which are not checked again."""
    for training in (True, False):
        triton_norm.batch_norm(**of_batch_norm(training, {}))
        triton_norm.batch_norm(**of_batch_norm(training, {"num_batches_tracked": torch.tensor(0)}))


@pytest.mark.parametrize(("changes", "words", "stated"), BATCH_NORM, ids=named)
def test_batch_norm(changes, words, stated):
    for training in (True, False):
        check("batch_norm", of_batch_norm(training, changes), words, stated)


@pytest.mark.parametrize(
    ("training", "changes", "words", "stated"),
    [(mode, *case) for mode, cases in ((True, ONLY_IN_TRAINING), (False, ONLY_IN_EVALUATION)) for case in cases],
    ids=named,
)
def test_batch_norm_in_one_mode(training, changes, words, stated):
    check("batch_norm", of_batch_norm(training, changes), words, stated)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_have_no_gradient(name, training, backend):
    arguments = of_batch_norm(training, {name: ONES.clone().requires_grad_()})
    words = f"not differentiable with respect to .*{name}"
    with pytest.raises(RuntimeError, match=words):
        F.batch_norm(**arguments)
    with triton_norm.backend(backend), refused(RuntimeError, words, *arguments.values()):
        triton_norm.batch_norm(**arguments)


SHAPES = {
    "BatchNorm1d": (2, 3, 4),
    "BatchNorm2d": (2, 3, 2, 2),
    "BatchNorm3d": (2, 3, 1, 2, 2),
    "SyncBatchNorm": (2, 3),
}
MODULES = [
    ({}, lambda x: [1.0], {}, None),
    ({}, lambda x: None, {}, None),
    ({}, lambda x: x.numpy(), {}, None),
    ({}, lambda x: x.reshape(-1), {}, "D input"),
    ({}, lambda x: x.long(), {}, "torch.int64"),
    ({}, lambda x: x.to(FLOAT8), {}, "float8"),
    ({}, lambda x: x + 0j, {}, "complex64"),
    ({}, lambda x: x.to_sparse(), {}, "layout torch.sparse_coo"),
    ({}, lambda x: x.to("meta"), {}, "input is on meta and running_mean is on cpu"),
    ({}, lambda x: x[:, :2], {}, r"running_mean should contain 2 elements.*\[3\]"),
    ({"track_running_stats": False}, lambda x: x[:, :2], {}, r"weight should contain 2 elements.*\[3\]"),
    ({"device": "meta"}, lambda x: x, {}, "input is on cpu and running_mean is on meta"),
    ({"momentum": "0.1"}, lambda x: x, {}, "'momentum' must be float, not str"),
    ({"momentum": torch.ones(2)}, lambda x: x, {}, "'momentum' must be float, not Tensor"),
    ({"eps": "1e-5"}, lambda x: x, {}, "'eps' must be float, not str"),
    ({"eps": None}, lambda x: x, {}, "'eps' must be float, not NoneType"),
    ({"eps": -1.0}, lambda x: x, {}, "eps must be"),
    *(
        ({}, lambda x: x, {name: value}, f"'{name}'")
        for name, value in (("training", False), ("eps", 1.0), ("weight", None), ("running_mean", None), ("residul", X))
    ),
]


@pytest.mark.parametrize(("options", "make", "named_arguments", "words"), MODULES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_modules(name, training, options, make, named_arguments, words):
    """torch's own has counted the batch by then."""
    theirs, ours = (getattr(norms, name)(3, **options).train(training) for norms in (nn, triton_norm))
    x = make(torch.ones(SHAPES[name]))
    with pytest.raises(Exception) as error:  # noqa: PT011
        theirs(x, **named_arguments)
    for backend in BACKENDS:
        with triton_norm.backend(backend), refused(error.type, words, ours, x):
            ours(x, **named_arguments)
        with triton_norm.backend(backend), refused(error.type, words, ours, x):
            triton_norm.explain(ours, x, **named_arguments)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("name", "shape"), [("BatchNorm1d", (1, 3)), ("BatchNorm2d", (1, 3, 1, 1)), ("BatchNorm1d", ())]
)
def test_a_module_that_rejects_a_batch_has_not_counted_it(name, shape, momentum):
    ours = getattr(triton_norm, name)(3, momentum=momentum)
    with refused(ValueError, "more than 1 value per channel|expected 2D or 3D input", ours):
        ours(torch.ones(shape))


def test_what_torch_itself_refuses_is_not_counted_either():
    """MKL-DNN's layout, of which torch's batch_norm takes four dimensions and five."""
    ours = triton_norm.SyncBatchNorm(3)
    with refused(RuntimeError, "mkldnn", ours):
        ours(X.to_mkldnn())


@pytest.fixture(scope="module")
def group():
    """Makes a group of two processes, one of which exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.new_group([0, 1])
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "x", "named_arguments", "error", "words"),
    [
        ({"process_group": "all"}, X, {}, TypeError, "'process_group' must be a ProcessGroup.*not str"),
        ({"process_group": 0}, X, {}, TypeError, "'process_group' must be a ProcessGroup.*not int"),
        ({"process_group": [0, 1]}, X, {}, TypeError, "'process_group' must be a ProcessGroup.*not list"),
        ({"process_group": dist.ProcessGroup}, X, {}, TypeError, "'process_group' must be a ProcessGroup"),
        ({"process_group": dist.ProcessGroup(0, 1)}, X, {}, RuntimeError, "'process_group' was destroyed"),
        ({}, torch.ones(3), {}, ValueError, "at least 2D input"),
        ({}, torch.ones(2, 5), {}, RuntimeError, r"running_mean should contain 5 elements.*\[3\]"),
        ({}, X.long(), {}, NotImplementedError, "torch.int64"),
        ({}, X.to_sparse(), {}, NotImplementedError, "layout torch.sparse_coo"),
        ({}, X.to("meta"), {}, RuntimeError, "input is on meta and running_mean is on cpu"),
        ({"eps": 0.0}, X, {}, ValueError, "eps must be positive"),
        ({"momentum": "0.1"}, X, {}, TypeError, "'momentum' must be float, not str"),
        ({}, X, {"residual": X[0]}, RuntimeError, r"residual of shape \[3, 4\] and input of size \[2, 3, 4\]"),
        ({}, X, {"activation": "new"}, ValueError, "activation must be one of"),
        ({}, X, {"training": False}, TypeError, "'training'"),
        ({}, X, {"group": None}, TypeError, "'group'"),
    ],
)
def test_sync_batch_norm_in_a_group(group, options, x, named_arguments, error, words):
    module = triton_norm.SyncBatchNorm(3, **{"process_group": group, **options})
    for backend in BACKENDS:
        with triton_norm.backend(backend), refused(error, words, module, x):
            module(x, **named_arguments)
        with triton_norm.backend(backend), refused(error, words, module, x):
            triton_norm.explain(module, x, **named_arguments)


def test_a_group_that_was_destroyed(group):
    gone = dist.new_group([0, 1])
    module = triton_norm.SyncBatchNorm(3, process_group=gone)
    dist.destroy_process_group(gone)
    with refused(RuntimeError, "'process_group' was destroyed", module):
        module(X)
    module.eval()(X)  # exchanges nothing


@pytest.mark.parametrize(
    "changes",
    [
        *({"momentum": momentum} for momentum in (-1.0, 2.0, INF, 1, True, np.float32(0.5), torch.tensor(0.5))),
        *({"eps": eps} for eps in (NAN, INF, 1, np.float32(0.5), torch.tensor(0.5), 10**30)),
        {"input": X.mT.contiguous().mT},
        {"input": X[:1].expand(2, 3, 4)},
        {"input": torch.complex(X, X).conj().imag},
        {"input": torch.ones(0, 3, 4)},
        {"weight": torch.ones(3, 1)},
        {"weight": torch.ones(1).expand(3)},
        {"weight": None, "bias": None},
        {"running_mean": torch.ones(6)[::2]},
    ],
    ids=named,
)
@pytest.mark.parametrize("training", [True, False])
def test_what_torch_takes_is_taken(changes, training):
    expected = of_batch_norm(training, changes)
    expected = {k: v.clone() if k.startswith("running") else v for k, v in expected.items()}
    y = F.batch_norm(**expected)
    for backend in ("auto", "torch"):
        arguments = of_batch_norm(training, changes)
        arguments = {k: v.clone() if k.startswith("running") else v for k, v in arguments.items()}
        with triton_norm.backend(backend):
            torch.testing.assert_close(triton_norm.batch_norm(**arguments), y, equal_nan=True)
        torch.testing.assert_close(arguments, expected, equal_nan=True)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_slope_that_is_no_float(backend):
    with triton_norm.backend(backend):
        y = triton_norm.batch_norm(X, None, None, training=True, activation="leaky_relu", negative_slope=10**30)
    assert y.isfinite().all()
