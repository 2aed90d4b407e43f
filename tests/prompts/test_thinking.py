"""What templates of models that think first are rendered to: where the answer begins, or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from thinking_models import (
    EFFORT,
    HARMONY,
    OFF_BY_DEFAULT,
    QWEN,
    R1,
    SELF_OPENED,
    SHOWS_ITS_FORM,
    SYSTEM_SWITCH,
    tagged,
    tokenizer_with,
)

from abliterate.metrics.answers import TAGS, WORDS
from abliterate.prompts.chat_template import ChatFormat, post_instruction_ids, render
from abliterate.prompts.thinking import find_thinking, opened_in

EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "end", "why"),
    [
        (R1, f"assistant\n{EMPTY}", "the prompt ends within <think>"),
        (QWEN, f"assistant\n{EMPTY}", "enable_thinking=false"),
        (SELF_OPENED, f"assistant\n{EMPTY}", "an empty <think>"),
        (OFF_BY_DEFAULT, "assistant\n</think>", "default is thinking=false"),
        (SYSTEM_SWITCH, "assistant\n", "default is thinking=false"),
        (EFFORT, "assistant\n", 'reasoning_effort="none"'),
        (SHOWS_ITS_FORM, "assistant\n<think>\n\n~</think>~~", "the prompt ends within <think>"),
        (HARMONY, "<|start|>assistant<|channel|>final<|message|>", "harmony"),
    ],
)
def test_thinking_answer_is_the_default_and_ends_where_the_answer_begins(
    template: str, end: str, why: str, tokenizer_dir: Path
) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, template)
    for mode in (None, "answer"):
        text = render(tokenizer, "What is it?", ChatFormat(thinking=mode))
        assert text.endswith(end)
        assert opened_in(text.rpartition("What is it?")[2]) is None
        found = find_thinking(tokenizer, ChatFormat(thinking=mode))
        assert (found.mode, found.begun) == ("answer", False)
        assert why in found.why
        assert "thinking: answer" in (found.line() or "")
    suffix = tokenizer.decode(post_instruction_ids(tokenizer, ChatFormat()))
    assert suffix.endswith(end)
    assert "none" in text or template != EFFORT


@pytest.mark.parametrize("template", [R1, QWEN, SELF_OPENED, SHOWS_ITS_FORM, HARMONY, EFFORT])
def test_thinking_whole_is_what_the_template_itself_gives(
    template: str, tokenizer_dir: Path
) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, template)
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=False
    )
    for mode in ("whole", "skip"):
        chat = ChatFormat(thinking=mode)
        assert render(tokenizer, "Why?", chat) == plain
        found = find_thinking(tokenizer, chat)
        assert found.mode == mode
        assert found.begun == (template in (R1, SHOWS_ITS_FORM))


@pytest.mark.parametrize(("opening", "closing"), [*TAGS, *WORDS])
def test_thinking_of_every_family_is_closed_with_its_own_mark(
    opening: str, closing: str, tokenizer_dir: Path
) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, tagged(opening, closing))
    end = render(tokenizer, "Why?", ChatFormat()).rpartition("Why?")[2]
    _, opened, inside = end.partition(opening)
    thought, closed, _ = inside.partition(closing)
    assert opened
    assert closed
    assert thought.strip() in ("", "thought")
    assert find_thinking(tokenizer, ChatFormat(thinking="whole")).begun


def test_thinking_skip_turns_on_what_is_off_by_default(tokenizer_dir: Path) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, OFF_BY_DEFAULT)
    chat = ChatFormat(thinking="skip")
    assert render(tokenizer, "Why?", chat).endswith("assistant\n<think>")
    assert find_thinking(tokenizer, chat).begun
    tokenizer = tokenizer_with(tokenizer_dir, SYSTEM_SWITCH)
    assert render(tokenizer, "Why?", chat).startswith("<|start|>system\nThink first.")


def test_thinking_that_the_user_decided_by_a_variable_stays(tokenizer_dir: Path) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, QWEN)
    on, off = (ChatFormat(template_kwargs={"enable_thinking": value}) for value in (True, False))
    assert render(tokenizer, "Why?", on).endswith("assistant\n")
    assert find_thinking(tokenizer, on).mode == "whole"
    assert render(tokenizer, "Why?", off).endswith(f"assistant\n{EMPTY}")
    assert find_thinking(tokenizer, off).mode == "answer"
    asked = ChatFormat(template_kwargs={"enable_thinking": True}, thinking="answer")
    assert render(tokenizer, "Why?", asked).endswith(f"assistant\n{EMPTY}")


def test_thinking_of_a_response_prefix_is_seen(tokenizer_dir: Path) -> None:
    tokenizer = tokenizer_with(tokenizer_dir, R1)
    chat = ChatFormat(response_prefix="<think>\nLet me")
    assert find_thinking(tokenizer, chat).begun
    assert render(tokenizer, "Why?", chat).endswith(f"{EMPTY}<think>\nLet me")
    closed = ChatFormat(response_prefix="fine</think>", thinking="whole")
    assert not find_thinking(tokenizer, closed).begun


def test_thinking_of_a_channel_that_the_prompt_opens_is_seen(tokenizer_dir: Path) -> None:
    opened = HARMONY.replace("assistant{% endif", "assistant<|channel|>analysis<|message|>{% endif")
    for template, prefix in ((opened, ""), (HARMONY, "<|channel|>analysis<|message|>")):
        tokenizer = tokenizer_with(tokenizer_dir, template)
        for mode in ("skip", "whole"):
            chat = ChatFormat(thinking=mode, response_prefix=prefix)
            assert render(tokenizer, "Why?", chat).endswith("<|channel|>analysis<|message|>")
            assert find_thinking(tokenizer, chat).begun
    tokenizer = tokenizer_with(tokenizer_dir, opened)
    assert render(tokenizer, "Why?", ChatFormat()).endswith("<|channel|>final<|message|>")
    assert not find_thinking(tokenizer, ChatFormat()).begun


def test_templates_that_know_no_thoughts_are_not_touched(
    tokenizer_dir: Path, monkeypatch: Any
) -> None:
    plain = "{{ messages[-1]['content'] }}{% if x %}Think; reasoning and thinking{% endif %}>"
    tokenizer = tokenizer_with(tokenizer_dir, plain, ("<think>", "</think>"))
    for mode in (None, "whole"):
        assert render(tokenizer, "Why?", ChatFormat(thinking=mode)) == "Why?>"
    assert find_thinking(tokenizer, ChatFormat()).line() is None
    assert find_thinking(tokenizer, ChatFormat()).summary() is None
    # Asked for, the vocabulary says how a thought is marked.
    assert render(tokenizer, "Why?", ChatFormat(thinking="answer")) == f"Why?>{EMPTY}"
    # Nothing is rendered to find that out where neither mark nor switch is named.
    tokenizer = tokenizer_with(tokenizer_dir, "{{ messages[-1]['content'] }}")
    monkeypatch.setattr("abliterate.prompts.template_checks.render_conversations", None)
    assert find_thinking(tokenizer, ChatFormat()).mode is None
