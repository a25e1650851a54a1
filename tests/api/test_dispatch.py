"""Calls that go to the kernels, calls that go to torch, and the reasons that `explain` gives."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

import triton_norm
from support import processes
from support.at_once import at_once
from triton_norm import checks_rows, dispatch


def test_backends(launched, device):
    x = torch.randn(4, 8, device=device)
    results = {}
    for name, launches in (("auto", 1), ("triton", 1), ("torch", 0)):
        with triton_norm.backend(name):
            results[name] = triton_norm.layer_norm(x, (8,))
        assert len(launched) == launches
        launched.clear()
    assert torch.equal(results["torch"], F.layer_norm(x, (8,)))
    assert torch.equal(results["auto"], results["triton"])


def test_the_backend_is_restored_after_an_error_and_nests():
    with pytest.raises(KeyError), triton_norm.backend("torch"):
        raise KeyError
    assert dispatch.override.name == "auto"
    with triton_norm.backend("torch"):
        with triton_norm.backend("triton"):
            assert dispatch.override.name == "triton"
        assert dispatch.override.name == "torch"


def test_the_backend_is_each_threads_own():
    with triton_norm.backend("torch"):
        assert at_once([lambda: dispatch.override.name]) == ["auto"]


def test_threads_leave_their_backends_in_any_order():
    first, second = triton_norm.backend("triton"), triton_norm.backend("torch")

    def within(context, leave):
        with context:
            entered.wait()
            leave.wait()
            return dispatch._newest

    entered, leaves = threading.Barrier(3), (threading.Event(), threading.Event())
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(within, *both) for both in zip((first, second), leaves, strict=True)]
        entered.wait()
        for leave, done in zip(leaves, running, strict=True):
            leave.set()
            done.result()
    assert dispatch._newest == "auto"


def test_unknown_backends():
    with pytest.raises(ValueError, match="'auto', 'triton', 'torch', but got 'cuda'"), triton_norm.backend("cuda"):
        pass


python = functools.partial(processes.output, "-c")

EXPLAIN = "import torch, triton_norm as tn; print(tn.explain(tn.layer_norm, torch.ones(2, 3), (3,)))"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "layer_norm: torch, because the input is on cpu, and TRITON_INTERPRET is not set"),
        ({"TRITON_INTERPRET": "1"}, "layer_norm: triton, because the kernels serve it, interpreted on the CPU"),
        ({"TRITON_INTERPRET": "1", "TRITON_NORM_BACKEND": "torch"}, "layer_norm: torch, because backend 'torch'"),
    ],
)
def test_cpu_tensors(environment, said):
    assert python(EXPLAIN, **environment).startswith(said)


NONSENSE = """
import os

for name in "cuda", "", " auto", "AUTO":
    os.environ["TRITON_NORM_BACKEND"] = name
    try:
        import triton_norm
    except ValueError as error:
        assert str(error) == f"TRITON_NORM_BACKEND must be one of 'auto', 'triton', 'torch', but got {name!r}", error
    else:
        raise AssertionError(name)
"""


def test_nonsense_in_the_environment_is_one_clear_error():
    python(NONSENSE)


def test_import_without_triton():
    code = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTriton())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
import torch, triton_norm as tn
y = tn.LayerNorm(4)(torch.randn(2, 4, requires_grad=True))
y.sum().backward()
print(tn.BatchNorm1d(4)(torch.randn(3, 4)).shape, tn.explain(tn.layer_norm, y, (4,)))
assert "triton" not in sys.modules
"""
    assert "triton is not installed" in python(code)


def test_import_does_not_import_triton_and_touches_no_gpu():
    code = "import sys, torch, triton_norm; assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    python(code)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_inputs_go_to_torch(shape, device):
    x = torch.ones(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[1], device=device, requires_grad=True)
    triton_norm.layer_norm(x, shape[1:], weight).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    with triton_norm.backend("triton"), pytest.raises(RuntimeError, match="the input has no elements"):
        triton_norm.layer_norm(x, shape[1:])


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batches_as_torch_treats_them(shape, momentum, device):
    theirs, ours = (norms.BatchNorm1d(shape[1], momentum=momentum, device=device) for norms in (nn, triton_norm))
    for module in (theirs, ours):
        module(torch.ones(shape, device=device))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_vector_of_no_elements_has_no_channels(device):
    x = torch.ones(0, device=device)
    assert triton_norm.batch_norm(x, x.clone(), x.clone(), training=True).shape == (0,)


class Tagged(torch.Tensor):
    pass


def test_subclasses_keep_their_class(device):
    x = torch.randn(3, 4, device=device).as_subclass(Tagged)
    assert isinstance(triton_norm.layer_norm(x, (4,)), Tagged)
    assert isinstance(triton_norm.batch_norm(x, None, None, training=True), Tagged)
    assert "Tagged" in str(triton_norm.explain(triton_norm.layer_norm, x, (4,)))


MIXED = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)]


