"""What batch_norm takes and torch's doesn't, residual, activation and negative_slope: kept, differentiated, refused."""

import contextlib
import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.channel_norms import (
    ACTIVATIONS,
    DTYPES,
    FUSED,
    KINDS,
    MODES,
    SHAPES,
    SPLIT,
    drawn,
    laid,
)
from support.oracle import assert_same_but_for_order
from triton_norm.tuning.limits import INTERPRETED

if INTERPRETED:
    from triton_norm.testing import interpreter

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _through_the_kernels():
    with triton_norm.backend("triton"):
        yield


def bits_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of one bit an element: each channel, position or sample begins with a byte."""
    n, c, positions = shape[0], shape[1], math.prod(shape[2:])
    rows, row = {"flat": (c, n * positions), "last": (n * positions, c), "folded": (n, c * positions)}[kind]
    return rows * -(-row // 8)


@MODES
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize(("activation", "residual"), FUSED)
def test_what_is_kept_for_the_backward(activation, residual, kind, shape, training, device):
    """x, statistics in fp32, and beside a residual the side of 0 that was taken, or the residual; no activated copy."""
    call = drawn(shape, kind, device, HALF, training=training, residual=residual, activation=activation)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call.ours(*call.inputs())
        assert not kept
        y = call.ours(*(None if t is None else t.requires_grad_() for t in call.inputs()))
    given = {
        t.data_ptr(): name
        for name, t in zip(("x", "residual", "weight", "bias"), call.inputs(), strict=True)
        if t is not None
    }
    if call.running is not None:
        given |= {t.data_ptr(): "running" for t in call.running}
    assert y.data_ptr() not in {t.data_ptr() for t in kept}
    names = {given[t.data_ptr()] for t in kept if t.data_ptr() in given}
    assert names - {"weight", "bias", "running"} == ({"x", "residual"} if residual and activation == "silu" else {"x"})
    own = sorted((str(t.dtype), t.numel()) for t in kept if t.data_ptr() not in given)
    expected = [("torch.float32", 3 * shape[1])] if training else []
    if residual and activation in ("relu", "leaky_relu"):
        expected.append(("torch.uint8", bits_of(kind, shape)))
    assert own == expected


@MODES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "residual"),
    [(None, torch.float32), ("relu", torch.float32), ("silu", None), ("silu", torch.float32)],
)
def test_nothing_is_moved_but_what_has_to_be(activation, residual, kind, training, guard, device):
    """2R1W forward and 2R2W backward, by programs that hold x and dy. Bits, or silu's residual, are read again where
    dx waits for the sums; without an activation dy itself is the residual's gradient."""
    if guard is None:
        pytest.skip("bytes are counted under the interpreter")
    call = drawn(SPLIT[kind][0], kind, device, training=training, residual=residual, activation=activation)
    call.run()
    size, bits = call.x.nbytes, 0
    if residual and activation == "relu":
        bits = bits_of(kind, tuple(call.x.shape))
    forward, backward = (launched.arguments for launched in guard.launches)
    times = 2 if training else 1
    added = size if residual else 0
    recomputed = added if activation == "silu" else 0
    for launched, kind_of_access, expected in (
        (forward, "load", {"x_ptr": size, "residual_ptr": added}),
        (forward, "store", {"y_ptr": size, "bits_ptr": bits}),
        (
            backward,
            "load",
            {"x_ptr": size, "dy_ptr": size, "bits_ptr": times * bits, "residual_ptr": times * recomputed},
        ),
        (backward, "store", {"dx_ptr": size, "dresidual_ptr": added if activation else 0}),
    ):
        for name, n_bytes in expected.items():
            found = launched[name].bytes[kind_of_access] if name in launched else 0
            assert found == n_bytes, (name, kind_of_access)


@MODES
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_only_the_gradients_asked_for(activation, training, device):
    call = drawn((3, 4, 5, 3), "flat", device, training=training, residual=HALF, activation=activation)
    everything = call.run()
    for asked in ((0,), (1,), (2,), (3,), (0, 1), (1, 3), (0, 2, 3)):
        for i, (found, expected) in enumerate(zip(call.run(asked).gradients, everything.gradients, strict=True)):
            assert (found is not None) == (i in asked)
            if found is not None:
                assert_same_but_for_order(found, expected)


def test_what_is_not_kept_may_be_overwritten(device):
    """y, and a residual beside which bits are kept; but not the one that silu's gradient is computed from."""
    for activation in ("relu", "silu"):
        call = drawn((3, 4, 5, 3), "flat", device, residual=torch.float32, activation=activation)
        expected = call.run()
        x, residual = call.x.clone().requires_grad_(), call.residual.clone()
        y = call.ours(x, residual, call.weight, call.bias)
        y.mul_(2.0)
        assert torch.equal(torch.autograd.grad(y, x, call.dy / 2, retain_graph=True)[0], expected.dx)
        residual.add_(100.0)
        if activation == "relu":
            assert torch.equal(torch.autograd.grad(y, x, call.dy / 2)[0], expected.dx)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, x, call.dy / 2)


def test_what_has_to_be_copied_is_said(device):
    x = torch.randn(3, 4, 6, 6, device=device)
    other = laid(x, "last")
    explain = triton_norm.explain
    said = explain(triton_norm.batch_norm, x, None, None, training=True, residual=other)
    assert said.copies == ("the residual: neither its channels nor its positions lie side by side",)
    assert not explain(triton_norm.batch_norm, x, None, None, training=True, residual=x + 1).copies
    assert not explain(triton_norm.BatchNorm2d(4, device=device), other, residual=other + 1, activation="relu").copies


