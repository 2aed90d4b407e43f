"""What a run says of a checkpoint, recomputed from the paper's definitions, a prompt at a time."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.metrics.intervals import bootstrap
from abliterate.prompts.sampling import prompt_key

KINDS = ("harmful", "harmless")
ROWS = ("baseline", "ablate", "add")
N_TRAIN, N_VAL, N_TEST = 6, 4, 6


class Plain:
    """The model as transformers loads it, and the interventions written out for a Llama."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> Tensor:
        chat = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt"
        )
        return rendered["input_ids"]

    def logits(self, ids: Tensor, change: tuple[str, Tensor, float] | None = None) -> Tensor:
        """``[tokens, vocabulary]``, float64."""
        with torch.no_grad():
            hooks = [] if change is None else self._hooks(*change)
            try:
                return self.model(ids).logits[0].double()
            finally:
                for hook in hooks:
                    hook.remove()

    def _hooks(self, name: str, direction: Tensor, number: float) -> list[Any]:
        blocks = self.model.model.layers
        if name == "add":  # h[l] <- h[l] + r, as it is (section 2.4)
            moved = direction.float()
            return [
                blocks[int(number)].register_forward_pre_hook(lambda _, args: (args[0] + moved,))
            ]
        unit = (direction / direction.norm()).float()
        share = number if name == "part" else 1.0

        def ablated(_: Any, __: Any, out: Any) -> Any:  # c <- c - (c . r) r
            first = out[0] if isinstance(out, tuple) else out
            first = first - share * (first @ unit)[..., None] * unit
            return (first, *out[1:]) if isinstance(out, tuple) else first

        parts = [self.model.model.embed_tokens]
        parts += [part for block in blocks for part in (block.self_attn, block.mlp)]
        return [part.register_forward_hook(ablated) for part in parts]


