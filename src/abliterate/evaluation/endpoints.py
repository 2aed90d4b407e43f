"""What is said of OpenAI-compatible endpoints, and their client library; imports it when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abliterate.console import debugging, redact
from abliterate.extras import import_extra

#: Characters of what an endpoint says in a message.
SHOWN = 120


def import_openai(option: str) -> Any:
    """The client library, quiet unless debugging.

    Args:
        option: what needs it.

    Raises:
        UsageError: it is not installed.
    """
    openai = import_extra("openai", option, "the openai package", "eval")
    if not debugging():
        import logging

        for name in ("openai", "httpx", "httpx2", "httpcore"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return openai


def said(error: BaseException) -> str:
    """What an endpoint says of a request that it refuses, in whatever field; else what the error
    says."""
    body = getattr(error, "body", None)
    if isinstance(body, Mapping):
        named = (body.get(key) for key in ("message", "detail", "error"))
        text = next((text for text in named if isinstance(text, str) and text), None)
        return json.dumps(body, ensure_ascii=False) if text is None else text
    return body if isinstance(body, str) and body else str(error)


def short(error: BaseException) -> str:
    """The beginning of what an error says, on one line and without secrets."""
    text = redact(" ".join(said(error).split())) or type(error).__name__
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
