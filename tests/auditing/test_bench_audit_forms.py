"""scripts/bench_audit_forms.py on one architecture: what docs/audit.md's table is made of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_audit_forms
import pytest
import torch
from audit_edits import DEPTH, WIDTH, Matrix


def test_the_sweep_prints_verdicts_and_figures_of_edits_and_benign_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    forms = ["half, by layer", "three"]
    command = ["--architectures", "llama", "--forms", *forms, "--benign", "decay"]
    assert bench_audit_forms.main([*command, "--out", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| half, by layer | 1 edited | 100% | 0.000 | 1.0000 | 1 clean |" in lines
    assert "| three | 1 edited | 100% | 0.000 | 1.0000 | 1 edited |" in lines
    assert "| decay | 1 clean | 0 | 1 clean |" in lines
    figures = json.loads(file.read_text())
    layers, three = figures["edits"]
    assert (layers["named"], layers["of"], three["of"]) == (12, 12, 13)
    assert layers["kinds"] == ["by layer", "partial"]
    assert layers["wrongly"] == three["wrongly"] == []


def test_cosines_are_held_against_the_directions_of_each_layer() -> None:
    """One direction for all is none of those by layer, and a layer without one counts as zero."""
    form = bench_audit_forms.FORMS["by layer"]
    writers = [Matrix(f"layers.{i}.x", 0, i, torch.ones(WIDTH)) for i in range(DEPTH)]
    rows = torch.stack([bench_audit_forms.directions_of(form, one)[:, 0] for one in writers])

    def shown(basis_at: Any) -> Any:
        return SimpleNamespace(basis_at=basis_at)

    own = bench_audit_forms.least_cosines(shown(lambda at: -rows[at][:, None]), form, writers)
    assert own == pytest.approx([1.0] * DEPTH)
    first = bench_audit_forms.least_cosines(shown(lambda _: rows[0][:, None]), form, writers)
    assert first == pytest.approx([1, 0.8, 0.64, 0.51, 0.41, 0.33], abs=0.3)
    assert first[-1] < 0.8
    assert bench_audit_forms.least_cosines(shown(lambda _: None), form, writers) == [0.0] * DEPTH
