"""What single values of settings must be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationInfo


def parse_json_object(value: Any) -> Any:
    """An object from its JSON text; what is no text stays."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object ({error})") from None


def as_sources(value: Any) -> Any:
    """One source, or none, as a list of them."""
    return () if value is None else (value,) if isinstance(value, str) else value


def plain_sources(value: tuple[str, ...]) -> str | list[str] | None:
    """What records hold of sources: none, the one, or a list of several."""
    return (value[0] if len(value) == 1 else list(value)) if value else None


_LITERALS = {"True": True, "False": False, "None": None}


def parse_assignment(text: str) -> tuple[str, Any]:
    """Name and value of ``NAME=VALUE``: a JSON value or one of Python's constants, else a text.

    Raises:
        ValueError: it is none.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise ValueError("must be NAME=VALUE")
    try:
        return name.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return name.strip(), _LITERALS.get(value.strip(), value)


def check_assignments(values: tuple[str, ...]) -> tuple[str, ...]:
    """Each such as :func:`parse_assignment` reads; they stay as they were written."""
    for value in values:
        parse_assignment(value)
    return values


def check_date(value: str | None) -> str | None:
    """A day as ``YYYY-MM-DD``."""
    if value is None:
        return None
    try:
        found = date.fromisoformat(value)
    except ValueError:
        found = None
    if found is None or found.isoformat() != value:
        raise ValueError("must be a day such as 2026-01-31")
    return value


#: The largest file that is read as a chat template.
_TEMPLATE_BYTES = 1 << 20


def read_template(value: Any, info: ValidationInfo) -> Any:
    """``plain``, a chat template, or the text of the file that holds one.

    Of a record (``json``) no file is read: it holds the text itself.
    """
    if not isinstance(value, str) or value == "plain" or _is_template(value):
        return value
    if info.mode == "json":
        raise ValueError("must be plain or the text of a chat template")
    path = Path(value).expanduser()
    try:
        if not path.is_file():
            why = "this is no file" if path.exists() else "there is none of this name"
            raise ValueError(f"must be plain or the file of a chat template ({why})")
        with path.open("rb") as file:
            text = file.read(_TEMPLATE_BYTES + 1)
        if len(text) > _TEMPLATE_BYTES:
            raise ValueError("must be a chat template, and no larger than 1 MiB")
        found = text.decode("utf-8-sig")  # editors put a mark before, which is no text of it
    except UnicodeDecodeError:
        raise ValueError("must be a chat template in UTF-8") from None
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if not _is_template(found):
        raise ValueError("must be a chat template, which writes {{ ... }} somewhere")
    if _is_json(found):  # tokenizer_config.json: rendered as it is, it would write its braces
        raise ValueError("must be a chat template's own text (a .jinja file), which is no JSON")
    return found


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list | str)
    except (ValueError, RecursionError):
        return False


def _is_template(text: str) -> bool:
    return re.search(r"\{\{|\{%", text) is not None


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


def split_server(spec: str) -> tuple[str | None, str]:
    """``ROW=URL`` as row and address; an address alone has no row."""
    row, equals, url = spec.partition("=")
    if not equals or spec.startswith(("http://", "https://")):
        return None, spec
    return row, url


def public_server(spec: str) -> str:
    """``ROW=URL`` or ``URL`` as records may have it: see :func:`public_url`."""
    row, url = split_server(spec)
    return public_url(url) if row is None else f"{row}={public_url(url)}"


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


def rows_or_none(value: Any) -> Any:
    """A switch of older configurations, which had rows alone."""
    if isinstance(value, bool):
        return "rows" if value else None
    return value


def check_interpolation(value: str | None) -> str | None:
    """``linear`` or ``spherical``, with layers behind a colon or without."""
    if value is not None and not re.fullmatch(r"(linear|spherical)(:[0-9,\- ]+)?", value):
        raise ValueError("must be linear or spherical, or with layers such as linear:4,10-12")
    return value
