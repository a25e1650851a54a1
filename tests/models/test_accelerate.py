"""Modules with accelerate's hooks, by which a model follows a device_map: a forward on the module itself, each."""

import copy
import functools
import types

import pytest
import torch
from torch import Tensor, nn

import triton_norm
from triton_norm import modules

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

NORMS = {"0": modules.LayerNorm, "2": modules.RMSNorm, "3": modules.BatchNorm1d}


class Counted(hooks.ModelHook):
    """Counts the calls that it goes before and after."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def pre_forward(self, module, *arguments, **named):
        self.before += 1
        return arguments, named

    def post_forward(self, module, output):
        self.after += 1
        return output


def model_of(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.BatchNorm1d(8))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.to(device).eval()


def follow(model: nn.Module, device: str) -> None:
    place = 0 if device == "cuda" else device
    accelerate.dispatch_model(model, device_map={"": place}, force_hooks=True, main_device=place)


def count(model: nn.Module, device: str) -> None:
    for module in model:
        hooks.add_hook_to_module(module, Counted())


def count_and_follow(model: nn.Module, device: str) -> None:
    count(model, device)
    for module in model:
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device=device), append=True)


HOOKING = pytest.mark.parametrize("hook", [follow, count, count_and_follow])


@pytest.fixture
def computes(launched, device):
    """Checks a model's results, and its number of launches."""
    x = torch.randn(6, 8, device=device)
    expected = model_of(device)(x)

    def check(model: nn.Module, launches: int) -> None:
        launched.clear()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert len(launched) == launches, launched

    return check


def own_forward(module: nn.Module):
    """The class's own as the module has it, where that is bound to the module."""
    saved = vars(module).get("_old_forward", vars(module).get("forward"))
    assert saved is None or saved.__self__ is module
    return type(module).forward if saved is None else saved.__func__


def are_torchs(model: nn.Module) -> bool:
    return all(own_forward(model[int(name)]) is getattr(nn, cls.__name__).forward for name, cls in NORMS.items())


def are_ours(model: nn.Module) -> bool:
    return all(own_forward(model[int(name)]) is cls.forward for name, cls in NORMS.items())


@HOOKING
def test_hooks_before_the_conversion(hook, computes, device):
    model = model_of(device)
    hook(model, device)
    computes(model, 0)
    report = triton_norm.convert(model)
    assert (list(report.converted), report.skipped) == (list(NORMS), {})
    assert triton_norm.explain(model[0], torch.ones(6, 8, device=device)).backend == "triton"
    assert are_ours(model)
    computes(model, 3)
    assert triton_norm.revert(model) == tuple(NORMS)
    assert are_torchs(model)
    computes(model, 0)


@HOOKING
def test_hooks_after_the_conversion(hook, computes, device):
    model = model_of(device)
    triton_norm.convert(model)
    hook(model, device)
    assert are_ours(model)
    computes(model, 3)
    assert triton_norm.revert(model) == tuple(NORMS)
    assert are_torchs(model)
    computes(model, 0)


def test_a_hook_is_called_as_before(device):
    model = model_of(device)
    count(model, device)
    triton_norm.convert(model)
    model(torch.randn(6, 8, device=device))
    assert [(module._hf_hook.before, module._hf_hook.after) for module in model] == [(1, 1)] * 4


@HOOKING
@pytest.mark.parametrize("before", [True, False], ids=["hooked before", "hooked after"])
def test_without_its_hooks_a_converted_model_stays_so(hook, before, computes, device):
    model = model_of(device)
    steps = [functools.partial(hook, model, device), functools.partial(triton_norm.convert, model)]
    for take in steps if before else reversed(steps):
        take()
    hooks.remove_hook_from_module(model, recurse=True)
    assert are_ours(model)
    computes(model, 3)
    assert triton_norm.revert(model) == tuple(NORMS)
    assert are_torchs(model)
    computes(model, 0)


@HOOKING
def test_a_model_that_once_had_hooks_converts(hook, computes, device):
    """accelerate leaves each module's own bound forward on it."""
    model = model_of(device)
    hook(model, device)
    hooks.remove_hook_from_module(model, recurse=True)
    report = triton_norm.convert(model)
    assert (list(report.converted), report.skipped) == (list(NORMS), {})
    computes(model, 3)
    hook(model, device)
    computes(model, 3)
    triton_norm.revert(model)
    computes(model, 0)


