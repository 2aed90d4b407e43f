"""Capability checks of ``evaluate``: loss and perplexity on corpora, lm-eval on local tasks."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate.direction import Direction, save_direction
from abliterate.errors import InputError, UsageError
from abliterate.evaluation.losses import measure_loss
from abliterate.models.loading import load_model
from abliterate.prompts.chat_template import ChatFormat, render
from abliterate.prompts.corpora import Corpus, Example, parse_corpora, read_corpus

SMALL = ("--refusal-token", "I", "--n-test", "4", "--max-new-tokens", "5", "--controls", "0")
TEXTS = [
    "a plain text",
    "another one that is quite a bit longer than the first",
    "three words here",
]
PAIRS = [
    {"instruction": "name a colour", "input": "", "output": "blue is one"},
    {"instruction": "add these", "input": "1 and 2", "output": "three"},
    {"instruction": "say something", "input": "", "output": "here is something, and more"},
]


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    generator = torch.Generator().manual_seed(3)
    vector = 4 * torch.randn(48, generator=generator, dtype=torch.float64)
    save_direction(path, Direction(vector, -1, 2), "tiny")
    return path


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "pile.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (folder / "alpaca.json").write_text(json.dumps(PAIRS))
    return folder


def _labelled(model: Any, ids: list[int], start: int) -> tuple[float, int]:
    """Summed loss by transformers' own labels, and how many tokens it is over."""
    labels = torch.tensor([[-100] * start + ids[start:]])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
    return float(loss) * (len(ids) - start), len(ids) - start


def test_losses_are_those_of_transformers(tiny, cli, corpora, direction, tmp_path: Path) -> None:
    """All three corpora, baseline and edited, through the command."""
    edited, out = tmp_path / "edited", tmp_path / "out"
    assert cli("orthogonalize", tiny("llama"), "--direction", direction, "-o", edited).code == 0
    result = cli(
        "evaluate", tiny("llama"), "--direction", direction, "--checkpoint", edited, "-o", out,
        *SMALL, "--intervention", "baseline", "--intervention", "ablate", "--corpus",
        f"pile={corpora / 'pile.jsonl'}", "--corpus", f"alpaca={corpora / 'alpaca.json'}",
        "--corpus", "own", "--batch-size", "2", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = result.json["interventions"]
    own = [
        json.loads(line)
        for line in (out / "completions" / "baseline-harmless.jsonl").read_text().splitlines()
    ]
    pairs = {
        "alpaca": [(row["instruction"], row["output"]) for row in PAIRS if not row["input"]],
        "own": [(row["prompt"], row["response"]) for row in own if row["response"]],
    }
    for name, folder in (("baseline", tiny("llama")), ("edited", edited)):
        loaded = load_model(str(folder))
        tokenizer = loaded.tokenizer
        rows = {"pile": [(tokenizer(text)["input_ids"], 1) for text in TEXTS]}
        for corpus, texts in pairs.items():
            rows[corpus] = []
            for instruction, answer in texts:
                before = tokenizer(render(tokenizer, instruction, ChatFormat()))["input_ids"]
                after = tokenizer(answer, add_special_tokens=False)["input_ids"]
                # Of the response alone: the template's tokens and the user's are not counted.
                rows[corpus].append((before + after, len(before)))
        for corpus, measured in found[name]["losses"].items():
            sums = [_labelled(loaded.model, ids, start) for ids, start in rows[corpus]]
            count = sum(n for _, n in sums)
            expected = sum(loss for loss, _ in sums) / count
            assert measured["n_tokens"] == count, corpus
            assert measured["n_texts"] == len(sums)
            assert measured["loss"] == pytest.approx(expected, rel=1e-4)
            assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-3)
    for corpus in ("pile", "alpaca", "own"):
        hooked, baked = (found[name]["losses"][corpus]["loss"] for name in ("ablate", "edited"))
        assert hooked == pytest.approx(baked, rel=1e-4)
        change = result.json["deltas"]["ablate"]["losses"][corpus]["loss"]
        assert change == pytest.approx(hooked - found["baseline"]["losses"][corpus]["loss"])
        assert abs(change) > 1e-3
    assert result.json["corpora"]["alpaca"]["n_texts"] == 2
    pile = ("--corpus", f"pile={corpora / 'pile.jsonl'}")
    table = cli("evaluate", tiny("llama"), "-o", out, *SMALL, *pile)
    assert "pile PPL" in table.out
    short = cli(
        "evaluate", tiny("llama"), "-o", out, *SMALL, *pile, "--corpus-tokens", "3", "--json"
    ).json["interventions"]["baseline"]["losses"]["pile"]
    assert short["n_tokens"] == 2 * short["n_texts"]  # the first of three is not predicted


