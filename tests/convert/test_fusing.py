"""convert(fuse=True): a norm and the activation after it in one call, wherever nothing stands between them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.steps import state_of


class Named(nn.Sequential):
    """Runs by the code that it inherits, however it is constructed."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.SiLU())


class Own(nn.Sequential):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.LeakyReLU(0.2)),
        Named(4),
        Own(nn.BatchNorm2d(4), nn.ReLU()),
        nn.InstanceNorm2d(4),
        nn.Hardswish(),
    )


def test_the_report_and_the_way_back():
    module = model()
    before = state_of(module)
    report = tn.convert(module, fuse=True)
    assert report.fused == {"": "1 + 2", "3": "1 + 2", "4": "0 + 1"}
    assert report.skipped == {
        "": "6 + 7: Hardswish is not among the activations that are known",
        "5": "0 + 1: Own is a subclass of torch.nn.Sequential: its forward may differ",
    }
    assert "3 fused\n  (the model)  1 + 2\n" in str(report)
    assert len(report.converted) == 5
    assert isinstance(module[4], Named)
    assert set(tn.revert(module)) == {*report.converted, *report.fused}
    assert state_of(module) == before


@pytest.mark.parametrize("training", [True, False])
def test_results_and_statistics_are_those_of_the_parts(training, device):
    theirs = model().to(device).train(training)
    ours = copy.deepcopy(theirs)
    tn.convert(ours, fuse=True)
    x = torch.randn(3, 2, 8, 8, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_copies_and_pickles_are_fused_and_reverted_too():
    module = model()
    tn.convert(module, fuse=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(part) for part in other.modules()] == [type(part) for part in module.modules()]
        assert len(tn.revert(other)) == 8
        assert [type(part) for part in other.modules()] == [type(part) for part in model().modules()]
