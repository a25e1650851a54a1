"""Norms whose class or forward is patched before or after convert, and conversions that fail halfway."""

import copy
import functools
import types
import weakref

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.pairwise import pairwise
from support.steps import state_of
from triton_norm import functional
from triton_norm.converting import calls, convert, hugging_face

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
LlamaRMSNorm = llama.LlamaRMSNorm

# Dynamo's own, on every autograd.Function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be inst:DeprecationWarning")


def for_a_gpu(error: Exception):
    """A forward as of a library of kernels."""

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if not hidden_states.is_cuda:
            raise error
        return hidden_states

    return forward


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)\nmore"),
        AssertionError("x must be on a GPU"),
        NotImplementedError("no CPU kernel"),
        KeyError("cpu"),
        ImportError("no such package"),
        RuntimeError("no driver"),
        Exception("anything"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_class_patched_for_a_gpu_is_skipped_with_what_it_raised(error, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", for_a_gpu(error))
    model = nn.Sequential(nn.LayerNorm(4), LlamaRMSNorm(4))
    before = state_of(model[1])
    report = tn.convert(model)
    assert list(report.converted) == ["0"]
    (said, *_) = str(error).split("\n")
    reason = f"its version of LlamaRMSNorm could not be tried on a few numbers, and raised {type(error).__name__}: "
    assert report.skipped == {"1": reason + said}
    assert len(str(report).splitlines()) == 4
    assert state_of(model[1]) == before


def test_an_interrupt_is_no_reason_to_skip(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", for_a_gpu(KeyboardInterrupt()))
    model = nn.Sequential(nn.LayerNorm(4), LlamaRMSNorm(4))
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        tn.convert(model)
    assert state_of(model) == before


def without_names(self, *inputs, **named):
    (x,) = (*inputs, *named.values())
    return self.weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, True) + self.variance_epsilon)).to(x)


def test_a_patch_that_computes_the_same_is_converted(monkeypatch, device):
    """Whatever it calls its argument; by keyword then is its own forward's."""
    hugging_face._counterpart.cache_clear()
    monkeypatch.setattr(LlamaRMSNorm, "forward", without_names)
    module, x = LlamaRMSNorm(8).to(device), torch.randn(3, 8, device=device)
    expected = module(x)
    assert list(tn.convert(module).converted) == [""]
    with tn.backend("triton"):
        torch.testing.assert_close(module(x), expected)
        with pytest.raises(RuntimeError, match="own forward computes something else"):
            module(x=x)
    for named in ({"x": x}, {"hidden_states": x}, {"inputs": x}):
        assert torch.equal(module(**named), expected)
    assert tn.explain(module, x=x).backend == "torch"
    tn.revert(module)
    hugging_face._counterpart.cache_clear()


def test_a_class_patched_after_convert_changes_nothing_that_the_kernels_compute(monkeypatch, device):
    for module in (LlamaRMSNorm(8).to(device), nn.LayerNorm(8, device=device)):
        x = torch.randn(3, 8, device=device)
        tn.convert(module)
        with tn.backend("triton"):
            expected = module(x)
            original = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("triton_norm"))
            monkeypatch.setattr(original, "forward", lambda self, x: x)
            assert torch.equal(module(x), expected)
        tn.revert(module)
        assert torch.equal(module(x), x)


def test_more_arguments_than_are_known_go_to_the_classes_own_forward(monkeypatch, device):
    module, x = LlamaRMSNorm(8).to(device), torch.randn(3, 8, device=device)
    tn.convert(module)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden_states, residual=None: hidden_states + residual)
    assert torch.equal(module(x, residual=x), 2 * x)
    assert torch.equal(module(hidden_states=x, residual=x), 2 * x)
    assert tn.explain(module, x, x).backend == "torch"
    with tn.backend("triton"), pytest.raises(RuntimeError, match="own forward computes something else"):
        module(x, x)


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        (nn.LayerNorm(4), "input", (3, 4)),
        (nn.RMSNorm(4), "x", (3, 4)),
        (nn.BatchNorm1d(4), "input", (3, 4)),
        (nn.BatchNorm2d(4), "input", (3, 4, 2, 2)),
        (nn.SyncBatchNorm(4), "input", (3, 4)),
    ],
)
def test_torchs_norms_take_their_argument_by_its_name(module, name, shape, device, guard):
    module = copy.deepcopy(module).to(device)
    tn.convert(module)
    x = torch.randn(shape, device=device)
    with tn.backend("triton"):
        assert torch.equal(module(**{name: x}), module(x))
    assert guard is None or len(guard.launches) >= 2
    assert tn.explain(module, **{name: x}) == tn.explain(module, x)
    for wrong in ({"nonsense": x}, {name: x, "nonsense": x}):
        with pytest.raises(TypeError, match=r"nonsense|missing"):
            module(**wrong)