def test_plain_texts_are_cut_and_batches_do_not_matter(tiny) -> None:
    loaded = load_model(str(tiny("llama")))
    words = " ".join(f"word {index}" for index in range(100))
    examples = tuple(Example(text) for text in (words, "short text", words + " more"))
    corpus = Corpus("pile", "x", examples)
    one, many = (measure_loss(loaded, corpus, max_tokens=20, batch_size=n) for n in (1, 3))
    assert one.n_tokens == 19 + 19 + len(loaded.tokenizer("short text")["input_ids"]) - 1
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    with pytest.raises(InputError, match="no text of two tokens"):
        measure_loss(loaded, Corpus("pile", "x", (Example("a"),)))


def test_corpora_and_their_mistakes(corpora, fails, tiny, tmp_path: Path) -> None:
    assert parse_corpora(["own", "pile=x.txt"]) == {"own": "baseline completions", "pile": "x.txt"}
    for wrong in (["pille"], ["own=x"], ["pile="], ["pile", "pile=x"]):
        with pytest.raises(UsageError, match="corpus"):
            parse_corpora(wrong)
    pairs = read_corpus("alpaca", str(corpora / "alpaca.json"), 10, 0).examples
    assert [example.text for example in pairs] == ["blue is one", "here is something, and more"]
    first = read_corpus("pile", str(corpora / "pile.jsonl"), 2, 0).examples
    assert [example.text for example in first] == TEXTS[:2]
    samples = {read_corpus("alpaca", str(corpora / "alpaca.json"), 1, s).examples for s in range(9)}
    assert len(samples) == 2
    base = ("evaluate", tiny("llama"), *SMALL)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a"}\n')
    assert "entry 1: no text in a column output" in fails(
        *base, "--corpus", f"alpaca={bad}", code=3
    )
    assert "nor a hub dataset" in fails(*base, "--corpus", "pile=./none", code=3)
    assert "does not exist" in fails(*base, "--corpus", "pile=none.jsonl", code=3)
    offline = fails(*base, "--corpus", "pile=no-such-org/no-such-set:train", code=3)
    assert "cannot be loaded" in offline


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two lm-eval tasks defined from local files: choices, and running text."""
    folder = tmp_path_factory.mktemp("tasks")
    data = [
        {
            "question": f"which is {index}",
            "choices": ["red", "a green one", "no"],
            "answer": index % 3,
        }
        for index in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'data.jsonl'}\n"
        "test_split: test\n"
    )
    (folder / "tiny_choice.yaml").write_text(
        "task: tiny_choice\n" + common + "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "tiny_text.yaml").write_text(
        "task: tiny_text\n" + common + "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list:\n  - metric: byte_perplexity\n"
    )
    return folder


def test_lm_eval_on_local_tasks(tiny, cli, tasks, direction, tmp_path: Path) -> None:
    """Hooks reach lm-eval: ablated it measures what the edited checkpoint gives, not the base."""
    edited, out = tmp_path / "edited", tmp_path / "out"
    assert cli("orthogonalize", tiny("llama"), "--direction", direction, "-o", edited).code == 0
    command = (
        "evaluate", tiny("llama"), "--direction", direction, "--checkpoint", edited, "-o", out,
        *SMALL, "--intervention", "baseline", "--intervention", "ablate", "--tasks",
        "tiny_choice,tiny_text", "--tasks-dir", tasks,
    )  # fmt: skip
    result = cli(*command, "--json")
    assert result.code == 0, result.err
    assert "%|" not in result.err
    found = {name: row["tasks"] for name, row in result.json["interventions"].items()}
    key = "byte_perplexity,none"
    texts = {name: row["tiny_text"][key] for name, row in found.items()}
    assert texts["ablate"] == pytest.approx(texts["edited"], rel=1e-4)
    assert abs(texts["ablate"] - texts["baseline"]) > 1e-3
    for name, folder in (("baseline", tiny("llama")), ("edited", edited)):
        assert found[name]["tiny_choice"]["acc,none"] == pytest.approx(_accuracy(folder, tasks))
    change = result.json["deltas"]["ablate"]["tasks"]["tiny_text"][key]
    assert change == pytest.approx(texts["ablate"] - texts["baseline"])

    again = cli(*command)
    assert "loaded" not in again.err  # nothing is computed twice
    lines = again.out.splitlines()
    (row,) = (line for line in lines if "tiny_choice" in line)
    assert "acc" in row
    assert any("baseline" in line and "edited" in line for line in lines)
    limited = cli(*command, "--task-limit", "3", "--json")
    accuracy = limited.json["interventions"]["baseline"]["tasks"]["tiny_choice"]["acc,none"]
    assert accuracy == pytest.approx(_accuracy(tiny("llama"), tasks, 3))
    assert limited.json["task_settings"]["limit"] == 3


def _accuracy(folder: Path, tasks: Path, limit: int | None = None) -> float:
    """What lm-eval's definition of ``acc`` gives, by hand."""
    loaded = load_model(str(folder))
    rows = [json.loads(line) for line in (tasks / "data.jsonl").read_text().splitlines()][:limit]
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            before = loaded.tokenizer(row["question"])["input_ids"]
            ids = loaded.tokenizer(f"{row['question']} {choice}")["input_ids"]
            loss, _ = _labelled(loaded.model, ids, len(before))
            sums.append(-loss)
        right += sums.index(max(sums)) == row["answer"]
    return right / len(rows)


