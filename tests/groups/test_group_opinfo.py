"""The inputs that PyTorch's own tests have for group_norm, instance_norm and their layers, through this library."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.group_norms import PATHS

_INTERNAL = "torch.testing._internal"
pytest.importorskip("expecttest", reason="torch's own tests need it")
OP_DB = pytest.importorskip(f"{_INTERNAL}.common_methods_invocations").op_db
MODULE_DB = pytest.importorskip(f"{_INTERNAL}.common_modules").module_db

OPS = {op.name: op for op in OP_DB if op.name in ("nn.functional.group_norm", "nn.functional.instance_norm")}
MODULES = {info.name: info for info in MODULE_DB if info.name.startswith(("nn.GroupNorm", "nn.InstanceNorm"))}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def copied(value):
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def stepped(function, input, args, kwargs, state=()):
    """Returns y, the gradients of all that require one, and the running statistics after the call."""
    input, kwargs = copied(input), {name: copied(value) for name, value in kwargs.items()}
    y = function(input, *args, **kwargs)
    tensors = [value for value in (input, *kwargs.values(), *state) if isinstance(value, Tensor)]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    dy = torch.cos(torch.arange(y.numel(), dtype=y.dtype, device=y.device)).view(y.shape)
    moved = [tensor.detach().clone() for tensor in tensors if not tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), *moved]


@PATHS
@DTYPES
@pytest.mark.parametrize("name", OPS)
def test_functions(name, dtype, path, device):
    function = name.rpartition(".")[2]
    ours, theirs = getattr(triton_norm, function), getattr(F, function)
    samples = list(OPS[name].sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) > 5
    for sample in samples:
        call = sample.input, sample.args, sample.kwargs
        expected = stepped(theirs, *call)
        with triton_norm.backend(path):
            result = stepped(ours, *call)
            served = triton_norm.explain(ours, sample.input, *sample.args, **sample.kwargs).backend
        assert served == ("triton" if path == "auto" and sample.input.numel() else "torch")
        torch.testing.assert_close(result, expected, equal_nan=True, **TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPS)
def test_errors(name):
    function = getattr(triton_norm, name.rpartition(".")[2])
    for wrong in OPS[name].error_inputs("cpu") if OPS[name].error_inputs_func else ():
        sample = wrong.sample_input
        for path in ("auto", "torch", "triton"):
            with triton_norm.backend(path), pytest.raises(wrong.error_type):
                function(sample.input, *sample.args, **sample.kwargs)


@PATHS
@DTYPES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_layers(name, training, dtype, path, device):
    info = MODULES[name]
    for arguments in info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training):
        options = arguments.constructor_input
        theirs = info.module_cls(*options.args, **options.kwargs, device=device, dtype=dtype).train(training)
        ours = copy.deepcopy(theirs)
        triton_norm.convert(ours)
        assert type(ours) is getattr(triton_norm, name.removeprefix("nn."))
        (x,), result = arguments.forward_input.args, {}
        for library, module in (("ours", ours), ("theirs", theirs)):
            with triton_norm.backend(path):
                result[library] = stepped(module, x, (), {}, [*module.parameters(), *module.buffers()])
        torch.testing.assert_close(result["ours"], result["theirs"], **TOLERANCE[dtype])


def test_constructors():
    for info in MODULES.values():
        if info.module_error_inputs_func is None:
            continue
        kind = getattr(triton_norm, info.name.removeprefix("nn."))
        for wrong in info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            options = wrong.module_error_input.constructor_input
            with pytest.raises(wrong.error_type, match=wrong.error_regex):
                kind(*options.args, **options.kwargs)
    assert issubclass(triton_norm.GroupNorm, nn.GroupNorm)
