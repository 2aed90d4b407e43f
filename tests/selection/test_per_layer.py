"""``select --per-layer``: each layer's own best candidate, and what commands do then."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.cli.app import main
from abliterate.selection.candidate_filters import Score, Thresholds
from abliterate.selection.per_layer import best_by_layer

LOOSE = ("--no-filter", "--n-val", "8", "--kl-threshold", "1e9", "--induce-threshold=-1e9")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("per-layer") / "run"
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "--positions", "-2,-1")
    assert main(["extract", str(tiny("llama")), "-o", str(folder), *train, "-q"]) == 0
    assert main(["select", str(folder), *LOOSE, "--per-layer", "-q"]) == 0
    return folder


def _means(run: Path) -> torch.Tensor:
    held = load_file(run / "directions.safetensors")
    return held["mean_harmful"] - held["mean_harmless"]  # positions -2, -1


def test_each_layer_keeps_its_own_best(run: Path) -> None:
    record = json.loads((run / "selection.json").read_text())
    held = load_file(run / "direction.safetensors")
    assert held["directions"].shape == (4, 48)
    scores = {(c["layer"], c["position"]): c["bypass_score"] for c in record["candidates"]}
    assert all(score is not None for (layer, _), score in scores.items() if layer)
    assert not held["directions"][0].any()  # the template's embedding is the same in every prompt
    chosen = set()
    for layer in (1, 2, 3):
        row = min((0, 1), key=lambda row: scores[layer, row - 2])
        assert torch.equal(held["directions"][layer], _means(run)[row, layer])
        assert record["per_layer"][layer]["position"] == row - 2
        chosen.add(row)
    winner = record["winner"]
    assert torch.equal(held["direction"], _means(run)[winner["position"] + 2, winner["layer"]])


def test_filters_come_before_the_score_and_nan_never_counts() -> None:
    thresholds = Thresholds(kl=0.1, induce=0.0)
    scores = [
        Score(-2, 1, -3.0, 1.0, 0.5),  # the lowest, with too large a KL
        Score(-1, 1, -2.0, 1.0, 0.01),
        Score(-2, 2, -1.0, -4.0, 0.01),  # neither passes: the lower one
        Score(-1, 2, -2.0, -4.0, 0.01),
        Score(-2, 3, math.nan, 1.0, 0.01),
        Score(-1, 3, 5.0, 1.0, 0.01),
        Score(-1, 0, math.nan, math.nan, math.nan),
    ]
    best = best_by_layer(scores, thresholds)
    assert {layer: score.position for layer, score in best.items()} == {1: -1, 2: -1, 3: -1}


def test_commands_that_take_the_run_take_its_set(
    run: Path, tiny, cli, fails, tmp_path: Path
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    result = cli("orthogonalize", tiny("llama"), "--direction", run, "-o", out, "--json")
    assert result.code == 0, result.err
    assert {t["layer"] for t in result.json["tensors"]} == {None, 1, 2, 3}
    assert result.json["direction"]["candidates"][0] is None
    short = ("--n-test", "2", "--max-new-tokens", "2")
    result = cli("evaluate", tiny("llama"), "--direction", run, "--checkpoint", f"edited={out}",
                 "-o", again, *short, "--json")  # fmt: skip
    assert result.code == 0, result.err
    rows = result.json["interventions"]
    assert list(rows) == ["baseline", "ablate", "edited"]
    hooks, files = rows["ablate"], rows["edited"]
    metrics = [row["harmful"]["refusal_metric"] for row in (hooks, files)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)
    assert hooks["kl_divergence"] > 1e-4
    assert hooks["kl_divergence"] == pytest.approx(files["kl_divergence"], rel=0.01)
    assert "one for all" in fails("export", run, "--to", "npz", code=2)


def test_trace_looks_along_each_layers_own(run: Path, cli, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("one two three\nfour five\n")
    asked = ("--prompts", words, "--harmless", words, "--n-prompts", "2", "--suffix", "x y")
    result = cli("trace", run, *asked, "--json")
    assert result.code == 0, result.err
    means = result.json["cosines"]["harmful"]["mean"]
    assert means[0] == 0  # no direction there
    assert min(abs(mean) for mean in means[1:]) > 1e-4
    assert result.json["heads"]["largest_error"] < 1e-3


def test_the_means_at_a_position_are_a_set(run: Path, tiny, cli, fails, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ("orthogonalize", tiny("llama"), "--direction", run, "-o", out, "--json")
    assert "holds positions -2, -1" in fails(*base, "--position", "-3", code=2)
    result = cli(*base, "--position", "-2", "--project-harmless")
    assert result.code == 0, result.err
    vectors = result.json["vectors"]
    assert vectors[0] is None
    harmless = load_file(run / "directions.safetensors")["mean_harmless"][0]
    for layer in (1, 2, 3):
        mine = torch.tensor(vectors[layer], dtype=torch.float64)
        m, difference = harmless[layer].double(), _means(run)[0, layer].double()
        expected = difference - (difference @ m) / (m @ m) * m
        assert torch.allclose(mine, expected, atol=1e-9)
    assert result.json["direction"]["position"] == -2
    checked = ("verify", out, "--direction", run, "--position", "-2", "--source", tiny("llama"))
    assert cli(*checked, "--project-harmless").code == 0
    assert cli(*checked).code == 6  # not projected: another set


def test_a_paragraph_for_a_paper_says_what_is_ablated(run: Path, cli) -> None:
    told = " ".join(cli("methods", run).out.split())
    assert "a direction of each layer's own" in told
    assert "(3 of 4 layers have one" in told


def test_what_is_wrong_with_a_set_names_its_file(run: Path, tiny, fails, tmp_path: Path) -> None:
    held = load_file(run / "direction.safetensors")["directions"]
    for rows, words in ((held[:2], "for 2 layers"), (held * torch.nan, "holds NaN")):
        save_file({"directions": rows.clone()}, path := tmp_path / "set.safetensors")
        line = fails("orthogonalize", tiny("llama"), "--direction", path, "-o", tmp_path / "x",
                     code=3)  # fmt: skip
        assert words in line
        assert str(path) in line
