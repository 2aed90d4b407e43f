"""What the demo shows fits a terminal of 80 columns too, and its commands can be copied."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from abliterate.cli.demo_output import show_demo
from abliterate.run_folder import COMPLETIONS, EDITED

HASH = "0123456789abcdef" * 4


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run folder ``runs/demo`` below the working directory, and the record of its stages."""
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "runs/demo" / COMPLETIONS
    texts.mkdir(parents=True)
    for name in ("baseline", EDITED):
        for kind in ("harmful", "harmless"):
            row = {"prompt": f"a {kind} prompt", "response": "several words of an answer " * 9}
            (texts / f"{name}-{kind}.jsonl").write_text(json.dumps(row) + "\n")
    rate = {"refusal_score": 0.5, "refusal_score_ci": [0.25, 0.75]}
    figures = {"harmful": rate, "harmless": rate, "kl_divergence": 0.1}
    return {
        "extract": {"positions": [{"position": -3, "token": "<|eot_id|>"}], "n_layers": 8},
        "select": {"winner": {"position": -3, "layer": 5}},
        "orthogonalize": {"tensors": [{}] * 17},
        "evaluate": {
            "n_prompts": {"harmful": 120, "harmless": 120},
            "interventions": dict.fromkeys(("baseline", "ablate", "add", EDITED), figures),
        },
        "hash": HASH,
    }


@pytest.mark.parametrize("columns", [80, 100, 250])
def test_the_demo_fits_its_terminal(
    columns: int,
    record: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    show_demo(record, Path("runs/demo"), "report: runs/demo/report.html")
    out = capsys.readouterr().out
    assert 70 < max(map(len, out.splitlines())) <= min(columns, 100)
    assert HASH in out
    assert "(17 tensors changed)" in " ".join(out.split())
    commands = [
        shlex.split(line.partition(": ")[2])
        for line in out.replace("\\\n", "").splitlines()
        if ": abliterate " in line
    ]
    model = "Qwen/Qwen2.5-0.5B-Instruct"
    assert commands == [
        ["abliterate", "run", model, "-o", "runs/mine"],
        ["abliterate", "report", "runs/mine"],
        ["abliterate", "chat", model, "--direction", "runs/mine", "--compare"],
    ]