class Lazy(types.ModuleType):
    """Imports any attribute that is looked up, which fails, as packages of many optional parts do."""

    def __getattr__(self, name: str):
        raise RuntimeError("Failed to import")


def test_a_lazy_package_in_the_code_of_a_model(monkeypatch):
    monkeypatch.setitem(globals(), "package", Lazy("package"))

    class Calling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(package.rms_norm(x), (4,))  # noqa: F821

    assert calls.norms_called_by(Calling) == ("torch.nn.functional.layer_norm",)


def by_wraps(module: nn.Module) -> None:
    forward = module.forward

    @functools.wraps(forward)
    def wrapper(*inputs, **named):
        return forward(*inputs, **named)

    module.forward = wrapper


def by_a_bound_wrapper(module: nn.Module) -> None:
    forward = module.forward
    module.forward = types.MethodType(lambda self, *inputs: forward(*inputs), module)


def by_a_partial(module: nn.Module) -> None:
    module.forward = functools.partial(module.forward)


def by_a_weak_method(module: nn.Module) -> None:
    forward = weakref.WeakMethod(module.forward)
    module.forward = lambda x: forward()(x)


class Caller:
    __slots__ = ("forward",)

    def __init__(self, module: nn.Module) -> None:
        self.forward = module.forward

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def by_an_object(module: nn.Module) -> None:
    module.forward = Caller(module)


def by_compiling(module: nn.Module) -> None:
    torch._dynamo.reset()
    module.forward = torch.compile(module.forward, backend="eager", fullgraph=True)


