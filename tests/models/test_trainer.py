"""The recipe for transformers' Trainer: a converted model trains, resumes and is stored as the model would be."""

import copy
import itertools

import pytest
import torch
from torch import nn

import triton_norm as tn
from support.models import TINY, VOCABULARY

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS, BATCH, LEARNING_RATE = 4, 2, 1e-2
N_NORMS = 2 * TINY.layers + 1
# A loss of about 4 after some steps, whose norms and their gradients differ by a few roundings of fp32.
TOLERANCE = 1e-5
# With activations in bf16, one that is at a tie is rounded the other way.
HALF_TOLERANCE = 2**-8


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=TINY.width,
        intermediate_size=2 * TINY.width,
        num_hidden_layers=TINY.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def data() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(VOCABULARY, (STEPS * BATCH, TINY.tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": sample, "labels": sample} for sample in tokens]


@pytest.fixture
def trainer_of(tmp_path, device):
    """Returns a function from a model and TrainingArguments to a Trainer in a folder of its own."""
    numbers = itertools.count()

    def make(model: nn.Module, **options: object) -> "transformers.Trainer":
        arguments = transformers.TrainingArguments(
            **{
                "output_dir": str(tmp_path / str(next(numbers))),
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH,
                "learning_rate": LEARNING_RATE,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": device == "cpu",
                "dataloader_pin_memory": device != "cpu",
                **options,
            }
        )
        return transformers.Trainer(model=model, args=arguments, train_dataset=data())

    return make


def losses(trainer: "transformers.Trainer") -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def converted(model: nn.Module) -> nn.Module:
    assert len(tn.convert(model).converted) == N_NORMS
    return model


OPTIONS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": STEPS // 2},
    "mixed precision": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # the name of all releases
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_converted_model_trains_as_the_model(name, trainer_of, launched):
    options = OPTIONS[name]
    expected = trainer_of(llama(), **options)
    expected.train()
    assert not launched
    trainer = trainer_of(converted(llama()), **options)
    trainer.train()
    assert launched
    assert len(losses(trainer)) == trainer.args.max_steps
    tolerance = HALF_TOLERANCE if trainer.args.bf16 else TOLERANCE
    torch.testing.assert_close(losses(trainer), losses(expected), rtol=tolerance, atol=0)
    for one, other in zip(trainer.model.parameters(), expected.model.parameters(), strict=True):
        # Adam's first steps have the sign of a gradient alone: one of about 0 may go the other way.
        assert (one - other).abs().mean() < LEARNING_RATE * 1e-2


def test_the_optimizer_decays_the_same_parameters(trainer_of):
    """Trainer leaves out norms by their class and by their names."""
    expected, own = (trainer_of(model).get_decay_parameter_names(model) for model in (llama(), converted(llama())))
    assert own == expected

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.LayerNorm(4)

    model = Model()
    trainer = trainer_of(model)
    expected = trainer.get_decay_parameter_names(model)
    assert expected == ["first.weight"]
    tn.convert(model)
    assert trainer.get_decay_parameter_names(model) == expected


def test_it_resumes_from_checkpoints_of_either(trainer_of, launched):
    every = {"save_strategy": "steps", "save_steps": STEPS // 2, "save_total_limit": 2}
    expected, own = trainer_of(llama(), **every), trainer_of(converted(llama()), **every)
    expected.train()
    own.train()
    for first in (expected, own):
        launched.clear()
        resumed = trainer_of(converted(llama()))
        resumed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-{STEPS // 2}")
        assert launched
        torch.testing.assert_close(losses(resumed), losses(expected), rtol=TOLERANCE, atol=0)


def test_what_is_saved_is_the_models(trainer_of, tmp_path):
    model = llama()
    other = converted(copy.deepcopy(model))
    trainer_of(model).save_model(str(tmp_path / "plain"))
    trainer_of(other).save_model(str(tmp_path / "converted"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "converted")
    assert type(loaded.model.norm) is type(model.model.norm)
    assert [*map(str, loaded.state_dict())] == [*map(str, other.state_dict())]
