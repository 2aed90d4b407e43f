"""``OUT.partial``: where an edited checkpoint grows until it gets its name, and survives a kill.

It holds ``files`` (what becomes OUT; shards enter it whole and flushed), ``current`` (the shards
being written), ``fetched`` (those that came from the hub for this edit alone) and ``journal.jsonl``
(whose first line says what the work depends on, and each further one a finished shard). The lock on
the journal keeps a second process out.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from abliterate.checkpoints.shards import Stamp
from abliterate.editing.matrix_orthogonalization import Sums
from abliterate.errors import CheckpointError, UsageError
from abliterate.storage.file_io import exchange, sync_file

_JOURNAL = Path("journal.jsonl")
_FILES, _CURRENT, _REPLACED, _FETCHED = "files", "current", "replaced", "fetched"


def partial_of(out: Path) -> Path:
    """The sibling in which ``out`` is made.

    Raises:
        UsageError: ``out`` is a folder like ``.`` that cannot be made anew under its name.
    """
    if out.name in ("", ".."):
        raise UsageError(f"output {out} has no name of its own: name a folder to make")
    return out.with_name(out.name + ".partial")


@dataclass
class Workspace:
    """A checkpoint in the making.

    Attributes:
        out: its name in the end.
        finished: by the name of each finished shard, the sums of its edits by their numbers.
        published: it has its name already, and only tidying up was left.
    """

    out: Path
    finished: dict[str, dict[int, Sums]]
    published: bool
    _journal: IO[bytes]

    @property
    def folder(self) -> Path:
        return partial_of(self.out)

    @property
    def files(self) -> Path:
        return self.folder / _FILES

    @property
    def fetched(self) -> Path:
        """Where files from the hub lie while they are needed."""
        return self.folder / _FETCHED

    def current(self, name: str) -> Path:
        """Where a shard is written."""
        return self.folder / _CURRENT / name

    def finish(self, name: str, sums: Mapping[int, Sums]) -> None:
        """Flush a shard that is written, and enter it into the journal."""
        path = self.files / name
        sync_file(self.current(name))
        self.current(name).replace(path)
        sync_file(self.files)
        stamp = asdict(Stamp.of(path.stat()))
        entry = {str(index): asdict(part) for index, part in sums.items()}
        self._append({"shard": name, "stamp": stamp, "sums": entry})
        self.finished[name] = dict(sums)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._journal.seek(0, os.SEEK_END)
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def publish(self) -> None:
        """Give the folder its name, in place of an old one if there is one."""
        for path in self.files.rglob("*"):
            if path.is_dir() or (path.is_file() and path.name not in self.finished):
                sync_file(path)
        sync_file(self.files)
        self._append({"inode": self.files.stat().st_ino})
        if self.out.exists() and not exchange(self.files, self.out):
            self.out.rename(self.folder / _REPLACED)
        if self.files.exists() and not self._is_out():
            self.files.rename(self.out)
        sync_file(self.out.parent)
        self.discard()

    def _is_out(self) -> bool:
        lines = _read_lines(self._journal)
        return self.out.exists() and lines[-1].get("inode") == self.out.stat().st_ino

    def gather(self) -> None:
        """Take in the shards that other processes finished."""
        lines = [line for journal in _journals(self.folder) for line in _lines_of(journal)]
        self.finished = _finished(self.files, lines, False)

    def discard(self) -> None:
        """Remove all traces."""
        # The journal goes last: without it the rest would look like someone else's folder.
        for name in (_CURRENT, _FILES, _FETCHED, _REPLACED):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the folder, which stays as it is."""
        self._journal.close()


def join_workspace(
    out: Path, rank: int, finished: dict[str, dict[int, Sums]], published: bool
) -> Workspace:
    """The workspace that another process opened; what this one finishes goes to its own journal."""
    journal = (partial_of(out) / f"{_JOURNAL.stem}-{rank}{_JOURNAL.suffix}").open("a+b")
    return Workspace(out, dict(finished), published, journal)


