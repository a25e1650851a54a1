"""Events between an op's forward and its backward: hooks on saved tensors, and other modes of autograd."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import triton_norm
from support.activations import MASKED
from support.every_op import EACH_FUNCTION, EVERY_OP, OPS, PATHS, ModulatedOp
from support.pairwise import pairwise

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def strided(tensor):
    """Returns the same values, two elements apart."""
    return torch.stack((tensor, torch.full_like(tensor, 77)), -1)[..., 0]


def transposed(tensor):
    """Returns the same values, with the order of axes in memory reversed."""
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


def channels_last(tensor):
    return tensor if tensor.dim() < 3 else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def shifted(tensor):
    """Returns the same values, not aligned to 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


def negated(tensor):
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


def contiguous(tensor):
    return tensor.contiguous().clone()


UNPACKED = [contiguous, strided, transposed, channels_last, shifted, negated]
READ_AS_CONTIGUOUS = [("layer_norm", strided), ("group_norm", strided), ("group_norm", transposed)]


def gradients(op, tensors, dys, hooks=contextlib.nullcontext, **options):
    """Returns the gradients of the tensors that are not None."""
    with hooks():
        outputs = op.ours(*tensors)
    return torch.autograd.grad(outputs, [tensor for tensor in tensors if tensor is not None], dys, **options)


def drawn(op, device, dtype=torch.float32):
    tensors = op.drawn(device, dtype)
    return tensors, [torch.randn_like(y) for y in op.theirs(*tensors)]


def is_read_right(op, unpack, path):
    """Returns False where torch's own backward reads strided tensors as contiguous, on the CPU."""
    return path == "triton" or (op.name, unpack) not in READ_AS_CONTIGUOUS


@pairwise({"op": EVERY_OP, "unpack": UNPACKED, "path": ["triton", "torch"]}, is_read_right)
def test_saved_tensors_come_back_with_other_strides(op, unpack, path, device):
    tensors, dys = drawn(op, device)
    with triton_norm.backend(path):
        expected = gradients(op, tensors, dys)
        actual = gradients(op, tensors, dys, lambda: saved_tensors_hooks(lambda tensor: tensor, unpack))
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("pin_memory", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", EACH_FUNCTION, ids=str)
def test_saved_on_the_cpu(op, pin_memory, device):
    tensors, dys = drawn(op, device)
    expected = gradients(op, tensors, dys)
    actual = gradients(op, tensors, dys, lambda: save_on_cpu(pin_memory=pin_memory))
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_the_largest_error_that_was_seen(device):
    """dx was off by 7.6 and dweight by 46: bits laid for channels last were read as if positions lay side by side."""
    module = triton_norm.BatchNorm2d(32, device=device)
    x, residual, dy = (channels_last(torch.randn(4, 32, 14, 14, device=device)) for _ in range(3))
    result = []
    for hooks in (contextlib.nullcontext(), saved_tensors_hooks(lambda t: t, contiguous)):
        leaf = x.clone().requires_grad_()
        with triton_norm.backend("triton"), hooks:
            y = module(leaf, residual=residual, activation="relu")
        result.append(torch.autograd.grad(y, (leaf, module.weight), dy))
    torch.testing.assert_close(*result, **TOLERANCE)


def test_layouts_of_one_shape_in_turn(device):
    """Plans remember the shapes of saved tensors; the bytes that bits take depend on the layout too."""
    x, residual, dy = torch.randn(3, 3, 3, 4, 5, device=device)
    weight = torch.rand(3, device=device)
    result = []
    for lay in (contiguous, channels_last, contiguous, channels_last):
        leaves = [lay(tensor).requires_grad_() for tensor in (x, residual)]
        with triton_norm.backend("triton"):
            y = triton_norm.batch_norm(
                leaves[0], None, None, weight, training=True, residual=leaves[1], activation="relu"
            )
        result.append(torch.autograd.grad(y, leaves, lay(dy)))
    for gradients in result[1:]:
        torch.testing.assert_close(gradients, result[0], **TOLERANCE)


@pytest.mark.parametrize("unpack", [contiguous, transposed], ids=lambda function: function.__name__)
@OPS
def test_second_derivatives_of_what_came_back_with_other_strides(op, unpack, device):
    tensors, dys = drawn(op, device, torch.float64)
    leaves = [tensor for tensor in tensors if tensor is not None]
    result = []
    for hooks in (contextlib.nullcontext, lambda: saved_tensors_hooks(lambda tensor: tensor, unpack)):
        with triton_norm.backend("triton"):
            dx, *_ = gradients(op, tensors, dys, hooks, create_graph=True)
        result.append(torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True))
    torch.testing.assert_close(*result, **EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.double(), "torch.float64"),
        (lambda tensor: tensor.flatten()[:-1], "shape"),
        (lambda tensor: tensor.to("meta"), "meta"),
    ],
    ids=["type", "shape", "device"],
)
@pytest.mark.parametrize("op", EACH_FUNCTION, ids=str)
def test_saved_tensors_that_come_back_as_others_are_an_error(op, change, message, device):
    """The kernels would read past their end."""
    tensors, dys = drawn(op, device)
    with triton_norm.backend("triton"), pytest.raises(RuntimeError, match=f"saved for backward as .*{message}"):
        gradients(op, tensors, dys, lambda: saved_tensors_hooks(lambda tensor: tensor, change))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is ")  # by torch itself, for the first dual number
