"""One run folder for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from reporting import make_run, make_small_runs
from sharing import made_once


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of every stage, with markup in names, prompts and answers; never written to."""
    return made_once(tmp_path_factory, "report", make_run) / "run"


@pytest.fixture(scope="session")
def small_runs(tiny, tmp_path_factory) -> list[Path]:
    place = made_once(
        tmp_path_factory, "small-runs", lambda where: make_small_runs(where, tiny("llama"))
    )
    return [place / "seed0" / "small", place / "seed1" / "small"]