@pytest.fixture(scope="module")
def made(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Plain]:
    """A run by the command line, its evaluation, and the model for what follows."""
    from abliterate.cli.app import main

    folder, base = tiny("llama"), tmp_path_factory.mktemp("definitions")
    run = base / "run"
    for kind in KINDS:
        texts = [f"{kind} {'word ' * (row % 5)}number {row}" for row in range(20)]
        (base / f"{kind}.txt").write_text("\n".join(texts))
    rows = [{"text": f"some plain text of {'more ' * row} words"} for row in range(5)]
    (base / "pile.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [part for kind in KINDS for part in (f"--{kind}", str(base / f"{kind}.txt"))]
    tokens = ("--refusal-token", "I", "--refusal-token", "a")
    quiet = ("--batch-size", "3", "-q")
    for command in (
        ("extract", str(folder), "-o", str(run), "--no-filter", "--n-train", f"{N_TRAIN}",
         "--positions", "last", *tokens, *sources),
        ("select", str(run), "--no-filter", "--n-val", f"{N_VAL}", "--kl-threshold", "1e9",
         "--induce-threshold=-1e9", "--search", "exhaustive"),
        ("evaluate", str(folder), "--direction", str(run), "--n-test", f"{N_TEST}",
         "--max-new-tokens", "2", "--corpus", f"pile={base / 'pile.jsonl'}", "--seed", "0"),
    ):  # fmt: skip
        assert main([*command, *quiet]) == 0
    return run, json.loads((run / "evaluation.json").read_text()), Plain(folder)


def _texts(run: Path) -> dict[str, str]:
    lines = [(run.parent / f"{kind}.txt").read_text().splitlines() for kind in KINDS]
    return {prompt_key(text): text for some in lines for text in some}


def test_means_and_directions_are_those_of_the_residual_stream(made) -> None:
    run, _, plain = made
    extract = json.loads((run / "extract.json").read_text())
    texts, held = _texts(run), load_file(run / "directions.safetensors")
    positions = [entry["position"] for entry in extract["positions"]]
    means = {}
    for kind in KINDS:
        total = torch.zeros(len(positions), 4, 48, dtype=torch.float64)
        for key in extract["prompts"][kind]:
            with torch.no_grad():
                out = plain.model(plain.ids(texts[key]), output_hidden_states=True)
            stream = torch.stack(out.hidden_states[:4])[:, 0].double()  # what enters each block
            total += stream[:, positions].transpose(0, 1)
        means[kind] = total / len(extract["prompts"][kind])
        assert len(extract["prompts"][kind]) == N_TRAIN
        torch.testing.assert_close(held[f"mean_{kind}"], means[kind], atol=1e-5, rtol=1e-5)
    winner = json.loads((run / "selection.json").read_text())["winner"]
    at = positions.index(winner["position"]), winner["layer"]
    direction = load_file(run / "direction.safetensors")["direction"].double()
    expected = means["harmful"][at] - means["harmless"][at]
    torch.testing.assert_close(direction, expected, atol=1e-5, rtol=1e-4)


def test_every_candidates_scores_are_those_of_a_plain_loop(made) -> None:
    run, _, plain = made
    selection = json.loads((run / "selection.json").read_text())
    held, texts = load_file(run / "directions.safetensors"), _texts(run)
    differences = held["mean_harmful"] - held["mean_harmless"]
    tokens = [token["id"] for token in selection["refusal_tokens"]]
    positions = sorted({c["position"] for c in selection["candidates"]})
    scored = [c for c in selection["candidates"] if c["bypass_score"] is not None][:3]
    assert scored
    for candidate in scored:
        row, layer = positions.index(candidate["position"]), candidate["layer"]
        direction = differences[row, layer]
        bypass, induce, kl = [], [], []
        for key in selection["prompts"]["harmful"]:
            ids = plain.ids(texts[key])
            bypass.append(_score(plain.logits(ids, ("ablate", direction, layer))[-1], tokens))
        for key in selection["prompts"]["harmless"]:
            ids = plain.ids(texts[key])
            induce.append(_score(plain.logits(ids, ("add", direction, layer))[-1], tokens))
            changed = plain.logits(ids, ("ablate", direction, layer))[-1]
            kl.append(_kl(plain.logits(ids)[-1], changed, 1e-6))
        for name, values in (("bypass", bypass), ("induce", induce)):
            expected = sum(values) / N_VAL
            assert candidate[f"{name}_score"] == pytest.approx(expected, abs=2e-4)
        assert candidate["kl_divergence"] == pytest.approx(sum(kl) / N_VAL, abs=2e-4)


def _score(logits: Tensor, tokens: list[int]) -> float:
    p = float(logits.softmax(0)[tokens].sum())
    return math.log(p + 1e-8) - math.log(1 - p + 1e-8)


def _kl(baseline: Tensor, changed: Tensor, epsilon: float) -> float:
    p, q = baseline.softmax(0), changed.softmax(0)
    return float((p * ((p + epsilon).log() - (q + epsilon).log())).sum())


def test_each_prompts_score_kl_and_loss_and_their_means(made) -> None:
    run, record, plain = made
    texts, held = _texts(run), record["by_prompt"]
    tokens = [token["id"] for token in record["refusal_tokens"]]
    winner = json.loads((run / "selection.json").read_text())["winner"]
    direction = load_file(run / "direction.safetensors")["direction"]
    changes = {name: None if name == "baseline" else (name, direction, winner["layer"])
               for name in ROWS}  # fmt: skip
    assert set(held["interventions"]) == set(ROWS)
    lines = (run.parent / "pile.jsonl").read_text().splitlines()
    corpus = [plain.tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    by_size = sorted(corpus, key=len)
    for name, change in changes.items():
        figures, means = held["interventions"][name], record["interventions"][name]
        for kind in KINDS:
            keys = held["prompts"][kind]
            assert len(set(keys)) == N_TEST
            found: dict[str, list[float]] = {"refusal_metric": [], "kl_divergence": [],
                                             "kl_exact": []}  # fmt: skip
            for key in keys:
                ids = plain.ids(texts[key])
                logits, base = plain.logits(ids, change)[-1], plain.logits(ids)[-1]
                found["refusal_metric"].append(_score(logits, tokens))
                found["kl_divergence"].append(_kl(base, logits, 1e-6))
                found["kl_exact"].append(_kl(base, logits, 0.0))
            for figure, expected in found.items():
                if kind == "harmful" and figure != "refusal_metric":
                    continue
                part = means[kind] if figure == "refusal_metric" else means
                values = figures[kind][figure]
                assert values == pytest.approx(expected, abs=2e-4), (name, kind, figure)
                assert part[figure] == pytest.approx(sum(values) / N_TEST)
                assert part[f"{figure}_ci"] == list(bootstrap(values))
                spread = part[f"{figure}_spread"]
                assert spread["median"] == pytest.approx(sum(sorted(values)[2:4]) / 2)
                assert spread["max"] == max(values)
        losses = figures["losses"]["pile"]
        texts_in_order = sorted(zip(losses["n_tokens"], losses["loss"], strict=True))
        total = 0.0
        for ids, (count, loss) in zip(by_size, texts_in_order, strict=True):
            logp = plain.logits(torch.tensor([ids]), change).log_softmax(-1)
            nats = -float(sum(logp[at, ids[at + 1]] for at in range(len(ids) - 1)))
            assert count == len(ids) - 1
            assert loss == pytest.approx(nats / count, abs=2e-4)
            total += nats
        loss = means["losses"]["pile"]
        assert loss["loss"] == pytest.approx(total / sum(losses["n_tokens"]), abs=2e-4)
        low, high = loss["loss_ci"]
        assert low <= loss["loss"] <= high
    # Differences are of the same prompts.
    change, base = (held["interventions"][name]["harmful"] for name in ("add", "baseline"))
    differences = [
        one - other
        for one, other in zip(change["refusal_metric"], base["refusal_metric"], strict=True)
    ]
    delta = record["deltas"]["add"]["harmful"]
    assert delta["refusal_metric_ci"] == pytest.approx(list(bootstrap(differences)))
    assert delta["refusal_metric"] == pytest.approx(sum(differences) / N_TEST)
    assert delta["refusal_score_p"] == 1.0  # nobody refuses
    exact, paper = (record["interventions"]["ablate"][k] for k in ("kl_exact", "kl_divergence"))
    assert exact != paper
    assert exact == pytest.approx(paper, rel=0.2)


def test_answers_are_greedy_a_token_at_a_time(made) -> None:
    run, record, plain = made
    texts = _texts(run)
    winner = json.loads((run / "selection.json").read_text())["winner"]
    direction = load_file(run / "direction.safetensors")["direction"]
    ends = {plain.tokenizer.eos_token_id, plain.model.config.eos_token_id}
    seen = set()
    for name in ROWS:
        change = None if name == "baseline" else (name, direction, winner["layer"])
        for kind in KINDS:
            lines = (run / "completions" / f"{name}-{kind}.jsonl").read_text().splitlines()
            answers = {line["prompt"]: line["response"] for line in map(json.loads, lines)}
            assert len(answers) == N_TEST
            for key in record["by_prompt"]["prompts"][kind]:
                ids, answer = plain.ids(texts[key]), list[int]()
                while len(answer) < 2 and not ends & set(answer):
                    answer.append(int(plain.logits(ids, change)[-1].argmax()))
                    ids = torch.cat([ids, torch.tensor([[answer[-1]]])], 1)
                said = plain.tokenizer.decode(answer, skip_special_tokens=True)
                assert answers[texts[key]].strip() == said.strip(), (name, kind)
                seen.add(said)
    assert len(seen) > 3


def test_edited_tensors_are_the_sources_less_the_direction(made, cli, tmp_path: Path) -> None:
    run, _, plain = made
    source = Path(plain.model.config._name_or_path)
    out = tmp_path / "out"
    assert cli("orthogonalize", source, "--direction", run, "-o", out, "-q").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    direction = load_file(run / "direction.safetensors")["direction"].double()
    unit, edited = direction / direction.norm(), 0
    for name, weight in before.items():
        expected = weight.double()
        if name == "model.embed_tokens.weight":  # a row for each token: e <- e - (e . r) r
            expected = expected - (expected @ unit)[:, None] * unit
        elif name.endswith(("o_proj.weight", "down_proj.weight")):  # W <- W - r r^T W
            expected = expected - torch.outer(unit, unit @ expected)
        else:
            assert torch.equal(after[name], weight), name
            continue
        edited += 1
        torch.testing.assert_close(after[name], expected.float(), atol=1e-6, rtol=1e-6)
    assert edited == 1 + 2 * 4


def test_fragility_removes_parts_of_the_direction(made, cli) -> None:
    run, _, plain = made
    texts = _texts(run)
    few = ("--steps", "3", "--n-test", "3", "--max-new-tokens", "1", "--controls", "0")
    result = cli("fragility", run, *few, "--no-picture", "--json", "-q")
    assert result.code == 0, result.err
    record, direction = result.json, load_file(run / "direction.safetensors")["direction"]
    tokens = [token["id"] for token in record["refusal_tokens"]]
    for share, point, held in zip(
        (0.0, 0.5, 1.0), record["points"], record["by_prompt"], strict=True
    ):
        change = None if share == 0 else ("part", direction, share)
        ids = {kind: [plain.ids(texts[key]) for key in record["prompts"][kind]] for kind in KINDS}
        scores = [_score(plain.logits(one, change)[-1], tokens) for one in ids["harmful"]]
        kls = [
            _kl(plain.logits(one)[-1], plain.logits(one, change)[-1], 1e-6)
            for one in ids["harmless"]
        ]
        assert held["bypass_score"] == pytest.approx(scores, abs=2e-4)
        assert held["kl_divergence"] == pytest.approx(kls, abs=2e-4)
        assert point["bypass_score"] == pytest.approx(sum(scores) / 3, abs=2e-4)
        assert point["kl_divergence"] == pytest.approx(sum(kls) / 3, abs=2e-4)
    halves = [point["kl_divergence"] for point in record["points"]]
    assert halves[0] < halves[1]


def test_controls_are_other_directions_under_the_same_measure(made) -> None:
    """Each family recomputed a prompt at a time, from the residual stream and the seeded draws."""
    run, record, plain = made
    texts, controls = _texts(run), record["controls"]
    winner = json.loads((run / "selection.json").read_text())["winner"]
    layer, tokens = winner["layer"], [token["id"] for token in record["refusal_tokens"]]
    direction = load_file(run / "direction.safetensors")["direction"].double()
    means = load_file(run / "directions.safetensors")
    prompts = record["by_prompt"]["prompts"]
    assert set(controls["rows"]) == {"ablate", "add"}
    assert (controls["n"], controls["seed"]) == (4, 0)
    assert controls["covariance_of"] == {
        "n_prompts": N_TEST, "layer": layer, "position": -1, "prompts": "harmless test",
    }  # fmt: skip
    stream = []
    for key in prompts["harmless"]:
        with torch.no_grad():
            out = plain.model(plain.ids(texts[key]), output_hidden_states=True)
        stream.append(out.hidden_states[layer][0, -1].double())
    centred = torch.stack(stream) - torch.stack(stream).mean(0)
    drawn = {
        "covariance": _draws("covariance", N_TEST) @ centred,
        "isotropic": _draws("isotropic", 48),
    }
    for name, held in controls["rows"].items():
        families = held["families"]
        assert list(families) == ["covariance", "isotropic", *(["layers"] * (name == "ablate"))]
        vectors = {
            family: [v * direction.norm() / v.norm() for v in drawn[family][:2]] for family in drawn
        }
        if name == "ablate":
            layers = [member["layer"] for member in families["layers"]["members"]]
            assert layer not in layers
            candidates = (means["mean_harmful"] - means["mean_harmless"])[0]
            vectors["layers"] = [candidates[at] for at in layers]
        for family, some in vectors.items():
            for vector, member in zip(some, families[family]["members"], strict=False):
                cosine = float(vector @ direction / vector.norm() / direction.norm())
                assert member["cosine"] == pytest.approx(cosine, abs=1e-4)
                change = name, vector, layer
                for kind in KINDS:
                    scores = [
                        _score(plain.logits(plain.ids(texts[key]), change)[-1], tokens)
                        for key in prompts[kind]
                    ]
                    expected = sum(scores) / N_TEST
                    assert member[f"{kind}_score"] == pytest.approx(expected, abs=5e-4)
                divergences = [
                    _kl(plain.logits(ids)[-1], plain.logits(ids, change)[-1], 1e-6)
                    for ids in (plain.ids(texts[key]) for key in prompts["harmless"])
                ]
                expected = sum(divergences) / N_TEST
                assert member["kl_divergence"] == pytest.approx(expected, abs=5e-4)
            place = families[family]["place"]["kl_divergence"]
            others = [member["kl_divergence"] for member in families[family]["members"]]
            selected = held["selected"]["kl_divergence"]
            assert selected == record["interventions"][name]["kl_divergence"]
            assert place["below"] == sum(other < selected for other in others)
            assert place["sd"] == pytest.approx(statistics.stdev(others))
            assert place["z"] is None  # of so few


def _draws(family: str, size: int) -> Tensor:
    rng = np.random.default_rng([0, *family.encode()])
    return torch.from_numpy(rng.standard_normal((4, size)))


def test_controls_can_be_fewer_or_left_out(made, cli, tmp_path: Path) -> None:
    run, _, plain = made
    model = plain.model.config._name_or_path
    common = ("evaluate", model, "--direction", run, "--n-test", "2", "--max-new-tokens", "1",
              "--intervention", "subtract", "--refusal-token", "I")  # fmt: skip
    shown = cli(*common, "--controls", "2", "-o", tmp_path / "two")
    assert shown.code == 0, shown.err
    assert "random, isotropic (2)" in shown.out
    assert "subtract, harmful log-odds: the selected direction lies above" in shown.out
    assert "z " not in shown.out
    held = json.loads((tmp_path / "two" / "evaluation.json").read_text())["controls"]
    assert list(held["rows"]) == ["subtract"]
    none = cli(*common, "--controls", "0", "-o", tmp_path / "none", "--json")
    assert none.code == 0, none.err
    assert none.json["controls"] is None
    again = cli(*common, "--controls", "2", "-o", tmp_path / "two", "--seed", "0", "--json")
    assert again.json["controls"] == held  # kept


def test_several_test_sets_have_a_row_each_and_one_together(made, cli, tmp_path: Path) -> None:
    _, _, plain = made
    model = plain.model.config._name_or_path
    texts = {"a": [f"first {n}" for n in range(4)], "b": ["first 1", "Second 0", "third", "more"]}
    files = {name: tmp_path / f"{name}.txt" for name in texts}
    for name, file in files.items():
        file.write_text("\n".join(texts[name]))
    sources = ("--harmful", files["a"], "--harmful", files["b"], "--harmless", files["b"])
    common = ("evaluate", model, *sources, "--max-new-tokens", "1", "--refusal-token", "I",
              "--intervention", "baseline")  # fmt: skip
    result = cli(*common, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["n_prompts"] == {"harmful": 7, "harmless": 4}  # one stands in both
    pooled, keys = record["interventions"]["baseline"]["harmful"], record["by_prompt"]["prompts"]
    values = record["by_prompt"]["interventions"]["baseline"]["harmful"]["refusal_metric"]
    of_key = dict(zip(keys["harmful"], values, strict=True))
    assert pooled["n"] == 7
    assert "sets" not in record["interventions"]["baseline"]["harmless"]
    for name, file in files.items():
        part = pooled["sets"][str(file)]
        own = [prompt_key(text) for text in texts[name]]
        assert record["sets"]["harmful"][str(file)] == own
        assert part["n"] == 4
        assert part["refusal_metric"] == pytest.approx(sum(of_key[key] for key in own) / 4)
        assert part["refusal_metric_spread"]["max"] == max(of_key[key] for key in own)
    shown = " ".join(result.out.split())
    assert "By test set" in shown
    assert "pooled" in shown
    assert cli("report", tmp_path / "out").code == 0
    assert "<h3>By test set</h3>" in (tmp_path / "out" / "report.html").read_text()
    found = cli("methods", tmp_path / "out")
    assert "### By test set" in found.out
    cells = [line.split(" | ") for line in found.out.splitlines()]
    assert [row[2] for row in cells if row[1:] and row[1].startswith("harmful: ")] == list("447")
