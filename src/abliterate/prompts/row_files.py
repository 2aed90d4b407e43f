"""The rows of a file: lines of text, JSON, JSON lines, CSV or parquet, as they stand in it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, first_line
from abliterate.prompts.columns import TEXT_COLUMNS
from abliterate.storage.json_text import parse_json

FILE_TYPES = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_DELIMITERS = ",;\t|"


def read_rows(path: Path, what: str = "prompt file") -> list[Any]:
    """The lines (``.txt``), entries or rows of a file, as they are.

    Args:
        path: a file of one of ``FILE_TYPES``.
        what: what the file is, for error messages.

    Raises:
        InputError: it is missing, unreadable, empty, damaged, of another type, or holds several
            splits.
    """
    splits = read_splits(path, what)
    if len(splits) > 1:
        raise InputError(f"{path} holds several lists ({', '.join(splits)}): name one as FILE:NAME")
    return next(iter(splits.values()))


def read_splits(path: Path, what: str = "prompt file") -> dict[str, list[Any]]:
    """The rows of a file by split: a JSON object of several lists of rows holds several.

    Args:
        path: a file of one of ``FILE_TYPES``.
        what: what the file is, for error messages.

    Raises:
        InputError: it is missing, unreadable, empty, damaged or of another type.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file ({', '.join(FILE_TYPES)}) inside it")
    kind = path.suffix.lower()
    if path.exists() and kind not in FILE_TYPES:
        raise InputError(f"{path}: unknown file type '{kind}', use one of {', '.join(FILE_TYPES)}")
    if path.exists() and not path.is_file():  # a device or pipe, which may never end
        raise InputError(f"{what} {path} is no regular file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
    if not raw.strip():
        raise InputError(f"{what} {path} is empty")
    if kind == ".parquet":
        return {"train": _parquet_rows(path, raw)}
    text = _decode(path, raw)
    if kind == ".txt":
        return {"train": _lines(text)}
    if kind in (".csv", ".tsv"):
        return {"train": _table_rows(path, text)}
    if kind == ".json":
        return _json_splits(path, parse_document(text, str(path)))
    return {
        "train": [
            parse_document(line, f"{path}, line {number}")
            for number, line in enumerate(_lines(text), 1)
            if line.strip()
        ]
    }


def _lines(text: str) -> list[str]:
    """What JSON, CSV and editors call a line; ``str.splitlines`` knows seven more ends of one."""
    return re.split(r"\r\n|\n|\r", text)


def _decode(path: Path, raw: bytes) -> str:
    if b"\0" in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise InputError(
            f"{path}, line {line}: a NUL character, which no text has: if the file is UTF-16, save "
            "it as UTF-8"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as "
            "UTF-8"
        ) from None


def _parquet_rows(path: Path, raw: bytes) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_table(io.BytesIO(raw)).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}") from None


def delimiter_of(text: str, usual: str = ",") -> str:
    """What stands between two columns, by the first line, which names them."""
    header = next((line for line in _lines(text) if line.strip()), "")
    with suppress(csv.Error):  # one column
        return csv.Sniffer().sniff(header, _DELIMITERS).delimiter
    return usual


def _table_rows(path: Path, text: str) -> list[Any]:
    """Rows by column."""
    delimiter = delimiter_of(text, "\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = [name for name in table.fieldnames or () if name.strip()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{path} has the column '{twice}' twice: rename one of them")
        rows: list[Any] = []
        for row in table:
            # Only the text's own delimiters can be too many: it would be cut at the first.
            if any(one.strip() for one in row.get(None) or ()):  # type: ignore[call-overload]
                raise InputError(
                    f"{path}, line {table.line_num}: more columns than the first line names: put "
                    f"a text with '{delimiter}' in it into double quotes"
                )
            rows.append(row)
        return rows
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file: {error}") from None


def parse_document(text: str, where: str) -> Any:
    """A JSON document.

    Raises:
        InputError: it is none; the message begins with ``where``.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def _json_splits(path: Path, document: Any) -> dict[str, list[Any]]:
    if isinstance(document, list):
        return {"train": document}
    if isinstance(document, dict):
        if (rows := _by_column(document)) is not None:
            return {"train": rows}
        lists = {name: value for name, value in document.items() if isinstance(value, list)}
        if len(lists) == 1:  # {"prompts": [...]} and the like: its one list
            return {"train": next(iter(lists.values()))}
        if lists and len(lists) == len(document):  # {"train": [{...}], "test": [{...}]}
            return lists
    raise InputError(f"{path}: expected a JSON list of strings or of objects")


def _by_column(document: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of a table that is an object: lists by column, or what pandas makes of one."""
    columns = list(document.values())
    if not columns:
        return None
    if all(isinstance(column, dict) for column in columns):
        keys = list(columns[0])
        if not all(key.isdigit() for key in keys):  # rows by name
            return columns
        if all(list(column) == keys for column in columns[1:]):
            return [{name: column[key] for name, column in document.items()} for key in keys]
    # One list under another name is a list of prompts.
    is_named = len(columns) > 1 or next(iter(document)).lower() in TEXT_COLUMNS
    is_table = is_named and all(isinstance(column, list) for column in columns)
    if is_table and len({len(column) for column in columns}) == 1:
        rows = [dict(zip(document, values, strict=True)) for values in zip(*columns, strict=True)]
        # Lists of objects are splits of rows, however long they are.
        return None if any(isinstance(v, dict) for row in rows for v in row.values()) else rows
    return None
