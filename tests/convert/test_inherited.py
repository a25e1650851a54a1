"""Subclasses of torch's norms: those that inherit all that their forward uses are converted, and others say why not."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import triton_norm as tn
from support.steps import saved_and_loaded, state_of, trained
from triton_norm.converting.inherited import LAYERS
from triton_norm.converting.sums import add_and_normalize, is_row_norm

N = 4
INPUTS = {cls: (3, N) for cls in (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.SyncBatchNorm)}
INPUTS |= {
    nn.BatchNorm2d: (2, N, 3, 3),
    nn.BatchNorm3d: (2, N, 2, 3, 2),
    nn.GroupNorm: (2, N, 6),
    nn.InstanceNorm1d: (2, N, 6),
}
INPUTS |= {nn.InstanceNorm2d: (2, N, 3, 3), nn.InstanceNorm3d: (2, N, 2, 3, 2)}


class Part(nn.Module):
    """A base that follows torch's class, as torchtitan's: it registers its subclasses, and has state of its own."""

    registered: ClassVar[list[type]] = []
    width: int | None = None

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        Part.registered.append(cls)

    def _apply(self, *arguments: Any, **named: Any) -> Any:
        return super()._apply(*arguments, **named)

    def init_weights(self) -> None:
        self.reset_parameters()


def _harmless(base: Any) -> Any:
    """Returns a subclass with other arguments, methods of its own, and all that may be overridden."""

    class Harmless(base, Part):  # type: ignore[misc]
        __slots__ = ()

        def __init__(self, width: int = N) -> None:
            affine = {"affine": True} if base.__name__.startswith("Instance") else {}
            super().__init__(*((2, width) if base is nn.GroupNorm else (width,)), **affine)
            self.width = width

        def reset_parameters(self) -> None:
            super().reset_parameters()
            if self.weight is not None:
                nn.init.constant_(self.weight, 1.5)

        def extra_repr(self) -> str:
            return f"{self.width} wide"

        def train(self, mode: bool = True) -> Any:
            return super().train(mode)

    Harmless.__qualname__ = Harmless.__name__ = f"Own{base.__name__}"
    globals()[Harmless.__name__] = Harmless
    return Harmless


OWN = {base: _harmless(base) for base in LAYERS}
EVERY_CLASS = pytest.mark.parametrize("base", LAYERS, ids=lambda base: base.__name__)


@EVERY_CLASS
def test_a_subclass_that_inherits_its_forward_is_converted(base, device, guard):
    cls, n_registered = OWN[base], len(Part.registered)
    theirs = nn.Sequential(cls()).to(device)
    ours = copy.deepcopy(theirs)
    text = str(ours)
    report = tn.convert(ours)
    assert report.converted == {"0": f"{__name__.partition('.')[0]}.{cls.__name__} → triton_norm.{cls.__name__}"}
    assert report.skipped == {}
    assert isinstance(ours[0], cls)
    assert (str(ours), list(ours.state_dict())) == (text, list(theirs.state_dict()))
    assert len(Part.registered) == n_registered
    x = torch.randn(INPUTS[base], device=device)
    with tn.backend("triton"):
        actual = trained(ours, ours, x)
    torch.testing.assert_close(actual, trained(theirs, theirs, x), rtol=1e-4, atol=1e-5)
    assert guard is None or guard.launches
    assert tn.explain(ours[0], x).backend == "triton"
    ours[0].init_weights()
    assert set(tn.convert(ours).skipped.values()) == {"is triton_norm's already"}
    ours = nn.Sequential(cls())
    before = state_of(ours)
    tn.convert(ours)
    assert tn.revert(ours) == ("0",)
    assert state_of(ours) == before


@EVERY_CLASS
def test_copies_and_pickles_are_converted_and_reverted_too(base):
    model = nn.Sequential(OWN[base]())
    tn.convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved_and_loaded(model)):
        assert type(other[0]) is type(model[0])
        assert other[0].width == N
        assert tn.revert(other) == ("0",)
        assert type(other[0]) is OWN[base]


def _overriding(base: Any, **attributes: Any) -> Any:
    return type("Own", (base,), attributes)


def _call(self: Any, *arguments: Any) -> Any:
    return nn.Module.__call__(self, *arguments) * 2.0


class Meta(type):
    """A class of classes."""


REFUSED: dict[str, tuple[Any, str]] = {
    "forward": (_overriding(nn.LayerNorm, forward=lambda self, x: x), ""),
    "call": (_overriding(nn.LayerNorm, __call__=_call), "__call__"),
    "weight": (_overriding(nn.RMSNorm, weight=property(lambda self: self._parameters["weight"] + 1)), "weight"),
    "eps": (_overriding(nn.GroupNorm, eps=property(lambda self: 1.0, lambda self, value: None)), "eps"),
    "training": (_overriding(nn.BatchNorm1d, training=property(lambda self: False, lambda self, on: None)), "training"),
    "attributes": (_overriding(nn.LayerNorm, __getattr__=lambda self, name: None), "__getattr__"),
    "every attribute": (
        _overriding(nn.LayerNorm, __getattribute__=lambda self, name: object.__getattribute__(self, name)),
        "__getattribute__",
    ),
    "setting": (
        _overriding(nn.RMSNorm, __setattr__=lambda self, *pair: object.__setattr__(self, *pair)),
        "__setattr__",
    ),
    "check": (_overriding(nn.BatchNorm2d, _check_input_dim=lambda self, x: None), "_check_input_dim"),
    "channels": (
        _overriding(nn.SyncBatchNorm, _check_non_zero_input_channels=lambda self, x: None),
        "_check_non_zero_input_channels",
    ),
    "unbatched": (_overriding(nn.InstanceNorm1d, _get_no_batch_dim=lambda self: 2), "_get_no_batch_dim"),
    "call of torch": (_overriding(nn.LayerNorm, _call_impl=_call), "_call_impl"),
    "copy": (_overriding(nn.LayerNorm, __deepcopy__=lambda self, memo: self), "__deepcopy__"),
    "pickle": (_overriding(nn.LayerNorm, __reduce_ex__=lambda self, protocol: (Part, ())), "__reduce_ex__"),
    "state": (_overriding(nn.LayerNorm, __getstate__=lambda self: {}), "__getstate__"),
    "making": (_overriding(nn.LayerNorm, __new__=lambda cls, *arguments: object.__new__(cls)), "__new__"),
    "hash": (_overriding(nn.LayerNorm, __hash__=lambda self: 1), "__hash__"),
    "a name of the layer's": (_overriding(nn.BatchNorm1d, _call=lambda self: 1), "_call"),
    "a name of the class made": (_overriding(nn.LayerNorm, preceding=lambda self: 1), "preceding"),
    "slots": (_overriding(nn.LayerNorm, __slots__=("a",)), "__slots__"),
    "metaclass": (Meta("Own", (nn.LayerNorm,), {}), "__class__"),
    "two": (_overriding(nn.RMSNorm, bias=None, normalized_shape=(4,)), "bias, normalized_shape"),
    "above": (_overriding(_overriding(nn.LayerNorm, _call_impl=_call)), "_call_impl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_subclass_that_overrides_a_part_of_its_forward_is_skipped(name):
    cls, names = REFUSED[name]
    base = next(each for each in cls.__mro__ if each in LAYERS)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    report = tn.convert(nn.ModuleList([module]))
    assert report.converted == {}
    words = f" that overrides {names}" if names else ""
    assert report.skipped == {"0": f"Own is a subclass of torch.nn.{base.__name__}{words}: its forward may differ"}
    assert type(module) is cls


def test_a_subclass_of_a_subclass_and_a_base_before_torchs_class():
    class First:
        """Precedes torch's class, and overrides nothing of it."""

        def described(self) -> str:
            return "first"

    model = nn.Sequential(_overriding(OWN[nn.LayerNorm])(), type("Own", (First, nn.RMSNorm), {})(N))
    assert list(tn.convert(model).converted) == ["0", "1"]
    assert model[1].described() == "first"
    with tn.backend("torch"):
        torch.testing.assert_close(model[1](torch.ones(2, N)), torch.ones(2, N))


