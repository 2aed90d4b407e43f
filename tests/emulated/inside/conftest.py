"""Within this folder the machine has an accelerator while a test asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from on_device import MODEL, REAL, TRAIN, VAL, on_device, on_host

# What looks into the emulated device; the others run on a real one as well.
collect_ignore = [
    "test_accelerator_itself.py",
    "test_architectures_on_accelerator.py",
    "test_gpu_check_on_accelerator.py",
    "test_scores_without_float64.py",
    "test_small_devices.py",
    "test_waiting.py",
] * bool(REAL)


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that was filled on the CPU."""
    run = tmp_path_factory.mktemp("cpu") / "run"
    on_host("extract", MODEL, "-o", run, *TRAIN)
    on_host("select", run, *VAL)
    return run


@pytest.fixture(scope="session")
def edited_on_cpu(on_cpu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without the direction."""
    out = tmp_path_factory.mktemp("edited") / "model"
    on_host("orthogonalize", MODEL, "--direction", on_cpu, "-o", out, "-q")
    return out


@pytest.fixture(
    scope="session",
    params=[True] if REAL else [False, True],
    ids=["real"] if REAL else ["mps-like", "cuda-like"],
)
def on_emu(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool, dict[str, Any]]:
    """The same on the device without and with float64: folder, float64, counts by command."""
    run = tmp_path_factory.mktemp("emu") / "run"
    kind = {"float64": request.param}
    counts = {
        "extract": on_device("extract", MODEL, "-o", run, *TRAIN, **kind),
        "select": on_device("select", run, *VAL, **kind),
    }
    return run, request.param, counts
