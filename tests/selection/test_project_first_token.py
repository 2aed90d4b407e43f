"""``--project-first-token``: nothing along the attention sink's mean residual stream."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharing import made_once
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.cli.app import main
from abliterate.run_staleness import find_stale

OPEN = ("--no-filter", "--n-val", "8", "--kl-threshold", "1e9", "--induce-threshold=-1e9", "-q")
TRAIN = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "--positions=-2,-1", "-q")
EMBEDDING, OPTION = "model.embed_tokens.weight", "--project-first-token"


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """A checkpoint whose first token has a massive activation, in every layer."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny("llama"), folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors")
        tensors[EMBEDDING][_prompt(folder, "Hello")[0]] *= 100
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return made_once(tmp_path_factory, "massive-activation", make)


def _prompt(model: Path, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    made = AutoTokenizer.from_pretrained(model).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    return list(made)


@pytest.fixture(scope="module")
def extracted(model: Path, tmp_path_factory) -> Path:
    def make(folder: Path) -> None:
        assert main(["extract", str(model), "-o", str(folder), *TRAIN]) == 0

    return made_once(tmp_path_factory, "massive-activation-run", make)


@pytest.fixture
def run(extracted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(extracted, tmp_path / "run")


def _streams(model: Path, ids: list[int]) -> torch.Tensor:
    """``[n_layers, d_model]``: what enters each block at the first token of a whole prompt."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        states = loaded(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.stack([state[0, 0] for state in states[:-1]]).double()


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return abs(float(torch.cosine_similarity(one.double(), other.double(), dim=0)))


def _selected(cli: Callable, run: Path, *options: str) -> torch.Tensor:
    result = cli("select", run, *OPEN, *options)
    assert result.code == 0, result.err
    return load_file(run / "direction.safetensors")["direction"]


def _winner(run: Path) -> dict[str, int]:
    return dict(json.loads((run / "selection.json").read_text())["winner"])


def test_extract_takes_the_first_tokens_stream_in_memory_and_streamed(
    model: Path, extracted: Path, cli, tmp_path: Path
) -> None:
    expected = _streams(model, _prompt(model, "Tell me about the sea."))
    result = cli("extract", model, "-o", tmp_path / "streamed", *TRAIN, "--offload")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "streamed/extract.json").read_text())["offload"]["passes"] == 1
    for folder in (extracted, tmp_path / "streamed"):
        found = load_file(folder / "directions.safetensors")["mean_first_token"]
        assert found.dtype == torch.float64
        assert ((found - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


def test_prompts_with_several_first_tokens_count_as_often_as_they_come(
    model: Path, cli, tmp_path: Path
) -> None:
    for kind, firsts in (("harmful", ("Why",) * 8), ("harmless", ("Name", "Bake", "Name", "Name"))):
        texts = [f"{firsts[i % len(firsts)]} one {i}." for i in range(8)]
        (tmp_path / f"{kind}.txt").write_text("\n".join(texts))
    sources = [f"--{kind}={tmp_path / kind}.txt" for kind in ("harmful", "harmless")]
    result = cli("extract", model, "-o", tmp_path / "run", *TRAIN, *sources, "--template=plain")
    assert result.code == 0, result.err
    tokenizer = AutoTokenizer.from_pretrained(model)
    name, bake = (_streams(model, tokenizer.encode(f"{one} one")) for one in ("Name", "Bake"))
    assert _cosine(name[1], bake[1]) < 0.9  # they do differ
    found = load_file(tmp_path / "run/directions.safetensors")["mean_first_token"]
    assert (found - (0.75 * name + 0.25 * bake)).norm() <= 1e-5 * found.norm()


def test_select_scores_candidates_without_the_stream_of_their_own_layer(
    model: Path, cli, run: Path
) -> None:
    streams = _streams(model, _prompt(model, "Tell me about the sea."))
    plain = _selected(cli, run)
    assert _cosine(plain, streams[_winner(run)["layer"]]) > 1e-2
    scores = json.loads((run / "selection.json").read_text())["candidates"]
    projected = _selected(cli, run, OPTION, "--per-layer")
    record = json.loads((run / "selection.json").read_text())
    assert record["settings"]["select"]["project_first_token"] is True
    assert [c["bypass_score"] for c in record["candidates"]] != [c["bypass_score"] for c in scores]
    assert _cosine(projected, streams[_winner(run)["layer"]]) < 1e-6
    for layer, row in enumerate(load_file(run / "direction.safetensors")["directions"]):
        if row.any():
            near = [_cosine(row, stream) for stream in streams]
            assert near[layer] < 1e-6 < 1e-4 < min(near[:layer] + near[layer + 1 :])
    told = cli("methods", run)
    assert "along the mean residual stream of the first token" in told.out
    # With the other option too it lies along neither, nor where that comes later.
    both = _selected(cli, run, OPTION, "--project-harmless")
    winner, means = _winner(run), load_file(run / "directions.safetensors")
    mean = means["mean_harmless"][winner["position"] + 2, winner["layer"]]
    assert max(_cosine(both, mean), _cosine(both, streams[winner["layer"]])) < 1e-6


def test_the_edit_spares_the_massive_activation(
    model: Path, cli, run: Path, tmp_path: Path
) -> None:
    _selected(cli, run)
    row, base = _prompt(model, "Hello")[0], ("--direction", run)
    old = load_file(model / "model.safetensors")[EMBEDDING][row]
    moved = []
    for out, options in (
        ("plain", ()),
        ("out", (OPTION,)),
        ("both", (OPTION, "--project-harmless")),
    ):
        result = cli("orthogonalize", model, *base, *options, "-o", tmp_path / out, "--json")
        assert result.code == 0, result.err
        assert result.json["direction"].get("project_first_token", False) is bool(options)
        new = load_file(tmp_path / out / "model.safetensors")[EMBEDDING][row]
        moved.append(float((new - old).norm() / old.norm()))
    assert max(moved[1:]) < 0.5 * moved[0]
    assert "residual stream of the first token" in (tmp_path / "out/README.md").read_text()
    checked = ("verify", tmp_path / "out", *base, "--source", model)
    assert (cli(*checked, OPTION).code, cli(*checked).code) == (0, 6)
    # The record has the direction, and repeats the edit to the byte.
    record = tmp_path / "out/abliterate.json"
    assert cli("orthogonalize", model, "--direction", record, "-o", tmp_path / "again").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    # One that was chosen without the harmless part loses the first token's, and stays without.
    chosen = _selected(cli, run, "--project-harmless")
    result = cli("orthogonalize", model, *base, OPTION, "-o", tmp_path / "more", "--json")
    assert result.code == 0, result.err
    vector = torch.tensor(result.json["unnormalised"], dtype=torch.float64)
    winner, means = _winner(run), load_file(run / "directions.safetensors")
    mean = means["mean_harmless"][winner["position"] + 2, winner["layer"]]
    sink = means["mean_first_token"][winner["layer"]]
    assert max(_cosine(vector, mean), _cosine(vector, sink)) < 1e-6 < _cosine(chosen, sink)


def test_hooks_use_the_direction_that_the_options_make(model: Path, cli, run: Path) -> None:
    _selected(cli, run)
    options = ("--intervention", "ablate", "--n-test", "8", "--max-new-tokens", "2", "--json")
    seen = set()
    for more in ((), (OPTION,), ("--project-harmless",), (OPTION, "--project-harmless")):
        result = cli("evaluate", model, "--direction", run, *options, *more)
        assert result.code == 0, result.err
        # Measured anew: what the other direction left in the folder is not taken for it.
        ablated, used = result.json["interventions"]["ablate"], result.json["direction"]
        seen.add((used["norm"], ablated["kl_divergence"]))
        names = {f"--{name.replace('_', '-')}" for name in used if name.startswith("project")}
        assert names == {*more}
    assert len({norm for norm, _ in seen}) == len({kl for _, kl in seen}) == 4


def test_the_means_at_a_position_lose_it_layer_by_layer(model: Path, cli, run: Path) -> None:
    streams = load_file(run / "directions.safetensors")["mean_first_token"]
    base = ("orthogonalize", model, "--direction", run, "--position=-1", OPTION)
    result = cli(*base, "-o", run / "model", "--json")
    assert result.code == 0, result.err
    assert not find_stale(run)  # the set is of the means that lie there
    assert result.json["direction"]["project_first_token"] is True
    rows = [(layer, row) for layer, row in enumerate(result.json["vectors"]) if row is not None]
    assert rows
    assert all(_cosine(torch.tensor(row), streams[layer]) < 1e-6 for layer, row in rows)
    held = load_file(run / "directions.safetensors")
    metadata = {"positions": "[-2, -1]", "model": "m", "abliterate": "0"}
    save_file(
        {**held, "mean_harmful": held["mean_harmful"] + 1}, run / "directions.safetensors", metadata
    )
    assert "of other means" in find_stale(run)["edit"].why


def test_a_run_folder_without_that_mean_is_refused_in_one_line(
    model: Path, cli, fails, run: Path, tmp_path: Path
) -> None:
    _selected(cli, run)
    means = run / "directions.safetensors"
    held, metadata = load_file(means), {"positions": "[-2, -1]", "model": "m", "abliterate": "0"}
    save_file({**held, "mean_first_token": held["mean_first_token"][1:].clone()}, means, metadata)
    edit = ("orthogonalize", model, "--direction", run, OPTION, "-o", tmp_path / "out")
    assert "run extract again" in fails(*edit, code=3)
    del held["mean_first_token"]
    save_file(held, means, metadata)
    for command in (edit, (*edit, "--position=-1"), ("select", run, *OPEN, OPTION)):
        said = fails(*command, code=3)
        assert "first token" in said
        assert "run extract again" in said
    assert not (tmp_path / "out").exists()
    alone = shutil.copy(run / "direction.safetensors", tmp_path / "direction.safetensors")
    edit = ("orthogonalize", model, "--direction", alone, OPTION, "-o", tmp_path / "out")
    assert "directions.safetensors" in fails(*edit, code=3)


def test_select_names_the_option_where_a_candidate_lies_along_the_sink(cli, run: Path) -> None:
    hint = "times another token's whole activation away from the first token"
    means = run / "directions.safetensors"
    tensors = load_file(means)
    with safe_open(means, "pt") as held:
        metadata = held.metadata()
    first, harmless = tensors["mean_first_token"], tensors["mean_harmless"]
    # Candidates of which a fifth of the length lies along a stream 50 times as long as others'.
    unit = first / first.norm(dim=-1, keepdim=True)
    tensors["mean_first_token"] = 50 * harmless.norm(dim=-1).mean(0)[:, None] * unit
    tensors["mean_harmful"] = tensors["mean_harmful"] + 1e-3 * unit
    for scale, told in ((1.0, True), (1e-6, False)):
        shrunk = {**tensors, "mean_first_token": tensors["mean_first_token"] * scale}
        save_file(shrunk, means, metadata)
        (run / "scores.safetensors").unlink(missing_ok=True)
        failed = cli("select", run, *OPEN[:3], "--kl-threshold=0", "--induce-threshold=-1e9")
        assert failed.code == 5, failed.err
        assert (hint in failed.err) is told, failed.err
        chosen = cli("select", run, *OPEN[:-1])
        assert chosen.code == 0, chosen.err
        assert (hint in " ".join(chosen.err.split())) is told, chosen.err
    assert hint not in cli("select", run, *OPEN[:-1], OPTION).err