def test_a_forward_on_the_module_and_parametrizations_are_no_ones_class():
    replaced, parametrized = OWN[nn.LayerNorm](), parametrizations.weight_norm(OWN[nn.LayerNorm](), dim=None)
    replaced.forward = lambda x: x
    report = tn.convert(nn.Sequential(replaced, parametrized))
    assert report.skipped == {"0": "its forward was replaced on the module itself", "1": "parametrized"}


def test_sync_batch_norm():
    model = nn.Sequential(OWN[nn.BatchNorm2d](), OWN[nn.SyncBatchNorm]())
    report = tn.convert(model, sync_batch_norm=True)
    assert list(report.converted) == ["1"]
    reason = "OwnBatchNorm2d is a subclass of torch.nn.BatchNorm2d, and can't become SyncBatchNorm"
    assert report.skipped == {"0": reason}


@pytest.mark.parametrize("base", [nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d])
def test_they_are_joined_with_activations(base, device):
    theirs = nn.Sequential(OWN[base](), nn.ReLU6()).to(device)
    ours = copy.deepcopy(theirs)
    assert tn.convert(ours, fuse=True).fused == {"": "0 + 1"}
    x = torch.randn(2, N, 3, 3, device=device)
    with tn.backend("triton"):
        actual = trained(ours, ours, x)
    torch.testing.assert_close(actual, trained(theirs, theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [nn.LayerNorm, nn.RMSNorm])
def test_they_take_a_sum(base, device, guard):
    norm = OWN[base]().to(device)
    augend, addend = torch.randn(2, 3, N, device=device)
    expected = norm(augend + addend)
    assert not is_row_norm(type(norm))
    tn.convert(norm)
    assert is_row_norm(type(norm))
    with tn.backend("triton"):
        y, total = add_and_normalize(norm, augend, addend)
    torch.testing.assert_close((y, total), (expected, augend + addend), rtol=1e-4, atol=1e-5)
    assert guard is None or [launched.arguments.keys() >= {"residual_ptr"} for launched in guard.launches] == [True]


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_trace_and_export(device):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = OWN[nn.RMSNorm](), OWN[nn.BatchNorm1d]()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    theirs = Model().to(device).eval()
    ours = copy.deepcopy(theirs)
    tn.convert(ours)
    x = torch.randn(3, N, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for run in (compiled, torch.jit.trace(ours, x), torch.export.export(ours, (x,)).module()):
        torch.testing.assert_close(run(x), theirs(x), rtol=1e-4, atol=1e-5)
    traced = torch.fx.symbolic_trace(nn.Sequential(ours.first))
    torch.testing.assert_close(traced(x), theirs.first(x), rtol=1e-4, atol=1e-5)
