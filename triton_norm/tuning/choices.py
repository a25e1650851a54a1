"""Chooses among the configs of a space.

The first of these decides: a choice made earlier in this process; `<gpu>.json`, measured by the project; a search by
`triton.autotune`, whose result is cached on disk. A file that can't be read, or a choice that the space no longer has,
is skipped with one warning.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_norm.tuning.configs import Config, Space, config
from triton_norm.tuning.memory import forget

TUNED = Path(__file__).parents[1] / "tuned"
"""The library's measured choices are in this folder."""


@dataclass
class _Choices:
    """Holds the choices made in this process, the files read so far, and the GPUs warned about, by GPU name."""

    folder: Path | None
    made: dict[tuple[str, str, str], Config] = field(default_factory=dict)
    shipped: dict[str, Mapping[str, Mapping[str, Config]]] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)


_in_force = _Choices(TUNED)


@contextlib.contextmanager
def begun_anew(folder: Path | None) -> Iterator[None]:
    """Starts with no choice made, in this context and all threads. `folder` has the measured choices, or is None."""
    global _in_force
    before, _in_force = _in_force, _Choices(folder)
    forget()
    try:
        yield
    finally:
        _in_force = before
        forget()


def chosen(space: Space, gpu_name: str | None) -> Config | None:
    """Returns the config for a space, or None if it has to be searched for; the best guess if gpu_name is None."""
    if gpu_name is None or len(space.configs) == 1:
        return space.configs[0]
    key = (gpu_name, space.kernel, space.key)
    result = _in_force.made.get(key)
    if result is None:
        stored = measured(gpu_name).get(space.kernel, {}).get(space.key)
        result = None if stored is None else space.find(stored.keywords)
        if result is not None:
            _in_force.made[key] = result
        elif stored is not None:
            _warn_of_foreign_choices(gpu_name, space, stored)
    return result


def _warn_of_foreign_choices(gpu_name: str, space: Space, choice: Config) -> None:
    if gpu_name in _in_force.warned:
        return
    _in_force.warned.add(gpu_name)
    example = f"{choice.keywords} for {space.kernel} ({space.key or 'any columns'})"
    message = f"triton_norm: {file_name(gpu_name)} has choices that can't be launched, such as {example}"
    warnings.warn(f"{message}; these launches are searched for", stacklevel=3)


def choose(space: Space, gpu_name: str, choice: Config) -> None:
    _in_force.made[gpu_name, space.kernel, space.key] = choice


def choose_only(gpu_name: str, choices: Mapping[tuple[str, str], Config]) -> None:
    """Replaces all choices made in this process by these, given by (kernel, key)."""
    _in_force.made.clear()
    _in_force.made.update({(gpu_name, *key): choice for key, choice in choices.items()})
    forget()


def chosen_so_far(gpu_name: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the choices made on a GPU, in the format of its file: keywords by kernel and key."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, kernel, key), choice in list(_in_force.made.items()):  # a copy, since another thread may add a choice
        if name == gpu_name:
            result.setdefault(kernel, {})[key] = choice.keywords
    return result


def file_name(gpu_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json"


def measured(gpu_name: str) -> Mapping[str, Mapping[str, Config]]:
    """Returns the choices measured on a GPU, by kernel and key; empty with one warning if its file can't be read."""
    result = _in_force.shipped.get(gpu_name)
    if result is None:
        result = _in_force.shipped[gpu_name] = _read(gpu_name)
    return result


def read_again() -> None:
    """Makes `measured` read the files again: they may have changed."""
    _in_force.shipped.clear()


def _read(gpu_name: str) -> Mapping[str, Mapping[str, Config]]:
    if _in_force.folder is None:
        return {}
    file = _in_force.folder / file_name(gpu_name)
    try:
        content = json.loads(file.read_text())
        measured_on = content.get("environment", {}).get("GPU", gpu_name)
        if measured_on != gpu_name:
            raise ValueError(f"measured on {measured_on}")
        return {
            kernel: {
                key: config(**{name: int(value) for name, value in result.items()}) for key, result in keys.items()
            }
            for kernel, keys in content["choices"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        warnings.warn(f"triton_norm: {file.name} is left out, launches are searched for: {error!r}", stacklevel=3)
        return {}
