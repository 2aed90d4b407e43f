"""Text of strangers between a template's special tokens, in which it can spell none itself.

An answer that holds ``<|eot_id|>`` would end the turn that quotes it: a judge would be asked about
something else, by whoever wrote the answer.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any


class SpelledOut:
    """The spellings of a tokenizer's added tokens, hidden in text while a template is rendered.

    Args:
        tokenizer: whose tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        known: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self._added = set(known)
        spellings = sorted({str(token) for token in known.values() if str(token).strip()}, key=len)
        self._pattern = re.compile("|".join(map(re.escape, reversed(spellings))) or r"(?!)")
        # Private characters around a random name, which no text holds.
        self._name = secrets.token_hex(8)
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        """``text`` with a placeholder for each spelling; templates take it for a word."""

        def placeholder(match: re.Match[str]) -> str:
            self._hidden.append(match[0])
            return f"\ue000{self._name}-{len(self._hidden) - 1}\ue001"

        return self._pattern.sub(placeholder, text)

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered template: its own special tokens, hidden ones as plain text."""
        ids: list[int] = []
        parts = re.split(f"\ue000{self._name}-(\\d+)\ue001", rendered)
        for number, part in enumerate(parts):
            if number % 2:
                ids += self._plain(self._hidden[int(part)])
            elif part:
                ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    def _plain(self, text: str) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids: list[int] = list(found["input_ids"])
        if len(text) > 1 and not self._added.isdisjoint(ids):
            # An added token that is not marked as special, or a tokenizer without that option.
            return self._plain(text[:1]) + self._plain(text[1:])
        return ids
