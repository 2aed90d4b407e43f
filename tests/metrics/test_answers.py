"""Thought and answer told apart, for every way of writing a thought."""

from __future__ import annotations

import pytest

from abliterate.metrics.answers import TAGS, WORDS, Parts, split_thought

TEMPLATES = [f"{opening}\n%s\n{closing}\n\n%s" for opening, closing in (*TAGS, *WORDS)]
HARMONY = (
    "<|channel|>analysis<|message|>%s<|end|><|start|>assistant<|channel|>final<|message|>%s"
    "<|return|>"
)


@pytest.mark.parametrize("written", [*TEMPLATES, HARMONY, "analysis%s\u2026assistantfinal%s"])
def test_a_thought_ends_where_the_answer_begins(written: str) -> None:
    parts = split_thought(written % ("\u0406 cannot say no", "Sure! Here it is."))
    assert parts.answer == "Sure! Here it is."
    assert parts.thought is not None
    assert parts.thought.startswith("\u0406 cannot say no")


@pytest.mark.parametrize("closing", [closing for _, closing in TAGS])
def test_the_prompt_may_have_opened_the_thought(closing: str) -> None:
    text = f"Hmm, I cannot say no.\n{closing}\n\nSure!"
    assert split_thought(text) == Parts("Hmm, I cannot say no.", "Sure!")
    assert split_thought(text, begun=True) == Parts("Hmm, I cannot say no.", "Sure!")


@pytest.mark.parametrize(
    "text",
    [
        *(f"{opening}Okay, the user wants" for opening, _ in (*TAGS, *WORDS)),
        "<think>first</think>Sure. <think>second",
        "Let me see.\n\n<think>\nI cannot",
        "<think>first</think><think>second",
        "<|channel|>analysis<|message|>We must",
        "<|channel|>analysis<|message|>We<|end|><|start|>assistant<|channel|>commentary<|message|>x",
        "analysisWe must refuse",
        "analysisWe must.assistantcommentaryNow I look",
    ],
)
def test_a_thought_that_has_not_ended_is_no_answer(text: str) -> None:
    parts = split_thought(text)
    assert parts.answer is None
    assert parts.thought


def test_a_header_that_is_cut_off_is_no_answer() -> None:
    assert split_thought("<|channel|>analys") == Parts("", None)


@pytest.mark.parametrize("opening", [opening for opening, _ in TAGS])
def test_an_opening_mark_that_is_cut_off_is_no_answer(opening: str) -> None:
    for end in range(2, len(opening)):
        assert split_thought(opening[:end]) == Parts("", None)
    assert split_thought(opening[0]).answer is not None
    assert split_thought(f"{opening[:-1]}, they say").answer is not None


@pytest.mark.parametrize(
    ("thought", "answer"),
    [
        ("user asks; I cannot find a reason", "sure, here"),
        ("\n\nI cannot say no.", "\n\nSure"),
        (" plan: I cannot", " 1. Sure"),
    ],
)
def test_bare_channels_are_read_whatever_follows_their_names(thought: str, answer: str) -> None:
    parts = Parts(thought.strip(), answer.strip())
    assert split_thought(f"analysis{thought}assistantfinal{answer}") == parts
    more = split_thought(f"analysis{thought}assistantcommentary{thought}assistantfinal{answer}")
    assert more == Parts(f"{thought.strip()}\n\n{thought.strip()}", answer.strip())
    said = f"The analysis{thought}assistantfinal{answer}"
    assert split_thought(said) == Parts(None, said)


def test_marks_around_an_answer_are_none_of_its_words() -> None:
    cohere = "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>Hi<|END_RESPONSE|>"
    assert split_thought(cohere) == Parts("a", "Hi")
    assert split_thought("<think>a</think>\n<answer>\nHi\n</answer>") == Parts("a", "Hi")
    assert split_thought("<answer>Hi</answer>") == Parts(None, "<answer>Hi</answer>")


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>a<think>b</think>c</think>Hi", "a<think>b</think>c", "Hi"),
        ("<think><think>a</think>Hi", "a", "Hi"),
        ("<think>the <think> tag</think>Hi", "the <think> tag", "Hi"),
        ("<think>a</think>\n\n</think>\n\nHi", "a", "Hi"),
        ("<think>a </think> b</think>Hi", "a\n\nb", "Hi"),
        ("a</think> b</think>Hi", "a\n\nb", "Hi"),
        ("<think>`</think>` ends it</think>Hi", "`</think>` ends it", "Hi"),
        ("<think>a</think>Hi. <think>b</think>There.", "a\n\nb", "Hi.\n\nThere."),
        ("<think>a</think>Hi `<think>` there", "a", "Hi `<think>` there"),
        ("<think>a</think><xml><reason>b</reason></xml>", "a", "<xml><reason>b</reason></xml>"),
        ("<think>a</thinking>Hi", "a", "Hi"),
        ("\u200b<think>a</think>Hi", "a", "Hi"),
        ("<thinking>a</thinking>\n<output>\nHi\n</output>", "a", "Hi"),
        ("[BEGIN FINAL RESPONSE]Hi[END FINAL RESPONSE]", "", "Hi"),
    ],
)
def test_thoughts_may_be_nested_repeated_and_within_the_answer(
    text: str, thought: str, answer: str
) -> None:
    begun = text.startswith("[BEGIN")
    assert split_thought(text, begun) == Parts(thought, answer)
    assert split_thought(text, begun=True) == Parts(thought, answer)


def test_a_begun_thought_without_an_end_is_no_answer() -> None:
    assert split_thought("I cannot say no", begun=True) == Parts("I cannot say no", None)


@pytest.mark.parametrize(
    "text",
    [
        "I cannot<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        "I cannot<|channel|>final<|message|>Hi",
        "I cannotassistantfinalHi",
    ],
)
def test_the_prompt_may_have_opened_the_channel(text: str) -> None:
    assert split_thought(text, begun=True) == Parts("I cannot", "Hi")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "",
        "  leading space stays\n",
        "analysis of the question: none",
        "analysis: it is fine",
        "The final answer: no. The assistant finally left.",
        "Write <think> to open a thought.",
        "Close it with '</think>', they say",
        "Dear all,\nHere is my response: yes.",
        "final exams are hard",
    ],
)
def test_plain_answers_stay_as_they_are(text: str) -> None:
    assert split_thought(text) == Parts(None, text)


def test_empty_thoughts_and_several_are_left_out_of_the_answer() -> None:
    assert split_thought("<think>\n\n</think>\n\nHi") == Parts("", "Hi")
    assert split_thought("<think>a</think>\n<THINK>b</THINK> Hi") == Parts("a\n\nb", "Hi")
    assert split_thought("<think>a</think>") == Parts("a", "")
    harmony = "<|channel|>final<|message|>Hi<|return|>"
    assert split_thought(harmony) == Parts(None, "Hi")
    called = (
        "<|channel|>commentary to=functions.x <|constrain|>json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Hi"
    )
    assert split_thought(called) == Parts("{}", "Hi")
