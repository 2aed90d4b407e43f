"""The choice among candidates: the filters, ties, saved tables, and scores by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM

from abliterate import ablate, add
from abliterate.metrics.refusal import kl_divergence, refusal_score
from abliterate.selection.score_table import choose_again
from abliterate.selection.search import Score, Thresholds
from abliterate.storage.artifacts import hash_file

OPEN = ("--kl-threshold", "1e9", "--induce-threshold=-1e9")


def _table(rows: list[tuple[int, int, float, float, float]]) -> list[dict]:
    keys = ("position", "layer", "refusal_score", "steering_score", "kl_div_score")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


BAIT = [
    (-2, 0, -9.0, 2.0, 0.3),  # best bypass, but too much KL
    (-2, 1, -8.0, -0.1, 0.01),  # does not induce
    (-2, 8, -7.0, 5.0, 0.01),  # in the last 20% of ten layers
    (-2, 2, math.nan, 5.0, 0.01),
    (-2, 3, -5.0, 0.0, 0.1),  # on both thresholds: kept
    (-2, 4, -6.0, 1.0, 0.05),  # the winner ...
    (-1, 2, -6.0, 9.0, 0.01),  # ... ties with a later position ...
    (-2, 5, -6.0, 9.0, 0.01),  # ... and with a higher layer, listed later
    (-1, 7, -4.0, 1.0, 0.05),  # the last layer that is not pruned
]


def test_papers_table_is_filtered_and_ties_go_to_the_first(cli, tmp_path: Path) -> None:
    table = _write(tmp_path / "scores.json", _table(sorted(BAIT)))
    result = cli("select", "--scores", table, "--n-layers", "10", "--json")
    assert result.code == 0, result.err
    assert result.json["winner"] == {"position": -2, "layer": 4}
    reasons = {(c["position"], c["layer"]): c["reason"] for c in result.json["candidates"]}
    assert reasons[-2, 0] == "kl"
    assert reasons[-2, 1] == "induce"
    assert reasons[-2, 8] == "layer"
    assert reasons[-2, 2] == "nan"
    assert {key for key, why in reasons.items() if why is None} == {
        (-2, 3), (-2, 4), (-2, 5), (-1, 2), (-1, 7)
    }  # fmt: skip
    assert "winner: position -2, layer 4" in cli(
        "select", "--scores", table, "--n-layers", "10"
    ).out  # fmt: skip
    loose = ("--kl-threshold", "0.5")
    result = cli("select", "--scores", table, "--n-layers", "10", "--json", *loose)
    assert result.json["winner"] == {"position": -2, "layer": 0}


@pytest.mark.parametrize(("n_layers", "first_pruned"), [(8, 6), (10, 8), (28, 22), (32, 25)])
def test_pruned_layers_round_as_in_the_paper(n_layers: int, first_pruned: int) -> None:
    scores = [Score(-1, layer, -float(layer), 1.0, 0.0) for layer in range(n_layers)]
    winner, judged = choose_again(scores, n_layers, Thresholds())
    assert winner.layer == first_pruned - 1
    assert [s.reason for s in judged[first_pruned:]] == ["layer"] * (n_layers - first_pruned)
    winner, _ = choose_again(scores, n_layers, Thresholds(prune_layers=0.0))
    assert winner.layer == n_layers - 1


def test_nothing_passes_says_why_and_what_would_help(fails, tmp_path: Path) -> None:
    rows = [(-1, 0, -1.0, 1.0, 0.1234), (-1, 1, -1.0, -0.25, 0.0), (-1, 9, -1.0, 1.0, 0.0)]
    table = _write(tmp_path / "scores.json", _table(rows))
    line = fails("select", "--scores", table, "--n-layers", "10", code=5)
    assert "none of 3 candidates passes" in line
    assert "--kl-threshold 0.124 admits it" in line
    assert "--induce-threshold=-0.25 admits it" in line
    assert "--prune-layers 0 admits it" in line


@pytest.mark.parametrize(
    ("document", "options", "message"),
    [
        (_table(BAIT), (), "--n-layers"),
        (_table(BAIT), ("--n-layers", "5"), "layer 8 is not one of 5"),
        ([{"position": -1, "layer": 0}], ("--n-layers", "5"), "'refusal_score'"),
        ({"a": 1}, ("--n-layers", "5"), "neither a selection.json"),
        ([], ("--n-layers", "5"), "no candidates"),
        ([{**_table(BAIT)[0], "layer": "x"}], ("--n-layers", "5"), "no number"),
    ],
)
def test_bad_tables_give_one_line(document, options, message, fails, tmp_path: Path) -> None:
    table = _write(tmp_path / "scores.json", document)
    assert message in fails("select", "--scores", table, *options, code=3)


def test_select_needs_a_run_or_a_table(fails, tmp_path: Path) -> None:
    fails("select", code=2)
    fails("select", tmp_path, "--scores", tmp_path / "x.json", code=2)
    assert "abliterate extract" in fails("select", tmp_path, code=3)
    assert "does not exist" in fails("select", "--scores", tmp_path / "x.json", code=3)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A run folder with extraction and selection of a tiny random model."""
    from abliterate.cli.app import main

    folder = tmp_path_factory.mktemp("select") / "run"
    extract = ["extract", tiny("llama"), "-o", folder, "--no-filter", "--refusal-token", "I",
               "--n-train", "12", "--positions", "-3,-1"]  # fmt: skip
    assert main([*map(str, extract)]) == 0
    select = ["select", folder, "--no-filter", "--n-val", "9", *OPEN, "--quiet",
              "--search", "exhaustive"]  # fmt: skip
    assert main([*map(str, select)]) == 0
    return folder


