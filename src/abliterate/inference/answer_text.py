"""From the tokens of an answer to its text, in which thought and answer can still be told apart.

Some families part them by special tokens (harmony's channels, Magistral's ``[THINK]``), which
decoding would drop: these stay, the others go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from abliterate.inference.declared_answers import Declared, declared_by
from abliterate.metrics.answers import (
    AROUND,
    FINAL,
    HARMONY,
    MARKS,
    TAGS,
    Parts,
    closing_start,
    first_thought_end,
    split_thought,
    within_nested_thought,
)
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.thinking import find_thinking

# What ends a message of harmony, or an answer of others, is none of its words.
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|END_RESPONSE|>", "<|end_of_solution|>")


@dataclass(frozen=True)
class AnswerReader:
    """Reads what a model wrote after prompts of one format.

    Attributes:
        tokenizer: the model's.
        begun: the prompts end within a thought.
    """

    tokenizer: Any
    begun: bool = False

    @classmethod
    def of(cls, tokenizer: Any, chat: ChatFormat) -> AnswerReader:
        """A reader of what follows prompts of that format."""
        return cls(tokenizer, find_thinking(tokenizer, chat).begun)

    def text(self, ids: Sequence[int]) -> str:
        """All that was written, without the special tokens that mark nothing."""
        return self.without_ends(self.raw(ids)).strip()

    def clean(self, written: str) -> str:
        """As :meth:`text`, of text in which special tokens may be spelled out."""
        for token in self.dropped if self.has_marks else ():
            written = written.replace(str(self.tokenizer.convert_ids_to_tokens(token)), "")
        return self.without_ends(written.strip()).strip()

    def without_ends(self, text: str) -> str:
        """A text without the special tokens that end harmony's last message."""
        for mark in _ENDS if self.has_marks else ():
            text = text.removesuffix(mark)
        return text

    def raw(self, ids: Sequence[int]) -> str:
        """As :meth:`text`, with the white space around it."""
        if self._marks.isdisjoint(ids):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        kept = [token for token in ids if token not in self.dropped]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    def parts(self, text: str) -> Parts:
        """Thought and answer of a text that :meth:`text` or :meth:`raw` gave.

        As the tokenizer declares them, else by the marks of known families.
        """
        if self._declared is not None:
            told = self._declared.parts(self.tokenizer, text, self.begun)
            if told is not None:
                return told
        return split_thought(text, self.begun)

    @cached_property
    def _declared(self) -> Declared | None:
        return declared_by(self.tokenizer)

    def thought_in(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Where the thought's closing mark starts in ``ids`` and where the answer does.

        Both are 0 where nothing was thought; None where the thought has not ended. Line breaks
        between mark and answer come before the answer, and so does a mark around it.
        """
        whole = self.raw(ids)
        if not self._has_thought(whole):
            unended = self.begun or self.parts(whole).answer is None
            return None if unended else (0, 0)
        if self.parts(whole).answer is None:
            return None
        # The first tokens that hold the whole thought; before them none do.
        ended = self._end_test(whole)
        low, high = 0, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if ended(self.raw(ids[:middle])) else (middle, high)
        start = self._closing_start(ids[:high])
        return start, high + self.lead_in(ids[high:])

    def lead_in(self, ids: Sequence[int]) -> int:
        """How many tokens behind a thought come before the answer: line breaks, and the mark that
        some families put around answers (``<answer>``, ``<|START_RESPONSE|>``)."""
        breaks = self.breaks_in(ids)
        text = self.raw(ids[breaks:]).lstrip()
        opening = next((mark for mark, _ in AROUND if mark and text.startswith(mark)), None)
        if opening is None:
            return breaks
        for end in range(breaks + 1, len(ids) + 1):
            written = self.raw(ids[breaks:end]).strip()
            if written == opening:
                return end + self.breaks_in(ids[end:])
            if not opening.startswith(written):  # a token that is part of both mark and answer
                break
        return breaks

    def breaks_in(self, ids: Sequence[int]) -> int:
        """How many tokens ``ids`` starts with that are line breaks."""
        count = 0
        for token in ids:
            text = str(self.tokenizer.decode([token]))
            if text.strip() or "\n" not in text:
                break
            count += 1
        return count

    def cut(self, ids: Sequence[int], thought: int, answer: int) -> list[int]:
        """``ids`` with a thought of at most so many tokens and an answer of at most so many.

        A longer thought is cut off, and no answer follows it.
        """
        found = self.thought_in(ids)
        if found is None or found[1] > thought:
            return list(ids[:thought])
        return list(ids[: found[1] + answer])

    def _end_test(self, whole: str) -> Callable[[str], bool]:
        """Tells of beginnings of a text whether they hold its first thought."""
        declared = self._declared and self._declared.parts(self.tokenizer, whole, self.begun)
        end = None if declared or FINAL in whole else first_thought_end(whole, self.begun)
        if end is None:
            return lambda text: self._has_thought(text) and self.parts(text).answer is not None
        return lambda text: text.startswith(whole[:end])

    def goes_on(self, text: str) -> bool:
        """Whether a text has closed a thought within its thought, and not yet that itself."""
        return within_nested_thought(text, self.begun)

    def _has_thought(self, text: str) -> bool:
        return FINAL in text or self.parts(text).thought is not None

    def _closing_start(self, ids: Sequence[int]) -> int:
        """Where the mark begins that ends a thought at the end of ``ids``."""
        text = self.raw(ids)
        own = () if self._declared is None else self._declared.closes
        at = min(
            closing_start(text), *(n for mark in own if (n := text.rfind(mark)) >= 0), len(text)
        )
        low, high = 0, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.raw(ids[:middle])) > at else (middle, high)
        return low

    @cached_property
    def closing_tokens(self) -> list[int]:
        """The closing marks that are tokens of their own."""
        known = {str(about): token for token, about in self.tokenizer.added_tokens_decoder.items()}
        return [known[closing] for _, closing in TAGS if closing in known]

    @property
    def has_marks(self) -> bool:
        """Special tokens tell thought and answer apart."""
        return bool(self._marks)

    @cached_property
    def dropped(self) -> frozenset[int]:
        """The special tokens that are no part of what was written."""
        return self._special - self._marks

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token for token, about in added if about.special}
        return frozenset(special | set(self.tokenizer.all_special_ids))

    @cached_property
    def _marks(self) -> frozenset[int]:
        names = {token: str(self.tokenizer.convert_ids_to_tokens(token)) for token in self._special}
        wanted = MARKS
        if self._declared is not None:
            wanted |= {*self._declared.opens, *self._declared.closes}
        if "<|channel|>" in names.values():  # <|start|> and <|end|> alone are not harmony's
            wanted |= frozenset(HARMONY)
        return frozenset(token for token, name in names.items() if name in wanted)
