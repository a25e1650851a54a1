"""Wrong arguments of many kinds, and checks that a wrong call has launched and moved nothing."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from triton_norm import dispatch, launch

BACKENDS = ("auto", "torch", "triton")


def contents(value: Any) -> Any:
    """Returns the contents that must stay of a tensor, or of the tensors and the attributes of a module."""
    if isinstance(value, nn.Module):
        tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        return value.training, [*value.__dict__], {name: contents(tensor) for name, tensor in tensors.items()}
    if not isinstance(value, Tensor):
        return None
    saved = type(value), value.dtype, value.requires_grad, value._version, contents(value.grad)
    if value.layout != torch.strided or value.is_nested or value.is_quantized or value.device.type != "cpu":
        return saved
    dense = value.detach().clone(memory_format=torch.contiguous_format)
    return *saved, value.stride(), dense.reshape(-1).view(torch.uint8).tolist()


def surroundings() -> Any:
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    drawn = torch.get_rng_state().numpy().tobytes()
    return dispatch.override.name, dispatch._newest, modes, torch.get_default_dtype(), drawn


@contextmanager
def refused(error: type[Exception], words: str | None, *watched: Any) -> Iterator[pytest.ExceptionInfo]:
    """Asserts that `error` is raised, in these words, with nothing launched, and nothing `watched` changed."""

    def fail(*_: Any) -> None:
        raise AssertionError("launched")

    before = [contents(value) for value in watched], surroundings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launch, "__call__", fail)
        with pytest.raises(error, match=words) as raised:
            yield raised
    assert ([contents(value) for value in watched], surroundings()) == before


def torchs_error(function: Callable[..., Any], arguments: dict[str, Any]) -> type[Exception]:
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        function(**copies)
    return theirs.type


def check(name: str, arguments: dict[str, Any], words: str, stated: type[Exception] | None) -> None:
    """A call raises as torch's own or, where `stated`, otherwise: by each backend, with gradients and without, and
    explained."""
    function, theirs = getattr(triton_norm, name), getattr(F, name)
    error = stated or torchs_error(theirs, arguments)
    inputs = arguments.values()
    for backend in BACKENDS:
        for grad in (True, False):
            with torch.set_grad_enabled(grad), triton_norm.backend(backend), refused(error, words, *inputs):
                function(**arguments)
        with triton_norm.backend(backend), refused(error, words, *inputs):
            triton_norm.explain(function, **arguments)


def named(case: Any) -> str | None:
    return "-".join(case) if isinstance(case, dict) else None


X = torch.arange(24.0).reshape(2, 3, 4)
FLOAT8 = torch.float8_e4m3fn
ONES = torch.ones(4)
NAN, INF = float("nan"), float("inf")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, of what it may change yet
    CSR = X.reshape(6, 4).to_sparse_csr()
    NESTED = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)])
    JAGGED = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    COMPLEX32 = X.to(torch.complex32)
    QUANTIZED = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)

NO_TENSORS = [
    (lambda n: [1.0] * n, "list"),
    (lambda n: (1.0,) * n, "tuple"),
    (lambda n: np.ones(n, np.float32), "ndarray"),
    (lambda n: 1.0, "float"),
    (lambda n: True, "bool"),
    (lambda n: "ones", "str"),
    (lambda n: Tensor, "_TensorMeta"),
    (lambda n: nn.ReLU(), "ReLU"),
]

INPUTS = [
    (X.to_sparse(), r"input of layout torch\.sparse_coo"),
    (CSR, r"input of layout torch\.sparse_csr|running_mean"),
    (X.long(), r"input of torch\.int64"),
    (X.to(torch.uint8), r"input of torch\.uint8"),
    (X.bool(), r"input of torch\.bool"),
    (QUANTIZED, r"input of torch\.quint8"),
    (X.to(FLOAT8), r"input of torch\.float8_e4m3fn"),
    (X.to(torch.float8_e5m2), r"input of torch\.float8_e5m2"),
    (X.to("meta"), "input is on meta and (weight|running_mean) is on cpu"),
]

NO_NUMBERS = [
    ("1e-5", "must be float, not str"),
    (1j, "must be float, not complex"),
    ([1e-5], "must be float, not list"),
    (float, "must be float, not type"),
    (torch.ones(1), "must be float, not Tensor"),
    (torch.ones(()).requires_grad_(), "must be float, not Tensor"),
    (np.ones(1), "must be float, not ndarray"),
    (np.array(0.5), "must be float, not ndarray"),
    (10**400, "int too large to convert to float"),
    (torch.tensor(1.0, device="meta"), "meta tensors"),
]

RESIDUALS = [
    *(({"residual": make(4)}, f"'residual' must be Tensor, not {kind}", TypeError) for make, kind in NO_TENSORS),
    ({"residual": torch.ones(3, 4)}, r"residual of shape \[3, 4\] and input of size \[2, 3, 4\]", RuntimeError),
    ({"residual": torch.ones(2, 3, 1)}, r"residual of shape \[2, 3, 1\] and input of size \[2, 3, 4\]", RuntimeError),
    ({"residual": torch.tensor(1.0)}, r"residual of shape \[\] and input of size \[2, 3, 4\]", RuntimeError),
    ({"residual": X.to("meta")}, "input is on cpu and residual is on meta", RuntimeError),
    ({"residual": X.to_sparse()}, r"residual of layout torch\.sparse_coo", NotImplementedError),
    ({"residual": X.to_mkldnn()}, r"residual of layout torch\._mkldnn", NotImplementedError),
    ({"residual": NESTED}, "nested residual", NotImplementedError),
    ({"residual": JAGGED}, "nested residual", NotImplementedError),
    ({"residual": X.long()}, r"residual.*torch\.int64", NotImplementedError),
    ({"residual": X.to(FLOAT8)}, r"residual.*torch\.float8_e4m3fn", NotImplementedError),
    ({"residual": X.to(torch.complex64)}, r"residual.*torch\.complex64", NotImplementedError),
    ({"residual": QUANTIZED}, r"residual.*torch\.quint8", NotImplementedError),
]