@pytest.mark.parametrize(("dtype", "parameters"), MIXED)
@pytest.mark.parametrize("training", [True, False])
def test_torchs_path_takes_the_same_mixtures_of_types(dtype, parameters, training, device):
    """torch refuses some; the kernels don't, so the path around them must not either."""
    x = torch.randn(4, 6, 5, device=device).to(dtype)
    weight, bias = torch.randn(2, 6, device=device).to(parameters)
    result = {}
    for name in ("torch", "auto"):
        mean, var = torch.zeros(6, device=device, dtype=parameters), torch.ones(6, device=device, dtype=parameters)
        with triton_norm.backend(name):
            y = triton_norm.batch_norm(x, mean, var, weight, bias, training)
            z = triton_norm.layer_norm(x.mT, (6,), weight, bias)
        assert y.dtype == z.dtype == dtype
        result[name] = (y, z, mean, var)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(result["auto"][:2], result["torch"][:2], **tolerance)
    eps = max(torch.finfo(parameters).eps, torch.finfo(torch.float32).eps)  # batch statistics are computed in fp32
    tolerance = {"rtol": 4 * eps, "atol": 4 * eps}
    torch.testing.assert_close(result["auto"][2:], result["torch"][2:], **tolerance)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's rms_norm, on CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autocast_as_torch(name, backend, dtype, device):
    x, weight = torch.randn(4, 8, device=device, dtype=dtype), torch.randn(8, device=device)
    ours, theirs = getattr(triton_norm, name), getattr(F, name)
    with torch.autocast(device, torch.bfloat16), triton_norm.backend(backend):
        expected = theirs(x, (8,), weight.to(dtype) if device == "cpu" else weight)
        y = ours(x, (8,), weight)
        z, total = ours(x, (8,), weight, residual=x)
        assert (y.dtype, z.dtype, total.dtype) == (expected.dtype, expected.dtype, dtype)
        assert triton_norm.batch_norm(x, None, None, weight, training=True).dtype == x.dtype


def test_complex_input_goes_to_torch(device):
    x = torch.randn(3, 8, dtype=torch.complex64, device=device)
    torch.testing.assert_close(triton_norm.rms_norm(x, (8,)), F.rms_norm(x, (8,)))
    with pytest.raises(NotImplementedError, match=r"input of torch\.complex64"):
        triton_norm.rms_norm(x, (8,), out_dtype=torch.float32)


def test_a_call_like_an_earlier_one_is_not_checked_again(monkeypatch, device):
    x, weight = torch.randn(5, 24, device=device), torch.ones(24, device=device)
    triton_norm.layer_norm(x, (24,), weight)
    monkeypatch.setattr(checks_rows, "rows", lambda *_: pytest.fail("checked again"))
    triton_norm.layer_norm(x + 1, (24,), weight + 1)
    monkeypatch.undo()
    for wrong in ((x, (24,), weight[:23]), (x[:, 1:], (24,), weight), (x, (24,), weight.long()), (x, [23], weight)):
        with pytest.raises(RuntimeError):
            triton_norm.layer_norm(*wrong)


def test_no_counter_is_needed_where_none_moves(device):
    """An old pickle has none."""
    module, x = triton_norm.BatchNorm1d(4).to(device).eval(), torch.randn(3, 4, device=device)
    expected = module(x)
    del module.num_batches_tracked
    assert torch.equal(module(x), expected)


def test_fake_tensors_outside_their_mode_stay_fake(device):
    with FakeTensorMode():
        x = torch.randn(3, 8, device=device)
    y = triton_norm.rms_norm(x, (8,))
    assert isinstance(y, FakeTensor)
    assert y.shape == x.shape


def test_explain_takes_modules_and_refuses_the_rest(device):
    x = torch.randn(2, 3, 4, device=device)
    for module in (triton_norm.LayerNorm(4), triton_norm.BatchNorm1d(3)):
        counted = {name: buffer.clone() for name, buffer in module.named_buffers()}
        explanation = triton_norm.explain(module.to(device), x)
        assert explanation.backend == "triton"
        assert all(torch.equal(counted[name].to(device), buffer) for name, buffer in module.named_buffers())
    with pytest.raises(TypeError, match="expected a function or module of triton_norm"):
        triton_norm.explain(nn.LayerNorm(4), x)


@pytest.mark.parametrize("n_axes", [64, 65, 80])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_axes_than_torchs_sums_take(backend, n_axes, device):
    """torch's own batch_norm takes any number of them forward."""
    x, residual = torch.randn(2, 2, 3, *(1 for _ in range(n_axes - 3)), 2, device=device)
    statistics = torch.zeros(3, device=device), torch.ones(3, device=device)
    flat = F.batch_norm(x.flatten(2), *(each.clone() for each in statistics), training=True) + residual.flatten(2)
    with triton_norm.backend(backend):
        leaf = x.clone().requires_grad_()
        y = triton_norm.batch_norm(leaf, *statistics, training=True, residual=residual)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        torch.autograd.grad(dx.square().sum(), leaf)
    torch.testing.assert_close(y.flatten(2), flat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics[0], 0.1 * x.flatten(2).mean((0, 2)))
