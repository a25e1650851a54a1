"""Chooses among the configs of a space.

A choice is found in this order: made before in this process; `<gpu>.json`, measured by the project; a search by
`triton.autotune` among the space's configs, which keeps its result on disk. A file that can't be used, and a choice in
it that is not among its space's configs, is left out with one warning.
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
"""Where the library's files of measured choices are."""


@dataclass
class _Choices:
    """Choices by the names of GPUs.

    Args:
        folder: has the files of measured choices; None is a folder without any.
        made: choices of this process, by GPU, kernel and key.
        shipped: what the files hold that have been read.
        warned: GPUs whose file has been warned of.
    """

    folder: Path | None
    made: dict[tuple[str, str, str], Config] = field(default_factory=dict)
    shipped: dict[str, Mapping[str, Mapping[str, Config]]] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)


_in_force = _Choices(TUNED)


@contextlib.contextmanager
def begun_anew(folder: Path | None) -> Iterator[None]:
    """Begins with no choice made, within this context and in all threads. Measured choices are read from the files in
    `folder`, or from none where it is None."""
    global _in_force
    before, _in_force = _in_force, _Choices(folder)
    forget()
    try:
        yield
    finally:
        _in_force = before
        forget()


def chosen(space: Space, gpu_name: str | None) -> Config | None:
    """Returns the config for a space on a GPU (None: no GPU, the best guess), or None where a search has to find it."""
    if gpu_name is None or len(space.configs) == 1:
        return space.configs[0]
    key = (gpu_name, space.kernel, space.key)
    found = _in_force.made.get(key)
    if found is None:
        stored = measured(gpu_name).get(space.kernel, {}).get(space.key)
        found = None if stored is None else space.find(stored.keywords)
        if found is not None:
            _in_force.made[key] = found
        elif stored is not None:
            _warn_of_foreign_choices(gpu_name, space, stored)
    return found


def _warn_of_foreign_choices(gpu_name: str, space: Space, choice: Config) -> None:
    if gpu_name in _in_force.warned:
        return
    _in_force.warned.add(gpu_name)
    what = f"{choice.keywords} for {space.kernel} ({space.key or 'any columns'})"
    message = f"triton_norm: {file_name(gpu_name)} has choices that can't be launched, such as {what}"
    warnings.warn(f"{message}; these launches are searched for", stacklevel=3)


def choose(space: Space, gpu_name: str, choice: Config) -> None:
    """Keeps the config that a search has found."""
    _in_force.made[gpu_name, space.kernel, space.key] = choice


def choose_only(gpu_name: str, choices: Mapping[tuple[str, str], Config]) -> None:
    """Keeps these configs, by kernel and key, in place of all choices made so far in this process."""
    _in_force.made.clear()
    _in_force.made.update({(gpu_name, *key): choice for key, choice in choices.items()})
    forget()


def chosen_so_far(gpu_name: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns what was chosen on a GPU so far, in the form of its file: keywords by kernel and key."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, kernel, key), choice in list(_in_force.made.items()):  # another thread may choose meanwhile
        if name == gpu_name:
            found.setdefault(kernel, {})[key] = choice.keywords
    return found


def file_name(gpu_name: str) -> str:
    """Returns the name of the file of choices measured on a GPU."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json"


def measured(gpu_name: str) -> Mapping[str, Mapping[str, Config]]:
    """Returns the choices measured on a GPU by kernel and key; a file that can't be used is left out with one
    warning."""
    found = _in_force.shipped.get(gpu_name)
    if found is None:
        found = _in_force.shipped[gpu_name] = _read(gpu_name)
    return found


def read_again() -> None:
    """Has `measured` read the files anew: they may have changed."""
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
            kernel: {key: config(**{name: int(value) for name, value in found.items()}) for key, found in keys.items()}
            for kernel, keys in content["choices"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        warnings.warn(f"triton_norm: {file.name} is left out, launches are searched for: {error!r}", stacklevel=3)
        return {}
