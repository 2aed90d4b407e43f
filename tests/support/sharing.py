"""What several test files read and none changes, made once for all workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> Path:
    """The folder ``name``, which ``make`` fills for the first worker that asks; others wait."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(place.with_suffix(".lock")):
        done = place.with_suffix(".done")
        if not done.exists():
            place.mkdir()
            make(place)
            done.touch()
    return place