def test_scores_equal_a_plain_loop_one_prompt_at_a_time(run: Path, tiny) -> None:
    """Catches a swapped prompt set, a wrong sign of KL, and a direction added at another layer."""
    from transformers import AutoTokenizer

    from abliterate.prompts.sampling import load_prompts

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    record = json.loads((run / "selection.json").read_text())
    extracted = json.loads((run / "extract.json").read_text())
    means = load_file(run / "directions.safetensors")
    directions = means["mean_harmful"] - means["mean_harmless"]
    token = [extracted["refusal_tokens"][0]["id"]]

    def logits(kind: str) -> torch.Tensor:
        rows = []
        for prompt in load_prompts(kind, "val", 9, 0):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}],
                add_generation_prompt=True,
                return_tensors="pt",
            )["input_ids"]
            with torch.no_grad():
                rows.append(model(ids).logits[0, -1])
        return torch.stack(rows)

    baseline = logits("harmless")
    assert len(record["candidates"]) == 2 * 4
    for candidate in record["candidates"]:
        row = [-3, -1].index(candidate["position"])
        direction = directions[row, candidate["layer"]]
        if candidate["layer"] == 0:  # a template token's embedding: no difference, no effect
            assert float(direction.norm()) < 1e-12
            assert candidate["reason"] == "nan"
            assert candidate["kl_divergence"] is None
            continue
        with ablate(model, direction):
            bypass = refusal_score(logits("harmful"), token).mean()
            kl = kl_divergence(baseline, logits("harmless")).mean()
        with add(model, direction, candidate["layer"]):
            induce = refusal_score(logits("harmless"), token).mean()
        assert candidate["bypass_score"] == pytest.approx(float(bypass), abs=1e-4)
        assert candidate["kl_divergence"] == pytest.approx(float(kl), abs=1e-4)
        assert candidate["induce_score"] == pytest.approx(float(induce), abs=1e-4)
    kept = [c for c in record["candidates"] if c["kept"]]
    best = min(kept, key=lambda c: c["bypass_score"])
    assert record["winner"] == {"position": best["position"], "layer": best["layer"]}
    assert all(c["layer"] < 3 for c in kept)


