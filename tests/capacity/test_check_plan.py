"""scripts/check_plan.py: every stage runs as it starts it, on a tiny checkpoint in one process."""

from __future__ import annotations

import argparse
import contextlib
import io

import check_plan
import pytest

from abliterate.capacity import machine_benchmark
from abliterate.cli.app import main


def test_every_stage_is_estimated_and_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(*arguments: str) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main([*arguments, "--quiet"]) == 0
        return said.getvalue()

    monkeypatch.setattr(check_plan, "output", output)
    for name, speed in (("disk_speed", 1e9), ("copy_speed", 1e9), ("layer_speed", 1e10)):
        monkeypatch.setattr(machine_benchmark, name, lambda *args, speed=speed, **more: speed)
    for name in ("_PROMPTS", "_TEST", "_ANSWER"):
        monkeypatch.setattr(check_plan, name, 2)
    check_plan.all_stages(argparse.Namespace(layers=4, width=64))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | " in line][1:]
    assert [row[0] for row in rows] == [f"| {name}" for name in (
        "extract", "select", "orthogonalize", "verify --forward", "evaluate")]  # fmt: skip
    assert all(float(row[1]) >= 0 and float(row[2]) >= 0 for row in rows)
