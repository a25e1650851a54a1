"""Times training steps of whole models, with and without faster norms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import triton_norm
from perf.calls import DTYPES, Candidate
from perf.gate import TOLERANCE, errors
from perf.measure import Stopped, Timer, time_interleaved
from perf.records import Spread, Step, failed, in_a_line, made

Built = tuple[nn.Module, torch.Tensor]

# Steps that are timed together, as in a loop that never waits for the GPU.
STEPS = 4
LEARNING_RATE = 1e-6
# A contender's error may be this many times torch's.
WORSE_THAN_TORCH = 2


@dataclass(frozen=True)
class Model:
    """`build` gives the module and its input, on the CPU in fp32. Trained in `dtype`, or in autocast to it."""

    name: str
    source: str
    ops: tuple[str, ...]
    dtype: str
    build: Callable[[], Built]
    takes: str  # the name of the input
    gives: str  # of the output
    autocast: bool = False
    channels_last: bool = False
    slow_to_compile: bool = False

    @property
    def is_landmark(self) -> bool:
        """Returns whether it is worth the time that compiling takes, in a quick run too."""
        return not self.slow_to_compile

    def describe(self) -> dict[str, str]:
        return {"model": self.name, "source": self.source, "dtype": self.dtype}

    def __str__(self) -> str:
        return f"step {self.dtype} {self.name}"


def bert(layers: int = 1, hidden: int = 768, heads: int = 12, batch: int = 32, tokens: int = 512) -> Built:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False), torch.randn(batch, tokens, hidden)


def llama(
    hidden: int = 4096, inner: int = 14336, heads: tuple[int, int] = (32, 8), batch: int = 2, tokens: int = 2048
) -> Built:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], use_cache=False,
    )  # fmt: skip
    return LlamaModel(config), torch.randn(batch, tokens, hidden)


def resnet(batch: int = 64, side: int = 224, **sizes: Any) -> Built:
    """Builds a ResNet, by default ResNet-50."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(**{"num_labels": 1000, **sizes})), torch.randn(
        batch, 3, side, side
    )


MODELS = [
    Model(
        "BERT base, one layer", "batch 32 × 512 tokens, AdamW", ("layer_norm",), "bf16", bert, "inputs_embeds",
        "last_hidden_state",
    ),
    Model(
        "Llama-3 8B, one layer", "batch 2 × 2048 tokens, AdamW", ("rms_norm",), "bf16", llama, "inputs_embeds",
        "last_hidden_state",
    ),
    Model(
        "ResNet-50", "batch 64 × 224 × 224, channels last, autocast, AdamW", ("batch_norm",), "bf16", resnet,
        "pixel_values", "logits", autocast=True, channels_last=True, slow_to_compile=True,
    ),
]  # fmt: skip


def missing() -> str:
    """Returns why the models cannot be built here, or an empty string."""
    try:
        import transformers  # noqa: F401
    except Exception as error:
        return in_a_line(error)
    return ""


class Trained:
    """A model in training on a device; `norms`: how many norms `convert` knows in it."""

    def __init__(self, model: Model, device: str) -> None:
        torch.manual_seed(0)
        module, x = model.build()
        self.model, self.device = model, device
        self.norms = len(triton_norm.convert(copy.deepcopy(module)).converted)
        self.module = module.train().to(device)
        self.x = x.to(device)
        if model.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = self.x.to(memory_format=torch.channels_last)
        if not model.autocast:
            self.module, self.x = self.module.to(DTYPES[model.dtype]), self.x.to(DTYPES[model.dtype])
        self.target = torch.randn_like(self.output(self.module, self.x, autocast=model.autocast))

    def output(self, module: nn.Module, x: torch.Tensor, autocast: bool) -> torch.Tensor:
        within: AbstractContextManager[Any] = nullcontext()
        if autocast:
            within = torch.autocast(torch.device(self.device).type, DTYPES[self.model.dtype])
        with within:
            result: torch.Tensor = getattr(module(**{self.model.takes: x}), self.model.gives)
        return result

    def results(self, module: nn.Module, double: bool = False) -> dict[str, torch.Tensor]:
        """Returns the output, and the gradients of all parameters, laid end to end."""
        module.zero_grad()
        y = self.output(module, self.x.double() if double else self.x, self.model.autocast and not double)
        (y * self.target.to(y.dtype)).mean().backward()
        gradients = [p.grad.flatten().double() for p in module.parameters() if p.grad is not None]
        return {"output": y.detach().double(), "gradients": torch.cat(gradients)}

    def exact(self) -> dict[str, torch.Tensor]:
        return self.results(copy.deepcopy(self.module).double(), double=True)

    def candidate(
        self, name: str, module: nn.Module, scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Candidate:
        optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE, fused=True)

        def steps(_: Any) -> None:
            with scope():
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    y = self.output(module, self.x, self.model.autocast)
                    (y * self.target).mean().backward()
                    optimizer.step()

        return Candidate(name, lambda: None, steps)


