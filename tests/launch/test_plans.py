"""The cache of plans: the calls that signatures tell apart, and how little a call like an earlier one does."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import triton_norm
from support.launchers import made_launchers
from triton_norm import plans
from triton_norm.rows import operator
from triton_norm.rows.backward import RowBackwardTensors
from triton_norm.specs import GradientDtypes, RowSpec, RowTensors

GUARDS = [plans.GuardsInPython, plans.guards_on]
X, WEIGHT = torch.randn(4, 6), nn.Parameter(torch.randn(6))
OTHERS = {
    "shape": lambda: torch.randn(5, 6),
    "strides": lambda: torch.randn(6, 4).t(),
    "dtype": lambda: X.double(),
    "class": lambda: nn.Parameter(X, requires_grad=False),
    "gradient": lambda: X.clone().requires_grad_(),
    "negated": lambda: torch._neg_view(X),
    "zero": lambda: torch._efficientzerotensor((4, 6)),
    "device": lambda: X.to("meta"),
    "sparse": lambda: X.to_sparse(),
    "nothing": lambda: None,
    "number": lambda: 3.0,
}


@pytest.fixture
def saved(monkeypatch):
    """An empty cache."""
    monkeypatch.setattr(plans, "_plans", {})
    return plans._plans


@pytest.mark.parametrize("guards", GUARDS)
def test_guards_pass_equal_tensors(guards):
    check = guards(X, WEIGHT).check
    assert check(X, WEIGHT)
    assert check(torch.randn(4, 6), nn.Parameter(torch.zeros(6)))
    with torch.no_grad():
        assert check(X + 1, WEIGHT)


@pytest.mark.parametrize("guards", GUARDS)
@pytest.mark.parametrize("difference", OTHERS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_guards_stop_other_tensors(guards, difference):
    if difference == "sparse" and guards is plans.GuardsInPython:
        pytest.skip("has no strides, and is not kept")
    assert not guards(X, WEIGHT).check(OTHERS[difference](), WEIGHT)


def refused(x, check):
    """Adds whether the guards told the tensors apart, and gives a scalar to differentiate."""
    seen.append((check(x, WEIGHT), check(X, WEIGHT)))
    return x.sum()


seen: list[tuple[bool, bool]] = []


@pytest.mark.parametrize("guards", GUARDS)
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_guards_stop_calls_that_others_may_take(guards):
    check = guards(X, WEIGHT).check
    seen.clear()
    torch.func.grad(lambda x: refused(x, check))(X)
    torch.func.vmap(lambda x: refused(x, check))(X[None])
    if guards is plans.guards_on:  # what asks for sizes in Python is recorded
        torch.jit.trace(lambda x: refused(x, check), (X,), check_trace=False)
    with torch.inference_mode():
        refused(X, check)
    with torch.autocast("cpu"):
        refused(X, check)
    assert set(seen) == {(False, False)}
    assert len(seen) >= 4


def test_one_tensor_twice_and_one_alone(saved):
    plans.keep("twice", (X, X, None), "found")
    assert plans.find("twice", (X, X, None)) == "found"
    plans.keep("alone", (X, None, None), "found")
    assert plans.find("alone", (X, None, None)) == "found"
    assert plans.find("alone", (X[:2], None, None)) is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_plain_memory_have_no_plan(saved):
    nested = torch.nested.nested_tensor([X])
    for tensor in (nested, X.to_sparse(), X.as_subclass(type("Own", (torch.Tensor,), {}))):
        plans.keep("key", (tensor,), "found")
    assert not saved
    plans.keep("key", (X,), "found")
    assert plans.find("key", (nested,)) is None


def test_no_plan_serves_while_a_mode_takes_calls(saved):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            return function(*arguments, **named or {})

    plans.keep("key", (X,), "found")
    with Mode():
        assert plans.find("key", (X,)) is None
        plans.keep("key", (X,), "another")
    with torch.autograd.forward_ad.dual_level():
        assert plans.find("key", (X,)) is None
    assert plans.find("key", (X,)) == "found"


def test_the_cache_is_bounded(saved, monkeypatch):
    monkeypatch.setattr(plans, "MOST_KEYS", 3)
    monkeypatch.setattr(plans, "MOST_PLANS", 2)
    for n in range(1, 9):
        plans.keep(n, (X,), n)
        strided = torch.empty(2 * n).as_strided((2,), (n,))
        plans.keep("one", (strided,), n)
        assert len(saved) <= 3
        assert all(len(entries) <= 2 for _, entries in saved.values())
        assert plans.find("one", (strided,)) == n


def row_operators(x, weight, bias):
    """Calls the operators that stand for a LayerNorm and its backward, as compiled code does."""
    spec = RowSpec(x.shape[-1], 1e-5, 0.0, True)
    call = operator.ForwardCall(RowTensors(x, None, weight, bias), True, spec)
    with torch.no_grad():
        y, _, statistics = operator.forward_op(call)
        requested = GradientDtypes(x.dtype, None, weight.dtype, bias.dtype)
        read = RowBackwardTensors(y, None, x, weight, statistics)
        operator.backward_op(operator.BackwardCall(read, requested, spec))


def test_an_operator_makes_no_launcher_again(monkeypatch, device):
    """Nor does a direct call behind it, or one of another number of rows."""
    x, (weight, bias) = torch.randn(5, 24, device=device), torch.randn(2, 24, device=device)
    row_operators(x, weight, bias)
    made = made_launchers(monkeypatch)
    row_operators(x + 1, weight, bias)
    row_operators(torch.randn(9, 24, device=device), weight, bias)
    assert not made
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    triton_norm.layer_norm(leaves[0], (24,), *leaves[1:]).sum().backward()
    known = len(made)  # of a gradient that is one element expanded
    assert known <= 1
    triton_norm.layer_norm(leaves[0], (24,), *leaves[1:]).sum().backward()
    assert len(made) == known


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_calls_make_no_launcher_again(backend, monkeypatch, device):
    torch._dynamo.reset()
    module = nn.Sequential(triton_norm.LayerNorm(24), triton_norm.RMSNorm(24)).to(device)
    run = torch.compile(module, backend=backend, fullgraph=True)
    x = torch.randn(5, 24, device=device)
    with triton_norm.backend("triton"):
        for _ in range(2):
            run(x).square().sum().backward()
        made = made_launchers(monkeypatch)
        run(x).square().sum().backward()
    assert not made


PACKAGE = Path(triton_norm.__file__).parent
OWN = f"{PACKAGE}{os.sep}"
LAUNCHING = {*map(str, (PACKAGE / "launch.py", *(PACKAGE / "kernels").iterdir(), *(PACKAGE / "testing").iterdir()))}


def functions_of(call) -> list[str]:
    """Returns the library's functions that a call runs, in order, but for those that launch."""
    result = []

    def note(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(OWN) and path not in LAUNCHING:
            result.append(f"{path.removeprefix(OWN)} {frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return result


NORMS = {
    "layer_norm": (lambda x, w, b: triton_norm.layer_norm(x, (6,), w, b), (5, 6)),
    "rms_norm": (lambda x, w, b: triton_norm.rms_norm(x, (6,), w), (5, 6)),
    "batch_norm": (lambda x, w, b: triton_norm.batch_norm(x, None, None, w, b, True), (5, 6, 3)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_call_like_an_earlier_one_runs_few_functions(name, device):
    """Ten forward and twelve backward with those that launch: one forward, and two or three backward."""
    norm, shape = NORMS[name]
    x, w, b = (torch.randn(size, device=device, requires_grad=True) for size in (shape, 6, 6))
    dy = torch.randn(shape, device=device)
    for _ in range(2):
        norm(x, w, b).backward(dy)
    y = norm(x, w, b)
    assert len(functions_of(lambda: norm(x, w, b))) <= 9
    assert len(functions_of(lambda: y.backward(dy))) <= 9
    with torch.no_grad():
        norm(x, w, b)
        assert len(functions_of(lambda: norm(x, w, b))) <= 8


@pytest.mark.parametrize("name", NORMS)
def test_another_order_of_states_finds_the_right_plan(name, device):
    """Gradients on and off, of all leaves and of some, contiguous and not, in turn."""
    norm, shape = NORMS[name]
    x, w, b = torch.randn(shape, device=device), torch.randn(6, device=device), torch.randn(6, device=device)
    dy = torch.randn(shape, device=device)

    def step(needs, strided):
        leaves = [tensor.clone().requires_grad_(asked) for tensor, asked in zip((x, w, b), needs, strict=True)]
        inputs = [leaves[0].mT.contiguous().mT if strided else leaves[0], *leaves[1:]]
        y = norm(*inputs)
        if y.requires_grad:
            y.backward(dy.mT.contiguous().mT if strided else dy)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    whole = step((True, True, True), False)
    for _ in range(2):
        for needs in ((False, False, False), (True, False, False), (False, True, False), (True, True, True)):
            for strided in (False, True):
                y, *gradients = step(needs, strided)
                torch.testing.assert_close(y, whole[0])
                for gradient, expected, asked in zip(gradients, whole[1:], needs, strict=True):
                    assert (gradient is not None) == (asked and expected is not None)
                    if gradient is not None:
                        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