def open_workspace(out: Path, inputs: str) -> Workspace:
    """Take up the work on ``out`` where it ended, or begin it.

    Args:
        out: the folder to be made.
        inputs: a hash of all that its content depends on.

    Raises:
        CheckpointError: another process is at it, or the folder is not this program's.
        OSError: it cannot be made.
    """
    folder = partial_of(out)
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise CheckpointError(f"{folder} is in the way and was not left by an edit: remove it")
    folder.mkdir(parents=True, exist_ok=True)
    journal = (folder / _JOURNAL).open("a+b")
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is writing {out}: wait for it") from None
        lines = _read_lines(journal)
        workspace = Workspace(out, {}, False, journal)
        if not lines or lines[0].get("inputs") != inputs:
            _begin(out, journal)
            workspace._append({"inputs": inputs})
        else:
            workspace.published = _was_published(out, lines[-1])
            for other in _journals(folder)[1:]:
                lines += _lines_of(other)
            workspace.finished = _finished(folder / _FILES, lines[1:], workspace.published)
            shutil.rmtree(folder / _CURRENT, ignore_errors=True)
            for torn in (folder / _FETCHED).rglob("*.incomplete"):
                torn.unlink()
        (folder / _CURRENT).mkdir(exist_ok=True)
        (folder / _FILES).mkdir(exist_ok=True)
        if not workspace.published:
            _remove_unfinished(folder / _FILES, workspace.finished)
        sync_file(folder)
        sync_file(folder.parent)
    except BaseException:
        journal.close()
        raise
    return workspace


def is_published(out: Path, inputs: str) -> bool:
    """Whether ``out`` is what a killed run with the same inputs had just given its name."""
    try:
        with (partial_of(out) / _JOURNAL).open("rb") as journal:
            lines = [json.loads(raw) for raw in journal]
        return lines[0]["inputs"] == inputs and _was_published(out, lines[-1])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _is_ours(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    return names <= {
        *(path.name for path in _journals(folder)),
        _FILES,
        _CURRENT,
        _FETCHED,
        _REPLACED,
    }


def _journals(folder: Path) -> list[Path]:
    """This process's own first, then those of other ranks."""
    return [folder / _JOURNAL, *sorted(folder.glob(f"{_JOURNAL.stem}-*{_JOURNAL.suffix}"))]


def _begin(out: Path, journal: IO[bytes]) -> None:
    folder = partial_of(out)
    if (folder / _REPLACED).exists() and not out.exists():
        (folder / _REPLACED).rename(out)  # a kill came between the two renames of an overwrite
    for name in (_CURRENT, _FILES, _FETCHED, _REPLACED):
        shutil.rmtree(folder / name, ignore_errors=True)
    for other in _journals(folder)[1:]:
        other.unlink()
    journal.truncate(0)


def _read_lines(journal: IO[bytes]) -> list[dict[str, Any]]:
    """The journal's whole lines; one that a kill tore off is dropped from the file too."""
    journal.seek(0)
    lines, end = [], 0
    for raw in journal:
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            break
        lines.append(line)
        end += len(raw)
    journal.truncate(end)
    return lines


def _lines_of(path: Path) -> list[dict[str, Any]]:
    with path.open("r+b") as journal:
        return _read_lines(journal)


def _was_published(out: Path, last: Mapping[str, Any]) -> bool:
    return "inode" in last and out.is_dir() and out.stat().st_ino == last["inode"]


def _finished(
    files: Path, lines: list[dict[str, Any]], published: bool
) -> dict[str, dict[int, Sums]]:
    """The shards that are still as they were when they were finished."""
    found = {}
    for line in lines:
        try:
            name, stamp = line["shard"], Stamp(**line["stamp"])
            sums = {int(index): Sums(**part) for index, part in line["sums"].items()}
            if published or Stamp.of((files / name).stat()) == stamp:
                found[name] = sums
        except (OSError, KeyError, TypeError, ValueError):
            continue  # it is written again
    return found


def _remove_unfinished(files: Path, finished: Mapping[str, Any]) -> None:
    for path in list(files.iterdir()):
        if path.name not in finished:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
