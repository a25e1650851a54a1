"""Finds norms that the code of a class calls as functions, and modulations, from its bytecode, without running it."""

import dis
import inspect
import itertools
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_NAMES: dict[Any, str] = {
    F.layer_norm: "torch.nn.functional.layer_norm",
    F.rms_norm: "torch.nn.functional.rms_norm",
    F.batch_norm: "torch.nn.functional.batch_norm",
    F.group_norm: "torch.nn.functional.group_norm",
    F.instance_norm: "torch.nn.functional.instance_norm",
    torch.layer_norm: "torch.layer_norm",
    torch.rms_norm: "torch.rms_norm",
    torch.batch_norm: "torch.batch_norm",
    torch.group_norm: "torch.group_norm",
    torch.instance_norm: "torch.instance_norm",
    torch.native_layer_norm: "torch.native_layer_norm",
    torch.native_batch_norm: "torch.native_batch_norm",
    torch.native_group_norm: "torch.native_group_norm",
    getattr(torch, "_transformer_encoder_layer_fwd", None): "torch's fused encoder layer, in evaluation,",
}


_FUSED = "rmsnorm_weight"
"""mamba_ssm's fused kernel takes the weight of the norm under this name."""
_FUSED_NAME = "mamba_ssm's fused scan, in training, with its norm's weight,"


def norms_called_by(cls: type[Any]) -> tuple[str, ...]:
    """Returns the names of norms that the class's methods refer to, by their globals and modules found there.

    Among them are fused kernels that are passed a norm's weight: these don't call the norm.
    """
    codes = [method.__code__ for method in _methods(cls)]
    fused = any(isinstance(constant, tuple) and _FUSED in constant for code in codes for constant in code.co_consts)
    result = {
        _NAMES[value]: None
        for function in _methods(cls)
        for value in _named(function.__code__, function.__globals__)
        if isinstance(value, (FunctionType, type(torch.layer_norm))) and value in _NAMES
    }
    return (*result, _FUSED_NAME) if fused else tuple(result)


def modulations_by(cls: type[Any]) -> tuple[str, ...]:
    """Returns the names of local variables that the class's methods add to 1, if "scale" is a part of the name."""
    return tuple(dict.fromkeys(name for function in _methods(cls) for name in _scales(function.__code__)))


def _scales(code: CodeType) -> Iterator[str]:
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG")]
    for place, (one, scale) in enumerate(itertools.pairwise(instructions)):
        is_one = one.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and type(one.argval) in (int, float) and one.argval == 1
        if is_one and scale.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and "scale" in str(scale.argval):
            operators = (each for each in instructions[place + 2 :] if each.opname.startswith("BINARY_"))
            operator = next((each for each in operators if not _is_subscript(each)), None)
            if operator is not None and (operator.opname == "BINARY_ADD" or operator.argrepr == "+"):
                yield str(scale.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _scales(constant)


def _is_subscript(instruction: dis.Instruction) -> bool:
    return instruction.opname in ("BINARY_SUBSCR", "BINARY_SLICE") or instruction.argrepr == "[]"


def _methods(cls: type[Any]) -> list[FunctionType]:
    return [
        inspect.unwrap(method)
        for base in cls.__mro__
        if base not in (object, nn.Module)
        for method in vars(base).values()
        if isinstance(method, FunctionType)
    ]


def _named(code: CodeType, variables: dict[str, Any]) -> Iterator[Any]:
    """Yields the values of global names, and of attributes looked up in modules from there, such as F.layer_norm."""
    value: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            value = variables.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = vars(value).get(instruction.argval)  # a lazy module's getattr would import, and may raise
        elif instruction.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            value = None
        yield value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named(constant, variables)
