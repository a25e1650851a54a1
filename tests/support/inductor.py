"""The code that Inductor generates, with Triton kernels on every machine.

Without a GPU the code is generated only, and the graph that it was generated from is run by torch, node by node.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from triton_norm.tuning.limits import INTERPRETED

Function = Callable[..., Any]


class _Interpreted:
    """Stands for the module that Inductor makes of the code of a graph."""

    __file__ = "not written"

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.graph = graph

    def call(self, arguments: Any) -> Any:
        return torch.fx.Interpreter(self.graph).run(*arguments)


@contextlib.contextmanager
def generated() -> Iterator[list[str]]:
    """Yields the code of each graph that is compiled inside, in order: a backward's comes after its forward's."""
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []

    def to_module(graph: Any) -> _Interpreted:
        codes.append(graph.codegen()[0].value)
        return _Interpreted(graph.module)

    with contextlib.ExitStack() as patched:
        patched.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        if INTERPRETED:
            patched.enter_context(torch._inductor.config.patch(cpu_backend="triton"))
            patched.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", return_value=""))
            patched.enter_context(mock.patch.object(GraphLowering, "compile_to_module", to_module))
        else:
            patched.enter_context(mock.patch.object(GraphLowering, "save_output_code", codes.append))
        torch._dynamo.reset()
        yield codes
        torch._dynamo.reset()


def launches(code: str) -> int:
    """Returns how many kernels of Inductor's the code starts."""
    return len(re.findall(r"^ *triton_\w+\.run\(", code, re.MULTILINE))


def operators(code: str) -> set[str]:
    """Returns the operators of this library that the code calls."""
    return set(re.findall(r"^[^#\n]*\btorch\.ops\.triton_norm\.(\w+)\.default\(", code, re.MULTILINE))


def stepped(function: Function, tensors: list[Tensor], training: bool) -> list[Tensor]:
    """Returns the function's results, and in training the gradients of the tensors that it uses, for gradients that
    are the same in each call."""
    leaves = [tensor.detach().requires_grad_(training) for tensor in tensors]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not training:
        return outputs
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    result = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    return [y.detach() for y in outputs] + [gradient for gradient in result if gradient is not None]