def converted(module: nn.Module) -> nn.Module:
    triton_norm.convert(module)
    return module


def without_norms(module: nn.Module) -> nn.Module:
    """Puts identities in the places of its norms."""
    for name in triton_norm.convert(copy.deepcopy(module)).converted:
        module.set_submodule(name, nn.Identity())
    return module


def compiled(module: nn.Module) -> nn.Module:
    module.compile(dynamic=False)
    return module


@dataclass(frozen=True)
class Way:
    """A way of training a model; `base` is the way of the same model without its norms. Its steps run in `scope`."""

    adapt: Callable[[nn.Module], nn.Module]
    base: str
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext


WAYS = {
    "torch": Way(lambda module: module, "eager"),
    "triton_norm": Way(converted, "eager"),
    "torch.compile": Way(compiled, "compiled"),
    "triton_norm, compiled": Way(
        lambda module: compiled(converted(module)), "compiled", lambda: triton_norm.backend("auto")
    ),
    "triton_norm, compiled, kernels forced": Way(
        lambda module: compiled(converted(module)), "compiled", lambda: triton_norm.backend("triton")
    ),
}
"""Ways of training by the names of contenders."""
BASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": without_norms,
    "compiled": lambda module: compiled(without_norms(module)),
}


def _distances(results: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: overall for name, (overall, _) in errors(results, exact).items()}


def verdict(distances: dict[str, float], distances_of_torch: dict[str, float], tolerance: float) -> str:
    """Returns the first result outside the tolerance in words, or an empty string. Rounding adds up over layers."""
    for name, distance in distances.items():
        allowed = WORSE_THAN_TORCH * distances_of_torch[name] + tolerance
        if not distance <= allowed:
            return f"{name} is off by {distance:.2e}, {allowed:.2e} is allowed"
    return ""


def _step(model: Model, contender: str, **fields: Any) -> Step:
    return made(Step, model.describe(), {"contender": contender, "status": "ok", "message": ""}, fields)


def _admitted(trained: Trained, names: Sequence[str]) -> Iterator[tuple[Step, nn.Module | None]]:
    exact = trained.exact()
    torchs = _distances(trained.results(copy.deepcopy(trained.module)), exact)
    for name in names:
        record = _step(trained.model, name, norms=trained.norms)
        try:
            module = WAYS[name].adapt(copy.deepcopy(trained.module))
            with WAYS[name].scope():
                distances = _distances(trained.results(module), exact)
        except Exception as error:
            yield made(Step, record, failed(error)), None
            continue
        message = verdict(distances, torchs, TOLERANCE[trained.model.dtype])
        record |= {"errors": distances, "status": "wrong" if message else "ok", "message": message}
        yield record, None if message else module


def measure_step(model: Model, contenders: Collection[str], timer: Timer, seconds: float = 1.5) -> list[Step]:
    """Returns one record for each way that is named: a step's time and one without norms, or the reason why not."""
    names = [name for name in WAYS if name in contenders]
    reason = missing()
    if reason:
        return [_step(model, name, status="missing", message=reason) for name in names]
    try:
        trained = Trained(model, timer.device)
        admitted = list(_admitted(trained, names))
        modules = {record["contender"]: module for record, module in admitted if module is not None}
        bases = {WAYS[name].base for name in modules}
        calls = [[trained.candidate(name, module, WAYS[name].scope)] for name, module in modules.items()]
        modules |= {base: BASES[base](copy.deepcopy(trained.module)) for base in bases}
        calls += [[trained.candidate(base, modules[base])] for base in bases]
        timings = time_interleaved(calls, timer, seconds, backlog=False) if calls else []
        spreads = dict(zip(modules, timings, strict=True))
    except Exception as error:
        records = [_step(model, name, **failed(error)) for name in names]
    else:
        records = [made(Step, record, _per_step(record, spreads)) for record, _ in admitted]
    try:
        timer.synchronize()
    except Exception as error:
        raise Stopped(records, error) from error
    return records


def _per_step(record: Step, spreads: dict[str, Spread]) -> dict[str, Any]:
    timing = spreads.get(record["contender"])
    if timing is None:
        return {}
    base = WAYS[record["contender"]].base
    each = {name: us / STEPS for name, us in timing.items() if name.endswith("_us") and isinstance(us, float)}
    return {**each, "repetitions": timing["repetitions"], "without_norms_us": spreads[base]["median_us"] / STEPS}
