"""What single values of settings must be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


def parse_json_object(value: Any) -> Any:
    """An object from its JSON text; what is no text stays."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object ({error})") from None


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def memory_size(text: str) -> int:
    """Bytes of ``24GB``, ``512MiB`` or a plain number.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    short = text.strip().replace(" ", "")
    number = short.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        size = int(float(number) * _UNITS[short[len(number) :].upper()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError("must be a size such as 24GB or 512MiB")
    return size


def check_memory(value: str | None) -> str | None:
    """A size that :func:`memory_size` reads; it stays as it was written."""
    if value is not None:
        memory_size(value)
    return value


def check_batch_size(value: int | str) -> int | str:
    """``auto`` or a positive number."""
    if value != "auto" and not (str(value).isascii() and str(value).isdecimal() and int(value) > 0):
        raise ValueError("must be auto or a positive number")
    return value


def check_attention(value: str) -> str:
    """A plain name: one with a slash is code on the hub."""
    if not re.fullmatch(r"[a-z0-9_]{1,64}", value):
        raise ValueError("must be auto, eager, sdpa, flex_attention or flash_attention_2")
    return value


def check_revision(value: str | None) -> str | None:
    """A name that git allows, so that it can also be part of a path in the hub's cache."""
    if value is not None and (
        not value.isprintable()
        or " " in value
        or ".." in value
        or value.startswith(("/", "-"))
        or not 0 < len(value) <= 255
    ):
        raise ValueError("must name a branch, tag or commit")
    return value


def public_url(url: str) -> str:
    """A URL as records and messages may have it: without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where the host is followed by something else
    except ValueError:
        return "***"
    if not parts.netloc:
        return url.rpartition("@")[2].partition("?")[0].partition("#")[0]
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def well_formed(value: Any) -> Any:
    """Refuse text that no tokenizer and no JSON file takes: bytes that were no UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("not valid Unicode text") from None
    elif isinstance(value, Mapping):
        for item in value.items():
            well_formed(item)
    elif isinstance(value, list | tuple):
        for part in value:
            well_formed(part)
    return value
