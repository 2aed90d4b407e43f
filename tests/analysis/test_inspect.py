"""Kept activations and what inspect makes of them, against plain computations."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from abliterate.inference.logit_lens import logit_lens
from abliterate.metrics.geometry import measure
from abliterate.prompts.sampling import load_prompts, prompt_key
from abliterate.resources import demo_model_dir
from abliterate.run_folder import Session
from abliterate.writers.tiny_model import randomise

COMMON = ("--no-filter", "--refusal-token", "I", "--n-train", "12")
FILE = "activations.safetensors"


def _plain(model_dir: Path, texts: list[str], layers: list[int], positions: list[int]):
    """``[n, layers, positions, d_model]``, one prompt at a time, without padding or hooks."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = []
    for text in texts:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            states = model(ids["input_ids"], output_hidden_states=True).hidden_states
        rows.append(torch.stack([states[layer][0, positions] for layer in layers]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("option", "which", "layers"),
    [("--save-activations", "last", [0, 1, 2, 3]), ("--save-activations=1,3", "all", [1, 3])],
)
def test_kept_activations_equal_a_plain_loop(
    option, which, layers, tiny, cli, tmp_path: Path
) -> None:
    model, run = tiny("gemma"), tmp_path / "run"
    where = ("--positions", "-4,-2,-1", "--activation-positions", which, "--batch-size", "5")
    result = cli("extract", model, "-o", run, *COMMON, *where, option, "--json")
    assert result.code == 0, result.err
    positions = [-1] if which == "last" else [-4, -2, -1]
    assert result.json["activations"] == {"layers": layers, "positions": positions}
    assert set(result.json["outputs"]) == {"directions.safetensors", FILE}
    held = load_file(run / FILE)
    for kind in ("harmful", "harmless"):
        texts = [p.text for p in load_prompts(kind, "train", 12, 0)]
        plain = _plain(model, texts, layers, positions)
        assert held[kind].shape == plain.shape
        assert (held[kind] - plain).norm() <= 1e-5 * plain.norm()
        assert held[f"kept_{kind}"].tolist() == [True] * 12
    means = load_file(run / "directions.safetensors")["mean_harmful"]
    mean = held["harmful"].double().mean(0)[:, -1]  # layers x d_model at position -1
    assert (means[-1, layers] - mean).norm() <= 1e-6 * mean.norm()


def test_rows_that_the_filter_drops_are_kept_but_do_not_count(cli, tmp_path: Path) -> None:
    model, run = demo_model_dir(), tmp_path / "run"
    harmful = [p.text for p in load_prompts("harmful", "train", 12, 0)]
    answered = [p.text for p in load_prompts("harmless", "test", 4, 0)]
    (tmp_path / "harmful.txt").write_text("\n".join(harmful[:6] + answered + harmful[6:]))
    source = ("--harmful", tmp_path / "harmful.txt", "--n-train", "16", "--save-activations")
    result = cli("extract", model, "-o", run, *source, "--json")
    assert result.code == 0, result.err
    held = load_file(run / FILE)
    texts = [p.text for p in load_prompts(str(tmp_path / "harmful.txt"), "train", 16, 0)]
    assert held["kept_harmful"].tolist() == [text not in answered for text in texts]
    mean = held["harmful"][held["kept_harmful"]].double().mean(0)[:, 0]
    directions = load_file(run / "directions.safetensors")
    assert (directions["mean_harmful"][-1] - mean).norm() <= 1e-6 * mean.norm()


def test_activations_are_reused_replaced_and_removed_with_their_extraction(
    tiny, cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    base = ("run", tiny("llama"), "-o", run, *COMMON, "--n-val", "8", "--n-test", "4",
            "--positions", "last", "--max-new-tokens", "2", "--kl-threshold", "1e9",
            "--induce-threshold=-1e9")  # fmt: skip
    assert cli(*base, "--save-activations=2").code == 0
    first = (run / FILE).read_bytes()
    again = cli(*base, "--save-activations=2")
    assert again.err.count("is up to date") == 4
    (run / FILE).write_bytes(first[:-1])
    assert cli(*base, "--save-activations=2").err.count("is up to date") == 3
    assert (run / FILE).read_bytes() == first
    assert cli(*base).code == 0
    assert not (run / FILE).exists()
    assert "activations" not in json.loads((run / "extract.json").read_text())


@pytest.mark.parametrize("layers", ["4", "1-9", "x", "-1", "1,,2"])
def test_layers_that_are_not_there_leave_nothing_behind(
    layers, tiny, fails, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = fails("extract", tiny(), "-o", out, *COMMON, f"--save-activations={layers}", code=2)
    assert "--save-activations" in line
    assert "0 to 3" in line
    assert not out.exists()


def test_a_failed_extraction_leaves_no_file_of_activations(tiny, fails, tmp_path: Path) -> None:
    out = tmp_path / "run"
    strict = ("--refusal-token", "I", "--n-train", "12", "--save-activations")
    fails("extract", tiny(), "-o", out, *strict, code=3)
    assert not out.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of the demo model with the activations of every layer and position."""
    from abliterate.cli.app import main

    folder = tmp_path_factory.mktemp("inspect") / "run"
    keep = ("--save-activations", "--activation-positions", "all", "--quiet")
    assert (
        main(["extract", str(demo_model_dir()), "-o", str(folder), "--n-train", "24", *keep]) == 0
    )
    assert main(["select", str(folder), "--n-val", "16", "--quiet"]) == 0
    return folder


def _auc(above: np.ndarray, below: np.ndarray) -> float:
    pairs = above[:, None] - below[None, :]
    return float((pairs > 0).mean() + 0.5 * (pairs == 0).mean())


def _silhouette(values: np.ndarray, kinds: np.ndarray) -> float:
    scores = []
    for i, value in enumerate(values):
        gap = np.abs(values - value)
        own = gap[(kinds == kinds[i]) & (np.arange(len(values)) != i)].mean()
        other = gap[kinds != kinds[i]].mean()
        scores.append((other - own) / max(own, other))
    return float(np.mean(scores))


def test_inspect_equals_plain_computations(run: Path, cli) -> None:
    result = cli("inspect", run, "--position", "-2", "--json")
    assert result.code == 0, result.err
    assert result.json == json.loads((run / "inspect.json").read_text())
    held, means = load_file(run / FILE), load_file(run / "directions.safetensors")
    directions = (means["mean_harmful"] - means["mean_harmless"]).numpy()
    selected = load_file(run / "direction.safetensors")["direction"].double().numpy()
    with safe_open(run / FILE, "pt") as file:
        column = json.loads(file.metadata()["positions"]).index(-2)
    assert result.json["position"] == -2
    assert [row["layer"] for row in result.json["layers"]] == list(range(8))
    assert result.json["layers"][0]["geometry"] is None  # the embedding of a template token
    for row in result.json["layers"][1:]:
        layer, found = row["layer"], row["geometry"]
        kinds = np.repeat([1, 0], [len(held["harmful"]), len(held["harmless"])])
        points = torch.cat([held["harmful"], held["harmless"]])[:, layer, column].double().numpy()
        own = points[kinds == 1].mean(0) - points[kinds == 0].mean(0)
        assert np.allclose(own, directions[column, layer], rtol=0, atol=1e-4 * np.abs(own).max())
        _, singular, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
        shares = singular**2 / (singular**2).sum()
        assert found["pc1_share"] == pytest.approx(shares[0], rel=1e-6)
        cosine = abs(axes[0] @ own) / np.linalg.norm(own)
        assert found["cos_pc1"] == pytest.approx(cosine, rel=1e-5)
        for name, direction in (("", own), ("_selected", selected)):
            along = points @ direction
            assert found[f"auc{name}"] == pytest.approx(_auc(along[kinds == 1], along[kinds == 0]))
            assert found[f"silhouette{name}"] == pytest.approx(_silhouette(along, kinds), abs=1e-6)
        assert row["norm"] == pytest.approx(np.linalg.norm(own), rel=1e-5)
        # Refusal is no chance, and that is seen in the length of the difference.
        null = found["permutations"]
        assert null["norm"]["p"] <= 2 / 1001
        assert null["norm"]["mean"] < np.linalg.norm(own) / 2
        if layer == 4:  # one labelling after the other
            rng, aucs = np.random.default_rng(0), []
            for labels in rng.permuted(np.repeat([kinds == 1], 1000, axis=0), axis=1)[:50]:
                own_of = points[labels].mean(0) - points[~labels].mean(0)
                aucs.append(_auc(points[labels] @ own_of, points[~labels] @ own_of))
            assert null["auc"]["mean"] == pytest.approx(np.mean(aucs), abs=0.02)
        expected = own @ selected / np.linalg.norm(own) / np.linalg.norm(selected)
        assert row["cosine_with_selected"] == pytest.approx(expected, abs=1e-5)
        # The plots' points: harmful prompts lie on the positive side of the first component.
        plotted = result.json["projections"][str(layer)]
        harmful = np.array(plotted["harmful"])
        assert harmful[:, 0].mean() > 0 > np.array(plotted["harmless"])[:, 0].mean()
        assert harmful.var(0)[0] > 0
    # On prompts that no stage has used, along the same directions.
    keys, used = result.json["held_out"]["prompts"], set()
    for name in ("extract.json", "selection.json"):
        prompts = json.loads((run / name).read_text())["prompts"]
        used |= {key for some in prompts.values() for key in some}
    texts = {
        kind: {prompt_key(p.text): p.text for p in load_prompts(kind, "test")} for kind in keys
    }
    assert all(len(some) == 64 and not used & set(some) for some in keys.values())
    others = {
        kind: _plain(demo_model_dir(), [texts[kind][key] for key in some[:64]], [2, 5], [-2])
        for kind, some in keys.items()
    }
    for at, layer in enumerate((2, 5)):
        found = result.json["layers"][layer]["held_out"]
        stream = [others[kind][:, at, 0].double().numpy() for kind in ("harmful", "harmless")]
        kinds = np.repeat([1, 0], 64)
        for name, direction in (("", directions[column, layer]), ("_selected", selected)):
            along = [some @ direction for some in stream]
            assert found[f"auc{name}"] == pytest.approx(_auc(*along), abs=2e-3)
            expected = _silhouette(np.concatenate(along), kinds)
            assert found[f"silhouette{name}"] == pytest.approx(expected, abs=1e-4)
    assert result.json["layers"][0]["held_out"] is None
    # The selected direction is itself among the candidates.
    winner = json.loads((run / "selection.json").read_text())["winner"]
    cosines = result.json["cosines"]
    at = cosines["values"][cosines["positions"].index(winner["position"])][winner["layer"]]
    assert at == pytest.approx(1.0, abs=1e-6)


def test_a_wrong_sign_or_kind_is_seen_in_the_separation() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    harmful, harmless = noise[:20] + direction, noise[20:] - direction
    right, wrong = measure(harmful, harmless, direction), measure(harmful, harmless, -direction)
    assert right is not None
    assert wrong is not None
    assert right.auc_selected == pytest.approx(1 - wrong.auc_selected)
    assert right.auc == right.auc_selected == 1.0


def test_the_logit_lens_is_norm_then_unembedding(run: Path, cli) -> None:
    result = cli("inspect", run, "--json")
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=torch.float64)
    direction = load_file(run / "direction.safetensors")["direction"].double()
    normed = model.model.norm.weight * direction / direction.square().mean().sqrt()
    logits = (model.lm_head.weight @ normed).detach()
    logits = logits - logits.mean()
    promotes, suppresses = (result.json["lens"][key] for key in ("promotes", "suppresses"))
    assert [t["id"] for t in promotes[:3]] == logits.topk(3).indices.tolist()
    assert [t["id"] for t in suppresses[:3]] == (-logits).topk(3).indices.tolist()
    for token in promotes + suppresses:
        assert token["logit"] == pytest.approx(float(logits[token["id"]]), abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    assert promotes[0]["token"] == tokenizer.decode([promotes[0]["id"]])


def test_the_logit_lens_leaves_biases_out() -> None:
    """GPT-2's final LayerNorm centres and has a bias, which is no part of the direction."""
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = logit_lens(model, vectors)
    centred = vectors - vectors.mean(1, keepdim=True)
    normed = centred / centred.square().mean(1, keepdim=True).sqrt()
    norm = model.transformer.ln_f
    expected = (normed * norm.weight.double()) @ model.lm_head.weight.double().T
    expected = (expected - expected.mean(1, keepdim=True)).detach()
    assert torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(logit_lens(model, -3 * vectors), -got, rtol=1e-3, atol=1e-3)


def test_without_activations_the_rest_is_shown_and_says_so(run: Path, cli, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in run.iterdir():
        if file.name != FILE:
            (bare / file.name).write_bytes(file.read_bytes())
    result = cli("inspect", bare)
    assert result.code == 0, result.err
    assert "no activations were kept" in result.err
    # Nor a column of dashes: what is not there is named once, and how to have it.
    lines = result.out.splitlines()
    (heading,) = (line for line in lines if "cos selected" in line)
    assert "PC1 share" not in heading
    assert "held-out silhouette" in heading
    assert heading.count("silhouette") == heading.count("AUC") == 1
    assert "not measured: n, PC1 share, |cos PC1|, AUC, silhouette, p of AUC" in lines
    assert any("run extract again with --save-activations" in line for line in lines)
    record = json.loads((bare / "inspect.json").read_text())
    assert all(row["geometry"] is None for row in record["layers"])
    assert record["layers"][3]["held_out"]["auc"] > 0.9
    assert record["lens"]["promotes"]


def test_an_inspection_that_is_up_to_date_is_shown_without_the_model(
    run: Path, cli, tmp_path: Path, monkeypatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "inspect.json").unlink(missing_ok=True)
    first = cli("inspect", copy, "--json")
    assert "up to date" not in first.err
    with monkeypatch.context() as patch:
        patch.setattr(Session, "load_in_memory", lambda session: pytest.fail("a model was loaded"))
        again = cli("inspect", copy, "--json")
        assert "inspect.json is up to date" in again.err
        assert again.json == first.json
        named = str(first.json["position"])
        assert cli("inspect", copy, "--position", named, "--json").json == first.json

    def anew(*more: str) -> Any:
        result = cli("inspect", copy, "--json", *more)
        assert result.code == 0, result.err
        assert "up to date" not in result.err
        return result.json

    assert anew("--position", "-2")["position"] == -2
    assert anew("--dtype", "float64")["position"] == first.json["position"]
    # What select has used since is held out no more.
    selection = json.loads((copy / "selection.json").read_text())
    tried = json.loads((copy / "inspect.json").read_text())["held_out"]["prompts"]["harmful"][0]
    selection["prompts"]["harmful"].append(tried)
    (copy / "selection.json").write_text(json.dumps(selection))
    (stale,) = cli("methods", copy, "--json").json["stale"]
    assert stale["part"] == "inspect"
    assert "which it held out" in stale["why"][0]
    assert tried not in anew()["held_out"]["prompts"]["harmful"]
    activations = (copy / FILE).read_bytes()
    (copy / FILE).unlink()
    assert all(row["geometry"] is None for row in anew()["layers"])
    (copy / FILE).write_bytes(activations)
    assert any(row["geometry"] for row in anew()["layers"])
    held = load_file(copy / "direction.safetensors")["direction"]
    save_file({"direction": -held}, copy / "direction.safetensors")
    assert anew()["layers"][3]["cosine_with_selected"] < 0
    (copy / "inspect.json").write_text("{")
    anew()


def test_inspect_errors_are_one_line(run: Path, fails, tmp_path: Path, monkeypatch) -> None:
    assert "abliterate extract" in fails("inspect", tmp_path, code=3)
    assert "-5, -4, -3, -2, -1" in fails("inspect", run, "--position", "-9", code=2)
    other = tmp_path / "other"
    other.mkdir()
    for file in run.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    damaged = (other / FILE).read_bytes()
    (other / FILE).write_bytes(damaged[:-4] + b"\1\0\1\0")
    assert "is not what" in fails("inspect", other, code=3)
    (other / FILE).write_bytes(damaged[:1000])
    assert "not a readable safetensors file" in fails("inspect", other, code=3)
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    (run / "inspect.json").unlink(missing_ok=True)
    assert "pip install 'abliterate[report]'" in fails("inspect", run, code=2)


def test_the_table_names_every_layer(run: Path, cli) -> None:
    out = cli("inspect", run).out
    assert "PC1 share" in out
    assert "not measured" not in out
    assert "the direction suppresses" in out
