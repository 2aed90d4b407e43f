"""Is a file that stands where we would write one of ours, of the same kind? Else it stays.

A kind looks into the file: a name alone shows nothing. A file that cannot be read any more (torn,
damaged) is taken for ours in a folder where another record of ours lies.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, UsageError
from abliterate.storage.artifacts import tensor_metadata
from abliterate.storage.checkpoint_folders import check_outside_checkpoints
from abliterate.storage.guarded_files import check_regular
from abliterate.storage.json_text import parse_json
from abliterate.storage.portable_names import check_output_path

#: Whether the file is of the kind; raises ``ValueError`` or ``OSError`` where it cannot be read.
Kind = Callable[[Path], bool]

#: What every page of ours has in its head.
GENERATOR = '<meta name="generator" content="abliterate">'
_HEAD = 4096
# What a loader could take for a part of the checkpoint that it lies in.
_TENSORS = {".safetensors", ".gguf", ".npz"}
_MARK = b"made by abliterate"


def claim(folder: Path, files: Mapping[str, Kind], home: Path | None = None) -> None:
    """Refuse a folder in which a file of a stage's would replace something else.

    Args:
        folder: where the files go; it need not exist.
        files: their names, and what such a file of ours looks like.
        home: the run folder, if ``folder`` lies in one.

    Raises:
        InputError: one of the names is taken by a link, by no regular file, or by a foreign one.
    """
    for name, kind in files.items():
        path = folder / name
        if not check_regular(path) or path.stat().st_size == 0:
            continue
        if not _is(kind, path, lambda: _has_record(home or folder)):
            raise InputError(
                f"{path} was not written by abliterate and would be replaced: choose another "
                "folder, or move it away"
            )


def claim_file(path: Path, kind: Kind, made_by: str) -> None:
    """Refuse an output file that would replace something else.

    Args:
        path: as the user named it.
        kind: what an earlier one of ours looks like.
        made_by: the command, for the error.

    Raises:
        InputError: it is a link, or no regular file.
        UsageError: it is there, and not an earlier output of that command; or a name that Windows
            cannot make; or tensors that would lie among a checkpoint's.
    """
    check_output_path(path)
    if not check_regular(path) or path.stat().st_size == 0:
        if path.suffix.lower() in _TENSORS:
            check_outside_checkpoints(path)
        return
    if not _is(kind, path, lambda: False):
        raise UsageError(
            f"output {path} is there and no earlier output of `abliterate {made_by}`: name "
            "another file, or move it away"
        )


def _is(kind: Kind, path: Path, among_ours: Callable[[], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):
        return among_ours()


def _has_record(folder: Path) -> bool:
    return any(
        _is(is_record, path, lambda: False)
        for path in sorted(folder.glob("*.json"))
        if path.is_file() and not path.is_symlink()
    )


def _document(path: Path) -> Any:
    return parse_json(path.read_text(encoding="utf-8"))


def is_record(path: Path) -> bool:
    """A stage's record: it says which version of this package wrote it."""
    document = _document(path)
    versions = document.get("versions") if isinstance(document, dict) else None
    return isinstance(versions, dict) and isinstance(versions.get("abliterate"), str)


def is_mapping(*keys: str) -> Kind:
    """A JSON object with these keys."""

    def kind(path: Path) -> bool:
        document = _document(path)
        return isinstance(document, dict) and set(keys) <= document.keys()

    return kind


def is_mapping_of(entry: Callable[[str, Any], bool]) -> Kind:
    """A JSON object all of whose entries are of a kind."""

    def kind(path: Path) -> bool:
        document = _document(path)
        return isinstance(document, dict) and all(entry(k, v) for k, v in document.items())

    return kind


def has_metadata(*keys: str, **values: str) -> Kind:
    """A safetensors file with these keys (and values) in its metadata."""

    def kind(path: Path) -> bool:
        from safetensors import SafetensorError

        try:
            metadata = tensor_metadata(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        return {*keys, *values} <= metadata.keys() and values.items() <= metadata.items()

    return kind


def is_lines(*keys: str) -> Kind:
    """JSONL of objects with these keys; a kill may have torn the last line."""

    def kind(path: Path) -> bool:
        lines = path.read_bytes().split(b"\n")
        torn = lines.pop()
        for line in lines:
            document = parse_json(line)
            if not isinstance(document, dict) or not set(keys) <= document.keys():
                return False
        return bool(lines) or torn.startswith(f'{{"{keys[0]}": '.encode())

    return kind


def is_page(path: Path) -> bool:
    """A page of ours: its head says so."""
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(_HEAD)


def is_picture(path: Path) -> bool:
    """A picture of ours, by the mark of :func:`mark_picture`."""
    return _MARK in path.read_bytes()


def mark_picture(content: bytes) -> bytes:
    """A PNG or SVG with a mark that nobody sees, by which it is known to be ours."""
    if content.startswith(b"\x89PNG"):
        chunk = b"tEXtComment\0" + _MARK
        whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        first = content.index(b"IHDR") + 4 + 13 + 4  # behind the header, which must come first
        return content[:first] + whole + content[first:]
    return content + b"<!-- " + _MARK + b" -->\n"