def by_accelerate(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def by_accelerate_after_another(module: nn.Module) -> None:
    by_wraps(module)
    by_accelerate(module)


def by_another_after_accelerate(module: nn.Module) -> None:
    by_accelerate(module)
    by_wraps(module)


WRAPPERS = [
    *(by_wraps, by_a_bound_wrapper, by_a_partial, by_a_weak_method, by_an_object, by_compiling),
    *(by_accelerate, by_accelerate_after_another, by_another_after_accelerate),
]
MODULES = pytest.mark.parametrize(
    "make",
    [
        nn.LayerNorm,
        nn.RMSNorm,
        nn.BatchNorm1d,
        nn.SyncBatchNorm,
        LlamaRMSNorm,
        pytest.importorskip("transformers.models.convnext.modeling_convnext").ConvNextLayerNorm,
    ],
)


@pytest.fixture
def ours(monkeypatch):
    """Calls of this library's functions so far."""
    names = []
    for name in ("normalize_rows", "normalize_channels"):
        function = getattr(functional, name)

        def noted(*args, name=name, function=function, **named):
            names.append(name)
            return function(*args, **named)

        monkeypatch.setattr(functional, name, noted)
    return names


@MODULES
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.unguarded
def test_what_wraps_a_forward_stays_and_calls_the_classes_own_after_revert(wrap, make, ours, device):
    module, x = make(4).to(device).eval(), torch.randn(2, 4, device=device)
    expected = module(x)
    tn.convert(module)
    wrap(module)
    forward = vars(module)["forward"]
    torch.testing.assert_close(module(x), expected)
    assert len(ours) == 1
    assert tn.revert(module) == ("",)
    assert type(module) is make
    assert vars(module)["forward"] is forward
    assert torch.equal(module(x), expected)
    assert len(ours) == 1


@pairwise({"wrap": WRAPPERS, "make": [nn.BatchNorm1d, tn.BatchNorm1d], "first": [False, True]})
@pytest.mark.unguarded
def test_what_wraps_the_forward_of_a_sync_batch_norm(wrap, first, make, ours, device):
    module, x = make(4).to(device), torch.randn(3, 4, device=device)
    expected = module(x)
    if first:
        tn.convert(module)
    tn.convert(module, sync_batch_norm=True)
    wrap(module)
    torch.testing.assert_close(module(x), expected)
    tn.revert(module)
    assert type(module) is make
    ours.clear()
    torch.testing.assert_close(module(x), expected)
    assert ours == ["normalize_channels"] * (make is tn.BatchNorm1d)


@MODULES
@pytest.mark.unguarded
def test_converted_again_once_the_wrapper_is_gone(make, ours, device):
    module, x = make(4).to(device), torch.randn(3, 4, device=device)
    before = vars(module).keys()
    tn.convert(module)
    by_wraps(module)
    tn.revert(module)
    assert tn.convert(module).skipped == {"": "its forward was replaced on the module itself"}
    del module.forward
    for _ in range(2):
        tn.convert(module)
        ours.clear()
        module(x)
        assert len(ours) == 1
        tn.revert(module)
        assert vars(module).keys() == before


class Patching(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_forward_that_torchs_class_borrows(monkeypatch, device):
    """Patches act as on torch's own class: on it, on derived classes, and after revert."""
    x = torch.randn(3, 4, device=device)
    expected = tn.LayerNorm(4, device=device)(x)
    monkeypatch.setattr(nn.LayerNorm, "forward", tn.LayerNorm.forward)
    module = nn.LayerNorm(4, device=device)
    assert torch.equal(module(x), expected)
    assert torch.equal(Patching(4, device=device)(x), 2 * expected)
    tn.convert(module)
    by_wraps(module)
    tn.revert(module)
    assert torch.equal(module(x), expected)


def refusing(number: int):
    """A __setattr__ whose call of this number raises, for the class of a module."""
    counted = []

    def refuse(self: nn.Module, name: str, value: object) -> None:
        if name == "__class__":
            counted.append(self)
            if len(counted) == number:
                raise RuntimeError("frozen")
        nn.Module.__setattr__(self, name, value)

    return refuse


def model_of_norms() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(4), LlamaRMSNorm(4), nn.BatchNorm1d(4), LlamaRMSNorm(4), nn.RMSNorm(4))
    model[0].forward = model[0].forward
    return model


@pytest.mark.parametrize("number", [1, 2])
def test_a_conversion_that_raises_midway_has_changed_nothing(number, monkeypatch):
    model = model_of_norms()
    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "__setattr__", refusing(number), raising=False)
        with pytest.raises(RuntimeError, match="frozen"):
            tn.convert(model, sync_batch_norm=True)
    assert state_of(model) == before
    assert model[0].forward.__func__ is nn.LayerNorm.forward
    assert len(tn.convert(model, sync_batch_norm=True).converted) == 5


@pytest.mark.parametrize("number", [1, 2])
def test_a_revert_that_raises_midway_has_changed_nothing(number, monkeypatch):
    model = model_of_norms()
    tn.convert(model, sync_batch_norm=True)
    by_wraps(model[4])
    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "__setattr__", refusing(number), raising=False)
        with pytest.raises(RuntimeError, match="frozen"):
            tn.revert(model)
    assert state_of(model) == before
    assert len(tn.revert(model)) == 5


@pytest.mark.parametrize("function", ["_target", "_obstacle", "_become"])
def test_a_conversion_that_fails_anywhere_has_changed_nothing(function, monkeypatch):
    for place in range(20):
        model = model_of_norms()
        before, genuine, count = state_of(model), getattr(convert, function), []

        def failing(*arguments, place=place, genuine=genuine, count=count, **named):
            count.append(None)
            if len(count) > place:
                raise MemoryError
            return genuine(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(convert, function, failing)
            try:
                tn.convert(model, sync_batch_norm=True)
            except MemoryError:
                assert state_of(model) == before
            else:
                assert place >= 5
                break
    else:
        raise AssertionError("it never succeeded")
