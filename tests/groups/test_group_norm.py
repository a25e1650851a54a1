"""group_norm and instance_norm, with a residual and an activation, on both paths against torch."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import triton_norm
from support.activations import near_a_kink, reach
from support.group_norms import (
    CALLS,
    EVERY_CALL,
    N_GROUPS,
    PATHS,
    channels_last,
    drawn,
    ours,
    stepped,
    theirs,
)
from support.oracle import compute_dtype
from triton_norm import dispatch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(2, 6, 5), (3, 6, 4, 4), (1, 6, 3, 2, 4), (2, 6, 2, 1, 2, 3)], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last], ids=["first", "last"])


def tolerance(dtype: torch.dtype, factor: float = 16.0) -> dict[str, float]:
    return dict.fromkeys(("rtol", "atol"), factor * torch.finfo(dtype).eps)


def assert_as_fp64(name: str, activation: str | None, inputs: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    """y and all gradients are those of torch in fp64; returns them."""
    wide = [None if tensor is None else tensor.double().contiguous() for tensor in inputs]
    expected = stepped(theirs(name, activation), wide, dy.double().contiguous())
    result = stepped(ours(name, activation), inputs, dy)
    arguments = [tensor for tensor in inputs if tensor is not None]
    for one, exact, like in zip(result, expected, (inputs[0], *arguments), strict=True):
        assert one.dtype == like.dtype
        scaled = exact.abs().max().clamp(min=1.0)
        eps = max((like.dtype, compute_dtype(inputs[0])), key=lambda dtype: torch.finfo(dtype).eps)
        torch.testing.assert_close(one.double() / scaled, exact / scaled, **tolerance(eps))
    return result


@PATHS
@DTYPES
@LAYOUTS
@SHAPES
@EVERY_CALL
def test_matches_fp64(name, shape, layout, dtype, path, device):
    if (path, name, shape[0], layout) == ("torch", "instance_norm", 1, channels_last):
        pytest.skip("torch's own dx is wrong on the CPU")
    x, _, weight, bias = drawn(shape, device, dtype)
    with triton_norm.backend(path):
        assert_as_fp64(name, None, [layout(x), None, weight, bias], layout(torch.randn_like(x)))


@PATHS
@DTYPES
@pytest.mark.parametrize("activation", [None, "relu", "silu", "leaky_relu", "relu6", "hardswish"])
@pytest.mark.parametrize("adds", [False, True], ids=["", "residual"])
@EVERY_CALL
def test_fused(name, adds, activation, dtype, path, device):
    x, residual, weight, bias = drawn((3, 6, 4, 5), device, dtype)
    weight = weight * reach(activation)
    z = theirs(name)(*(tensor.double() for tensor in (x, residual, weight, bias)))
    dy = torch.randn_like(x).masked_fill_(near_a_kink(z, activation, 0.05), 0.0)  # either side of a kink may be taken
    if not adds:
        z = theirs(name)(x.double(), None, weight.double(), bias.double())
        dy = dy.masked_fill_(near_a_kink(z, activation, 0.05), 0.0)
    with triton_norm.backend(path):
        assert_as_fp64(name, activation, [x, residual if adds else None, weight, bias], dy)


@PATHS
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@EVERY_CALL
def test_gelu(name, activation, path, device):
    """It takes the path of silu: only the function is another one."""
    x, residual, weight, bias = drawn((3, 6, 4, 5), device)
    with triton_norm.backend(path):
        assert_as_fp64(name, activation, [x, residual, weight, bias], torch.randn_like(x))


@PATHS
@pytest.mark.parametrize(("has_weight", "has_bias"), list(itertools.product((True, False), repeat=2)))
@EVERY_CALL
def test_either_parameter_may_be_missing(name, has_weight, has_bias, path, device):
    x, residual, weight, bias = drawn((2, 6, 7), device)
    inputs = [x, residual, weight if has_weight else None, bias if has_bias else None]
    with triton_norm.backend(path):
        assert_as_fp64(name, "silu", inputs, torch.randn_like(x))


@PATHS
@DTYPES
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@EVERY_CALL
def test_parameters_and_residual_of_another_type(name, parameters, dtype, path, device):
    """torch refuses some of these; the kernels don't, and so the path around them doesn't either."""
    x, *others = drawn((2, 6, 7), device, dtype)
    residual, weight, bias = (tensor.to(parameters) for tensor in others)
    with triton_norm.backend(path):
        for added in (None, residual):
            assert_as_fp64(name, None, [x, added, weight, bias], torch.randn_like(x))


@PATHS
@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 6, 4, 5), (2, 6, 3, 4, 5)], ids=str)
@EVERY_CALL
def test_memory_formats(name, shape, layout, path, device):
    """The kernels keep the input's, torch's path torch's."""
    x, residual, weight, bias = drawn(shape, device)
    x = layout(x)
    expected = x if path == "auto" else CALLS[name](F, x, weight, bias)
    with triton_norm.backend(path):
        y = CALLS[name](triton_norm, x, weight, bias)
        fused = CALLS[name](triton_norm, x, weight, bias, residual=layout(residual), activation="relu")
    assert y.stride() == fused.stride() == expected.stride()


