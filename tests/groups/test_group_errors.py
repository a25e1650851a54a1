"""Wrong calls of group_norm, instance_norm and their layers: torch's exception types, and nothing launched or moved."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import triton_norm
from support.wrong_calls import (
    BACKENDS,
    COMPLEX32,
    FLOAT8,
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
OF_CHANNELS = {
    name: [
        *(({name: make(3)}, f"'{name}' must be Tensor, not {kind}", None) for make, kind in NO_TENSORS),
        ({name: torch.ones(4)}, rf"{name} should contain 3 elements.*\[2, 3, 4\].*{name} of shape \[4\]", None),
        ({name: torch.ones(3, 1)}, rf"{name} should contain 3 elements.*{name} of shape \[3, 1\]", None),
        ({name: torch.tensor(1.0)}, rf"{name} should contain 3 elements.*{name} of shape \[\]", RuntimeError),
        ({name: torch.ones(3, device="meta")}, f"input is on cpu and {name} is on meta", None),
        ({name: ONES.long()}, rf"{name}.*torch\.int64", NotImplementedError),  # torch's instance_norm takes statistics
        ({name: ONES.to(torch.complex64)}, rf"{name}.*torch\.complex64", NotImplementedError),
        ({name: ONES.to(FLOAT8)}, rf"{name}.*torch\.float8_e4m3fn", NotImplementedError),
        ({name: QUANTIZED[0, :, 0]}, rf"{name}.*torch\.quint8", NotImplementedError),
        ({name: ONES.to_sparse()}, rf"{name} of layout torch\.sparse_coo", None),
        ({name: ONES.to_mkldnn()}, rf"{name} of layout torch\._mkldnn", None),
        ({name: NESTED}, f"nested {name}", None),
        ({name: JAGGED}, f"nested {name}", NotImplementedError),
    ]
    for name in ("weight", "bias", "running_mean", "running_var")
}
BOTH = [
    *(({"input": make(3)}, f"'input' must be Tensor, not {kind}", TypeError) for make, kind in NO_TENSORS),
    ({"input": None}, "'input' must be Tensor, not NoneType", TypeError),
    ({"input": X.to_sparse()}, r"input of layout torch\.sparse_coo", None),
    ({"input": X.to_mkldnn()}, r"input of layout torch\._mkldnn", None),
    ({"input": NESTED}, "nested input", None),
    ({"input": JAGGED}, "nested input", NotImplementedError),
    *(
        ({"input": X.to(dtype)}, rf"input of {dtype}", NotImplementedError)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, FLOAT8)
    ),
    ({"input": COMPLEX32}, r"input of torch\.complex32", None),
    ({"input": QUANTIZED}, r"input of torch\.quint8", None),
    ({"input": X.to("meta")}, "input is on meta and (weight|running_mean) is on cpu", None),
    *OF_CHANNELS["weight"],
    *OF_CHANNELS["bias"],
    *(({"eps": eps}, f"'eps'.*{words}", None) for eps, words in NO_NUMBERS),
    ({"eps": None}, "'eps' must be float, not NoneType", None),
    *RESIDUALS,
    *(({"activation": name}, rf"_norm\(\): activation must be one of.*{name!r}", ValueError) for name in ("tanh", "")),
    *(
        ({"activation": activation}, "'activation' must be str or None, not", TypeError)
        for activation in (3, True, F.relu, nn.ReLU(), ["relu"], b"relu", torch.tensor(1))
    ),
    ({"negative_slope": None}, "'negative_slope' must be float, not NoneType", TypeError),
    ({"residul": X}, "unexpected keyword argument 'residul'", TypeError),
    ({"out_dtype": torch.float32}, "unexpected keyword argument 'out_dtype'", TypeError),
]

GROUP_NORM = [
    *(({"input": torch.ones(shape)}, r"at least 2 dimensions", None) for shape in ((), (3,))),
    *(
        ({"input": torch.ones(shape)}, "Expected more than 1 value per channel", None)
        for shape in ((1, 3), (1, 3, 1), (1, 3, 1, 1))
    ),
    ({"input": torch.ones(2, 4, 4)}, r"divisible by num_groups=3.*\[2, 4, 4\]", None),
    ({"num_groups": 2}, r"divisible by num_groups=2.*\[2, 3, 4\]", None),
    ({"num_groups": 6}, r"divisible by num_groups=6.*\[2, 3, 4\]", None),
    ({"num_groups": 2**70}, "divisible by num_groups=", RuntimeError),
    ({"num_groups": 0}, "num_groups must be greater than 0, but got 0", None),
    ({"num_groups": -1}, "num_groups must be greater than 0, but got -1", None),
    ({"num_groups": -3}, "num_groups must be greater than 0, but got -3", None),
    *(
        ({"num_groups": number}, f"'num_groups' must be int, not {type(number).__name__}", TypeError)
        for number in (3.0, None, "3", True, [3], torch.tensor(3.0), torch.tensor([3]), np.float32(3), np.array([3]))
    ),
]

INSTANCE_NORM = [
    *OF_CHANNELS["running_mean"],
    *OF_CHANNELS["running_var"],
    *(
        ({"use_input_stats": value}, f"'use_input_stats' must be bool, not {type(value).__name__}", None)
        for value in (None, 0, 1, 1.5, "yes", torch.tensor(True), np.True_)
    ),
    *(({"momentum": momentum}, f"'momentum'.*{words}", None) for momentum, words in NO_NUMBERS),
    ({"momentum": None}, "'momentum' must be float, not NoneType", None),
    ({"running_mean": None}, "running_mean and running_var must", None),
    ({"running_var": None}, "running_mean and running_var must", None),
]
ONLY_WITH_INPUT_STATISTICS = [
    *(
        ({"input": torch.ones(shape)}, "Expected more than 1 spatial element when training, got input size", None)
        for shape in ((), (3,), (2, 3), (2, 3, 1), (2, 3, 1, 1), (0, 3))
    ),
    # torch's makes NaN of the statistics.
    *(({"momentum": value}, r"momentum must not be nan.*\[3\]", ValueError) for value in (NAN, torch.tensor(NAN))),
    ({"running_mean": torch.zeros(1).expand(3)}, r"running_mean share memory.*\[3\]", RuntimeError),
    ({"running_var": torch.ones(1).expand(3)}, r"running_var share memory.*\[3\]", RuntimeError),
]
ONLY_WITH_RUNNING_STATISTICS = [
    ({"input": torch.ones(3)}, r"at least 2 dimensions.*\[3\]", None),
    ({"input": torch.tensor(1.0)}, r"at least 2 dimensions.*\[\]", None),
    ({"running_mean": None, "running_var": None}, "must be defined without use_input_stats", None),
    *(({"eps": eps}, "eps must be non-negative", ValueError) for eps in (-1.0, torch.tensor(-1.0))),  # as batch_norm's
]


def of_group_norm(changes: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments that are right but for these changes."""
    weight = ONES.clone().requires_grad_()
    return {"input": X.clone(), "num_groups": 3, "weight": weight, "bias": ONES.clone(), **changes}