def test_direction_file_holds_the_winners_unnormalised_difference(run: Path) -> None:
    winner = json.loads((run / "selection.json").read_text())["winner"]
    means = load_file(run / "directions.safetensors")
    row = [-3, -1].index(winner["position"])
    expected = (means["mean_harmful"] - means["mean_harmless"])[row, winner["layer"]]
    assert torch.equal(load_file(run / "direction.safetensors")["direction"], expected)
    with safe_open(run / "direction.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["position"] == str(winner["position"])
    assert metadata["layer"] == str(winner["layer"])


def test_a_saved_selection_can_be_judged_again(run: Path, cli) -> None:
    record = json.loads((run / "selection.json").read_text())
    again = cli("select", "--scores", run / "selection.json", *OPEN, "--json").json
    assert again["winner"] == record["winner"]
    assert again["candidates"] == record["candidates"]


def test_validation_never_reuses_training_prompts(tiny, cli, fails, tmp_path: Path) -> None:
    """One file without splits: select draws from what extract left over, and only from that."""
    texts = [f"{verb} the {noun}" for verb in ("Paint", "Fix", "Sell") for noun in "abcdefgh"]
    for kind in ("x", "y"):
        (tmp_path / f"{kind}.txt").write_text("\n".join(f"{text} {kind}" for text in texts))
    sources = ("--harmful", tmp_path / "x.txt", "--harmless", tmp_path / "y.txt")
    run = tmp_path / "run"
    extract = ("extract", tiny("llama"), "-o", run, "--no-filter", "--refusal-token", "I")
    assert cli(*extract, "--n-train", "14", *sources).code == 0
    result = cli("select", run, "--no-filter", "--n-val", "10", *OPEN, "--json")
    assert result.code == 0, result.err
    used = json.loads((run / "extract.json").read_text())["prompts"]
    for kind in ("harmful", "harmless"):
        assert len(used[kind]) == 14
        assert len(result.json["prompts"][kind]) == 10
        assert not set(used[kind]) & set(result.json["prompts"][kind])
    line = fails("select", run, "--no-filter", "--n-val", "11", *OPEN, code=3)
    assert "10 distinct prompts left" in line


def test_select_filters_as_extract_did_unless_it_is_told(
    run: Path, tiny, cli, fails, tmp_path: Path
) -> None:
    """A random model refuses none of the prompts: filtered, nothing is left."""
    copy, config = tmp_path / "run", tmp_path / "mine.toml"
    shutil.copytree(run, copy)
    chosen = cli("select", copy, "--n-val", "9", *OPEN, "--json")
    assert chosen.code == 0, chosen.err
    assert chosen.json["settings"]["select"]["filter"] is False
    assert chosen.json["counts"]["harmful"]["used"] == 9
    assert "--no-filter" in fails("select", copy, "--filter", "--n-val", "9", *OPEN, code=3)
    config.write_text("[select]\nfilter = true\n")
    given = ("--n-val", "9", "--config", config, *OPEN)
    assert "--no-filter" in fails("select", copy, *given, code=3)
    config.write_text("[extract]\nfilter = true\n")
    assert "--no-filter" in fails("select", copy, *given, code=3)


def test_a_failed_choice_keeps_the_scores(tiny, cli, run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    result = cli("select", copy, "--no-filter", "--n-val", "9", "--kl-threshold", "1e-12")
    assert result.code == 5
    assert "none of 8 candidates passes" in result.err
    assert not (copy / "direction.safetensors").exists()
    record = json.loads((copy / "selection.json").read_text())
    assert record["winner"] is None
    assert len(record["candidates"]) == 8


@pytest.mark.parametrize("n_layers", [1, 2])
def test_models_of_one_or_two_layers(n_layers: int, tiny, cli, fails, tmp_path: Path) -> None:
    """The paper's filter drops every layer of them but the embedding, which holds no direction."""
    folder, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers = model.model.layers[:n_layers]
    model.config.num_hidden_layers = n_layers
    model.save_pretrained(folder)
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "-q")
    assert cli("extract", folder, "-o", run, *train).code == 0
    base = ("select", run, "--no-filter", "--n-val", "8", "-q")
    loose = ("--kl-threshold", "1e9", "--induce-threshold=-1e9")
    for search in ("staged", "exhaustive"):
        line = fails(*base, *loose, "--search", search, code=5)
        assert "without a direction" in line or "in the last 20% of layers" in line
        assert "--prune-layers 0" in line or n_layers == 1
    every = (*base, *loose, "--prune-layers", "0")
    if n_layers == 1:
        assert "without a direction" in fails(*every, code=5)
        assert "without a direction" in fails(*every, "--offload", code=5)
    else:
        assert cli(*every, "--json").json["winner"]["layer"] == 1
        fails(*base, "--offload", code=5)
    fails(*base, *loose, "--prune-layers", "0.999", code=5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_directions_that_are_none(value: float, tiny, cli, fails, tmp_path: Path) -> None:
    """A run whose means say nothing ends with the exit code of "no direction"."""
    run = tmp_path / "run"
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "-q")
    assert cli("extract", tiny("llama"), "-o", run, *train).code == 0
    tensors = load_file(run / "directions.safetensors")
    held = {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}
    save_file(held, run / "directions.safetensors")
    record = json.loads((run / "extract.json").read_text())
    record["outputs"]["directions.safetensors"] = hash_file(run / "directions.safetensors")
    (run / "extract.json").write_text(json.dumps(record))
    line = fails("select", run, "--no-filter", "--n-val", "8", "-q", code=5)
    assert "without a direction" in line
    assert not (run / "direction.safetensors").exists()
