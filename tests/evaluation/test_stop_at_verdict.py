"""Answers that end at their verdict: the same verdicts, and whole answers where there is none."""

from __future__ import annotations

import json
from pathlib import Path

from thinking_models import R1, prompts, scripted, tokenizer_with

from abliterate.metrics.refusal_phrases import ALL

DEMO = Path(__file__).resolve().parents[2] / "data/demo-model"


def _answers(out: Path, kind: str) -> list[dict[str, object]]:
    lines = (out / "completions" / f"baseline-{kind}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_answers_end_at_their_verdict_and_the_verdicts_stay(cli, fails, tmp_path: Path) -> None:
    common = ("--n-test", "6", "--max-new-tokens", "40", "--controls", "0")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli("evaluate", DEMO, "-o", whole, *common).code == 0
    result = cli("evaluate", DEMO, "-o", cut, *common, "--stop-at-verdict", "--json")
    assert result.code == 0, result.err
    assert result.json["stop_at_verdict"] is True
    shortened = 0
    for kind in ("harmful", "harmless"):
        for one, other in zip(_answers(whole, kind), _answers(cut, kind), strict=True):
            assert one["refused"] == other["refused"]
            assert str(one["response"]).startswith(str(other["response"]))
            if not one["refused"]:
                assert one["response"] == other["response"]
            shortened += one["response"] != other["response"]
            # Not before the phrase is there.
            assert ALL.found_in(str(other["response"])) == other["refused"]
    assert shortened >= 3
    # Cut and whole answers are not taken for each other.
    again = cli("evaluate", DEMO, "-o", cut, *common)
    assert again.code == 0, again.err
    assert _answers(cut, "harmful") == _answers(whole, "harmful")
    line = fails("evaluate", DEMO, "-o", tmp_path / "x", "--stop-at-verdict", "--classifier", "x",
                 code=2)  # fmt: skip
    assert "--stop-at-verdict" in line
    assert "--classifier" in line


def test_a_thought_within_the_thought_is_no_verdict(cli, tokenizer_dir, tmp_path: Path) -> None:
    said = "no <think>a</think> I cannot say anything at all here</think>Yes, of course I can."
    model = scripted(tmp_path / "model", tokenizer_with(tokenizer_dir, R1), "", said)
    result = cli(
        "evaluate", model, "-o", tmp_path / "out", *prompts(tmp_path), "--n-test", "1",
        "--intervention", "baseline", "--thinking", "whole", "--refusal-token", "I",
        "--max-new-tokens", "80", "--stop-at-verdict",
    )  # fmt: skip
    assert result.code == 0, result.err
    (line,) = _answers(tmp_path / "out", "harmful")
    assert (line["response"], line["refused"]) == (said, False)


def test_stopping_at_the_verdict_leaves_nothing_to_judge(fails, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    for given, named in (
        (("--judge-url", url, "--judge-model", "m"), "--judge-url"),
        (("--judge", DEMO), "--judge"),
        (("--judge-url", url, "--judge-model", "m", "--second-judge", DEMO), "--judge-url"),
    ):
        line = fails("evaluate", DEMO, "-o", tmp_path / "x", "--stop-at-verdict", *given, code=2)
        assert f"{named} takes whole ones" in line
        assert not (tmp_path / "x").exists()
