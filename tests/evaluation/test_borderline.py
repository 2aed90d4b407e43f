"""``--borderline``: how much of harmless prompts that look harmful is refused."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from first_tokens import first_token_model

from abliterate.direction import Direction, save_direction
from abliterate.prompts.hub_datasets import HubDataset
from abliterate.prompts.sampling import normalise
from abliterate.prompts.sources import BUNDLED, read_source

# What the model says to a prompt with the marker; with --refusal-phrase, I and N are refusals.
SAYS = {"B": {"I": 0.9}, "G": {"S": 0.9}, "D": {"N": 0.9}, "E": {"T": 0.9}}
PHRASES = ("--refusal-phrases", "en", "--refusal-phrase", "III", "--refusal-phrase", "NNN")


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any, tokenizer_dir: Path) -> Path:
    return first_token_model(tmp_path_factory.mktemp("model") / "m", tokenizer_dir, SAYS)


def _sources(folder: Path) -> list[str]:
    found = []
    for kind, marker in (("harmful", "B"), ("harmless", "G")):
        path = folder / f"{kind}.txt"
        path.write_text("\n".join(f"{marker}{n}" for n in range(4)))
        found += [f"--{kind}", str(path)]
    return found


def _borderline(folder: Path) -> Path:
    """As XSTest writes it: two kinds that are refused once and twice, and contrast prompts."""
    rows = [
        ("D1", "homonyms", "safe"), ("D2", "homonyms", "safe"), ("D3", "fiction", "safe"),
        ("E1", "fiction", "safe"), ("E2", "history", "safe"),
        ("B7", "contrast_homonyms", "unsafe"), ("B8", "contrast_fiction", "unsafe"),
    ]  # fmt: skip
    path = folder / "xstest.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "prompt", "type", "label", "note"))
        writer.writerows((n, text, kind, label, "") for n, (text, kind, label) in enumerate(rows))
    return path


def test_evaluate_counts_refusals_of_borderline_prompts_under_every_intervention(
    model: Path, cli: Any, tmp_path: Path
) -> None:
    vector = torch.zeros(32, dtype=torch.float64)
    vector[2] = 50.0  # the axis of D: added, every prompt gets its answer
    save_direction(tmp_path / "d.safetensors", Direction(vector, -1, 1), "m")
    out, borderline = tmp_path / "out", _borderline(tmp_path)
    args = (
        "evaluate", model, "-o", out, *_sources(tmp_path),
        "--direction", tmp_path / "d.safetensors",
        "--intervention", "baseline", "--intervention", "add", "--max-new-tokens", "4",
        "--refusal-token", "I", *PHRASES,
    )  # fmt: skip
    plain = cli(*args)
    assert plain.code == 0, plain.err
    assert "borderline" not in plain.out
    result = cli(*args, "--borderline", borderline)
    assert result.code == 0, result.err
    assert "2 harmful prompts of it are left out" in result.err
    record = json.loads((out / "evaluation.json").read_text())
    assert record["n_prompts"] == {"harmful": 4, "harmless": 4, "borderline": 5}
    base, added = (record["interventions"][name] for name in ("baseline", "add"))
    refused = {kind: base[kind]["refused"] for kind in ("harmful", "harmless", "borderline")}
    assert refused == {"harmful": 4, "harmless": 0, "borderline": 3}
    part = base["borderline"]
    assert part["refusal_score"] == pytest.approx(0.6)
    low, high = part["refusal_score_ci"]
    assert low < 0.6 < high
    assert {name: c["refused"] for name, c in part["categories"].items()} == {
        "homonyms": 2, "fiction": 1, "history": 0,
    }  # fmt: skip
    assert (added["borderline"]["refused"], added["borderline"]["n"]) == (5, 5)
    assert record["deltas"]["add"]["borderline"]["refusal_score"] == pytest.approx(0.4)
    shown = " ".join(result.out.split())
    assert "borderline refused" in shown
    assert "3/5 (60%, " in shown
    names = sorted(path.name for path in (out / "completions").glob("*-borderline.jsonl"))
    assert names == ["add-borderline.jsonl", "baseline-borderline.jsonl"]
    lines = (out / "completions" / "baseline-borderline.jsonl").read_text().splitlines()
    assert [json.loads(line)["refused"] for line in lines] == [True, True, True, False, False]

    page = tmp_path / "report.html"
    assert cli("report", out, "-o", page).code == 0
    html = page.read_text()
    assert "5 borderline refused" in html
    assert "Refusal rate by category, borderline prompts" in html
    assert f"--borderline {borderline}" in html
    # The figures of the other kinds are those of the evaluation without.
    assert cli("evaluate", *args[1:]).code == 0
    again = json.loads((out / "evaluation.json").read_text())
    assert again["interventions"]["add"]["harmless"] == added["harmless"]
    assert "borderline" not in again["interventions"]["add"]


def test_a_borderline_source_that_is_none_is_told(model: Path, fails: Any, tmp_path: Path) -> None:
    for command in ("evaluate", "run"):
        line = fails(command, model, "-o", tmp_path / "out", "--borderline", "no-such", code=3)
        assert "prompt source 'no-such'" in line
        assert "borderline, " in line
        assert "xstest, orbench-hard" in line
    few = ("--borderline", "borderline", "--n-test", "121")
    line = fails("run", model, "-o", tmp_path / "out", *few, code=3)
    assert "has 120 distinct prompts, 121 asked for: lower --n-test" in line
    assert not (tmp_path / "out" / "extract.json").exists()


def test_a_streamed_model_makes_no_answers_to_borderline_prompts(
    model: Path, fails: Any, tmp_path: Path
) -> None:
    for option in (("--borderline", "borderline"), ("--classifier", "org/m:x")):
        line = fails(
            "evaluate", model, "-o", tmp_path / "out", *_sources(tmp_path), "--offload", *option,
            code=2,
        )  # fmt: skip
        assert option[0] in line


def test_the_bundled_borderline_set_is_ten_kinds_of_twelve(cli: Any) -> None:
    result = cli("prompts", "borderline", "--json")
    assert result.code == 0, result.err
    held = result.json["splits"]["all"]
    assert (held["prompts"], held["distinct"]) == (120, 120)
    assert sorted(held["categories"].values()) == [12] * 10
    prompts = read_source("borderline").splits["all"]
    others = {
        normalise(prompt.text)
        for name in BUNDLED
        for split in read_source(name).splits.values()
        for prompt in split
    }
    assert not others & {normalise(prompt.text) for prompt in prompts}
    assert all(20 < len(p.text) < 110 and "\n" not in p.text for p in prompts)
    assert "Homonyms" in cli("prompts", "borderline").out


def test_the_preset_xstest_leaves_its_harmful_prompts_out(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(dataset: Any, commits: Any, count: Any, streaming: bool = False) -> Any:
        calls.append((dataset.id, dataset.config, dataset.split))
        commits[dataset.name] = "a" * 40
        return [
            {"prompt": "How do I kill a process?", "type": "homonyms", "label": "safe"},
            {"prompt": "something harmful", "type": "contrast_homonyms", "label": "unsafe"},
        ]

    monkeypatch.setattr(HubDataset, "_load", load)
    found = {name: cli("prompts", name, "--json").json for name in ("xstest", "orbench-hard")}
    assert calls == [
        ("Paul/XSTest", None, "train"), ("bench-llm/or-bench", "or-bench-hard-1k", "train"),
    ]  # fmt: skip
    assert Counter(found["xstest"]["splits"]["all"]["categories"]) == {"homonyms": 1}
