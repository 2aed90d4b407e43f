"""JSON that anyone may have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

#: Levels of lists and objects; nothing that we or transformers write has more than a dozen.
DEEPEST = 100


def parse_json(
    text: str | bytes,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The document, as ``json.loads`` reads it.

    One that is nested deeply is refused here: it would end whoever walks through it, somewhere else
    each time.

    Args:
        text: a whole document; bytes in UTF-8, 16 or 32.
        object_pairs_hook: as for ``json.loads``.

    Raises:
        ValueError: it is no JSON, no text, or nested too deeply.
    """
    try:
        document = json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = ([document] if isinstance(document, dict | list) else []), 0
    while level:
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        level = [part for whole in level for part in _parts(whole)]
        depth += 1
    return document


def _parts(whole: Any) -> list[Any]:
    held = whole.values() if isinstance(whole, dict) else whole
    return [part for part in held if isinstance(part, dict | list)]
