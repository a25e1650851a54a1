"""convert and revert: which modules change, which stay and why, and all that must not change."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import triton_norm as tn
from support.steps import state_of


class Own(nn.LayerNorm):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Functional(nn.Module):
    """Calls norms as functions, in a method, in a nested function and by another name of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(y, (4,))

        return self._first(inner(x))

    def _first(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (4,))


class Harmless(nn.Module):
    """Has an attribute of a norm's name, and calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x)


class RMSNormOfSomeone(nn.Module):
    """y = x / (‖x‖ + eps), whatever its name says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm() + self.eps)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(4, eps=1e-3, bias=False)
        self.again = self.first
        self.body = nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 4), nn.RMSNorm(4))
        self.absent = None
        self.last = nn.BatchNorm1d(4, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.body(self.first(x))))


TYPES = {
    nn.LayerNorm: tn.LayerNorm,
    nn.RMSNorm: tn.RMSNorm,
    nn.BatchNorm1d: tn.BatchNorm1d,
    nn.BatchNorm2d: tn.BatchNorm2d,
    nn.BatchNorm3d: tn.BatchNorm3d,
    nn.SyncBatchNorm: tn.SyncBatchNorm,
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize(("theirs", "ours"), TYPES.items(), ids=lambda cls: f"{cls.__module__.split('.')[0]}")
def test_every_type(theirs, ours):
    module = theirs(4)
    model = nn.Sequential(module)
    tensors = tensors_of(model)
    report = tn.convert(model)
    assert type(module) is ours
    assert model[0] is module
    assert report.converted == {"0": f"torch.nn.{theirs.__name__} → triton_norm.{ours.__name__}"}
    assert report.skipped == {}
    assert all(tensor is tensors[name] for name, tensor in tensors_of(model).items())
    assert tn.revert(model) == ("0",)
    assert type(module) is theirs


def test_a_model_that_is_itself_a_norm():
    model = nn.LayerNorm(4)
    report = tn.convert(model)
    assert list(report.converted) == [""]
    assert "(the model)" in str(report)
    assert type(model) is tn.LayerNorm


def test_everything_stays_and_comes_back():
    model = Model()
    model.body.eval()
    fired = []
    model.first.register_forward_hook(lambda module, inputs, y: fired.append(type(module)))
    model.first.note = "kept"
    model.body[0].weight.requires_grad_(False)
    before, text, tensors, names = state_of(model), str(model), tensors_of(model), list(model.state_dict())
    x = torch.randn(6, 4)
    with tn.backend("torch"):
        expected = copy.deepcopy(model)(x)
    report = tn.convert(model)
    assert list(report.converted) == ["first", "again", "body.0", "body.2", "last"]
    assert report.skipped == {}
    assert str(model) == text
    assert list(model.state_dict()) == names
    assert tensors_of(model).keys() == tensors.keys()
    assert all(tensor is tensors[name] for name, tensor in tensors_of(model).items())
    assert (model.training, model.body.training, model.first.note) == (True, False, "kept")
    assert model.first is model.again
    fired.clear()
    with tn.backend("torch"):
        assert torch.equal(model(x), expected)
    assert fired == [tn.LayerNorm, tn.LayerNorm]
    assert tn.revert(model) == tuple(report.converted)
    model.body[0].num_batches_tracked.zero_()
    assert state_of(model) == before
    assert tn.revert(model) == ()


def test_the_kernels_compute(guard, device):
    model = Model().to(device)
    tn.convert(model)
    with tn.backend("triton"):
        model(torch.randn(6, 4, device=device)).sum().backward()
    assert guard is None or len(guard.launches) > 5
    assert all(p.grad is not None for p in model.parameters())


def test_modules_that_are_skipped_and_why():
    model = nn.ModuleDict(
        {
            "own": Own(4),
            "parametrized": parametrizations.weight_norm(nn.LayerNorm(4), dim=None),
            "replaced": nn.LayerNorm(4),
            "other": nn.modules.batchnorm._NormBase(4),
            "lazy instance": nn.LazyInstanceNorm1d(),
            "lazy": nn.LazyBatchNorm1d(),
            "unknown": RMSNormOfSomeone(),
            "ours": tn.RMSNorm(4),
            "functional": Functional(),
            "layer": nn.TransformerEncoderLayer(4, 1, 4),
            "harmless": Harmless(),
            "linear": nn.Linear(4, 4),
        }
    )
    model["replaced"].forward = lambda x: x
    before = state_of(model)
    report = tn.convert(model, exclude="layer.norm?")
    assert report.converted == {}
    assert report.skipped == {
        "own": "Own is a subclass of torch.nn.LayerNorm: its forward may differ",
        "parametrized": "parametrized",
        "replaced": "its forward was replaced on the module itself",
        "other": "triton_norm has no _NormBase",
        "lazy instance": "LazyInstanceNorm1d becomes another class in its first call",
        "lazy": "LazyBatchNorm1d becomes another class in its first call",
        "unknown": "RMSNormOfSomeone is not among the classes that are known",
        "ours": "is triton_norm's already",
        "functional": "Functional calls torch.nn.functional.rms_norm, torch.nn.functional.layer_norm as a function",
        "layer": "TransformerEncoderLayer calls torch's fused encoder layer, in evaluation, as a function",
        "layer.norm1": "excluded",
        "layer.norm2": "excluded",
    }
    assert state_of(model) == before


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is ")  # by torch 2.14 in another category than before
@pytest.mark.parametrize("package", [nn, tn])
def test_scripted_modules_are_skipped(package):
    report = tn.convert(nn.Sequential(torch.jit.script(package.LayerNorm(4))))
    assert report.converted == {}
    assert list(report.skipped) == ["0"]


def test_a_lazy_module_is_one_of_torchs_after_its_first_call():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model(torch.randn(3, 4))
    assert list(tn.convert(model).converted) == ["0"]


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [
        (None, (), ["first", "again", "body.0", "body.2", "last"]),
        (nn.LayerNorm, (), ["first", "again"]),
        ([nn.LayerNorm, "body.2"], (), ["first", "again", "body.2"]),
        ("body", (), ["body.0", "body.2"]),
        ("b*", nn.RMSNorm, ["body.0"]),
        (None, ["body", nn.BatchNorm1d], ["first", "again"]),
        (None, "again", ["body.0", "body.2", "last"]),  # a module has all its names
        ("*", "*", []),
        ([], (), []),
        (nn.BatchNorm3d, (), []),
        (nn.modules.batchnorm._BatchNorm, (), []),  # exactly that class
    ],
)
def test_include_and_exclude(include, exclude, converted):
    model = Model()
    report = tn.convert(model, include=include, exclude=exclude)
    assert list(report.converted) == converted
    assert sorted([*report.converted, *report.skipped]) == ["again", "body.0", "body.2", "first", "last"]
    ours = [name for name, module in model.named_modules(remove_duplicate=False) if type(module) in TYPES.values()]
    assert ours == converted


