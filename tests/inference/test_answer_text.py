"""Thought and answer in tokens: marks that are special, what tokenizers declare, where they end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from thinking_models import HARMONY, HARMONY_TOKENS, SELF_OPENED, scripted, tokenizer_with

from abliterate.inference.answer_text import AnswerReader
from abliterate.metrics.answers import Parts

DECLARED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant\n",
    "fields": {
        "thinking": {"open": "{{plan}}", "close": "{{done}}", "content": "text"},
        "content": {"close_pattern": r"(x+x+)+y", "content": "text"},
    },
}


def _reader(tokenizer_dir: Path, special: tuple[str, ...], begun: bool = False) -> AnswerReader:
    return AnswerReader(tokenizer_with(tokenizer_dir, HARMONY, special), begun)


@pytest.mark.parametrize(
    ("special", "written", "expected"),
    [
        (("[THINK]", "[/THINK]"), "[THINK]a[/THINK]Hi<|end|>", Parts("a", "Hi")),
        (("<|channel>", "<channel|>"), "<|channel>thought\na<channel|>Hi", Parts("a", "Hi")),
        (HARMONY_TOKENS, "<|channel|>final<|message|>Hi<|return|>", Parts(None, "Hi")),
        (HARMONY_TOKENS, "Hi<|return|>", Parts(None, "Hi")),
        ((), "Hi<|end|>", Parts(None, "Hi")),
    ],
)
def test_special_tokens_that_mark_a_thought_stay(
    special: tuple[str, ...], written: str, expected: Parts, tokenizer_dir: Path
) -> None:
    reader = _reader(tokenizer_dir, special)
    ids = reader.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert reader.parts(reader.text(ids)) == expected


@pytest.mark.parametrize(
    ("written", "begun", "closing", "answer"),
    [
        ("<think>\nhm\n</think>\n\nHi", False, "</think>\n\n", "Hi"),
        ("hm</think>Hi", True, "</think>", "Hi"),
        ("Hi there", False, "", "Hi there"),
        ("<think>\nhm", False, None, None),
        ("hm", True, None, None),
        ("a<think>b</think>c</think>Hi", True, "</think>", "Hi"),
        ("a <think> b</think>Hi", True, "</think>", "Hi"),
        ("a</think>Hi. <think>b</think>There", True, "</think>", "Hi. <think>b</think>There"),
        ("\u25c1think\u25b7a\u25c1/think\u25b7Hi", False, "\u25c1/think\u25b7", "Hi"),
        ("hm</think>\n<answer>\nHi", True, "</think>\n<answer>\n", "Hi"),
        ("hm</think> <response>Hi", True, "</think> <response>", "Hi"),
        ("hm</think><answered>Hi", True, "</think>", "<answered>Hi"),
    ],
)
def test_where_the_answer_begins(
    written: str, begun: bool, closing: str | None, answer: str | None, tokenizer_dir: Path
) -> None:
    reader = _reader(tokenizer_dir, (), begun)
    ids = reader.tokenizer(written, add_special_tokens=False)["input_ids"]
    found = reader.thought_in(ids)
    if closing is None:
        assert found is None
        assert reader.cut(ids, 2, 9) == ids[:2]
        return
    assert found is not None
    start, stop = found
    assert reader.raw(ids[start:stop]) == closing
    assert reader.raw(ids[stop:]) == answer
    assert reader.cut(ids, len(ids), 1) == ids[: stop + 1]
    if stop:
        assert reader.cut(ids, stop - 1, 9) == ids[: stop - 1]


def test_what_a_tokenizer_declares_of_its_thoughts_counts(
    cli: Any, tokenizer_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, SELF_OPENED.replace("</think>", "#"))
    if not hasattr(tokenizer, "response_template"):
        pytest.skip("this transformers knows no response templates")
    tokenizer.response_template = DECLARED
    reader = AnswerReader(tokenizer)
    assert reader.parts("{{plan}} I cannot {{done}} Yes") == Parts("I cannot", "Yes")
    assert reader.parts("{{plan}} I cannot") == Parts("I cannot", None)
    assert reader.parts("Yes") == Parts(None, "Yes")
    assert reader.parts("<think>a</think>Yes") == Parts("a", "Yes")
    assert AnswerReader(tokenizer, True).parts("hm {{done}} Yes") == Parts("hm", "Yes")
    # Its regular expressions, which may take for ever, are never run.
    assert reader.parts("{{plan}}a{{done}}" + "x" * 64).answer == "x" * 64
    model = scripted(tmp_path / "model", tokenizer, "{{plan}} I can {{done}}\n", "I cannot")
    monkeypatch.setattr("sys.stdin", io.StringIO("p0\n"))
    result = cli("chat", model, "--max-new-tokens", "32", "--json")
    assert result.code == 0, result.err
    (turn,) = result.json["turns"]
    assert (turn["thought"], turn["answer"]) == ("I can", "I cannot")
