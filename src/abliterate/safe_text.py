"""Texts that strangers wrote, as a terminal may have them: no control characters, no secrets."""

from __future__ import annotations

import os
import re

#: Characters of a line, and of a cell of a table; what is longer loses its middle.
LINE, CELL = 4000, 600

# Characters that act instead of showing, or do not show: C0, DEL and C1 controls, separators of
# lines and paragraphs, bidi marks, embeddings, overrides and isolates, zero-width and other
# invisible format characters, fillers that look empty, tags and variation selectors beyond the
# sixteenth, and surrogates without their half.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
UNSAFE_IN_JSON = re.compile(f"(?![\t\n]){_UNSAFE.pattern}")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

_SECRET_VARIABLES = ("OPENAI_API_KEY", "SECOND_JUDGE_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_NO_SECRETS = ("", "none", "None", "empty", "EMPTY")
_HIDDEN = "***"
# A password may hold what it should not; in addresses of the hub (hf://) an @ has its own meaning.
_USERINFO = re.compile(r"\b(?:(https?://)[^\s'\"<>]*@|([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]*@)")
_secrets: set[str] = set()


def safe(text: object, limit: int | None = None, lines: bool = False) -> str:
    """``text`` as a terminal may have it.

    Args:
        text: whatever a stranger wrote.
        limit: most characters; of a longer text the middle is left out.
        lines: line breaks and tabs stay; without, they are shown as ``\\n`` and ``\\t``.
    """
    shown = str(text)
    if limit is not None and len(shown) > limit:
        tail = limit // 4
        shown = f"{shown[: limit - tail - 1]}…{shown[-tail:]}"

    def visible(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character in "\n\t":
            return character
        return _SHORT.get(character) or _escaped(character)

    return _UNSAFE.sub(visible, shown)


def _escaped(character: str) -> str:
    code = ord(character)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def one_line(text: str) -> str:
    """A message on one line: lines and runs of white space closed up, secrets out, safe."""
    return safe(without_users(redact(" ".join(text.split()))), LINE)


def without_users(text: str) -> str:
    """``text`` without users and passwords in addresses."""
    return _USERINFO.sub(rf"\1\2{_HIDDEN}@", text)


def hide(*secrets: str) -> None:
    """Never show these, from now on and until the next command."""
    _secrets.update(secrets)


def forget() -> None:
    """Take back all that :func:`hide` was told."""
    _secrets.clear()


def redact(text: str) -> str:
    """``text`` without what :func:`hide` was told, and without the keys in the environment.

    A secret of less than four characters goes only where it stands alone: anywhere else it is more
    likely part of a word.
    """
    known = _secrets | {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    for secret in sorted(known.difference(_NO_SECRETS), key=len, reverse=True):
        if len(secret) >= 4:
            text = text.replace(secret, _HIDDEN)
        else:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", _HIDDEN, text)
    return text
