"""Prompts with a suffix, as token ids, and where instruction and suffix lie in them.

The random suffix is put in as token ids, so that it has exactly as many tokens as the given one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, UsageError
from abliterate.prompts.chat_template import ChatFormat, encode, post_instruction_ids

# User texts that start differently, so that only the template's own tokens are common.
_STARTS = ("a", "Z9", "?x", ".end", "(b)", "é", '"no" he said', "12 to count", ";tab")


@dataclass(frozen=True)
class Span:
    """Tokens ``[start, stop)`` of a prompt, counted from its end, so that padding moves nothing."""

    start: int
    stop: int


@dataclass(frozen=True)
class Marked:
    """A prompt's token ids, and its instruction and suffix in them (``suffix`` may be None)."""

    ids: tuple[int, ...]
    instruction: Span
    suffix: Span | None = None


def read_suffix(given: str) -> str:
    """The text of ``--suffix``: of a file, if there is one of that name, else as it is.

    Raises:
        InputError: the file is no UTF-8 text.
        UsageError: there is nothing in it.
    """
    text, source = given, "--suffix"
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):  # too long for a file name, or with a NUL
        is_file = False
    if is_file:
        source = f"--suffix {given}"
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read as UTF-8 text ({error})") from None
    if not text.strip():
        raise UsageError(f"{source} holds no text")
    return text.strip()


def _common(rows: Sequence[Sequence[int]]) -> int:
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


class Marker:
    """Encodes prompts of one tokenizer and template, and says what is where in them."""

    def __init__(self, tokenizer: Any, chat: ChatFormat) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self._before = _common(encode(tokenizer, _STARTS, chat))
        self._after = len(post_instruction_ids(tokenizer, chat))

    def plain(self, texts: Sequence[str]) -> list[Marked]:
        """The prompts as they are."""
        return [
            Marked(tuple(ids), Span(self._before - len(ids), -self._after))
            for ids in encode(self.tokenizer, texts, self.chat)
        ]

    def suffixed(self, texts: Sequence[str], suffix: str) -> list[Marked]:
        """The prompts, each followed by a space and the suffix.

        Raises:
            UsageError: the template cuts the suffix off, so that no token of it is left.
        """
        marked_prompts = []
        longer = encode(self.tokenizer, [f"{text} {suffix}" for text in texts], self.chat)
        for marked, ids in zip(self.plain(texts), longer, strict=True):
            stop = len(ids) - self._after
            # The tokens up to where the two part; a token across the seam belongs to the suffix.
            unmarked_stop = len(marked.ids) - self._after
            start = min(_common([marked.ids, ids]), unmarked_stop, stop)
            if start >= stop:
                raise UsageError("the chat template leaves nothing of --suffix in the prompt")
            instruction = Span(self._before - len(ids), start - len(ids))
            marked_prompts.append(
                Marked(tuple(ids), instruction, Span(start - len(ids), -self._after))
            )
        return marked_prompts

    def randomised(self, prompts: Sequence[Marked], seed: int) -> list[Marked]:
        """The prompts with as many random tokens in the place of each suffix.

        Each prompt gets tokens of its own, drawn evenly from the vocabulary less special tokens.
        """
        import torch

        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        vocabulary = [i for i in range(self.tokenizer.vocab_size) if i not in special]
        generator = torch.Generator().manual_seed(seed)
        replaced = []
        for prompt in prompts:
            span = prompt.suffix
            assert span is not None
            count = span.stop - span.start
            drawn = torch.randint(0, len(vocabulary), (count,), generator=generator).tolist()
            ids = list(prompt.ids)
            start = len(ids) + span.start
            ids[start : start + count] = [vocabulary[i] for i in drawn]
            replaced.append(Marked(tuple(ids), prompt.instruction, span))
        return replaced
