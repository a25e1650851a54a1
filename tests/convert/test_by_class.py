"""Tools that look a module's exact class up in a table: after revert they work as on torch's own."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn

quantization = pytest.importorskip("torch.ao.quantization")
quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel"),
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]+. is "),
]

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
GROUP = ["conv", "norm", "relu"]
FUSERS: dict[str, tuple[bool, Callable[[nn.Module], nn.Module]]] = {
    "fuse_modules": (False, lambda model: quantization.fuse_modules(model, [GROUP])),
    "fuse_modules_qat": (True, lambda model: quantization.fuse_modules_qat(model, [GROUP])),
    "fuse_fx": (False, lambda model: quantize_fx.fuse_fx(model)),
}
"""Tools by name, each with the mode that the model is in."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


@pytest.fixture
def model(device) -> nn.Module:
    model = Model().to(device)
    model(torch.randn(3, 2, 6, 6, device=device))  # moves the statistics from their defaults
    return model


def classes(model: nn.Module) -> dict[str, type]:
    """Returns the classes in a model; each graph module has a class of its own."""
    return {name: type(module) for name, module in model.named_modules() if name}


@pytest.mark.parametrize("norm", [*NORMS, "llama.LlamaRMSNorm", "convnext.ConvNextLayerNorm"])
def test_a_reverted_layer_is_of_exactly_the_class_it_had(norm):
    if isinstance(norm, str):
        model, _, name = norm.partition(".")
        norm = getattr(pytest.importorskip(f"transformers.models.{model}.modeling_{model}"), name)
    module = norm(4)
    before = vars(module).copy()
    tn.convert(module)
    assert type(module) is not norm
    assert isinstance(module, norm)
    tn.revert(module)
    assert type(module) is norm
    assert vars(module) == before


@pytest.mark.parametrize("name", FUSERS)
def test_a_reverted_model_is_fused_as_one_that_never_was_converted(name, model, device):
    training, fuse = FUSERS[name]
    model.train(training)
    other = copy.deepcopy(model)
    tn.convert(other)
    tn.revert(other)
    expected, actual = fuse(model), fuse(other)
    assert classes(actual) == classes(expected)
    assert not any(cls.__module__.startswith("triton_norm") for cls in classes(actual).values())
    x = torch.randn(3, 2, 6, 6, device=device)
    assert torch.equal(actual(x), expected(x))
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    before = classes(actual)
    report = tn.convert(actual)  # leaves what is torch.ao's
    changed = {name for name, cls in classes(actual).items() if cls is not before[name]}
    assert changed == set(report.converted) == {name for name, cls in before.items() if cls is nn.BatchNorm2d}
    torch.testing.assert_close(actual(x), expected(x))


@pytest.mark.parametrize("name", ["fuse_modules", "fuse_modules_qat"])
def test_a_converted_model_is_an_error_to_fuse_modules(name, model):
    training, fuse = FUSERS[name]
    model.train(training)
    tn.convert(model)
    before = classes(model)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse(model)
    assert classes(model) == before


def test_a_converted_model_is_left_unfused_by_fuse_fx(model, device):
    model.eval()
    tn.convert(model)
    fused = quantize_fx.fuse_fx(model)
    assert [node.target for node in fused.graph.nodes if node.op == "call_module"] == GROUP
    assert type(fused.norm) is tn.BatchNorm2d
    x = torch.randn(3, 2, 6, 6, device=device)
    torch.testing.assert_close(fused(x), model(x))


QUANTIZED = pytest.mark.skipif(
    "x86" not in torch.backends.quantized.supported_engines, reason="torch has no kernels to quantize with here"
)


@QUANTIZED
@pytest.mark.parametrize("reverted", [False, True])
def test_quantize_fx(reverted, model):
    """The norm of a converted model stays as it is, in floating point; that of a reverted model is fused."""
    model = model.cpu().eval()
    x = torch.randn(3, 2, 6, 6)
    expected = model(x)
    tn.convert(model)
    if reverted:
        tn.revert(model)
    prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (x,))
    torch.testing.assert_close(prepared(x), expected)
    quantized = quantize_fx.convert_fx(prepared)
    kinds = [type(module) for module in quantized.modules()]
    assert (tn.BatchNorm2d in kinds) is not reverted
    assert nn.Conv2d not in kinds
    assert (quantized(x) - expected).abs().max() < 0.05 * expected.abs().max()


