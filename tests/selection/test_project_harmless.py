"""``--project-harmless``: nothing along the mean harmless activation, in select, hooks and edit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharing import made_once

OPEN = ("--no-filter", "--n-val", "8", "--kl-threshold", "1e9", "--induce-threshold=-1e9", "-q")


@pytest.fixture(scope="module")
def extracted(tiny, tmp_path_factory) -> Path:
    """A run folder with means at two positions, whose harmless part is large."""
    from abliterate.cli.app import main

    def make(folder: Path) -> None:
        options = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "--positions=-2,-1")
        assert main(["extract", str(tiny("llama")), "-o", str(folder), *options, "-q"]) == 0

    return made_once(tmp_path_factory, "projected-run", make)


@pytest.fixture
def run(extracted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(extracted, tmp_path / "run")


def _along_harmless(run: Path, vector: torch.Tensor) -> float:
    """``|cos|`` with the mean harmless activation of the selected position and layer."""
    winner = json.loads((run / "selection.json").read_text())["winner"]
    mean = load_file(run / "directions.safetensors")["mean_harmless"]
    mean = mean[[-2, -1].index(winner["position"]), winner["layer"]]
    return abs(float(torch.cosine_similarity(vector.double(), mean, dim=0)))


def _selected(cli: Callable, run: Path, *options: str) -> tuple[torch.Tensor, dict]:
    result = cli("select", run, *OPEN, *options, "--json")
    assert result.code == 0, result.err
    return load_file(run / "direction.safetensors")["direction"], result.json


def test_select_scores_and_keeps_projected_candidates(cli, run: Path) -> None:
    plain, scored = _selected(cli, run)
    assert _along_harmless(run, plain) > 1e-3
    projected, rescored = _selected(cli, run, "--project-harmless")
    assert _along_harmless(run, projected) < 1e-6
    # Scored anew, not taken from what the plain candidates left.
    bypass = [
        {(c["position"], c["layer"]): c["bypass_score"] for c in record["candidates"]}
        for record in (scored, rescored)
    ]
    moved = [key for key, value in bypass[0].items() if value != bypass[1][key]]
    assert moved
    again, _ = _selected(cli, run)
    assert torch.equal(again, plain)


def test_the_edit_is_along_the_projected_direction(tiny, cli, run: Path, tmp_path: Path) -> None:
    plain, _ = _selected(cli, run)
    source, out = tiny("llama"), tmp_path / "out"
    base = ("--direction", run, "--project-harmless")
    result = cli("orthogonalize", source, *base, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json["direction"]["project_harmless"] is True
    name = "model.layers.1.mlp.down_proj.weight"
    old, new = (load_file(folder / "model.safetensors")[name].double() for folder in (source, out))
    removed = torch.linalg.svd(old - new).U[:, 0]
    assert _along_harmless(run, removed) < 1e-4  # of float32 weights
    assert abs(float(torch.cosine_similarity(removed, plain.double(), dim=0))) > 0.1
    assert cli("verify", out, *base, "--source", source).code == 0
    assert cli("verify", out, "--direction", run, "--source", source).code == 6
    # Chosen so already, the direction needs no option; with one it stays as it is.
    chosen, _ = _selected(cli, run, "--project-harmless")
    for options in ((), ("--project-harmless",)):
        again = tmp_path / f"again{len(options)}"
        made = cli("orthogonalize", source, "--direction", run, "-o", again, *options)
        assert made.code == 0, made.err
        record = json.loads((again / "abliterate.json").read_text())
        assert torch.equal(torch.tensor(record["unnormalised"], dtype=torch.float64), chosen)


def test_without_means_there_is_nothing_to_project_on(
    tiny, cli, fails, run: Path, tmp_path: Path
) -> None:
    _selected(cli, run)
    alone = tmp_path / "direction.safetensors"
    shutil.copy(run / "direction.safetensors", alone)
    base = ("orthogonalize", tiny("llama"), "-o", tmp_path / "out", "--project-harmless")
    assert "directions.safetensors" in fails(*base, "--direction", alone, code=3)
    means = load_file(run / "directions.safetensors")
    winner = json.loads((run / "selection.json").read_text())["winner"]
    row = [-2, -1].index(winner["position"])
    vector = means["mean_harmless"][row, winner["layer"]] * -2
    metadata = {"position": str(winner["position"]), "layer": str(winner["layer"])}
    save_file({"direction": vector}, run / "direction.safetensors", metadata)
    assert "leaves nothing" in fails(*base, "--direction", run, code=3)
    metadata["layer"] = "99"
    save_file({"direction": vector}, run / "direction.safetensors", metadata)
    assert "layer 99" in fails(*base, "--direction", run, code=3)
