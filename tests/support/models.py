"""Models of Hugging Face's transformers, small and with random weights, and the results of a training step of them."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_norm as tn

transformers = pytest.importorskip("transformers")

VOCABULARY, CLASSES, PATCH = 40, 6, 4


@dataclass(frozen=True)
class Size:
    """`image` is the side of a picture; a network of convolutions has `layers` blocks in each of its two stages."""

    layers: int
    width: int
    batch: int
    tokens: int
    image: int


# Eight pictures, for BatchNorm to fold several channels into a program: the interpreter's cost is by the program.
TINY = Size(layers=1, width=16, batch=8, tokens=3, image=16)
FULL = Size(layers=2, width=48, batch=8, tokens=9, image=32)


def _no_dropout(*names: str) -> dict[str, float]:
    return dict.fromkeys(names, 0.0)


def bert(size: Size) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=2,
        intermediate_size=2 * size.width,
        max_position_embeddings=size.tokens,
        initializer_range=0.3,
        num_labels=CLASSES,
        **_no_dropout("hidden_dropout_prob", "attention_probs_dropout_prob"),
    )
    return transformers.BertForSequenceClassification(config)


def gpt2(size: Size) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        use_cache=False,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        **_no_dropout("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    )
    return transformers.GPT2LMHeadModel(config)


def vit(size: Size) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=2,
        intermediate_size=2 * size.width,
        image_size=size.image,
        patch_size=size.image // 2,
        initializer_range=0.3,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def _decoder(size: Size) -> dict[str, Any]:
    """Returns the options that the configurations of Llama and Gemma share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,  # shared, torch.compile would add their gradients up in another order
        "head_dim": size.width // 2,
        "max_position_embeddings": 32,
        "use_cache": False,  # a layer that is computed again would add to the cache again
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def llama(size: Size) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_decoder(size)))


def gemma(size: Size) -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**_decoder(size)))


def t5(size: Size) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=size.width,
        d_kv=size.width // 2,
        d_ff=2 * size.width,
        num_layers=size.layers,
        num_heads=2,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def resnet_contiguous(size: Size) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[size.width, 2 * size.width],
        depths=[size.layers, size.layers],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return transformers.ResNetForImageClassification(config)


def resnet(size: Size) -> nn.Module:
    return resnet_contiguous(size).to(memory_format=torch.channels_last)


def convnext(size: Size) -> nn.Module:
    config = transformers.ConvNextConfig(
        patch_size=2,
        num_stages=2,
        hidden_sizes=[8, size.width],
        depths=[size.layers, size.layers],
        layer_scale_init_value=1.0,  # 1e-6 would hide a block's norm
        initializer_range=0.3,
        image_size=size.image,
        num_labels=CLASSES,
    )
    return transformers.ConvNextForImageClassification(config)


def mobilenet_v2(size: Size) -> nn.Module:
    config = transformers.MobileNetV2Config(
        image_size=size.image,
        depth_multiplier=size.width / 256,
        depth_divisible_by=4,
        min_depth=4,
        output_stride=8,
        classifier_dropout_prob=0.0,
        initializer_range=0.3,
        num_labels=CLASSES,
    )
    return transformers.MobileNetV2ForImageClassification(config).to(memory_format=torch.channels_last)


def text(size: Size) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (size.batch, size.tokens))}


def padded_text(size: Size) -> dict[str, Tensor]:
    """The last sentence is a word shorter."""
    mask = torch.ones(size.batch, size.tokens, dtype=torch.long)
    mask[-1, -1] = 0
    return {**text(size), "attention_mask": mask}


def two_texts(size: Size) -> dict[str, Tensor]:
    return {**text(size), "decoder_input_ids": text(size)["input_ids"]}


def pictures(size: Size) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(size.batch, 3, size.image, size.image)}


def pictures_channels_last(size: Size) -> dict[str, Tensor]:
    return {name: x.to(memory_format=torch.channels_last) for name, x in pictures(size).items()}


@dataclass(frozen=True)
class Case:
    """`norms`: how many of which classes there are, by the number of layers."""

    build: Callable[[Size], nn.Module]
    inputs: Callable[[Size], dict[str, Tensor]]
    norms: Callable[[int], dict[str, int]]


CASES = {
    "bert": Case(bert, padded_text, lambda layers: {"torch.nn.LayerNorm": 1 + 2 * layers}),
    "gpt2": Case(gpt2, text, lambda layers: {"torch.nn.LayerNorm": 1 + 2 * layers}),
    "vit": Case(vit, pictures, lambda layers: {"torch.nn.LayerNorm": 1 + 2 * layers}),
    "llama": Case(llama, text, lambda layers: {"transformers.LlamaRMSNorm": 1 + 2 * layers}),
    "gemma": Case(gemma, text, lambda layers: {"transformers.GemmaRMSNorm": 1 + 2 * layers}),
    "t5": Case(t5, two_texts, lambda layers: {"transformers.T5LayerNorm": 2 + 5 * layers}),
    "resnet": Case(resnet, pictures_channels_last, lambda layers: {"torch.nn.BatchNorm2d": 3 + 4 * layers}),
    "resnet_contiguous": Case(resnet_contiguous, pictures, lambda layers: {"torch.nn.BatchNorm2d": 3 + 4 * layers}),
    "convnext": Case(
        convnext, pictures, lambda layers: {"transformers.ConvNextLayerNorm": 2 + 2 * layers, "torch.nn.LayerNorm": 1}
    ),
    "mobilenet_v2": Case(mobilenet_v2, pictures_channels_last, lambda layers: {"torch.nn.BatchNorm2d": 52}),
}
WITH_BATCH_NORM = ("resnet", "resnet_contiguous", "mobilenet_v2")


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}