GROUP = torch.distributed.ProcessGroup(0, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": [nn.LayerNorm(4)]}, TypeError, "'model' must be torch.nn.Module, not list"),
        ({"include": "frist"}, ValueError, "'include': the model has no module named 'frist'"),
        ({"exclude": ["first", "layers.*"]}, ValueError, r"'exclude': the model has no module named 'layers\.\*'"),
        ({"include": [1]}, TypeError, "'include' must hold names and classes, not 1"),
        ({"exclude": 1}, TypeError, "'exclude' must hold names and classes, not 1"),
        ({"exclude": int}, TypeError, "'exclude' must hold names and classes, not <class 'int'>"),
        ({"fuse": 1}, TypeError, "'fuse' must be bool, not int"),
        ({"process_group": GROUP}, ValueError, "process_group was given without sync_batch_norm"),
        ({"process_group": 1, "sync_batch_norm": True}, TypeError, "'process_group' must be a ProcessGroup.*not int"),
    ],
)
def test_wrong_calls_change_nothing(arguments, error, words):
    model = Model()
    before = state_of(model)
    with pytest.raises(error, match=words):
        tn.convert(**{"model": model, **arguments})
    assert state_of(model) == before


def test_revert_of_no_module():
    with pytest.raises(TypeError, match=r"'model' must be torch\.nn\.Module, not str"):
        tn.revert("model")