@QUANTIZED
def test_quantization_aware_training_by_quantize_fx(model):
    """The statistics of the layer that stays in the graph move once a call."""
    model = model.cpu().train()
    tn.convert(model)
    x = torch.randn(3, 2, 6, 6)
    mapping = quantization.get_default_qat_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_qat_fx(model, mapping, (x,))
    before = prepared.norm.num_batches_tracked.clone()
    prepared(x).sum().backward()
    assert prepared.norm.num_batches_tracked == before + 1
    assert prepared.norm.weight.grad is not None


def fused_prepared_quantized(model: nn.Module, x: Tensor, converted: str) -> dict[str, Tensor]:
    """Makes a quantized model whose norm is converted, if it is, inside the layer that torch.ao has made."""
    fused = quantization.fuse_modules_qat(model, [GROUP])
    if converted == "fused":
        assert list(tn.convert(fused).converted) == ["conv.1"]
    fused.qconfig = quantization.get_default_qat_qconfig("x86")
    prepared = quantization.prepare_qat(fused)
    if converted == "prepared":
        assert list(tn.convert(prepared).converted) == ["conv.bn"]
    prepared(x).sum().backward()
    norm = prepared.conv.bn
    result = {"counter": norm.num_batches_tracked, "mean": norm.running_mean, "dweight": norm.weight.grad}
    quantized = quantization.convert(prepared.eval())
    assert type(quantized.conv) is torch.ao.nn.intrinsic.quantized.ConvReLU2d
    return {**result, "y": prepared(x).detach(), "quantized weight": quantized.conv.weight().dequantize()}


@QUANTIZED
@pytest.mark.parametrize("converted", ["fused", "prepared"])
def test_a_norm_that_is_converted_inside_a_fused_layer(converted, model):
    """It is torch's layer around it that torch.ao looks for."""
    model, x = model.cpu().train(), torch.randn(3, 2, 6, 6)
    expected = fused_prepared_quantized(copy.deepcopy(model), x, "never")
    actual = fused_prepared_quantized(model, x, converted)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-4)


@QUANTIZED
@pytest.mark.parametrize("reverted", [False, True])
@pytest.mark.parametrize(("norm", "shape"), [(nn.LayerNorm, (3, 4)), (nn.BatchNorm2d, (3, 4, 2, 2))])
def test_quantization_by_module(norm, shape, reverted):
    """Its table has no class of this library, whose layer is then called with quantized numbers, and refuses them."""
    model = quantization.QuantWrapper(norm(4)).eval()
    tn.convert(model)
    if reverted:
        tn.revert(model)
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared, x = quantization.prepare(model), torch.randn(shape)
    prepared(x)
    quantized = quantization.convert(prepared)
    if reverted:
        torch.testing.assert_close(quantized(x), model(x), rtol=0.0, atol=0.1)
    else:
        with pytest.raises(NotImplementedError, match=r"not implemented for input of torch\.quint8"):
            quantized(x)


@pytest.mark.parametrize("reverted", [False, True])
def test_the_fusion_of_torch_fx(reverted, model, device):
    optimization = pytest.importorskip("torch.fx.experimental.optimization")
    model.eval()
    tn.convert(model)
    if reverted:
        tn.revert(model)
    fused = optimization.fuse(model)
    assert ("norm" in dict(fused.named_children())) is not reverted
    x = torch.randn(3, 2, 6, 6, device=device)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_torchs_own_conversion_to_sync_batch_norm_goes_by_isinstance(model):
    tn.convert(model)
    result = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(result.norm) is nn.SyncBatchNorm
    assert list(tn.convert(result).converted) == ["norm"]


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_torchs_counter_of_operations_counts_the_same(path, model, device):
    """It counts those of matrix products alone, whichever module calls them."""
    from torch.utils.flop_counter import FlopCounterMode

    x, counts = torch.randn(3, 2, 6, 6, device=device), []
    for converted in (False, True):
        if converted:
            tn.convert(model)
        with tn.backend(path), FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append((counter.get_total_flops(), sum(counter.get_flop_counts()["Model"].values())))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
