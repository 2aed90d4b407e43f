"""Figures that cost time, kept under a hash of what they depend on in ``measured.json``.

The file is data that anybody may have written: what does not look like a figure is measured again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from abliterate.evaluation.outcomes import Metrics
from abliterate.storage.artifacts import write_json
from abliterate.storage.guarded_files import make_folder
from abliterate.storage.json_text import parse_json
from abliterate.storage.ownership import is_mapping_of

MEASURED = "measured.json"
# What is kept of each prompt's first token.
FIGURES = tuple(one.name for one in fields(Metrics) if one.name != "seed")


def _is_hash(key: str, figure: Any) -> bool:
    return len(key) == 64 and set(key) <= set("0123456789abcdef")


is_memo = is_mapping_of(_is_hash)


def _is_number(value: Any) -> bool:
    """As records have them: null for what is not finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)


def as_float(value: float | None) -> float:
    """A kept number; NaN for null, which is what was not finite."""
    return math.nan if value is None else float(value)


def values_of(metrics: Metrics) -> dict[str, list[float]]:
    """The figures of each prompt, as they are kept."""
    return {name: list(getattr(metrics, name)) for name in FIGURES}


def are_values(figure: Any) -> bool:
    """Whether something kept is what :func:`values_of` gives."""
    return (
        isinstance(figure, dict)
        and set(figure) == set(FIGURES)
        and all(
            isinstance(held, list) and bool(held) and all(map(_is_number, held))
            for held in figure.values()
        )
    )


def is_loss(figure: Any) -> bool:
    """Whether something kept is the sums of a loss and their tokens."""
    if not isinstance(figure, dict) or set(figure) != {"sums", "counts"}:
        return False
    sums, counts = figure["sums"], figure["counts"]
    return (
        isinstance(sums, list)
        and isinstance(counts, list)
        and len(sums) == len(counts) > 0
        and all(map(_is_number, sums))
        and all(type(count) is int and count > 0 for count in counts)
    )


def are_tasks(figure: Any) -> bool:
    """Whether something kept is lm-eval's figures by task."""
    return isinstance(figure, dict) and all(
        isinstance(one, dict) and all(map(_is_number, one.values())) for one in figure.values()
    )


def are_tokens(figure: Any) -> bool:
    """Whether something kept is refusal tokens as records list them."""
    return (
        isinstance(figure, list)
        and bool(figure)
        and all(
            isinstance(one, dict)
            and set(one) == {"id", "token"}
            and type(one["id"]) is int
            and 0 <= one["id"] < 2**31
            and isinstance(one["token"], str)
            for one in figure
        )
    )


class Memo:
    """Figures by the hash of what they depend on, kept in a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path is not None:
            try:
                document = parse_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                document = None
            self.known = document if isinstance(document, dict) else {}

    def has(self, key: str, good: Callable[[Any], bool]) -> bool:
        """Whether a figure is known, and ``good``."""
        return key in self.known and good(self.known[key])

    def get(self, key: str, find: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
        """The figure, found now if it is not known, or what is kept is not ``good``."""
        if not self.has(key, good):
            self.known[key] = find()
            if self.path is not None:
                make_folder(self.path.parent)
                write_json(self.path, self.known)
        return self.known[key]
