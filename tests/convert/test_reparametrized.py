"""Converted norms whose weight torch's utilities compute, exchange or take away: as of the class that was converted."""

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, stateless

import triton_norm as tn
from support.pairwise import pairwise
from support.steps import saved_and_loaded

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
gemma3n = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
convnext = pytest.importorskip("transformers.models.convnext.modeling_convnext")
t5 = pytest.importorskip("transformers.models.t5.modeling_t5")

pytestmark = pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm|functional_call).*:FutureWarning")
SIZE = 8


class Shifted(nn.Module):
    """w → 2 w + 1."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight + 1

    def right_inverse(self, weight: Tensor) -> Tensor:
        return (weight - 1) / 2


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Shifted())


def parametrized_twice(module: nn.Module) -> None:
    parametrized(module)
    parametrize.register_parametrization(module, "weight", nn.Softplus())


def by_weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module, dim=None)


def by_spectral_norm(module: nn.Module) -> None:
    parametrizations.spectral_norm(module)


def by_a_hook_of_weight_norm(module: nn.Module) -> None:
    torch.nn.utils.weight_norm(module, dim=None)


def by_a_hook_of_spectral_norm(module: nn.Module) -> None:
    torch.manual_seed(0)
    torch.nn.utils.spectral_norm(module)


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.5)


def pruned_for_good(module: nn.Module) -> None:
    pruned(module)
    prune.remove(module, "weight")


def assigned(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.linspace(1, 2, SIZE, device=module.weight.device))


def exchanged(module: nn.Module) -> None:
    other = nn.Parameter(torch.linspace(1, 2, SIZE, device=module.weight.device))
    torch.utils.swap_tensors(module.weight, other)


def by_data(module: nn.Module) -> None:
    module.weight.data = torch.linspace(1, 2, SIZE, device=module.weight.device)


def narrowed(module: nn.Module) -> None:
    module.half()


PARAMETRIZED = [parametrized, parametrized_twice, by_weight_norm, by_spectral_norm]
HOOKED = [by_a_hook_of_weight_norm, by_a_hook_of_spectral_norm, pruned]
SWAPPED = [pruned_for_good, assigned, exchanged, by_data, narrowed]
ANY = pytest.mark.parametrize("change", [*PARAMETRIZED, *HOOKED, *SWAPPED])
CLASSES = {
    cls.__name__: cls
    for cls in (
        *(llama.LlamaRMSNorm, gemma.GemmaRMSNorm, gemma3n.Gemma3nRMSNorm, t5.T5LayerNorm, convnext.ConvNextLayerNorm),
        *(nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d),
    )
}
NAMED = pytest.mark.parametrize("name", CLASSES)


def made(name: str, device: str) -> nn.Module:
    module = CLASSES[name](SIZE)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(device)


def pair(name: str, device: str, change: Callable[[nn.Module], None], before: bool = False) -> list[nn.Module]:
    """One converted and one not, each changed, either before it was converted or after."""
    theirs = made(name, device)
    ours = copy.deepcopy(theirs)
    if before:
        change(ours)
    assert list(tn.convert(ours).converted) == [""]
    if not before:
        change(ours)
    change(theirs)
    return [ours, theirs]


def stepped(module: nn.Module, backend: str) -> list[Tensor]:
    """An output, the gradients of all parameters, and an output after a step of SGD."""
    torch.manual_seed(1)
    parameters = list(module.parameters())
    x = torch.randn(6, SIZE).to(parameters[0])
    with tn.backend(backend):
        y = module(x)
        grads = torch.autograd.grad(y.square().sum(), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(0.01 * grad)
        return [y, *grads, module(x)]


def assert_alike(ours: nn.Module, theirs: nn.Module) -> None:
    coarse = max(torch.finfo(parameter.dtype).eps for parameter in theirs.parameters())
    ours, theirs = stepped(ours, "triton"), stepped(theirs, "torch")
    torch.testing.assert_close(ours, theirs, rtol=64 * coarse, atol=64 * coarse)


@NAMED
@ANY
def test_after_the_conversion(change, name, device, guard):
    ours, theirs = pair(name, device, change)
    assert_alike(ours, theirs)
    assert guard is None or len(guard.launches) >= 3


@NAMED
@pytest.mark.parametrize("change", [*HOOKED, *SWAPPED])
def test_before_the_conversion(change, name, device, guard):
    ours, theirs = pair(name, device, change, before=True)
    assert_alike(ours, theirs)
    assert guard is None or len(guard.launches) >= 3


@NAMED
@pytest.mark.parametrize("change", PARAMETRIZED)
def test_parametrized_before_the_conversion_it_is_skipped(change, name, device):
    module = made(name, device)
    change(module)
    assert tn.convert(module).skipped == {"": "parametrized"}


@NAMED
@ANY
def test_a_deep_copy(change, name, device):
    ours, theirs = pair(name, device, change)
    if change in HOOKED:  # torch can't copy a weight that was computed, until it is computed without gradients
        for module in (ours, theirs):
            with torch.no_grad():
                module(torch.randn(6, SIZE, device=device))
    other = copy.deepcopy(ours)
    assert type(other) is type(ours)
    assert parametrize.is_parametrized(other) == parametrize.is_parametrized(theirs)
    assert {key: tensor.shape for key, tensor in other.state_dict().items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }
    assert_alike(other, copy.deepcopy(theirs))
    assert_alike(ours, theirs)


def pickled(module: nn.Module, protocol: int) -> nn.Module:
    return pickle.loads(pickle.dumps(module, protocol))


WAYS: list[Callable[[nn.Module], nn.Module]] = [
    *(functools.partial(pickled, protocol=protocol) for protocol in (0, 2, 5)),
    saved_and_loaded,
    copy.copy,
]


@NAMED
@pytest.mark.parametrize("change", PARAMETRIZED)
def test_a_parametrized_module_refuses_to_be_pickled(change, name, device):
    for module in pair(name, device, change):
        for copied in WAYS:
            with pytest.raises(RuntimeError, match="Serialization of parametrized modules is only supported through"):
                copied(module)


@NAMED
@pytest.mark.parametrize("change", [*HOOKED, *SWAPPED])
def test_what_can_be_pickled(change, name, device):
    originals = pair(name, device, change)
    with torch.no_grad():
        expected = originals[1](torch.ones(6, SIZE).cumsum(1).to(next(originals[1].parameters())))
    for copied in WAYS:
        ours, theirs = map(copied, originals)
        for module, backend in ((ours, "triton"), (theirs, "torch")):
            with torch.no_grad(), tn.backend(backend):
                y = module(torch.ones(6, SIZE).cumsum(1).to(expected))
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        tn.revert(ours)
        assert type(ours) is type(theirs)


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "T5LayerNorm", "LayerNorm"])
@pytest.mark.parametrize("change", PARAMETRIZED)
def test_a_parametrization_comes_off(change, name, device):
    ours, theirs = pair(name, device, change)
    with pytest.raises(RuntimeError, match=f"'' was converted, but is a Parametrized{name} now"):
        tn.revert(ours)
    for module in (ours, theirs):
        parametrize.remove_parametrizations(module, "weight")
    assert_alike(ours, theirs)
    assert tn.revert(copy.deepcopy(ours)) == tn.revert(ours) == ("",)
    assert type(ours) is type(theirs)


@NAMED
@pytest.mark.parametrize("call", [torch.func.functional_call, stateless.functional_call])
def test_called_with_other_parameters(call, name, device, guard):
    ours, theirs = pair(name, device, lambda module: None)
    x = torch.randn(6, SIZE, device=device)
    weight = torch.linspace(1, 2, SIZE, device=device).requires_grad_()
    results = []
    for module, backend in ((ours, "triton"), (theirs, "torch")):
        with tn.backend(backend):
            y = call(module, {"weight": weight}, (x,))
        results.append((y, *torch.autograd.grad(y.square().sum(), weight)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert guard is None or len(guard.launches) >= 2


@NAMED
def test_on_the_meta_device(name, device):
    ours = made(name, device).to("meta")
    assert list(tn.convert(ours).converted) == [""]
    assert ours(torch.randn(6, SIZE, device="meta")).is_meta
    with pytest.raises(RuntimeError, match=r"device|meta"):
        ours(torch.randn(6, SIZE, device=device))
    with pytest.raises(RuntimeError, match="the input is on meta"), tn.backend("triton"):
        ours(torch.randn(6, SIZE, device="meta"))


def deleted(module: nn.Module) -> None:
    del module.weight


def of_none(module: nn.Module) -> None:
    module.weight = None


@pairwise({"take": [deleted, of_none], "backend": ["auto", "torch"], "name": list(CLASSES)})
def test_a_weight_that_is_missing(take, backend, name, device):
    """The converted forward does without a weight if the class's own does; else both raise the same error."""
    results = []
    for module in pair(name, device, take):
        torch.manual_seed(0)
        try:
            with tn.backend(backend):
                results.append(module(torch.randn(6, SIZE, device=device)))
        except (AttributeError, TypeError) as error:
            results.append((type(error), str(error)))
    ours, theirs = results
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert take is of_none
        torch.testing.assert_close(ours, theirs)