STRIDED = {
    "every second sample": lambda x: torch.stack((x, x), 1)[:, 0],
    "some of the channels": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every second column": lambda x: torch.stack((x, x), -1)[..., 0],
    "one sample expanded": lambda x: x[:1].expand(x.shape),
    "height and width exchanged": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "negated": lambda x: torch.complex(x, x).conj().imag,
}


@PATHS
@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("of", ["input", "residual", "gradient"])
@EVERY_CALL
def test_strides(name, of, strided, path, device):
    x, residual, weight, bias = drawn((4, 6, 4, 6), device)
    dy = torch.randn_like(x)
    change = STRIDED[strided]
    x, residual, dy = (
        change(t) if of == kind else t for kind, t in (("input", x), ("residual", residual), ("gradient", dy))
    )
    with triton_norm.backend(path):
        assert_as_fp64(name, None, [x, residual, weight, bias], dy)


@PATHS
@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0), (2, 0, 4), (0, 6)], ids=str)
@EVERY_CALL
def test_empty(name, shape, path, device):
    if name == "instance_norm" and len(shape) < 3:
        pytest.skip("one position a channel")
    """Gradients of parameters are 0, where torch's are NaN, or an error."""
    x, residual, weight, bias = drawn(shape, device)
    with triton_norm.backend(path):
        y, dx, dresidual, *parameters = stepped(ours(name, "silu"), [x, residual, weight, bias], torch.ones_like(x))
    assert y.shape == dx.shape == dresidual.shape == shape
    assert not any(map(torch.any, parameters))


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 1, 1)], ids=str)
@PATHS
def test_one_value_a_group_is_centred_to_zero(shape, path, device):
    x, _, weight, bias = drawn(shape, device)
    with triton_norm.backend(path):
        y = triton_norm.group_norm(x, 6, weight, bias)
    exact = bias.view(1, 6, *(1 for _ in shape[2:])).expand(shape)
    assert torch.equal(y, exact) if path == "auto" else torch.allclose(y, exact, atol=1e-3)


@PATHS
@pytest.mark.parametrize("activation", [None, "silu", "leaky_relu"])
@pytest.mark.parametrize("adds", [False, True], ids=["", "residual"])
@EVERY_CALL
def test_second_derivatives(name, adds, activation, path, device):
    x, residual, weight, bias = drawn((2, 6, 4), device, torch.float64)
    inputs = [
        None if tensor is None else tensor.requires_grad_() for tensor in (x, residual if adds else None, weight, bias)
    ]
    there = [tensor for tensor in inputs if tensor is not None]

    def function(*leaves: Tensor) -> Tensor:
        result = iter(leaves)
        return ours(name, activation)(*(None if tensor is None else next(result) for tensor in inputs))

    with triton_norm.backend(path):
        assert torch.autograd.gradcheck(function, there, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, there, fast_mode=True)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sin().sum()),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x[None]),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f: torch.func.jacrev(lambda x: f(x).sum(-1)),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sin().sum()),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is ")  # torch's own, in its forward derivatives
@PATHS
@pytest.mark.parametrize("transform", TRANSFORMS)
@EVERY_CALL
def test_transforms_go_to_torch(name, transform, path, device):
    x, _, weight, bias = drawn((2, 6, 3), device)
    apply = TRANSFORMS[transform]
    expected = apply(lambda x: CALLS[name](F, x, weight, bias))(x)
    with triton_norm.backend(path):
        result = apply(lambda x: CALLS[name](triton_norm, x, weight, bias))(x)
    torch.testing.assert_close(result, expected)
    with triton_norm.backend("triton"), pytest.raises(RuntimeError, match="can't serve this call"):
        apply(lambda x: CALLS[name](triton_norm, x, weight, bias))(x)


