"""Outputs stay out of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from abliterate.direction import Direction, save_direction


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("how", ["named", "linked", "from within"])
def test_no_output_is_made_in_a_checkpoint(
    how: str, tiny, fails, tmp_path: Path, monkeypatch
) -> None:
    model, other = tiny("llama"), Path(shutil.copytree(tiny("qwen2"), tmp_path / "other"))
    vector = tmp_path / "direction.safetensors"
    save_direction(vector, Direction(torch.linspace(-1, 2, 48).double(), -1, 2), "tiny")
    before, place = _names(other), other
    if how == "linked":
        place = tmp_path / "link"
        place.symlink_to(other, target_is_directory=True)
    elif how == "from within":
        monkeypatch.chdir(other)
        place = Path()
    edit = ("orthogonalize", model, "--direction", vector, "-o")
    for command in (
        (*edit, place / "out"),
        (*edit, place / "deep" / "er" / "out", "--overwrite"),
        ("extract", model, "-o", place / "run"),
        ("extract", model, "-o", place),
        ("run", model, "-o", place / "run"),
        ("evaluate", model, "-o", place / "answers", "--intervention", "baseline"),
        ("export", vector, "--to", "npz", "-o", place / "direction.npz"),
        ("audit", model, "-o", place / "found.safetensors"),
    ):
        line = fails(*command, code=2)
        assert f"lies in the checkpoint {other}" in line, command
    assert "overlaps the source" in fails(*edit[:3], vector, "-o", model / "out", code=2)
    assert _names(other) == before


def test_a_folder_that_only_looks_like_one_is_none(tiny, cli, tmp_path: Path) -> None:
    """Of other programs too there are files called config.json."""
    vector = tmp_path / "direction.safetensors"
    save_direction(vector, Direction(torch.linspace(-1, 2, 48).double(), -1, 2), "tiny")
    for text in ('{"name": "mine"}', "[1]", "no JSON", ""):
        (tmp_path / "config.json").write_text(text)
        out = tmp_path / "direction.npz"
        assert cli("export", vector, "--to", "npz", "-o", out).code == 0
        out.unlink()


def test_a_place_of_two_names_is_one(tiny, fails, tmp_path: Path, monkeypatch) -> None:
    """As on file systems where case does not count: ``OUT`` may be the source by another name."""
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    vector = tmp_path / "direction.safetensors"
    save_direction(vector, Direction(torch.linspace(-1, 2, 48).double(), -1, 2), "tiny")
    plain = Path.samefile

    def samefile(one: Path, other: Path) -> bool:
        return str(one).lower() == str(other).lower() or plain(one, other)

    monkeypatch.setattr(Path, "samefile", samefile)
    for out in (tmp_path / "MODEL", tmp_path / "Model" / "out"):
        line = fails("orthogonalize", model, "--direction", vector, "-o", out, code=2)
        assert "overlaps the source" in line
    evaluate = ("evaluate", model, "--checkpoint", f"one={model}", "--checkpoint")
    for name in ("ONE", "Baseline"):
        line = fails(*evaluate, f"{name}={model}", code=2)
        assert f"the name '{name}' is taken" in line
