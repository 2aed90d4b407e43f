"""Prompts of a model that thinks before it answers, up to where the answer begins.

Under ``--thinking skip`` the unmodified model thinks once about each prompt, greedily, and whatever
is scored by its first token (refusal score, KL) is scored behind that thought. All interventions
and candidates see the same one, so that they are compared on the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.console import log
from abliterate.errors import InputError
from abliterate.inference.answer_text import AnswerReader
from abliterate.inference.in_memory import engine_of
from abliterate.metrics.answers import Parts
from abliterate.models.loading import LoadedModel
from abliterate.models.model_classes import text_config
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.prompts.thinking import find_thinking

# Tokens behind the closing mark that are looked at for line breaks and a mark before the answer.
_LEAD_IN = 12


@dataclass(frozen=True)
class Asked:
    """Prompts as token ids, each up to where the answer begins.

    Attributes:
        ids: of each prompt, and of the thought about it where there is one.
        ended: whether that thought has ended: what follows another is no answer.
        closing: how many last tokens end the thought in all of them; 0 where nothing is thought.
        thought: the model was asked to think first.
    """

    ids: list[list[int]]
    ended: list[bool]
    closing: int = 0
    thought: bool = False

    def finished(self, kind: str) -> list[list[int]]:
        """The prompts whose thought has ended.

        Raises:
            InputError: there is none.
        """
        found = [ids for ids, ended in zip(self.ids, self.ended, strict=True) if ended]
        if not found:
            raise InputError(
                f"no thought about the {len(self.ids)} {kind} prompts ends: raise "
                "--max-thinking-tokens, or pass --thinking answer"
            )
        return found


def ask(
    loaded: LoadedModel,
    texts: Sequence[str],
    chat: ChatFormat,
    batch_size: int | str = "auto",
    kind: str = "",
) -> Asked:
    """Token ids of prompts, up to where the answer begins.

    Args:
        loaded: the unmodified model, which thinks under ``--thinking skip``.
        texts: what the user says.
        chat: how it becomes a conversation.
        batch_size: prompts per batch, or ``auto``.
        kind: of the prompts, for the progress bar and the log.

    Raises:
        UsageError: it is to think, and the model does not generate.
    """
    prompts = encode(loaded.tokenizer, texts, chat)
    if find_thinking(loaded.tokenizer, chat).mode != "skip":
        return Asked(prompts, [True] * len(prompts))
    engine, reader = engine_of(loaded), AnswerReader.of(loaded.tokenizer, chat)
    engine.require_answers("--thinking skip", "--thinking answer")
    longest = room_for(loaded, prompts, chat.max_thinking_tokens)
    ends = reader.closing_tokens
    said = engine.answers(prompts, longest, batch_size, f"think: {kind}", chat=chat, ends=ends)
    # Where the mark ended a thought within the thought alone, the model goes on.
    nested = {
        row: longest - len(thought)
        for row, thought in enumerate(said)
        if thought[-1:] and thought[-1] in ends and reader.goes_on(reader.raw(thought))
    }
    for left in sorted(set(nested.values()) - {0}):
        rows = [row for row in nested if nested[row] == left]
        whole = [[*prompts[row], *said[row]] for row in rows]
        for row, more in zip(rows, engine.answers(whole, left, batch_size, chat=chat), strict=True):
            said[row] += more
    found = [reader.thought_in(thought) for thought in said]
    ids = [
        [*prompt, *(thought if cut is None else thought[: cut[1]])]
        for prompt, thought, cut in zip(prompts, said, found, strict=True)
    ]
    ended = [cut is not None for cut in found]
    # Where the mark itself ended the thought: what the model writes between it and the answer.
    short = [
        row
        for row, cut in enumerate(found)
        if cut is not None and cut[0] < cut[1] == len(said[row]) < longest
    ]
    behind = engine.answers([ids[row] for row in short], _LEAD_IN, batch_size, chat=chat)
    for row, tokens in zip(short, behind, strict=True):
        ids[row] += tokens[: reader.lead_in(tokens)]
    if not all(ended):
        log.warning(
            "%d of %d thoughts about %s prompts do not end within %d tokens: these prompts are "
            "left out (--max-thinking-tokens)",
            ended.count(False),
            len(ended),
            kind,
            longest,
        )
    closings = [
        len(ids[row]) - len(prompts[row]) - cut[0]
        for row, cut in enumerate(found)
        if cut is not None
    ]
    return Asked(ids, ended, min(closings, default=0), thought=True)


def unfinished(asked: Mapping[str, Asked]) -> dict[str, int]:
    """By kind, about how many prompts the thought has not ended; empty where none was had."""
    if not any(one.thought for one in asked.values()):
        return {}
    return {kind: one.ended.count(False) for kind, one in asked.items()}


@dataclass(frozen=True)
class AnswerLimits:
    """How long completions of prompts may be, thought and answer each, and how they are read.

    Attributes:
        reader: tells thought and answer apart.
        longest: tokens to generate.
        thought: tokens that a thought may take; None where thought and answer share ``longest``.
        answer: tokens that the answer behind it may take.
    """

    reader: AnswerReader
    longest: int
    thought: int | None
    answer: int

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        chat: ChatFormat,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        begun: bool | None = None,
    ) -> AnswerLimits:
        """Those of a model's answers.

        Args:
            loaded: the model.
            chat: how the prompts were formatted.
            prompts: token ids.
            max_new_tokens: longest answer.
            begun: the prompts end within a thought; None if the model's own template says so.
        """
        tokenizer, config = loaded.tokenizer, loaded.model
        return cls.without_model(tokenizer, config, chat, prompts, max_new_tokens, begun)

    @classmethod
    def without_model(
        cls,
        tokenizer: Any,
        config: Any,
        chat: ChatFormat,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        begun: bool | None = None,
    ) -> AnswerLimits:
        """As :meth:`of`, of a model that runs elsewhere: from its tokenizer and configuration."""
        thinking = find_thinking(tokenizer, chat)
        reader = AnswerReader(tokenizer, thinking.begun if begun is None else begun)
        if chat.thinking != "skip":
            return cls(reader, max_new_tokens, None, max_new_tokens)
        longest = _room_in(config, prompts, chat.max_thinking_tokens + max_new_tokens)
        return cls(reader, longest, chat.max_thinking_tokens, max_new_tokens)

    def read(self, ids: Sequence[int]) -> tuple[str, Parts]:
        """The text of a completion, and its parts; a thought that is too long has not ended."""
        if self.thought is not None:
            ids = self.reader.cut(ids, self.thought, self.answer)
        text = self.reader.text(ids)
        return text, self.reader.parts(text)

    def read_text(self, written: str) -> tuple[str, Parts]:
        """As :meth:`read`, of text that came without its tokens; a thought's are those it has when
        it is encoded again."""
        if self.thought is not None:
            ids = self.reader.tokenizer(written, add_special_tokens=False)["input_ids"]
            if len(self.reader.cut(ids, self.thought, self.answer)) < len(ids):
                return self.read(ids)
        text = self.reader.clean(written)
        return text, self.reader.parts(text)


def room_for(loaded: LoadedModel, prompts: Sequence[Sequence[int]], wanted: int) -> int:
    """How many of so many wanted tokens fit into the model's context behind all the prompts."""
    return _room_in(loaded.model, prompts, wanted)


def _room_in(config: Any, prompts: Sequence[Sequence[int]], wanted: int) -> int:
    context = getattr(text_config(config), "max_position_embeddings", None)
    if not isinstance(context, int):
        return wanted
    return max(1, min(wanted, context - max(map(len, prompts), default=0)))