@PATHS
@OPS
def test_forward_mode_over_the_backward(op, path, device):
    """The gradient of y = f(x) for a dual number has the tangent that torch's has; silu's has none in torch either."""
    if op.name == "group_norm":
        pytest.skip("torch has no forward mode over its gradient")
    tensors, dys = drawn(op, device, torch.float64)
    leaves = [tensor for tensor in tensors if tensor is not None]
    tangents = [torch.randn_like(dy) for dy in dys]
    result = []
    for function in (op.ours, op.theirs):
        with triton_norm.backend(path):
            outputs = function(*tensors)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(dy, tangent) for dy, tangent in zip(dys, tangents, strict=True)]
            if op.has_silu:
                with pytest.raises(NotImplementedError, match="silu_backward"):
                    torch.autograd.grad(outputs, leaves, duals)
                continue
            unpacked = map(forward_ad.unpack_dual, torch.autograd.grad(outputs, leaves, duals))
            result.append([part for gradient in unpacked for part in (gradient.primal, gradient.tangent)])
    if result:
        torch.testing.assert_close(*result, **EXACT)


def has_batches(op, how, path):
    """Returns False where torch's own backward has no batches: in channels last."""
    return path == "triton" or (op.name, op.kind) != ("group_norm", "last")


@pairwise({"op": EVERY_OP, "how": ["is_grads_batched", "vmap"], "path": ["triton", "torch"]}, has_batches)
def test_batches_of_gradients(op, how, path, device):
    tensors, dys = drawn(op, device, torch.float64)
    leaves = [tensor for tensor in tensors if tensor is not None]
    batches = [torch.randn(3, *dy.shape, dtype=dy.dtype, device=device) for dy in dys]
    with triton_norm.backend(path):
        outputs = op.ours(*tensors)
        if how == "vmap":

            def vjp(*dys):
                return torch.autograd.grad(outputs, leaves, dys, retain_graph=True)

            result = torch.func.vmap(vjp)(*batches)
        else:
            result = torch.autograd.grad(outputs, leaves, batches, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(outputs, leaves, dys, retain_graph=True) for dys in zip(*batches, strict=True)]
    torch.testing.assert_close(result, tuple(map(torch.stack, zip(*each, strict=True))), **EXACT)


@PATHS
@pytest.mark.parametrize("op", [op for op in EVERY_OP if op.activation not in MASKED], ids=str)
def test_gradcheck_of_batches_and_of_second_derivatives(op, path, device):
    """Activations with a kink have no second derivative to compare with there."""
    positions = [1 for _ in op.shape[2:]]
    if op.name == "instance_norm":
        positions[0] = 3
    rest = op.shape[1:] if op.is_rows else (*op.shape[1:2], *positions)
    small = dataclasses.replace(op, shape=(2, *rest))
    tensors = [tensor for tensor in small.drawn(device, torch.float64)]
    arguments = [tensor for tensor in tensors if tensor is not None]

    def function(*arguments):
        remaining = iter(arguments)
        return small.ours(*(None if tensor is None else next(remaining) for tensor in tensors))

    with triton_norm.backend(path):
        torch.autograd.gradcheck(function, arguments, check_batched_grad=True, fast_mode=True)
        torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pairwise(
    {
        "module": ["LayerNorm", "RMSNorm", "BatchNorm1d"],
        "function": ["jacobian", "hessian"],
        "path": ["triton", "torch"],
    }
)
def test_vectorized_derivatives(module, function, path, device):
    x = torch.randn(3, 4, dtype=torch.float64, device=device)
    result = []
    for library in (nn, triton_norm):
        norm = getattr(library, module)(4, device=device, dtype=torch.float64)
        of = getattr(torch.autograd.functional, function)
        with triton_norm.backend(path):
            result.append(of(lambda x, norm=norm: norm(x).pow(3).sum(), x, vectorize=True))
    torch.testing.assert_close(*result, **EXACT)