def convert(model: nn.Module) -> nn.Module:
    """Converts the model, with no norm left out."""
    report = tn.convert(model)
    assert report.skipped == {}
    assert report.converted.keys() == norms_of(model).keys() != set()
    return model


def built(name: str, size: Size, device: str = "cpu") -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in training mode and its inputs. No norm has a parameter or a running statistic of 0 or 1 left."""
    model = CASES[name].build(size).train()
    with torch.no_grad():
        for norm in norms_of(model).values():
            for key, tensor in norm.state_dict().items():
                if key == "running_var":
                    tensor.uniform_(0.5, 2.0)
                elif tensor.is_floating_point():
                    tensor.add_(0.3 * torch.randn_like(tensor))
    return model.to(device), {key: tensor.to(device) for key, tensor in CASES[name].inputs(size).items()}


def tensors_in(prefix: str, value: Any) -> dict[str, Tensor]:
    """The floating-point ones among the outputs of a model, by name."""
    if isinstance(value, Tensor):
        return {prefix: value} if value.is_floating_point() else {}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    else:
        return {}
    return {name: tensor for key, part in items for name, tensor in tensors_in(f"{prefix}.{key}", part).items()}


def loss_of(logits: Tensor) -> Tensor:
    labels = torch.arange(logits[..., 0].numel(), device=logits.device) % logits.shape[-1]
    return F.cross_entropy(logits.flatten(0, -2), labels)


def step(
    model: nn.Module, inputs: dict[str, Tensor], run: Callable[..., Any] | None = None, hidden_states: bool = True
) -> dict[str, Tensor]:
    """Outputs, gradients, and the state after a step of SGD; `run`: the model, compiled."""
    leaves = {
        key: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor for key, tensor in inputs.items()
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        outputs = (model if run is None else run)(**leaves, output_hidden_states=hidden_states)
        loss_of(outputs.logits).backward()
    result = tensors_in("outputs", outputs)
    result |= {f"gradient of {key}": leaf.grad for key, leaf in leaves.items() if leaf.requires_grad}
    result |= {f"gradient of {key}": parameter.grad for key, parameter in model.named_parameters()}
    optimizer.step()
    result |= {f"state of {key}": tensor for key, tensor in model.state_dict().items()}
    return {key: tensor.detach().clone() for key, tensor in result.items() if tensor is not None}


def widened(model: nn.Module) -> nn.Module:
    """A copy in fp64, its RMSNorms too, which are Hugging Face's and compute in fp32 whatever they are given."""
    wide = copy.deepcopy(model).double()
    for norm in norms_of(wide).values():
        kind = type(norm).__name__
        if kind in ("LlamaRMSNorm", "GemmaRMSNorm", "T5LayerNorm"):
            norm.forward = _exact_rms_norm(norm, 1.0 if kind == "GemmaRMSNorm" else 0.0)
    return wide


def _exact_rms_norm(norm: nn.Module, weight_offset: float) -> Callable[[Tensor], Tensor]:
    eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(x: Tensor) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight + weight_offset, eps)

    return forward


def _wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}


def _moved_by_an_ulp(model: nn.Module) -> nn.Module:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape, device=p.device).to(p))
    return moved


def _error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact.double()).abs().max().item()


# At a tensor's largest value: where little is rounded, the runs of torch may all happen to be exact.
ULPS = 4
# A converted model is one more draw of rounding errors, and may be so many times as bad as the worst of the others.
WORSE = 2.0
RUNS = 9


@dataclass(frozen=True)
class Expected:
    """Results of a model that is not converted: in fp64, and how far from that it strays in its own type, with its
    parameters as they are and in eight more runs with each of them moved by at most an ulp."""

    exact: dict[str, Tensor]
    plain: dict[str, Tensor]
    strays: dict[str, float]

    def check(self, actual: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Asserts that `found` strays no farther, and most of it not even as far."""
        assert actual.keys() == self.exact.keys() == self.plain.keys()
        ratios = []
        for key, exact in self.exact.items():
            assert (actual[key].dtype, actual[key].shape) == (self.plain[key].dtype, exact.shape), key
            bound = self.strays[key] + ULPS / WORSE * torch.finfo(dtype).eps * exact.double().abs().max().item()
            error = _error(actual[key], exact)
            assert error <= WORSE * bound, f"{key}: {error:.2e} from exact, where torch is {self.strays[key]:.2e}"
            ratios.append(error / bound if bound else 0.0)
        assert statistics.median(ratios) <= 1.0


Step = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def expected(model: nn.Module, inputs: dict[str, Tensor], take: Step = step, take_exact: Step = step) -> Expected:
    exact = take_exact(widened(model), _wide(inputs))
    results = [take(_moved_by_an_ulp(model) if run else copy.deepcopy(model), inputs) for run in range(RUNS)]
    return Expected(exact, results[0], {key: max(_error(run[key], exact[key]) for run in results) for key in exact})


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [key for key, tensor in actual.items() if not torch.equal(tensor, expected[key])] == []


def assert_same_step(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Asserts the same bits on a CPU; a GPU adds up in an order of its own in some of torch's operators."""
    if all(tensor.is_cpu for tensor in actual.values()):
        assert_same_bits(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
