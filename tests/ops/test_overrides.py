"""Calls that a mode or an argument takes by the protocol of __torch_function__, as torch.nn.functional lets them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

import triton_norm
from support.every_op import PATHS

X = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
FUNCTIONS = {
    "layer_norm": (((2,),), {"weight_offset": 1.0}),
    "rms_norm": (((2,),), {"out_dtype": torch.float64}),
    "batch_norm": ((torch.zeros(2), torch.ones(2)), {"activation": "relu"}),
    "group_norm": ((1,), {"activation": "relu"}),
    "instance_norm": ((), {"activation": "relu"}),
}
"""Arguments of torch's behind the input, and an option that is ours, by name."""
"""Launches of a forward that takes more than one."""
EVERY_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)


class Negated(TorchFunctionMode):
    """Negates the norms, whosever they are, and remembers how they were called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in FUNCTIONS and function.__module__ != "torch._C":
            self.calls.append((function, args, kwargs))
            return -result
        return result


def arguments_of(name, device):
    inputs, option = FUNCTIONS[name]
    inputs = [value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs]
    if "weight_offset" in option:
        option = option | {"weight": torch.ones(2, device=device)}
    x = X[None] if name == "instance_norm" else X  # a sample of two channels
    return (x.to(device), *inputs), option


@PATHS
@EVERY_FUNCTION
def test_a_mode_is_handed_torchs_function_for_torchs_arguments(name, path, device):
    arguments, _ = arguments_of(name, device)
    ours, theirs = getattr(triton_norm, name), getattr(F, name)
    with triton_norm.backend("auto" if path == "triton" else path):
        expected = ours(*arguments)
        with Negated() as mode:
            actual = ours(*arguments)
        with Negated() as torchs:
            exact = theirs(*arguments)
    torch.testing.assert_close(actual, -expected)
    torch.testing.assert_close(actual, exact)
    assert [function for function, _, _ in mode.calls] == [theirs]
    assert str(mode.calls) == str(torchs.calls)


@PATHS
@EVERY_FUNCTION
def test_a_mode_is_handed_ours_for_ours(name, path, device):
    """And when it calls that, the call goes where it would have gone."""
    arguments, option = arguments_of(name, device)
    ours = getattr(triton_norm, name)
    with triton_norm.backend("auto" if path == "triton" else path):
        expected = ours(*arguments, **option)
        with Negated() as mode:
            assert torch.equal(ours(*arguments, **option), -expected)
    assert [function for function, _, _ in mode.calls] == [ours]


@pytest.mark.parametrize("module", ["LayerNorm", "RMSNorm", "BatchNorm1d", "GroupNorm", "InstanceNorm1d"])
def test_modules_too(module, device):
    options = (1, 2) if module == "GroupNorm" else (2,)
    norm = getattr(triton_norm, module)(*options, device=device).eval()
    expected = norm(X.to(device))
    with Negated():
        torch.testing.assert_close(norm(X.to(device)), -expected)


def test_the_innermost_mode_comes_first(device):
    with Negated() as outer, Negated() as inner:
        result = triton_norm.rms_norm(X.to(device), (2,))
    assert len(outer.calls) == len(inner.calls) == 1
    torch.testing.assert_close(result, F.rms_norm(X.to(device), (2,)))


class Wrapper:
    """No tensor, but with a tensor's protocol."""

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        unwrapped = [value.tensor if isinstance(value, cls) else value for value in args]
        named = {name: value.tensor if isinstance(value, cls) else value for name, value in (kwargs or {}).items()}
        return "taken", function, function(*unwrapped, **named)


class Doubled(torch.Tensor):
    """A subclass of Tensor with a protocol of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return "taken", function, function(*args, **(kwargs or {}))


class Plain(torch.Tensor):
    """A subclass that takes nothing."""


@pytest.mark.parametrize("kind", [Wrapper, lambda tensor: tensor.as_subclass(Doubled)], ids=["object", "subclass"])
@pytest.mark.parametrize("position", ["input", "weight", "residual"])
@EVERY_FUNCTION
def test_arguments_take_calls(name, position, kind, device):
    ours, theirs = getattr(triton_norm, name), getattr(F, name)
    (x, *rest), _ = arguments_of(name, device)
    options = {"weight": torch.tensor([2.0, 3.0], device=device)}
    if position == "residual":
        options["residual"] = x + 1
    expected = ours(x, *rest, **options)
    if position == "input":
        x = kind(x)
    else:
        options[position] = kind(options[position])
    taken, function, actual = ours(x, *rest, **options)
    assert taken == "taken"
    assert function is (ours if position == "residual" else theirs)
    torch.testing.assert_close(actual, expected)


@EVERY_FUNCTION
def test_a_subclass_without_a_protocol_goes_to_torch_as_before(name, device):
    (x, *rest), option = arguments_of(name, device)
    result = getattr(triton_norm, name)(x.as_subclass(Plain), *rest, **option)
    torch.testing.assert_close(torch.as_tensor(result), getattr(triton_norm, name)(x, *rest, **option))


@pytest.mark.parametrize("how", ["context", "default"])
@EVERY_FUNCTION
def test_a_default_device_keeps_no_call_from_the_kernels(name, how, device, guard):
    arguments, option = arguments_of(name, device)
    ours = getattr(triton_norm, name)
    with triton_norm.backend("triton"):
        if how == "context":
            with torch.device(device):
                assert triton_norm.explain(ours, *arguments, **option).backend == "triton"
                ours(*arguments, **option)
        else:
            torch.set_default_device(device)
            try:
                ours(*arguments, **option)
            finally:
                torch.set_default_device(None)
    assert guard is None or len(guard.launches) == 1


@EVERY_FUNCTION
def test_backend_triton_says_who_takes_a_call(name, device):
    arguments, option = arguments_of(name, device)
    ours = getattr(triton_norm, name)
    with triton_norm.backend("triton"), Negated(), pytest.raises(RuntimeError, match=r"can't serve.*mode Negated"):
        ours(*arguments)
    subclass = arguments[0].as_subclass(Doubled)
    with triton_norm.backend("triton"), pytest.raises(RuntimeError, match=r"can't serve.*Doubled"):
        ours(subclass, *arguments[1:], **option)
    with Negated():
        assert "mode Negated" in triton_norm.explain(ours, *arguments).reason


@EVERY_FUNCTION
def test_torchs_own_modes_take_no_calls(name, device, guard):
    """Those of its tracers, in which everything that is exported is called."""
    arguments, option = arguments_of(name, device)
    with triton_norm.backend("triton"), BaseTorchFunctionMode():
        getattr(triton_norm, name)(*arguments, **option)
    assert guard is None or len(guard.launches) == 1


def test_what_is_wrong_is_an_error_to_who_calls_torch(device):
    with Negated(), pytest.raises(RuntimeError, match="normalized_shape"):
        triton_norm.layer_norm(X.to(device), (3,))


@pytest.mark.parametrize("mode", [Negated, lambda: torch.device("cpu")], ids=["mode", "device"])
def test_under_compile(mode, device):
    x = X.to(device)

    def function(x):
        return triton_norm.rms_norm(x, (2,)) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with mode():
        torch.testing.assert_close(compiled(x), function(x))


def test_a_hugging_face_norm_leaves_a_call_to_its_own_forward(device):
    transformers = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = transformers.LlamaRMSNorm(2).to(device)
    model = nn.Sequential(norm)
    triton_norm.convert(model)
    names = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    with Watched():
        model(X.to(device))
    assert "rsqrt" in names