def test_again_is_harmless():
    model = Model()
    before = state_of(model)
    first = tn.convert(model)
    second = tn.convert(model)
    assert second.converted == {}
    assert second.skipped == dict.fromkeys(first.converted, "is triton_norm's already")
    tn.revert(model)
    assert state_of(model) == before


def test_what_was_triton_norms_stays_so():
    model = nn.Sequential(tn.LayerNorm(4), nn.LayerNorm(4))
    tn.convert(model)
    assert tn.revert(model) == ("1",)
    assert [type(module) for module in model] == [tn.LayerNorm, nn.LayerNorm]


@pytest.mark.parametrize("first", [False, True], ids=["at once", "after another conversion"])
def test_sync_batch_norm(first):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm2d(4), tn.BatchNorm3d(4), nn.SyncBatchNorm(4), nn.LayerNorm(4))
    before = state_of(model)
    if first:
        tn.convert(model)
    report = tn.convert(model, sync_batch_norm=True, process_group=GROUP)
    assert [type(module) for module in model] == [*[tn.SyncBatchNorm] * 4, tn.LayerNorm]
    assert [module.process_group for module in model[:4]] == [GROUP, GROUP, GROUP, None]
    assert report.converted["2"] == "triton_norm.BatchNorm3d → triton_norm.SyncBatchNorm"
    assert len(tn.revert(model)) == 5
    assert state_of(model) == before


def test_sync_batch_norm_alone_computes_batch_norm(device):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    expected = copy.deepcopy(model)(x)
    tn.convert(model, sync_batch_norm=True)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("sync_batch_norm", [False, True])
def test_copies_and_pickles_are_reverted_too(sync_batch_norm):
    model = Model()
    before = [type(module) for module in model.modules()]
    tn.convert(model, sync_batch_norm=sync_batch_norm)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert len(tn.revert(other)) == 5
        assert [type(module) for module in other.modules()] == before
        assert [vars(module).keys() for module in other.modules()] == [vars(m).keys() for m in Model().modules()]


def test_revert_of_what_has_another_class_since():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    tn.convert(model)
    parametrizations.weight_norm(model[1], dim=None)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="'1' was converted, but is a ParametrizedLayerNorm now"):
        tn.revert(model)
    assert state_of(model) == before
    parametrize.remove_parametrizations(model[1], "weight")
    assert tn.revert(model) == ("0", "1")


def test_a_state_dict_goes_both_ways():
    theirs, ours = Model(), Model()
    tn.convert(ours)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_the_report_is_a_table():
    model = nn.Sequential(nn.LayerNorm(4), nn.LazyInstanceNorm1d(), nn.Sequential(nn.GroupNorm(2, 4)))
    assert str(tn.convert(model)).splitlines() == [
        "2 converted",
        "  0            torch.nn.LayerNorm → triton_norm.LayerNorm",
        "  2.0          torch.nn.GroupNorm → triton_norm.GroupNorm",
        "1 skipped",
        "  1            LazyInstanceNorm1d becomes another class in its first call",
    ]
    assert str(tn.convert(nn.Linear(4, 4))) == "0 converted\n0 skipped"


def test_converts_on_the_meta_device():
    with torch.device("meta"):
        model = Model()
    tn.convert(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(model.first) is tn.LayerNorm


def test_a_hook_that_computes_the_weight_keeps_doing_so(device):
    """torch.nn.utils.prune sets weight anew before each call, and leaves the class."""
    from torch.nn.utils import prune

    model = nn.Sequential(nn.LayerNorm(8)).to(device)
    prune.random_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(3, 8, device=device)
    expected = model(x)
    assert list(tn.convert(model).converted) == ["0"]
    torch.testing.assert_close(model(x), expected)
