"""What may be replaced by an edited checkpoint: an earlier one, and nothing that came to it since.

The record ``abliterate.json`` lists every file that the editor wrote. A folder is ours if it holds
such a record, and no other file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from abliterate.editing.file_names import RECORD
from abliterate.errors import UsageError
from abliterate.storage.json_text import parse_json


def file_list(folder: Path, *more: str) -> list[str]:
    """The files below a folder and ``more``, as ``files`` of the record names them."""
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted({*(path.relative_to(folder).as_posix() for path in paths), *more})


def check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that holds anything but an edited checkpoint of ours.

    Raises:
        UsageError: it does; the message names the file.
    """
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out} is no folder: choose another name")
    if not any(out.iterdir()):
        return
    listed = _listed(out)
    if listed is None and _is_older(out):
        raise UsageError(
            f"{out} is an edited checkpoint of an older version, whose {RECORD} does not list its "
            "files, so that nobody can tell what came to it since: look into it and remove it "
            "yourself, or choose another folder"
        )
    if listed is None:
        raise UsageError(
            f"{out} was not made by `abliterate orthogonalize` (it has no {RECORD} that lists its "
            "files), so it is never replaced: choose another folder, or remove it yourself"
        )
    for path in _entries(out):
        if path.relative_to(out).as_posix() not in listed:
            raise UsageError(
                f"{path} is no part of the edited checkpoint {out}, which is therefore not "
                "replaced: move that file away, or choose another folder"
            )


def _is_older(out: Path) -> bool:
    """Whether it has a record of ours that lists no files."""
    record = _record(out)
    return record is not None and "files" not in record


def _record(out: Path) -> dict[str, Any] | None:
    """The folder's record, if it is one of ours."""
    path = out / RECORD
    if path.is_symlink() or not path.is_file():
        return None
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        made_by = record["versions"]["abliterate"]
        ours = isinstance(made_by, str) and {"source", "direction", "tensors"} <= record.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(record) if ours else None


def _listed(out: Path) -> set[str] | None:
    """What the folder's record lists; None if that is no record of ours."""
    files = (_record(out) or {}).get("files")
    if not isinstance(files, list) or RECORD not in files:
        return None
    return {name for name in files if isinstance(name, str)}


def _entries(out: Path) -> list[Path]:
    """Every file and link, and every folder that holds nothing."""
    entries = []
    for place, folders, files in os.walk(out):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        entries += [here / name for name in (*links, *files)]
        if not folders and not files:
            entries.append(here)
    return sorted(entries)
