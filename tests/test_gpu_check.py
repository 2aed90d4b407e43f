"""scripts/gpu_check.py, whole, with tiny shapes on the CPU; on a device: ``emulated/inside``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def _floors(document: Any) -> list[Any]:
    """Every part that was measured, in whatever depth: what has a floor."""
    if not isinstance(document, dict):
        return []
    own = [document] if "floor" in document else []
    return own + [found for value in document.values() for found in _floors(value)]


def test_the_check_runs_whole_and_names_a_floor_beside_each_figure(
    gpu_check: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "figures.json"
    assert gpu_check.main(["--device", "cpu", "--tiny", "-o", str(file)]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document == json.loads(file.read_text())
    assert document["failures"] == []
    assert document["tiny"] is True
    assert document["demo"]["same_winner"] is True
    assert set(document["versions"]) >= {"torch", "transformers", "abliterate"}
    parts = [shape[part] for shape in document["shapes"].values()
             for part in ("extract", "select", "generate")]  # fmt: skip
    assert len(parts) == 6
    assert all("skipped" not in part and "error" not in part for part in parts)
    assert all(part["floor"]["seconds"] > 0 for part in parts if "seconds" in part)
    assert all(shape["select"]["not_used"] == [] for shape in document["shapes"].values())
    # Each of them with its waits and its memory, the edit, and the demo model.
    assert len(_floors(document)) == 6 * 3 + 1 + 1
    first, second = document["shapes"].values()
    assert first["orthogonalize"]["ratio"] > 1
    assert "orthogonalize" not in second


def test_what_there_is_no_time_for_is_left_out_and_what_fails_is_told(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(gpu_check, "demo", broken)
    monkeypatch.setattr(gpu_check.Bench, "extract", broken)
    for part in ("select", "generate", "orthogonalize"):
        monkeypatch.setattr(gpu_check.Bench, part, lambda *_: {"floor": None})
    assert gpu_check.main(["--device", "cpu", "--tiny"]) == 1
    document = json.loads(capfd.readouterr().out)
    assert document["failures"][0] == "demo model: RuntimeError: no such kernel"
    shapes = document["shapes"].values()
    assert all(shape["extract"]["error"].endswith("no such kernel") for shape in shapes)
    assert all(shape["select"] == {"floor": None} for shape in shapes)
    assert gpu_check.main(["--device", "cpu", "--tiny", "--seconds", "1"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert all("no time" in shape["skipped"] for shape in document["shapes"].values())


def test_without_an_accelerator_it_says_so(
    gpu_check: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--device", "cpu"]) == 2
    assert "there is no accelerator here" in capfd.readouterr().err
    assert gpu_check.main(["--device", "cuda:99"]) == 2
    assert "--device cuda:99" in capfd.readouterr().err
