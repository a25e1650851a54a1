"""Layers of Hugging Face's transformers, made without a model around them and without memory for their parameters."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 64},
    {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    {"first_k_dense_replace": 1},
    {"num_hidden_layers": 2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
)
"""Some configurations lack these, or have lengths that don't agree."""


def class_at(path: str) -> type[nn.Module] | None:
    """Returns None where the installed version has no such model or class."""
    model, name = path.split(".")
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ModuleNotFoundError:
        return None
    return getattr(module, name, None)


def layer_at(path: str) -> nn.Module:
    """Returns the first layer of a model of the default configuration, on the meta device. Some classes take the
    configuration of a part of the model."""
    cls: Any = class_at(path)
    failed: Exception | None = None
    for config in _configurations(path.split(".")[0], cls):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return cls(**_arguments(cls, config))
        except Exception as error:
            failed = failed or error
    raise LookupError(f"{path}: no configuration fits") from failed


def _configurations(model: str, cls: Any) -> Iterator[Any]:
    from transformers import PreTrainedConfig

    file = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    classes = [each.annotation for each in inspect.signature(cls).parameters.values()]
    classes += [each for name, each in sorted(vars(file).items()) if "Config" in name]
    for kind in dict.fromkeys(each for each in classes if isinstance(each, type)):
        for sizes in _SIZES if issubclass(kind, PreTrainedConfig) and kind is not PreTrainedConfig else ():
            try:
                config = kind(**sizes)
            except Exception:
                continue
            yield config
            yield from (part for part in vars(config).values() if isinstance(part, PreTrainedConfig))


def _arguments(cls: Any, config: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name == "config":
            arguments[name] = config
        elif name in ("layer_idx", "layer_id"):
            arguments[name] = 0
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            arguments[name] = 64 if name in ("hidden_size", "d_model", "dim") else 1
    return arguments
