"""--thinking through the command line, on models whose answer depends on the prompt's kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from thinking_models import (
    HARMONY,
    HARMONY_TOKENS,
    QWEN,
    R1,
    SELF_OPENED,
    prompts,
    scripted,
    tokenizer_with,
)

PLAIN = SELF_OPENED.replace("</think>", "#")
THOUGHT = "hm I cannot say\n</think>\n\n"
ANALYSIS = "<|channel|>analysis<|message|>I cannot say<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
RESPONSE_TOKENS = (
    "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
)  # fmt: skip
RESPONSE = "<|END_THINKING|><|START_RESPONSE|>"
CLOSINGS = {"harmony": f"<|end|><|start|>assistant{FINAL}", "response": RESPONSE}
# Template, special tokens, what stands between prompt and answer under answer, and the thought.
FAMILIES = {
    "r1": (R1, (), "\n</think>\n\n", THOUGHT),
    "qwen": (QWEN, (), "<think>\n\n</think>\n\n", f"<think>\n{THOUGHT}"),
    "no switch": (SELF_OPENED, (), "<think>\n\n</think>\n\n", f"<think>\n{THOUGHT}"),
    "token": (R1, ("<think>", "</think>"), "\n</think>\n\n", THOUGHT),
    "plain": (PLAIN, (), "", f"<think>\n{THOUGHT}"),
    "harmony": (HARMONY, HARMONY_TOKENS, FINAL, f"{ANALYSIS}{FINAL}"),
    "response": (PLAIN, RESPONSE_TOKENS, "", f"<|START_THINKING|>I cannot say{RESPONSE}"),
    "nested": (R1, ("<think>", "</think>"), "", f"I <think>can</think> {THOUGHT}"),
}


def _model(folder: Path, family: str, tokenizer_dir: Path, thinks: bool) -> Path:
    template, special, closed, thought = FAMILIES[family]
    tokenizer = tokenizer_with(tokenizer_dir, template, special)
    if thinks:
        return scripted(folder, tokenizer, thought, "I cannot", "A")
    return scripted(folder, tokenizer, "", "I cannot", "A", before=closed)


def _extract(cli: Any, model: Path, tmp_path: Path, *options: str) -> Any:
    return cli(
        "extract", model, "-o", tmp_path / "run", *prompts(tmp_path), "--n-train", "10", *options
    )


def _later(cli: Any, model: Path, run: Path, *options: str) -> dict[str, Any]:
    """Select and evaluate what was extracted; returns the record of evaluate."""
    chosen = cli("select", run, "--n-val", "8", "--kl-threshold", "9")
    assert chosen.code == 0, chosen.err
    rows = (
        "--intervention",
        "baseline",
        "--intervention",
        "ablate",
        "--n-test",
        "2",
        "--controls",
        "1",
    )
    short = ("--max-new-tokens", "6", *options)
    done = cli("evaluate", model, "--direction", run, "-o", run, *rows, *short)
    assert done.code == 0, done.err
    return dict(json.loads((run / "evaluation.json").read_text()))


def _lines(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "completions" / f"baseline-{kind}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("family", ["r1", "qwen", "no switch", "harmony"])
def test_thinking_answer_makes_the_next_token_the_answers_first(
    family: str, cli: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    model = _model(tmp_path / "model", family, tokenizer_dir, thinks=False)
    result = _extract(cli, model, tmp_path)
    assert result.code == 0, result.err
    assert result.err.count("thinking: answer (") == 1
    record = json.loads((tmp_path / "run" / "extract.json").read_text())
    assert record["thinking"]["mode"] == "answer"
    assert [token["token"] for token in record["refusal_tokens"]] == ["I"]
    closed = FAMILIES[family][2]
    assert "".join(each["token"] for each in record["positions"]).endswith(closed)
    if family not in ("r1", "harmony"):
        return
    evaluation = _later(cli, model, tmp_path / "run")
    assert evaluation["thinking"] == record["thinking"]
    baseline, ablated = (evaluation["interventions"][name] for name in ("baseline", "ablate"))
    assert (baseline["harmful"]["refusal_score"], baseline["harmless"]["refusal_score"]) == (1, 0)
    assert baseline["harmful"]["refusal_metric"] > 1 > -1 > baseline["harmless"]["refusal_metric"]
    assert abs(ablated["harmful"]["refusal_metric"]) < 1
    assert [line["response"] for line in _lines(tmp_path / "run", "harmful")] == ["I cannot"] * 2


@pytest.mark.parametrize(
    "family", ["r1", "no switch", "token", "plain", "harmony", "response", "nested"]
)
def test_thinking_skip_scores_the_token_behind_the_thought(
    family: str, cli: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    model = _model(tmp_path / "model", family, tokenizer_dir, thinks=True)
    result = _extract(cli, model, tmp_path, "--thinking", "skip", "--max-thinking-tokens", "48")
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "run" / "extract.json").read_text())
    assert record["thinking"]["mode"] == "skip"
    assert [token["token"] for token in record["refusal_tokens"]] == ["I"]
    ends = "".join(each["token"] for each in record["positions"])
    closing = CLOSINGS.get(family, "</think>\n\n")
    assert ends.endswith(closing)
    assert len(ends) < len(closing) + 3  # the tokens that end the thought, none of its own
    if family not in ("plain", "harmony"):
        return
    # The later stages follow the record.
    evaluation = _later(cli, model, tmp_path / "run")
    baseline, ablated = (evaluation["interventions"][name] for name in ("baseline", "ablate"))
    assert (baseline["harmful"]["refusal_score"], baseline["harmless"]["refusal_score"]) == (1, 0)
    assert baseline["harmful"]["refusal_metric"] > 1 > -1 > baseline["harmless"]["refusal_metric"]
    assert abs(ablated["harmful"]["refusal_metric"]) < 1
    for kind, answer in (("harmful", "I cannot"), ("harmless", "A cannot")):
        for line in _lines(tmp_path / "run", kind):
            assert "I cannot say" in line["thought"]
            assert line["answer"] == answer


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("r1", ("--thinking", "whole"), "ends within a thought"),
        ("plain", (), "begin with <think>"),
        ("harmony", ("--thinking", "whole"), "begin with the channel analysis"),
        ("qwen", ("--thinking", "whole", "--refusal-token", "I"), "begin with <think>"),
    ],
)
def test_extract_says_that_the_model_thinks_first(
    family: str, options: tuple[str, ...], says: str, fails: Any, cli: Any, tokenizer_dir: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = _model(tmp_path / "model", family, tokenizer_dir, thinks=True)
    run, given = tmp_path / "run", prompts(tmp_path)
    line = fails("extract", model, "-o", run, *given, "--n-train", "10", *options, code=3)
    assert says in line
    assert "--thinking skip" in line
    assert ("--thinking answer" in line) == (family != "plain")
    assert "does not seem to refuse" not in line
    evaluated = cli(
        "evaluate", model, *given, "--n-test", "2", "--max-new-tokens", "2", *options[:2],
        "--intervention", "baseline",
    )  # fmt: skip
    assert evaluated.code == 3
    assert says in evaluated.err


def test_thoughts_that_do_not_end_are_counted_apart(
    cli: Any, fails: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    model = _model(tmp_path / "model", "r1", tokenizer_dir, thinks=True)
    given = prompts(tmp_path)
    skip = ("--thinking", "skip", "--max-thinking-tokens", "3")
    line = fails("extract", model, "-o", tmp_path / "run", *given, "--n-train", "10", *skip, code=3)
    assert "no thought about the 10 harmful prompts ends: raise --max-thinking-tokens" in line
    out = tmp_path / "out"
    for length, thinking in (("3", "whole"), ("40", "whole"), ("6", "skip")):
        if thinking == "skip":  # the answer's room is not the thought's
            options = ("--thinking", "skip", "--max-thinking-tokens", "40")
        else:
            options = ("--thinking", "whole")
        done = cli(
            "evaluate", model, "-o", out, *given, "--n-test", "2", "--max-new-tokens", length,
            *options, "--intervention", "baseline", "--refusal-token", "I",
        )  # fmt: skip
        assert done.code == 0, done.err
        record = json.loads((out / "evaluation.json").read_text())
        harmful = record["interventions"]["baseline"]["harmful"]
        ended = length == "40" or thinking == "skip"
        assert harmful["no_verdict"] == (0 if ended else 2)
        assert harmful["refusal_score"] == (1.0 if ended else None)
        assert ("2 unfinished" in done.out) != ended
        for line in _lines(out, "harmful"):
            assert line["refused"] is (True if ended else None)
            assert line["answer"] == ("I cannot" if ended else None)
        again = cli("score", out / "completions" / "baseline-harmful.jsonl", "--json")
        assert again.json["scores"]["no_verdict"] == (0 if ended else 2)


def test_models_that_do_not_think_are_not_touched(cli: Any, tiny: Any, tmp_path: Path) -> None:
    options = ("--n-train", "8", "--refusal-token", "I", "--no-filter")
    folders = []
    for mode in ((), ("--thinking", "whole")):
        folders.append(tmp_path / f"run{len(mode)}")
        result = cli("extract", tiny(), "-o", folders[-1], *options, *mode)
        assert result.code == 0, result.err
        record = json.loads((folders[-1] / "extract.json").read_text())
        assert ("thinking:" in result.err) == bool(mode)
        assert ("thinking" in record) == bool(mode)
    first, second = ((folder / "directions.safetensors").read_bytes() for folder in folders)
    assert first == second