def test_tasks_and_their_mistakes(tiny, fails, tasks, monkeypatch, tmp_path: Path) -> None:
    base = ("evaluate", tiny("llama"), *SMALL)
    assert "without --tasks" in fails(*base, "--task-limit", "3", code=2)
    assert "is no folder" in fails(*base, "--tasks", "x", "--tasks-dir", "./none", code=2)
    broken = tmp_path / "broken"
    broken.mkdir()
    text = (tasks / "tiny_choice.yaml").read_text().replace("data.jsonl", "gone.jsonl")
    (broken / "tiny_broken.yaml").write_text(text.replace("tiny_choice", "tiny_broken"))
    line = fails(*base, "--tasks", "tiny_broken", "--tasks-dir", broken, code=3)
    assert "lm-eval fails" in line
    assert "gone.jsonl" in line
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "lm_eval", None)
        assert "pip install 'abliterate[eval]'" in fails(*base, "--tasks", "mmlu", code=2)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "openai", None)
        judge = ("--judge-url", "http://127.0.0.1:1/v1", "--judge-model", "x")
        assert "pip install 'abliterate[eval]'" in fails(*base, *judge, code=2)
    import lm_eval.tasks

    # lm-eval's own index takes ten seconds to read: here it is empty.
    known = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", known)
    assert f"neither lm-eval nor {tasks} has a task 'no_such_task'" in fails(
        *base, "--tasks", "tiny_text,no_such_task", "--tasks-dir", tasks, code=2
    )
    assert "lm-eval has no task 'mmlu'" in fails(*base, "--tasks", "mmlu", code=2)
