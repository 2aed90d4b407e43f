"""chat with models that think first: the thought stands apart, and only the answer goes back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from thinking_models import HARMONY, HARMONY_TOKENS, R1, SELF_OPENED, scripted, tokenizer_with

from abliterate.inference.answer_stream import AnswerStream
from abliterate.inference.answer_text import AnswerReader
from abliterate.metrics.answers import TAGS, Parts

ANALYSIS = "<|channel|>analysis<|message|>I cannot say<|end|><|start|>assistant"
CHANNELS = f"{ANALYSIS}<|channel|>final<|message|>"
CASES = {
    "r1": (R1, (), "hm I cannot say\n</think>\n\n"),
    "no switch": (SELF_OPENED, (), "<think>\nhm I cannot say\n</think>\n\n"),
    "tokens": (R1, ("<think>", "</think>"), "hm I cannot say\n</think>\n\n"),
    "harmony": (HARMONY, HARMONY_TOKENS, CHANNELS),
}


@pytest.mark.parametrize("family", CASES)
def test_chat_keeps_thoughts_apart(
    family: str, cli: Any, tokenizer_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    template, special, thought = CASES[family]
    tokenizer = tokenizer_with(tokenizer_dir, template, special)
    model = scripted(tmp_path / "model", tokenizer, thought, "I cannot")

    def say(*options: str) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("p0\n/reset\nq1\n"))
        return cli("chat", model, "--max-new-tokens", "48", *options)

    shown = say("--thinking", "whole")
    assert shown.code == 0, shown.err
    assert shown.out == "I cannot\nI cannot\n"
    assert shown.err.count("I cannot say") == 2
    document = say("--thinking", "whole", "--json").json
    for turn in document["turns"]:
        assert turn["answer"] == "I cannot"
        assert turn["thought"].endswith("I cannot say")
    short = say("--thinking", "whole", "--max-new-tokens", "9" if family == "no switch" else "5")
    assert short.out == "\n\n"
    assert short.err.count("the thought did not end: raise --max-new-tokens") == 2
    skipped = say("--thinking", "skip", "--max-thinking-tokens", "1", "--max-new-tokens", "1")
    assert "the thought did not end: raise --max-thinking-tokens" in skipped.err
    monkeypatch.setattr("sys.stdin", io.StringIO("p0\n"))
    cut = cli("chat", model, "--thinking", "whole", "--max-new-tokens", "9", "--json").json
    assert cut["turns"][0]["answer"] is None


def test_chat_gives_back_the_answer_alone(
    cli: Any, tokenizer_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, HARMONY, HARMONY_TOKENS)
    model = scripted(tmp_path / "model", tokenizer, CHANNELS, "I cannot")
    asked: list[str] = []

    class Watching(AnswerStream):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt:
                asked.append(self.tokenizer.decode(value.flatten()))
            super().put(value)

    monkeypatch.setattr("abliterate.inference.dialogue.AnswerStream", Watching)
    monkeypatch.setattr("sys.stdin", io.StringIO("p0\nq1\n"))
    result = cli("chat", model, "--max-new-tokens", "48", "--thinking", "whole")
    assert result.code == 0, result.err
    assert asked[1].startswith(
        "<|start|>user<|message|>p0<|end|>"
        "<|start|>assistant<|channel|>final<|message|>I cannot<|end|><|start|>user"
    )
    assert "say" not in asked[1]


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("written", "begun", "expected"),
    [
        *(
            (f"{opening}\nhm < no\n{closing}\n\nYes < 7", False, Parts("hm < no", "Yes < 7"))
            for opening, closing in TAGS
        ),
        ("hm\n</think>\n\nYes", True, Parts("hm", "Yes")),
        ("hm </thin", True, Parts("hm </thin", None)),
        ("plain <b> text ", False, Parts(None, "plain <b> text")),
        (f"{CHANNELS}Yes", False, Parts("I cannot say", "Yes")),
        ("a</think>Hi.\n<think>b</think>Yo", True, Parts("a\n\nb", "Hi.\n\nYo")),
        ("a<think>b</think>c</think>Hi", True, Parts("a<think>b</think>c", "Hi")),
    ],
)
def test_answer_stream_tells_pieces_apart(
    written: str, begun: bool, expected: Parts, piece: int, tokenizer_dir: Path
) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, HARMONY, HARMONY_TOKENS)
    thought: list[str] = []
    answer: list[str] = []
    stream = AnswerStream(AnswerReader(tokenizer, begun), answer.append, thought.append)
    for start in range(0, len(written), piece):
        stream.on_finalized_text(written[start : start + piece])
    stream.on_finalized_text("", stream_end=True)
    assert stream.parts == expected
    assert "".join(answer).strip() == (expected.answer or "")
    assert "".join(thought) == (expected.thought or "")


def test_chat_of_a_model_that_does_not_think_is_as_before(cli: Any, monkeypatch: Any) -> None:
    from abliterate.resources import demo_model_dir

    monkeypatch.setattr("sys.stdin", io.StringIO("Which tree is this?\n"))
    result = cli("chat", demo_model_dir(), "--max-new-tokens", "8", "--json")
    assert list(json.loads(result.out)["turns"][0]) == ["user", "intervention", "answer"]
    assert "thinking" not in result.err
