"""Launchers that are made while a test runs."""

import weakref
from typing import Any

import pytest

from triton_norm import launch


def made_launchers(monkeypatch: pytest.MonkeyPatch) -> "weakref.WeakSet[launch.Launcher]":
    """Returns the launchers that are made from now on, as long as something else keeps them."""
    made: weakref.WeakSet[launch.Launcher] = weakref.WeakSet()
    make = launch.Launcher.__init__

    def note(launcher: launch.Launcher, *arguments: Any, **named: Any) -> None:
        make(launcher, *arguments, **named)
        made.add(launcher)

    monkeypatch.setattr(launch.Launcher, "__init__", note)
    return made