def test_a_copy_has_its_own(computes, device):
    model = model_of(device)
    follow(model, device)
    triton_norm.convert(model)
    other = copy.deepcopy(model)
    triton_norm.revert(model)
    assert are_ours(other)
    assert are_torchs(model)
    computes(other, 3)
    computes(model, 0)


def test_weights_that_are_there_only_during_a_call(computes, device):
    model = model_of(device)
    accelerate.cpu_offload(model, execution_device=torch.device(device), offload_buffers=True)
    assert model[0].weight.is_meta
    assert list(triton_norm.convert(model).converted) == list(NORMS)
    computes(model, 3)
    assert model[0].weight.is_meta
    triton_norm.revert(model)
    computes(model, 0)


@pytest.mark.parametrize("offloaded", [False, True], ids=["in place", "offloaded"])
def test_llama(offloaded, launched, device):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = transformers.LlamaModel(config).to(device).eval()
    ids = torch.randint(0, 9, (2, 4), device=device)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        if offloaded:
            accelerate.cpu_offload(model, execution_device=torch.device(device))
        else:
            follow(model, device)
        assert len(triton_norm.convert(model).converted) == 5
        actual = model(ids).last_hidden_state
        assert launched == ["rows_forward_kernel"] * 5
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        triton_norm.revert(model)
        assert torch.equal(model(ids).last_hidden_state, expected)
    assert len(launched) == 5


def doubled(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * x


def by_a_function(module: nn.Module) -> None:
    module.forward = lambda x: 2 * x


def by_a_method(module: nn.Module) -> None:
    module.forward = types.MethodType(doubled, module)


def by_a_partial(module: nn.Module) -> None:
    module.forward = functools.partial(doubled, module)


def by_a_name_of_accelerates(module: nn.Module) -> None:
    module.forward = module._old_forward = types.MethodType(doubled, module)


def by_anothers(module: nn.Module) -> None:
    module.forward = nn.LayerNorm(8, bias=False).double().forward


REPLACING = pytest.mark.parametrize(
    "replace", [by_a_function, by_a_method, by_a_partial, by_a_name_of_accelerates, by_anothers]
)


@REPLACING
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_any_other_forward_on_a_module_stays(replace, hooked, launched):
    module, x = nn.LayerNorm(8), torch.randn(3, 8, dtype=torch.float64)
    replace(module)
    if hooked:
        hooks.add_hook_to_module(module, Counted())
    expected, before = module(x), dict(vars(module))
    report = triton_norm.convert(module)
    assert (report.converted, report.skipped) == ({}, {"": "its forward was replaced on the module itself"})
    assert type(module) is nn.LayerNorm
    assert vars(module) == before
    assert torch.equal(module(x), expected)
    assert not launched


@REPLACING
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_revert_leaves_a_forward_that_came_since(replace, hooked):
    module, x = nn.LayerNorm(8), torch.randn(3, 8, dtype=torch.float64)
    triton_norm.convert(module)
    replace(module)
    if hooked:
        hooks.add_hook_to_module(module, Counted())
    expected = module(x)
    assert triton_norm.revert(module) == ("",)
    assert type(module) is nn.LayerNorm
    assert torch.equal(module(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("hooks_first", [True, False])
def test_a_device_map_over_two_gpus(hooks_first, launched):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    model, x = model_of("cuda"), torch.randn(6, 8, device="cuda")
    expected = model(x)
    device_map = {"0": 0, "1": 1, "2": 1, "3": 0}
    steps = [
        functools.partial(accelerate.dispatch_model, model, device_map),
        functools.partial(triton_norm.convert, model),
    ]
    for take in steps if hooks_first else reversed(steps):
        take()
    for _ in range(2):
        y = model(x)
        torch.testing.assert_close(y.to(0), expected, rtol=1e-5, atol=1e-5)
    assert len(launched) == 6
    y.sum().backward()
    assert [module.weight.grad.device.index for module in model] == [0, 1, 1, 0]
