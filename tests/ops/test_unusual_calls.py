"""Calls that no ordinary training makes: negated tensors, one tensor for two arguments, and torch.func's transforms."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import triton_norm
from support.every_op import EACH_FUNCTION, EVERY_OP, OPS

EACH = pytest.mark.parametrize("op", EACH_FUNCTION, ids=str)
SHAPE = (6, 8)


class Watched(TorchDispatchMode):
    """Mode under which calls go through the operators."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def negated(tensor):
    """Returns a tensor of the same values whose memory has the opposite ones, as a conjugate's imaginary part does."""
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    return view


@pytest.mark.parametrize("place", range(4), ids=["x", "residual", "weight", "bias"])
@EACH
def test_negated_inputs(op, place, device):
    """An earlier call on tensors that differ in nothing else is remembered."""
    tensors = [tensor if tensor is None else tensor.detach() for tensor in op.drawn(device)]
    if tensors[place] is None:
        pytest.skip("has no such argument")
    expected = op.ours(*tensors)
    tensors[place] = negated(tensors[place])
    torch.testing.assert_close(op.ours(*tensors), expected)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Watched])
@OPS
def test_negated_gradients(op, mode, device):
    tensors = op.drawn(device)
    leaves = [tensor for tensor in tensors if tensor is not None]
    outputs = op.ours(*tensors)
    dys = [torch.randn_like(y) for y in outputs]

    def gradients(dys):
        with mode():
            return torch.autograd.grad(outputs, leaves, dys, retain_graph=True, allow_unused=True)

    expected = gradients(dys)
    assert expected[0].any()
    torch.testing.assert_close(gradients([negated(dy) for dy in dys]), expected, rtol=0, atol=0)


def test_a_loss_of_the_conjugates_imaginary_part(device):
    gradients = []
    for module in (torch.nn.LayerNorm(8, device=device), triton_norm.LayerNorm(8, device=device)):
        x = torch.linspace(-1, 3, 48, device=device).view(SHAPE)
        y = module(x)
        (torch.complex(torch.ones_like(y), y).conj().sum() * (2 - 3j)).real.backward()
        gradients.append(module.bias.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("op", [op for op in EVERY_OP if op.residual], ids=str)
def test_a_residual_that_is_the_input(op, device):
    """Its gradient is the sum of both."""
    x, _, *parameters = op.drawn(device)
    apart = [x, x.detach().clone().requires_grad_()]
    dys = [torch.randn_like(y) for y in op.theirs(x, x, *parameters)]
    with triton_norm.backend("triton"):
        of_both = torch.autograd.grad(op.ours(*apart, *parameters), apart, dys)
        (dx,) = torch.autograd.grad(op.ours(x, x, *parameters), x, dys)
    torch.testing.assert_close(dx, sum(of_both))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is ")  # torch's own decompositions; a FutureWarning since 2.14
@OPS
def test_transforms_and_forward_mode(op, device):
    """Torch's path serves these."""
    if (op.function, op.kind) == ("group_norm", "last"):
        pytest.skip("torch's own has no batches where channels lie last")
    x, *rest = [tensor if tensor is None else tensor.detach() for tensor in op.drawn(device, torch.float64)]
    batch, tangent = torch.stack((x, x.sin())), torch.randn_like(x)

    def loss(function):
        return lambda x: sum(y.pow(3).sum() for y in function(x, *rest))

    result = []
    for function in map(loss, (op.ours, op.theirs)):
        results = [torch.func.grad(function)(x), torch.func.vmap(function)(batch)]
        results.append(torch.func.jvp(function, (x,), (tangent,))[1])
        if op.is_rows:
            results.append(torch.func.hessian(function)(x))
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent)
        result.append(results)
    torch.testing.assert_close(*result)
