"""The right diagnosis where first tokens show no refusal: the model may think first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from abliterate.errors import InputError, UsageError
from abliterate.inference.answer_text import AnswerReader
from abliterate.inference.in_memory import engine_of
from abliterate.metrics.answers import opening_mark
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.thinking import find_thinking

# So many prompts are looked at, and so many tokens of their answers.
_PROMPTS, _TOKENS = 4, 12


@contextmanager
def or_thinks_first(
    loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[Sequence[int]]
) -> Iterator[None]:
    """Within the context, no refusal among first tokens is explained by a thought, if it is one.

    Args:
        loaded: the model.
        chat: how the prompts were formatted.
        prompts: token ids; some are answered to see how answers begin, if something is wrong.

    Raises:
        InputError: the error of the context, or one that says that the model thinks first.
    """
    try:
        yield
    except InputError:
        if (why := _why(loaded, chat, prompts)) is None:
            raise
        raise InputError(why) from None


def _why(loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[Sequence[int]]) -> str | None:
    """That the model thinks first, and what to do; None if it does not, or is asked to."""
    thinking = find_thinking(loaded.tokenizer, chat)
    if thinking.mode == "skip" or not prompts:
        return None
    if thinking.begun:
        seen = "the prompt ends within a thought"
    else:
        marks = [mark for mark in _openings(loaded, chat, prompts[:_PROMPTS]) if mark]
        if 2 * len(marks) <= len(prompts[:_PROMPTS]):
            return None
        seen = f"the model thinks first (its answers begin with {marks[0]})"
    ways = "--thinking skip"
    closed = find_thinking(loaded.tokenizer, replace(chat, thinking="answer"))
    if thinking.mode != "answer" and (closed.appended or closed.variables):
        ways = "--thinking answer, or --thinking skip"
    return f"{seen}, so that first tokens say nothing about refusal: pass {ways}"


def _openings(
    loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[Sequence[int]]
) -> list[str | None]:
    """The mark of a thought that each answer begins with."""
    engine, reader = engine_of(loaded), AnswerReader.of(loaded.tokenizer, chat)
    try:
        said = engine.answers(prompts, _TOKENS, chat=chat)
    except UsageError:  # a streamed model gives first tokens alone
        logits = engine.last_logits({"": prompts}, {"": None})[""][""]
        said = [[int(token)] for token in logits.argmax(-1)]
    return [opening_mark(reader.raw(answer)) for answer in said]
