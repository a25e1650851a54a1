"""More scenarios of test_sync_batch_norm.py: between forward and backward, and counters."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import triton_norm
from support.channel_norms import Call, drawn
from support.sync_scenarios import UNEVEN, module_of, shape_of, share_of, y_of_share
from support.worlds import World


def between_forward_and_backward(world: World) -> None:
    """Saved tensors come back with other strides, gradients are duals or batches, the bias and the input change as
    other norms can't bear: each gives the gradients that the undisturbed call gives."""
    for kind, dtype, activation in (("last", torch.float32, "relu"), ("flat", torch.float64, "leaky_relu")):
        shape = shape_of(UNEVEN, world, 6, 5, 4)
        part = share_of(world, drawn(shape, kind, world.device, dtype, residual=dtype, activation=activation), UNEVEN)
        module = module_of(part)
        leaves = [tensor.detach().requires_grad_() for tensor in part.inputs() if tensor is not None]
        close = {"rtol": 1e-4, "atol": 1e-5}

        def y_of(leaves: Sequence[Tensor], module: nn.Module = module, part: Call = part) -> Tensor:
            x, residual, weight, bias = leaves
            return y_of_share(module, part, x, residual, weight, bias)

        expected = torch.autograd.grad(y_of(leaves), leaves, part.dy)
        for unpack in (lambda t: t.contiguous(), lambda t: torch.stack((t, t + 1), -1)[..., 0]):
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
                y = y_of(leaves)
            torch.testing.assert_close(torch.autograd.grad(y, leaves, part.dy), expected, **close)

        y = y_of(leaves)
        tangent = torch.ones_like(part.dy)
        of_tangent = torch.autograd.grad(y, leaves, tangent, retain_graph=True)
        with torch.autograd.forward_ad.dual_level():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the first dual number makes torch use what it deprecates
                dual = torch.autograd.forward_ad.make_dual(part.dy, tangent)
            unpacked = [
                torch.autograd.forward_ad.unpack_dual(gradient)
                for gradient in torch.autograd.grad(y, leaves, dual, retain_graph=True)
            ]
            results = [(gradient.primal, gradient.tangent) for gradient in unpacked]
        torch.testing.assert_close(tuple(zip(*results, strict=True)), (expected, of_tangent), **close)
        both = torch.stack((part.dy, tangent))
        batches = torch.autograd.grad(y, leaves, both, is_grads_batched=True)
        torch.testing.assert_close(batches, tuple(map(torch.stack, zip(expected, of_tangent, strict=True))), **close)

        with torch.inference_mode():
            x = part.x.clone()
        y = y_of([x, *leaves[1:]])
        torch.testing.assert_close(torch.autograd.grad(y, leaves[2], part.dy)[0], expected[2], **close)

        y = y_of_share(module, part.of(activation=None), *leaves)
        expected = torch.autograd.grad(y, leaves, part.dy, retain_graph=True)
        with torch.no_grad():
            leaves[3].add_(5.0)  # the bias, of which no gradient takes the values
        assert all(map(torch.equal, torch.autograd.grad(y, leaves, part.dy), expected))


def counters_of_every_type(world: World) -> None:
    x = torch.randn(world.size, 4, 3, device=world.device)
    for counter in (torch.int16, torch.bfloat16, torch.float64):
        for momentum in (0.1, None):
            exact = nn.BatchNorm1d(3, momentum=momentum, device=world.device)
            module = triton_norm.SyncBatchNorm(3, momentum=momentum, device=world.device)
            for each in (exact, module):
                each.num_batches_tracked = torch.tensor(2, dtype=counter, device=world.device)
            exact(x.flatten(0, 1))
            module(x[world.rank])
            for name, buffer in module.named_buffers():
                torch.testing.assert_close(buffer, getattr(exact, name))