def of_instance_norm(uses_input: bool, changes: dict[str, Any]) -> dict[str, Any]:
    right = of_group_norm({})
    del right["num_groups"]
    running = {"running_mean": torch.zeros(3), "running_var": ONES.clone()}
    return {**right, **running, "use_input_stats": uses_input, **changes}


@pytest.fixture(scope="module", autouse=True)
def _after_right_calls():
    """A wrong call must not be taken for one like these, which are not checked again."""
    triton_norm.group_norm(**of_group_norm({}))
    for uses_input in (True, False):
        triton_norm.instance_norm(**of_instance_norm(uses_input, {}))


@pytest.mark.parametrize(("changes", "words", "stated"), [*BOTH, *GROUP_NORM], ids=named)
def test_group_norm(changes, words, stated):
    check("group_norm", of_group_norm(changes), words, stated)


@pytest.mark.parametrize(("changes", "words", "stated"), [*BOTH, *INSTANCE_NORM], ids=named)
def test_instance_norm(changes, words, stated):
    for uses_input in (True, False):
        check("instance_norm", of_instance_norm(uses_input, changes), words, stated)


@pytest.mark.parametrize(
    ("uses_input", "changes", "words", "stated"),
    [
        (uses_input, *case)
        for uses_input, cases in ((True, ONLY_WITH_INPUT_STATISTICS), (False, ONLY_WITH_RUNNING_STATISTICS))
        for case in cases
    ],
    ids=named,
)
def test_instance_norm_in_one_mode(uses_input, changes, words, stated):
    check("instance_norm", of_instance_norm(uses_input, changes), words, stated)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("uses_input", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_have_no_gradient(name, uses_input, backend):
    arguments = of_instance_norm(uses_input, {name: ONES.clone().requires_grad_()})
    with pytest.raises(RuntimeError, match=f"not differentiable with respect to .*{name}"):
        F.instance_norm(**arguments)
    words = rf"instance_norm\(\): not differentiable with respect to {name}"
    with triton_norm.backend(backend), refused(RuntimeError, words, *arguments.values()):
        triton_norm.instance_norm(**arguments)


@pytest.mark.parametrize("eps", [-1.0, 0.0, 1, True, NAN, torch.tensor(0.5)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of eps below 0, from the interpreter
def test_eps_is_any_number(eps, backend):
    x = torch.randn(2, 3, 4)
    with triton_norm.backend(backend):
        result = triton_norm.group_norm(x, 3, eps=eps), triton_norm.instance_norm(x, eps=eps)
    torch.testing.assert_close(result, (F.group_norm(x, 3, eps=eps), F.instance_norm(x, eps=eps)), equal_nan=True)


@pytest.mark.parametrize("number", [3, np.int64(3), torch.tensor(3)])
def test_integers_of_other_types(number):
    torch.testing.assert_close(triton_norm.group_norm(X, number), F.group_norm(X, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda norms: norms.GroupNorm(0, 6),
        lambda norms: norms.GroupNorm(4, 6),
        lambda norms: norms.GroupNorm(3.0, 6)(torch.ones(2, 6, 3)),
        lambda norms: norms.GroupNorm(-3, 6)(torch.ones(2, 6, 3)),
        lambda norms: norms.GroupNorm(3, 6)(torch.ones(2, 3, 3)),
        lambda norms: norms.GroupNorm(3, 6)(torch.ones(6)),
        lambda norms: norms.GroupNorm(3, 6, eps="1")(torch.ones(2, 6, 3)),
        lambda norms: norms.GroupNorm(3, 6)(torch.ones(2, 6, 3), residul=X),
        lambda norms: norms.GroupNorm(3, 6)(),
        lambda norms: norms.GroupNorm(3),
        lambda norms: norms.GroupNorm(3, 6).load_state_dict(norms.GroupNorm(1, 3).state_dict()),
        lambda norms: norms.InstanceNorm1d("3", affine=True),
        lambda norms: norms.InstanceNorm1d(3, momentun=0.1),
        lambda norms: norms.InstanceNorm1d(3)(X[0, 0]),
        lambda norms: norms.InstanceNorm1d(3)(X[None]),
        lambda norms: norms.InstanceNorm2d(3)(X[..., :1, None]),
        lambda norms: norms.InstanceNorm1d(3)(X[..., :1]),
        lambda norms: norms.InstanceNorm1d(3, momentum="0.1", track_running_stats=True)(X),
        lambda norms: norms.InstanceNorm1d(3)(X, X),
        lambda norms: norms.InstanceNorm1d(3)(X, weight=ONES),
        lambda norms: norms.InstanceNorm1d(3).train(None),
    ],
)
def test_layers_as_torchs(make):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        make(nn)
    with refused(theirs.type, None, X):
        make(triton_norm)


@pytest.mark.parametrize("module", ["GroupNorm", "InstanceNorm1d"])
@pytest.mark.parametrize(
    ("fused", "error", "words"),
    [
        ({"residual": [1.0]}, TypeError, "'residual' must be Tensor, not list"),
        ({"residual": X[:, :2]}, RuntimeError, "residual of shape"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"activation": 3}, TypeError, "'activation' must be str or None, not int"),
    ],
)
def test_a_wrong_call_of_a_layer_moves_nothing(fused, error, words, module):
    options = {"track_running_stats": True} if module == "InstanceNorm1d" else {"num_channels": 3}
    made = getattr(triton_norm, module)(3, **options)
    inputs = (X, X[0]) if module == "InstanceNorm1d" else (X,)
    for backend in BACKENDS:
        for x in inputs:
            with triton_norm.backend(backend), refused(error, words, made, x):
                made(x, **fused)
            with triton_norm.backend(backend), refused(error, words, made, x):
                triton_norm.explain(made, x, **fused)