@pytest.mark.unguarded  # fp64 through hundreds of launches; the kernels are guarded above
@MODES
@pytest.mark.parametrize(("activation", "residual"), FUSED)
def test_gradients_of_both_orders(activation, residual, training, device):
    residual = None if residual is None else torch.float64
    kind, shape = ("last", (3, 2)) if residual else ("flat", (2, 2, 2))
    call = drawn(shape, kind, device, torch.float64, training=training, residual=residual, activation=activation)
    leaves = [tensor.requires_grad_() for tensor in call.inputs() if tensor is not None]

    def function(x, *others):
        return call.ours(x, *(others if residual else (None, *others)))

    with interpreter.fast_launches() if INTERPRETED else contextlib.nullcontext():
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_differentiated_twice_a_gradient_goes_by_the_same_bits(activation, kind, device):
    """What create_graph=True computes with torch from the bits is what the kernels compute from them."""
    shape, _ = SPLIT[kind]
    call = drawn(shape, kind, device, residual=torch.float32, activation=activation)
    leaves = [tensor.detach().requires_grad_() for tensor in call.inputs()]
    found = torch.autograd.grad(call.ours(*leaves), leaves, call.dy, create_graph=True)
    expected = call.run()
    assert torch.equal(found[1], expected.dresidual)
    for ours, kernels in zip(found, expected.gradients, strict=True):
        torch.testing.assert_close(ours, kernels, rtol=1e-4, atol=1e-5 * kernels.abs().max().item())


X = torch.ones(2, 3, 4)
WRONG = [
    ({"residual": torch.ones(3, 4)}, RuntimeError, r"residual of shape \[3, 4\] and input of size \[2, 3, 4\]"),
    ({"residual": torch.ones(2, 3, 1)}, RuntimeError, r"residual of shape \[2, 3, 1\] and input of size \[2, 3, 4\]"),
    ({"residual": [1.0]}, TypeError, "'residual' must be Tensor, not list"),
    ({"residual": X.long()}, RuntimeError, "residual.*torch.int64"),
    ({"residual": X.to("meta")}, RuntimeError, "input is on cpu and residual is on meta"),
    ({"activation": "gelu"}, ValueError, "activation must be one of 'relu', 'silu', 'leaky_relu' or None.*'gelu'"),
    ({"activation": "ReLU"}, ValueError, "activation must be one of.*'ReLU'"),
    ({"activation": ""}, ValueError, "activation must be one of.*''"),
    ({"activation": 3}, TypeError, "'activation' must be str or None, not int"),
    ({"activation": F.relu}, TypeError, "'activation' must be str or None, not"),
    ({"activation": "leaky_relu", "negative_slope": "steep"}, TypeError, "'negative_slope' must be float, not str"),
]


@MODES
@pytest.mark.parametrize(("arguments", "error", "words"), WRONG)
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_a_wrong_call_has_moved_nothing(arguments, error, words, backend, training):
    mean, var, counter = torch.zeros(3), torch.ones(3), torch.tensor(0)
    with triton_norm.backend(backend), pytest.raises(error, match=words):
        triton_norm.batch_norm(X, mean, var, training=training, num_batches_tracked=counter, **arguments)
    with pytest.raises(error, match=words):
        triton_norm.explain(triton_norm.batch_norm, X, mean, var, training=training, **arguments)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    assert counter.item() == 0


def test_one_value_per_channel_is_no_batch_with_a_residual_either(device):
    module = triton_norm.BatchNorm1d(3, device=device)
    x = torch.ones(1, 3, device=device)
    with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got input size.*\[1, 3\]"):
        module(x, residual=x, activation="relu")
    assert module.num_batches_tracked.item() == 0
    assert torch.equal(module.eval()(-x, residual=-x, activation="relu"), torch.zeros_like(x))


@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_modules_take_them(activation, training, device):
    ours = triton_norm.BatchNorm2d(4, device=device).train(training)
    theirs = nn.BatchNorm2d(4, device=device).train(training)
    x, residual = torch.randn(2, 3, 4, 5, 6, device=device)
    for _ in range(2):
        y = ours(x, residual=residual, activation=activation, negative_slope=0.2)
        z = theirs(x) + residual
        expected = {"relu": F.relu(z), "silu": F.silu(z), "leaky_relu": F.leaky_relu(z, 0.2)}.get(activation, z)
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "residual"), FUSED)
def test_torchs_path_computes_the_same(activation, residual, dtype, training, device):
    call = drawn((3, 5, 5, 7), "flat", device, dtype, training=training, residual=residual, activation=activation)
    with triton_norm.backend("torch"):
        call.against_oracle()


def test_transforms(device):
    """The kernels don't serve these: torch's path does."""
    call = drawn((3, 4, 6), "flat", device, torch.float64, residual=torch.float64, activation="silu")
    inputs = call.inputs()
    with triton_norm.backend("auto"):
        for ours, theirs in zip(
            *(
                torch.func.grad(lambda *a, f=f: f(*a).pow(3).sum(), (0, 1, 2, 3))(*inputs)
                for f in (call.ours, call.composed)
            ),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@MODES
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_compiled_gives_the_bits_of_eager(activation, training, device):
    eager = triton_norm.BatchNorm2d(4).to(device).train(training)
    compiled = copy.deepcopy(eager)

    def step(module, run, x):
        x, residual = (t.clone().requires_grad_() for t in x)
        y = run(x, residual=residual, activation=activation)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, residual, *module.parameters()))]

    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for n in (2, 3):  # the second makes shapes dynamic
        x = torch.randn(2, n, 4, 3, 6, device=device)
        assert all(map(torch.equal, step(eager, eager, x), step(compiled, run, x)))
    assert all(map(torch.equal, eager.buffers(), compiled.buffers()))


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
