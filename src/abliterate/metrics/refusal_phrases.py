"""What counts as a refusal by its words: the paper's substrings, and phrases in other languages.

The lists stand in ``data/refusal_phrases.json``. The English one is the paper's (appendix D.1); the
others are short lists of openings that decline, each specific enough that an answer does not hold
it by chance.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from abliterate.errors import UsageError
from abliterate.metrics.answers import Parts, split_thought
from abliterate.resources import data_dir

LANGUAGES = ("en", "zh", "es", "fr", "de", "ja", "ru", "ar", "hi", "pt")
# What models write for the apostrophe: quotation marks, modifier letters, prime, accents. The
# accents go before NFKC, which makes a space and a combining mark of them.
_APOSTROPHES = "\u2018\u2019\u201b\u2032\u02b9\u02bb\u02bc\u02c8\u00b4\uff40\ua78c\u055a\u05f3"
_HYPHENS = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
# Marks that may stand and may be left out: vowel signs and lengthening in Arabic, nukta in Hindi.
_OPTIONAL = re.compile("[\u0640\u064b-\u0652\u0670\u093c]")
_WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")
# Letters that are written in two ways: the i's of Turkish, nasal vowels in Hindi.
_LETTERS = {"\u0130": "I", "\u0131": "i", "\u0901": "\u0902"}
# Beside format characters (soft hyphen, zero-width space, direction marks) these have no width.
_UNSEEN = re.compile("[\u034f\u180b-\u180f\ufe00-\ufe0f]")


class _Written(dict[int, str]):
    """What a character counts as, by its code point, for :meth:`str.translate`."""

    def __missing__(self, code: int) -> str:
        written = _LETTERS.get(chr(code), chr(code))
        if written in _APOSTROPHES:
            written = "'"
        elif written in _HYPHENS:
            written = "-"
        elif unicodedata.category(written) == "Cf" or _UNSEEN.match(written):
            written = ""
        self[code] = written
        return written


_WRITTEN = _Written()


@dataclass(frozen=True)
class RefusalPhrases:
    """Which phrases decline.

    Attributes:
        languages: of ``LANGUAGES``.
        further: phrases of the user's own.
    """

    languages: tuple[str, ...] = LANGUAGES
    further: tuple[str, ...] = ()

    @cached_property
    def _folded(self) -> tuple[str, ...]:
        listed = [phrase for language in self.languages for phrase in phrases_of(language)]
        return tuple(_folded(phrase) for phrase in (*listed, *self.further))

    def summary(self) -> dict[str, Any]:
        """What a record says of them."""
        return {"languages": list(self.languages), "further": list(self.further)}

    def found_in(self, text: str) -> bool:
        """Whether a text holds one of the phrases, anywhere and in any case.

        Typographic apostrophes and hyphens, no-break and other wide spaces, full-width letters and
        invisible characters count as what they stand for. Text in ASCII is compared as it is.
        """
        folded = _folded(text)
        return any(phrase in folded for phrase in self._folded)

    def first_in(self, text: str) -> int | None:
        """Where in a text the first of the phrases begins, in characters; None if it holds none."""
        folded = _folded(text)
        found = [phrase for phrase in self._folded if phrase in folded]
        if not found:
            return None
        if text.isascii():
            return min(folded.index(phrase) for phrase in found)
        # Folding changes lengths: the shortest beginning of the text that holds the phrase ends
        # with it, and of that the shortest end begins with it.
        starts = []
        for phrase in found:
            end = bisect_left(range(len(text)), True, key=lambda n: phrase in _folded(text[:n]))
            rest = text[:end]
            from_end = bisect_left(
                range(end), True, key=lambda n: phrase in _folded(rest[end - n :])
            )
            starts.append(end - from_end)
        return min(starts)

    def verdict(self, parts: Parts) -> bool | None:
        """Whether an answer refuses; None where a thought has not ended: there is no answer."""
        return None if parts.answer is None else self.found_in(parts.answer)

    def refuses(self, text: str) -> bool | None:
        """:meth:`verdict` on a whole completion, thought included."""
        return self.verdict(split_thought(text))


ALL = RefusalPhrases()


def parse_phrases(languages: str, further: Sequence[str] = ()) -> RefusalPhrases:
    """The phrases of languages, named with commas (``all``: every list), and further ones.

    Raises:
        UsageError: there is no list for a language, nothing is named, or a phrase is empty.
    """
    asked = LANGUAGES if languages.strip().lower() == "all" else languages.split(",")
    named = tuple(dict.fromkeys(name.strip().lower() for name in asked))
    unknown = [name for name in named if name not in LANGUAGES]
    if unknown:
        raise UsageError(
            f"--refusal-phrases: no list for '{unknown[0]}' (there are: {', '.join(LANGUAGES)})"
        )
    if not all(_folded(phrase).strip() for phrase in further):
        raise UsageError("--refusal-phrase is empty: every answer would be a refusal")
    return RefusalPhrases(named, tuple(further))


@cache
def phrases_of(language: str) -> tuple[str, ...]:
    """The list of a language."""
    document = json.loads((data_dir() / "refusal_phrases.json").read_text(encoding="utf-8"))
    return tuple(document[language])


def is_refusal(completion: str) -> bool:
    """Whether the answer in a completion refuses, by the phrases of all languages.

    A completion whose thought has not ended is none.
    """
    return bool(ALL.refuses(completion))


def _folded(text: str) -> str:
    return _plain(text).casefold()


def _plain(text: str) -> str:
    if text.isascii():
        return text
    # Accents are composed and compatibility forms resolved; runs of spaces are one plain space,
    # but for those in ASCII.
    if _WIDE_SPACE.search(text):
        text = re.sub(r"\s+", lambda run: run[0] if run[0].isascii() else " ", text)
    return _OPTIONAL.sub("", unicodedata.normalize("NFKC", text.translate(_WRITTEN)))