def tensor_of(transform, x):
    """A tensor of x's values that outlives the transform that made it."""
    saved = []

    def function(x):
        saved.append(x * 1)
        return x.sum()

    if transform == "jvp":
        torch.func.jvp(function, (x,), (x,))
    elif transform == "vjp":
        torch.func.vjp(function, x)
    else:
        torch.func.grad(function)(x)
    return saved[0]


@PATHS
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp"])
def test_a_tensor_of_a_finished_transform(transform, path, device):
    """Results are torch's for such an input, gradient and weight. The call before it, on
    tensors of the same kind, is remembered."""
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=device)
    saved = tensor_of(transform, x)
    expected = torch.tensor([[0.6325, 1.2649], [0.7276, 1.2127]], device=device)
    with triton_norm.backend("auto" if path == "triton" else path):
        triton_norm.rms_norm(x, (2,))
        torch.testing.assert_close(triton_norm.rms_norm(saved, (2,)), expected, rtol=0, atol=1e-4)
        weighted = triton_norm.layer_norm(x, (2,), tensor_of(transform, x[0]))
        torch.testing.assert_close(weighted, nn.functional.layer_norm(x, (2,), x[0]))
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(triton_norm.rms_norm(leaf, (2,)), leaf, saved)
        (exact,) = torch.autograd.grad(nn.functional.rms_norm(leaf, (2,)), leaf, x)
        torch.testing.assert_close(dx, exact)
    if path == "triton":
        assert "no memory of its own" in triton_norm.explain(triton_norm.rms_norm, saved, (2,)).reason
        with triton_norm.backend("triton"), pytest.raises(RuntimeError, match="no memory of its own"):
            triton_norm.rms_norm(saved, (2,))


@pairwise(
    {
        "op": [op for op in EVERY_OP if op.function != "rms_norm"],
        "frozen": [(), ("weight",)],
        "path": ["triton", "torch"],
    }
)
def test_a_bias_that_is_changed_in_between(op, frozen, path, device):
    """torch's BatchNorm does not mind, as no gradient depends on the bias; an activation that is computed again does,
    and it is an error."""
    tensors, dys = drawn(op, device)
    _, residual, weight, bias, *_ = tensors
    if bias is None:
        pytest.skip("has no bias")
    weight.requires_grad_("weight" not in frozen)
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    with triton_norm.backend(path):
        outputs = op.ours(*tensors)
        expected = torch.autograd.grad(outputs, leaves, dys, retain_graph=True)
        with torch.no_grad():
            bias.add_(100)
        by_bits = op.function == "batch_norm" and residual is not None and op.activation in MASKED
        recomputes = op.activation is not None and not by_bits
        recomputes = recomputes or isinstance(op, ModulatedOp)
        if path == "triton" and recomputes:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(outputs, leaves, dys)
        elif path == "triton" or op.function == "batch_norm":
            assert all(map(torch.equal, torch.autograd.grad(outputs, leaves, dys), expected))


@OPS
def test_inputs_that_were_made_under_inference_mode(op, device):
    """The kernels train behind them, from a copy, as torch's RMSNorm does."""
    tensors, dys = drawn(op, device)
    leaves = [tensor for tensor in tensors[2:] if tensor is not None]
    with torch.inference_mode():
        frozen = [None if tensor is None else tensor.detach().clone() for tensor in tensors[:2]]
    with triton_norm.backend("triton"):
        actual = torch.autograd.grad(op.ours(*frozen, *tensors[2:])[0], leaves, dys[0])
        plain = [None if tensor is None else tensor.detach() for tensor in tensors[:2]]
        expected = torch.autograd.grad(op.ours(*plain, *tensors[2:])[0], leaves, dys[0])
        assert all(map(torch.equal, actual, expected))
        with torch.inference_mode():
            assert op.ours(*frozen, *tensors[2:])[0].is_inference()


def test_explain_tells_of_the_copy_of_an_inference_tensor(device):
    with torch.inference_mode():
        h = torch.tensor([[3.0, 4.0]], device=device)
    norm = triton_norm.RMSNorm(2, device=device)
    assert any("inference_mode" in copy for copy in triton_norm.explain(norm, h).copies)
    norm(h).sum().backward()
    torch.testing.assert_close(norm.weight.grad, torch.tensor([0.8485, 1.1314], device=device), rtol=0, atol=1e-4)
    with torch.no_grad():
        assert triton_norm.explain(norm, h).copies == ()
    assert triton_norm.explain(norm, h, residual=h).copies == ()
    assert triton_norm.explain(norm.requires_grad_(False), h).copies == ()
