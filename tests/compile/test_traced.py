"""torch.jit.trace over this library's layers: it records torch's operators, as it does of torch's own layers."""

import copy
import io

import pytest
import torch
from torch import Tensor

import triton_norm as tn
from support.every_op import EVERY_OP, PATHS
from support.steps import NORMS, TRAINING, Model, assert_same, drawn, ours_of, trained
from triton_norm import plans

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]+. is "),  # by torch 2.14 in another category than before
    # Of torch's own layers too. By itself torch ignores it where its own code compares sizes.
    pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning:torch[.]"),
]


@PATHS
@TRAINING
@NORMS
def test_trace(name, training, path, device, guard):
    """Tracing runs a module several times, of which the counter tells; the traced one moves it as often as torch's."""
    norm, x = drawn(name, training, device)
    theirs = Model(norm)
    ours = ours_of(theirs)
    with tn.backend("auto" if path == "triton" else path):
        traced = torch.jit.trace(ours, x, check_trace=path == "torch")
        expected = torch.jit.trace(theirs, x, check_trace=path == "torch")
        assert guard is None or not guard.launches
        assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        more = torch.cat([x, x + 1])  # another batch than was traced
        assert_same(trained(traced, ours, more), trained(expected, theirs, more))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        torch.testing.assert_close(loaded(more), traced(more))
        torch.testing.assert_close(traced(more), (expected(more), expected(more))[1])
        assert_same(trained(ours, ours, x), trained(theirs, theirs, x))  # where nothing is traced any more
    assert guard is None or bool(guard.launches) == (path == "triton")


@pytest.mark.parametrize("op", EVERY_OP, ids=str)
def test_trace_of_functions(op, device):
    tensors = op.drawn(device)
    arguments, ours = [tensor for tensor in tensors if tensor is not None], op.ours

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        left = iter(values)
        return ours(*(None if tensor is None else next(left) for tensor in tensors))

    traced = torch.jit.trace(function, tuple(arguments))
    for actual, expected in zip(traced(*arguments), function(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Explaining(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.explained = tn.explain(self.norm, x)
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:Converting a tensor")  # explain compares sizes where they are traced
@NORMS
def test_trace_goes_to_torch_and_says_so(name, device):
    norm, x = drawn(name, True, device)
    model = Explaining(norm)
    tn.convert(model)
    torch.jit.trace(model, x, check_trace=False)
    assert model.explained.backend == "torch"
    assert model.explained.reason == "torch.jit.trace is recording"
    assert tn.explain(model.norm, x).backend == "triton"
    before = copy.deepcopy(model.state_dict())
    with (
        tn.backend("triton"),
        pytest.raises(RuntimeError, match=r"can't serve this call: torch\.jit\.trace is recording"),
    ):
        torch.jit.trace(model, x)
    assert_same(model.state_dict(), before)


def test_trace_of_sync_batch_norm(device):
    theirs, x = drawn("BatchNorm2d", True, device)
    ours = copy.deepcopy(theirs)
    tn.convert(ours, sync_batch_norm=True)
    traced, expected = torch.jit.trace(ours, x), torch.jit.trace(theirs, x)
    assert_same(trained(traced, ours, x), trained(expected, theirs, x))


def test_trace_remembers_no_traced_sizes(device):
    x = torch.randn(3, 4, device=device)
    for make in (tn.LayerNorm, tn.BatchNorm1d):
        model = make(4, device=device)
        model(x)
        remembered = [len(saved) for _, saved in plans._plans.values()]
        torch.jit.trace(model, x, check_trace=False)
        assert [len(saved) for _, saved in plans._plans.values()] == remembered