@PATHS
@EVERY_CALL
def test_autocast_as_torch(name, path, device):
    x, _, weight, bias = drawn((2, 6, 3), device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16), triton_norm.backend(path):
        expected = CALLS[name](F, x, weight, bias)
        y = CALLS[name](triton_norm, x, weight, bias)
        fused = CALLS[name](triton_norm, x, weight.float(), bias.float(), residual=x, activation="relu")
    assert y.dtype == fused.dtype == expected.dtype
    torch.testing.assert_close(y, expected, **tolerance(torch.bfloat16))


def test_cudas_autocast_gives_group_norm_in_fp32(monkeypatch, device):
    monkeypatch.setattr(dispatch, "autocasts", lambda function, x: function == "group_norm")
    x, _, weight, bias = drawn((2, 6, 3), device, torch.float16)
    exact = CALLS["group_norm"](F, x.double(), weight.double(), bias.double())
    y = triton_norm.group_norm(x, N_GROUPS, weight, bias, activation="silu")  # of no key that others have
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), F.silu(exact), **tolerance(torch.float32))


@EVERY_CALL
def test_explained(name, device):
    x, residual, weight, bias = drawn((2, 6, 4, 6), device)
    target = getattr(triton_norm, name)
    arguments = {"num_groups": N_GROUPS} if name == "group_norm" else {}
    explained = triton_norm.explain(target, x, weight=weight, bias=bias, residual=residual, **arguments)
    assert (explained.function, explained.backend, explained.copies) == (name, "triton", ())
    copies = triton_norm.explain(target, x[..., ::2], residual=residual[..., ::2], **arguments).copies
    assert [copy.split(":")[0] for copy in copies] == ["the input", "the residual"]
    assert not triton_norm.explain(target, channels_last(x), **arguments).copies
    assert "no elements" in triton_norm.explain(target, x[:0], **arguments).reason
    with triton_norm.backend("torch"):
        assert triton_norm.explain(target, x, **arguments).backend == "torch"
    with torch.inference_mode():
        made = torch.randn(2, 6, 4, device=device)
    assert triton_norm.explain(target, made, weight=weight.requires_grad_(), **arguments).copies
    y = CALLS[name](triton_norm, made, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), weight)[0].shape, weight.shape)


RECORDED = pytest.mark.parametrize("path", ["auto", "triton", "torch"])


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@RECORDED
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.usefixtures("_fresh_dynamo")
@EVERY_CALL
def test_compiled(name, activation, backend, path, device):
    """Sizes change, and depend on data."""
    function = ours(name, activation)
    inputs = drawn((4, 6, 3), device, torch.float64)
    with triton_norm.backend(path):
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
        for n in (4, 3):
            sliced = [inputs[0][:n], inputs[1][:n], *inputs[2:]]
            dy = torch.ones_like(sliced[0])
            torch.testing.assert_close(stepped(compiled, sliced, dy), stepped(function, sliced, dy))
        masked = torch.compile(lambda x, m, *rest: function(x[m], None, *rest), backend=backend, fullgraph=True)
        mask = torch.tensor([True, False, True, True], device=device)
        expected = function(inputs[0][mask], None, *inputs[2:])
        torch.testing.assert_close(masked(inputs[0], mask, *inputs[2:]), expected)


@pytest.mark.parametrize("path", ["auto", "torch"])
@EVERY_CALL
def test_exported_as_torchs_functions(name, path, device):
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return CALLS[name](triton_norm, x, weight, bias)

    x, _, *parameters = drawn((4, 6, 3), device)
    with triton_norm.backend(path):
        program = torch.export.export(Norm(), (x, *parameters))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [f"aten.{name}.default"]
    torch.testing.assert_close(program.module()(x, *parameters), CALLS[name](F, x, *parameters))


@PATHS
@EVERY_CALL
def test_under_a_checkpoint(name, path, device):
    inputs = drawn((2, 6, 4), device)
    dy = torch.randn_like(inputs[0])
    with triton_norm.backend(path):
        expected = stepped(ours(name, "silu"), inputs, dy)
        result = stepped(lambda *leaves: checkpoint(ours(name, "silu"), *leaves, use_reentrant=False), inputs, dy)
    torch.testing.assert_close(result, expected)


@EVERY_CALL
def test_a_call_like_an_earlier_one_is_not_checked_again(name, monkeypatch, device):
    x, residual, weight, bias = drawn((5, 6, 4), device)
    ours(name)(x, residual, weight, bias)
    monkeypatch.setattr(f"triton_norm.checks.{name}", lambda *_: pytest.fail("checked again"))
    ours(name)(x + 1, residual, weight + 1, bias)
    monkeypatch.undo()
    with pytest.raises(RuntimeError):
        ours(name)(x, residual, weight[:5], bias)
