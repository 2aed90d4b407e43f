"""scripts/gpu_check.py, whole, with tiny shapes on a device that counts waits and memory."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from on_device import accelerator

from abliterate import precision

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu_check.py"


def test_the_check_runs_whole_on_an_accelerator(capfd: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    gpu_check = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = gpu_check
    spec.loader.exec_module(gpu_check)
    precision._computes_float64.cache_clear()
    capfd.readouterr()
    with accelerator.accelerator(float64=True, memory=1 << 31) as state:

        @contextlib.contextmanager
        def count_waits(device: torch.device) -> Iterator[Callable[[], dict[str, int]]]:
            before = state.synchronisations()
            yield lambda: {"all": state.synchronisations() - before}

        code = gpu_check.main(["--device", "emu", "--tiny"], count_waits)
    captured = capfd.readouterr()
    assert code == 0, captured.err[-2000:]
    document = json.loads(captured.out)
    assert document["device"]["type"] == "emu"
    assert document["device"]["memory"] == 1 << 31
    assert document["demo"]["same_winner"] is True
    for shape in document["shapes"].values():
        for part in ("extract", "select", "generate"):
            memory = shape[part]["memory"]
            assert memory["bytes"] >= memory["floor"]["bytes"] >= 2 * shape["parameters"]
        # One a batch, that of the first token among them; transformers asks a batch's mask twice.
        waits = shape["extract"]["waits"]
        assert waits["floor"] < waits["count"] <= 3 * (waits["floor"] + 1)
        assert shape["select"]["waits"]["count"] > 0
        assert shape["generate"]["waits"]["count"] >= 2
