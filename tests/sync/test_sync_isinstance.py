"""SyncBatchNorm is one of torch's: to tools that look for those by isinstance, in copies, and in conversions."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

import triton_norm as tn
from support import worlds
from support.steps import saved_and_loaded

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm in evaluation for ever, as torchvision's and timm's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.eps = module.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(module, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def replaced(module: nn.Module, kinds: tuple[type, ...], make) -> nn.Module:
    """Replaces each layer of these kinds, as timm's freeze_batch_norm_2d and Lightning's and mmcv's reverts do."""
    if isinstance(module, kinds):
        return make(module)
    for name, child in module.named_children():
        new = replaced(child, kinds, make)
        if new is not child:
            module.add_module(name, new)
    return module


def freeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    return replaced(module, (nn.BatchNorm2d, nn.SyncBatchNorm), FrozenBatchNorm2d)


class _BatchNormXd(nn.modules.batchnorm._BatchNorm):
    """Lightning's, of any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        return


def batch_norm_xd(module: nn.Module) -> nn.Module:
    options = module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    made = _BatchNormXd(*options)
    if module.affine:
        made.weight, made.bias = module.weight, module.bias
    made.running_mean, made.running_var = module.running_mean, module.running_var
    made.num_batches_tracked = module.num_batches_tracked
    return made


def by_convert(model: nn.Module) -> nn.Module:
    tn.convert(model, sync_batch_norm=True)
    return model


CONVERSIONS = pytest.mark.parametrize("conversion", [by_convert, tn.SyncBatchNorm.convert_sync_batchnorm])


@CONVERSIONS
def test_it_is_frozen(conversion, device):
    model = freeze_batch_norm_2d(conversion(nn.Sequential(nn.BatchNorm2d(1)).to(device)))
    y = model.train()(torch.tensor([10.0, 14.0], device=device).view(2, 1, 1, 1))
    torch.testing.assert_close(y.flatten().cpu(), torch.tensor([10.0, 14.0]), rtol=1e-5, atol=0)
    assert model[0].running_mean.tolist() == [0.0]
    assert model[0].running_var.tolist() == [1.0]


@CONVERSIONS
def test_it_is_reverted_by_lightning(conversion, device):
    theirs = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4))).to(device)
    model = replaced(conversion(copy.deepcopy(theirs)), (nn.SyncBatchNorm,), batch_norm_xd)
    assert type(model[1][0]) is _BatchNormXd
    x = torch.randn(5, 4, device=device)
    assert torch.equal(model(x), theirs(x))
    assert all(map(torch.equal, model.state_dict().values(), theirs.state_dict().values()))


@CONVERSIONS
def test_it_has_no_weight_decay(conversion):
    model = conversion(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm2d(4)))
    undecayed = [p for m in model.modules() if isinstance(m, (*BATCH_NORMS, nn.SyncBatchNorm)) for p in m.parameters()]
    assert len(undecayed) == 4


def test_isinstance_follows_convert_and_revert():
    for module in (nn.BatchNorm2d(4), tn.BatchNorm2d(4)):
        assert isinstance(module, nn.BatchNorm2d)
        tn.convert(module, sync_batch_norm=True)
        assert isinstance(module, (nn.SyncBatchNorm, tn.SyncBatchNorm))
        assert isinstance(module, nn.SyncBatchNorm)
        assert not isinstance(module, BATCH_NORMS)
        tn.revert(module)
        assert isinstance(module, nn.BatchNorm2d)
        assert not isinstance(module, nn.SyncBatchNorm)
    assert issubclass(tn.SyncBatchNorm, nn.SyncBatchNorm)
    assert tn.SyncBatchNorm(4).__class__ is tn.SyncBatchNorm


def test_its_modules_are_named_as_torchs():
    ours, theirs = (nn.Sequential(kind(4), nn.Sequential(kind(4))) for kind in (tn.SyncBatchNorm, nn.SyncBatchNorm))
    for options in ({}, {"prefix": "model"}, {"remove_duplicate": False}):
        for own, other in ((ours, theirs), (ours[0], theirs[0])):
            assert [name for name, _ in own.named_modules(**options)] == [n for n, _ in other.named_modules(**options)]
    assert [name for name, _ in ours[0].named_modules(None, "a", True)] == ["a"]
    assert list(ours[0].modules()) == [ours[0]]
    assert str(ours) == str(theirs)
    ours.append(ours[0])
    assert len(list(ours.modules())) == 4


def test_copies_and_pickles():
    module = tn.SyncBatchNorm(4, momentum=None)
    pickled = [pickle.loads(pickle.dumps(module, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (copy.copy(module), copy.deepcopy(module), saved_and_loaded(module), *pickled):
        assert type(other) is tn.SyncBatchNorm
        assert isinstance(other, nn.SyncBatchNorm)
        assert vars(other).keys() == vars(module).keys()


def test_parametrized(device, guard):
    module = tn.SyncBatchNorm(4, device=device)
    expected = tn.BatchNorm1d(4, device=device)
    parametrize.register_parametrization(module, "weight", nn.Softplus())
    expected.weight = nn.Parameter(module.weight.detach().clone())
    x = torch.randn(5, 4, device=device)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(module)
    for other in (module, copy.deepcopy(module)):
        assert isinstance(other, nn.SyncBatchNorm)
        with tn.backend("triton"):
            torch.testing.assert_close(other(x), expected(x))
    assert guard is None or len(guard.launches) >= 4
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is tn.SyncBatchNorm


def test_torchs_own_conversion_makes_torchs():
    ours = nn.Sequential(tn.SyncBatchNorm(4))
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(theirs[0]) is nn.SyncBatchNorm
    tn.convert(theirs)
    assert type(theirs[0]) is tn.SyncBatchNorm


class Counting(nn.Module):
    """Looks among its own modules in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = tn.SyncBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        result = [module for module in self.modules() if isinstance(module, nn.SyncBatchNorm)]
        return self.norm(x) * len(result) if isinstance(self.norm, nn.SyncBatchNorm) else x


