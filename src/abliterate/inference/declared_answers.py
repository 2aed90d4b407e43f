"""Thought and answer by what a checkpoint declares of its answers (``response_template``).

transformers parses answers by a template that the tokenizer brings along. Its anchors may be
regular expressions of a stranger's, which nothing bounds in time; so what is handed to the
library's parser is the part of the template that says by plain text where a thought opens and
closes. Versions of transformers that know no such template have none to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abliterate.metrics.answers import Parts

_THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought")
_NO_ANCHOR = "\x00"


@dataclass(frozen=True)
class Declared:
    """How a tokenizer says that thoughts are written.

    Attributes:
        opens: what may open one.
        closes: what may close one.
    """

    opens: tuple[str, ...]
    closes: tuple[str, ...]

    def parts(self, tokenizer: Any, text: str, begun: bool) -> Parts | None:
        """Thought and answer of a completion; None where it holds no such thought."""
        template = {
            "start_anchor": _NO_ANCHOR,
            "fields": {
                "thought": {
                    "open": list(self.opens), "close": list(self.closes), "content": "text",
                    "repeats": True,
                },
                "answer": {"content": "text", "repeats": True},
            },
        }  # fmt: skip
        prefix = self.opens[0] if begun else ""
        try:
            found = tokenizer.parse_response(text, template, prefix=prefix)
        except (AttributeError, TypeError, ValueError):  # another version's parser
            return None
        thoughts, answers = (found.get(name) or [] for name in ("thought", "answer"))
        if not (thoughts or self._closes_at_once(text, begun)):
            return None
        thought = "\n\n".join(filter(None, (each.strip() for each in thoughts)))
        last_open = max((text.rfind(mark) for mark in self.opens), default=-1)
        last_close = max((text.rfind(mark) for mark in self.closes), default=-1)
        if last_close < 0 or last_close < last_open:
            return Parts(thought, None)
        return Parts(thought, "".join(answers).strip())

    def _closes_at_once(self, text: str, begun: bool) -> bool:
        return begun and text.lstrip().startswith(self.closes)


def declared_by(tokenizer: Any) -> Declared | None:
    """What a tokenizer declares of thoughts in plain text; None if it does not."""
    template = getattr(tokenizer, "response_template", None)
    fields = template.get("fields") if isinstance(template, Mapping) else None
    if not isinstance(fields, Mapping):
        return None
    for name in _THOUGHTS:
        field = fields.get(name)
        if isinstance(field, Mapping):
            opens, closes = (_literals(field.get(key)) for key in ("open", "close"))
            if opens and closes:
                return Declared(opens, closes)
    return None


def _literals(value: Any) -> tuple[str, ...]:
    """Plain texts, without the white space around them: decoding and trimming change it."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        return ()
    return tuple(one.strip() for one in given if one.strip())
