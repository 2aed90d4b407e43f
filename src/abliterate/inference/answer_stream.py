"""An answer as it is written: pieces of the thought and of the answer, told apart on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import TextStreamer

from abliterate.inference.answer_text import AnswerReader
from abliterate.metrics.answers import HARMONY, MARKS, Parts

# What a piece may end in the middle of.
_CUT = tuple(mark.lower() for mark in (*MARKS, *HARMONY))
_LONGEST = max(map(len, _CUT))

Heard = Callable[[str], object]


class AnswerStream(TextStreamer):  # type: ignore[misc]
    """Takes a model's tokens as ``generate`` gives them.

    Args:
        reader: tells thought and answer apart.
        heard: called with each piece of the answer.
        thought: called with each piece of the thought before it.
    """

    def __init__(self, reader: AnswerReader, heard: Heard, thought: Heard) -> None:
        super().__init__(
            reader.tokenizer, skip_prompt=True, skip_special_tokens=not reader.has_marks
        )
        self.reader, self._heard, self._thought = reader, heard, thought
        self.text, self.ended = "", False
        self._shown = Parts("", "")

    def put(self, value: torch.Tensor) -> None:
        """Tokens, of which the first ones are the prompt."""
        if self.reader.has_marks and not self.next_tokens_are_prompt:
            kept = [token for token in value.flatten().tolist() if token not in self.reader.dropped]
            if not kept:
                return
            value = torch.tensor(kept)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of text that later tokens will not change."""
        self.text += text
        self.ended = self.ended or stream_end
        whole = self.text if stream_end else _without_cut_mark(self.text)
        parts = self.reader.parts(self.reader.without_ends(whole))
        if not stream_end and self.reader.goes_on(whole):  # whether what follows is an answer
            parts = Parts(self._shown.thought, None)  # is known when it has ended
        self._tell(self._thought, self._shown.thought or "", parts.thought or "")
        self._tell(self._heard, self._shown.answer or "", parts.answer or "")
        # A thought within the answer hides what was said before it; that has been heard.
        said = self._shown.answer if parts.answer is None else parts.answer
        self._shown = Parts(parts.thought, said)

    @staticmethod
    def _tell(heard: Heard, before: str, now: str) -> None:
        if now.startswith(before) and (piece := now[len(before) :]):
            heard(piece)

    @property
    def parts(self) -> Parts:
        """All that was said so far, without white space around it."""
        return self.reader.parts(self.reader.without_ends(self.text).strip())


def _without_cut_mark(text: str) -> str:
    """``text`` without the beginning of a mark at its end."""
    for length in range(min(_LONGEST - 1, len(text)), 0, -1):
        end = text[-length:].lower()
        if any(len(mark) > length and mark.startswith(end) for mark in _CUT):
            return text[:-length]
    return text


def no_words(piece: str) -> None:
    """For who does not listen."""