@pytest.mark.unguarded
def test_compiled_code_finds_it(device):
    torch._dynamo.reset()
    model, x = Counting().to(device), torch.randn(5, 4, device=device)
    with tn.backend("torch"):
        y = torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(y, tn.SyncBatchNorm(4, device=device)(x))


def wrapped_in_distributed_data_parallel(world: worlds.World) -> None:
    """DistributedDataParallel refuses torch's on the CPU, and only those."""
    parametrized = tn.SyncBatchNorm(4)
    parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    inside = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([by_convert(nn.BatchNorm1d(4))])[0])
    for module in (tn.SyncBatchNorm(4), inside, nn.Sequential(parametrized)):
        model = DistributedDataParallel(module)
        assert sum(isinstance(part, nn.SyncBatchNorm) for part in model.modules()) == 1
        model(torch.randn(3, 4)).sum().backward()
    for module in (nn.SyncBatchNorm(4), nn.Sequential(tn.SyncBatchNorm(4), nn.SyncBatchNorm(4))):
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            DistributedDataParallel(module)


def test_distributed_data_parallel_on_the_cpu(tmp_path):
    worlds.start(tmp_path, 1, False, [wrapped_in_distributed_data_parallel])


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's, which has an activation."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def by_a_forward_of_its_own() -> nn.Module:
    module = nn.BatchNorm2d(4)
    module.forward = lambda x: x.relu()
    return module


def by_a_parametrization() -> nn.Module:
    return parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Softplus())


class Own(tn.SyncBatchNorm):
    """A subclass."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BatchNormAct2d(4), r"0\.bn \(BatchNormAct2d\)$"),
        (by_a_forward_of_its_own, r"0\.bn \(BatchNorm2d\)$"),
        (by_a_parametrization, r"0\.bn \(ParametrizedBatchNorm2d\)$"),
        (lambda: Own(4), r"0\.bn \(Own\)$"),
        (nn.LazyBatchNorm2d, r"0\.bn \(LazyBatchNorm2d\)$"),
    ],
)
def test_what_may_compute_more_stays_and_is_named(make, words):
    model = nn.Sequential(nn.Sequential(), nn.BatchNorm2d(4))
    model[0].add_module("bn", make())
    before, inside = model[0].bn, [*model[0].bn.modules()]
    with pytest.warns(UserWarning, match=words) as caught:
        converted = tn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert converted is model
    assert model[0].bn is before
    assert type(before) is type(inside[0])
    assert type(model[1]) is tn.SyncBatchNorm
    if isinstance(before, BatchNormAct2d):
        assert type(before.act[1]) is tn.SyncBatchNorm


def test_all_that_stays_is_named_at_once():
    model = nn.Sequential(BatchNormAct2d(4), BatchNormAct2d(4), nn.InstanceNorm2d(4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match=r"0 \(BatchNormAct2d\), 1 \(BatchNormAct2d\)$"):
        tn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.warns(UserWarning, match=r"\(the module\) \(Own\)$"):
        assert type(tn.SyncBatchNorm.convert_sync_batchnorm(Own(4))) is Own


def test_the_same_layer_twice_is_one_layer():
    model = nn.ModuleDict({"first": nn.BatchNorm2d(4), "body": nn.Sequential()})
    model["again"] = model["first"]
    model["body"].append(model["first"])
    tn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model["first"]) is tn.SyncBatchNorm
    assert model["first"] is model["again"] is model["body"][0]


def test_what_a_layer_holds_comes_along():
    """Children stay, converted; hooks and attributes don't: so it is with torch's."""
    layer = nn.BatchNorm2d(4)
    layer.extra = nn.BatchNorm2d(4)
    layer.note = "gone"
    layer.register_forward_hook(lambda *_: None)
    ours, theirs = (kind.convert_sync_batchnorm(copy.deepcopy(layer)) for kind in (tn.SyncBatchNorm, nn.SyncBatchNorm))
    assert type(ours.extra) is tn.SyncBatchNorm
    assert vars(ours).keys() == vars(theirs).keys()
    assert len(ours._forward_hooks) == len(theirs._forward_hooks) == 0


def test_a_lazy_layer_converts_once_it_was_called():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model(torch.randn(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is tn.SyncBatchNorm
    assert model[0].num_features == 4


def test_a_forward_that_a_removed_hook_left_is_the_classes_own():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].forward = model[0].forward
    assert type(tn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is tn.SyncBatchNorm


def test_a_pruned_layer_raises_and_all_stay():
    """Layers before it are replaced by then, as they are by torch's."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    prune.random_unstructured(model[1][0], "weight", amount=0.5)
    before = list(model.modules())
    with pytest.raises(TypeError, match="cannot assign"):
        tn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(model.modules()) == before
    with pytest.raises(TypeError, match="cannot assign"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_a_layer_stays_where_it_is_and_what_it_has():
    layer = nn.BatchNorm2d(4, device="meta", dtype=torch.float64).eval()
    layer.weight.requires_grad_(False)
    converted = tn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert all(tensor.is_meta for tensor in converted.state_dict().values())
    assert (converted.training, converted.weight.requires_grad, converted.bias.requires_grad) == (False, False, True)
    assert converted.weight is layer.weight
