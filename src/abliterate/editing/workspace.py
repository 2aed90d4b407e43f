"""``OUT.partial``: where an edited checkpoint grows until it gets its name, and survives a kill.

It holds ``files`` (what becomes OUT; shards enter it whole and flushed), ``current`` (the shards
being written), ``fetched`` (those that came from the hub for this edit alone) and ``journal.jsonl``
(whose first line says what the work depends on, and each further one a finished shard). The lock
``journal.lock`` keeps a second process out: a file of its own, since Windows lets nobody read what
is locked. The folder may have come from elsewhere: no link in it is followed, and without a journal
of this program's nothing in it is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from abliterate.checkpoints.safetensors_header import FileStamp
from abliterate.editing.matrix_orthogonalization import DirectionEnergy
from abliterate.editing.own_checkpoint import check_replaceable
from abliterate.errors import CheckpointError, InputError, UsageError
from abliterate.storage.file_io import exchange, sync_file
from abliterate.storage.guarded_files import check_folder, check_regular, naming, open_to_extend
from abliterate.storage.json_text import parse_json
from abliterate.storage.locks import hold, holder_file

_JOURNAL, _LOCK = Path("journal.jsonl"), "journal.lock"
_FILES, _CURRENT, _REPLACED, _FETCHED = "files", "current", "replaced", "fetched"
_FOLDERS = (_CURRENT, _FILES, _FETCHED, _REPLACED)


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
    finished: dict[str, dict[int, DirectionEnergy]]
    published: bool
    _journal: IO[bytes]

    @property
    def energies(self) -> dict[int, DirectionEnergy]:
        """What the finished shards measured, by the number of the edit."""
        return {n: sums for shard in self.finished.values() for n, sums in shard.items()}

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

    def finish(self, name: str, sums: Mapping[int, DirectionEnergy]) -> None:
        """Flush a shard that is written, and enter it into the journal."""
        path = self.files / name
        sync_file(self.current(name))
        self.current(name).replace(path)
        sync_file(self.files)
        stamp = asdict(FileStamp.of(path.stat()))
        entry = {str(index): asdict(part) for index, part in sums.items()}
        self._append({"shard": name, "stamp": stamp, "sums": entry})
        self.finished[name] = dict(sums)

    def _append(self, line: Mapping[str, Any]) -> None:
        with naming(self.folder / _JOURNAL):
            self._journal.seek(0, os.SEEK_END)
            self._journal.write(json.dumps(line).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def publish(self, overwrite: bool) -> None:
        """Give the folder its name, in place of an old one if there is one.

        Raises:
            UsageError: a folder of that name came meanwhile, or something came into the old one.
        """
        for path in self.files.rglob("*"):
            if path.is_dir() or (path.is_file() and path.name not in self.finished):
                sync_file(path)
        sync_file(self.files)
        if self.out.exists() or self.out.is_symlink():
            check_absent(self.out, overwrite)
        self._append({"inode": self.files.stat().st_ino})
        if self.out.exists() and not exchange(self.files, self.out):
            self.out.rename(self.folder / _REPLACED)
        if self.files.exists() and not self._is_out():
            self.files.rename(self.out)
        sync_file(self.out.parent)
        self.discard()

    def _is_out(self) -> bool:
        lines = _read_lines(self._journal)
        return bool(lines) and _was_published(self.out, lines[-1])

    def gather(self) -> None:
        """Take in the shards that other processes finished."""
        lines = [line for journal in _journals(self.folder) for line in _lines_of(journal)]
        self.finished = _finished(self.files, lines, False)

    def discard(self) -> None:
        """Remove all traces; of an output that has its name, :func:`hold_workspace` the journal."""
        # The journal goes last: without it the rest would look like someone else's folder, and
        # what was published just now like what had been there before.
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        first, *others = _journals(self.folder)
        going = others if self._is_out() else [*others, first]
        self.close()  # where a file that is open cannot be removed
        for path in going:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the folder, which stays as it is."""
        self._journal.close()


def join_workspace(
    out: Path, rank: int, finished: dict[str, dict[int, DirectionEnergy]], published: bool
) -> Workspace:
    """The workspace that another process opened; what this one finishes goes to its own journal."""
    journal = open_to_extend(partial_of(out) / f"{_JOURNAL.stem}-{rank}{_JOURNAL.suffix}")
    return Workspace(out, dict(finished), published, journal)


def check_absent(out: Path, overwrite: bool) -> None:
    """Refuse an output that is there already, unless it may be replaced.

    Raises:
        UsageError: it is, and it may not.
    """
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise UsageError(f"{out} exists already: choose another folder or pass --overwrite")
    check_replaceable(out)


def is_begun(out: Path) -> bool:
    """Whether an earlier run left work on ``out`` behind."""
    journal = partial_of(out) / _JOURNAL
    return journal.is_file() and journal.stat().st_size > 0


@contextmanager
def hold_workspace(out: Path) -> Iterator[None]:
    """Keep other processes from working on ``out``.

    Raises:
        CheckpointError: what lies in its place was not left by this program.
        InputError: another process is at it, or a link lies in the folder.
    """
    folder = partial_of(out)
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise CheckpointError(f"{folder} is in the way and was not left by an edit: remove it")
    try:
        with hold(folder / _LOCK, out, "orthogonalize"):
            yield
    finally:
        with suppress(OSError):
            _forget_published(out)
            folder.rmdir()  # nothing is left to go on from


def open_workspace(out: Path, inputs: str) -> Workspace:
    """Take up the work on ``out`` where it ended, or begin it; within :func:`hold_workspace`.

    Args:
        out: the folder to be made.
        inputs: a hash of all that its content depends on.

    Raises:
        InputError: a link lies in the folder.
        OSError: it cannot be made.
    """
    folder = partial_of(out)
    journal = open_to_extend(folder / _JOURNAL)
    try:
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
            _check_no_links(folder / _FETCHED)
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
            lines, _ = _whole_lines(journal)
        begun = bool(lines) and lines[0].get("inputs") == inputs
        return begun and _was_published(out, lines[-1])
    except OSError:
        return False


def _forget_published(out: Path) -> None:
    """Remove the journal of an output that has its name, once all else is gone, the lock too."""
    folder = partial_of(out)
    if any((folder / name).exists() for name in _FOLDERS) or not (folder / _JOURNAL).is_file():
        return
    with (folder / _JOURNAL).open("rb") as journal:
        lines, _ = _whole_lines(journal)
    if lines and _was_published(out, lines[-1]):
        (folder / _JOURNAL).unlink()


def _is_ours(folder: Path) -> bool:
    """Whether it holds our names alone, and a journal of ours if there is anything to lose.

    Raises:
        InputError: one of the names is a link, or no file or folder as it should be.
    """
    if not folder.is_dir():
        return False
    journals = _journals(folder)
    files = {*(path.name for path in journals), _LOCK, holder_file(folder / _LOCK).name}
    if not {path.name for path in folder.iterdir()} <= {*files, *_FOLDERS}:
        return False
    for name in _FOLDERS:
        check_folder(folder / name)
    for name in files:
        check_regular(folder / name)
    held = any((folder / name).is_dir() and any((folder / name).iterdir()) for name in _FOLDERS)
    return not held or _is_journal(journals[0])


def _is_journal(path: Path) -> bool:
    try:
        with path.open("rb") as journal:
            inputs = parse_json(journal.readline(4096))["inputs"]
        return re.fullmatch(r"[0-9a-f]{64}", inputs) is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_no_links(folder: Path) -> None:
    """Refuse a folder that something else writes to for us, if a link in it leads elsewhere."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() or (name in files and path.lstat().st_nlink != 1):
                raise InputError(f"{path} is a link, which is never written through: remove it")


def _journals(folder: Path) -> list[Path]:
    """This process's own first, then those of other ranks."""
    return [folder / _JOURNAL, *sorted(folder.glob(f"{_JOURNAL.stem}-*{_JOURNAL.suffix}"))]


def _begin(out: Path, journal: IO[bytes]) -> None:
    folder = partial_of(out)
    if (folder / _REPLACED).exists() and not out.exists():
        (folder / _REPLACED).rename(out)  # a kill came between the two renames of an overwrite
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for other in _journals(folder)[1:]:
        other.unlink()
    journal.truncate(0)


def _read_lines(journal: IO[bytes]) -> list[dict[str, Any]]:
    """The journal's whole lines; one that a kill tore off is dropped from the file too."""
    journal.seek(0)
    lines, end = _whole_lines(journal)
    journal.truncate(end)
    return lines


def _whole_lines(journal: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The lines before one that a kill tore off, and the byte where they end."""
    lines, end = [], 0
    for raw in journal:
        try:
            line = parse_json(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            break
        lines.append(line)
        end += len(raw)
    return lines, end


def _lines_of(path: Path) -> list[dict[str, Any]]:
    with open_to_extend(path, create=False) as journal:
        return _read_lines(journal)


def _was_published(out: Path, last: Mapping[str, Any]) -> bool:
    return "inode" in last and out.is_dir() and out.stat().st_ino == last["inode"]


def _finished(
    files: Path, lines: list[dict[str, Any]], published: bool
) -> dict[str, dict[int, DirectionEnergy]]:
    """The shards that are still as they were when they were finished."""
    finished = {}
    for line in lines:
        try:
            name, stamp = line["shard"], FileStamp(**line["stamp"])
            sums = {int(index): DirectionEnergy(**part) for index, part in line["sums"].items()}
            if Path(name).name != name:
                continue
            status = (files / name).lstat() if not published else None
            if status is None or (stat.S_ISREG(status.st_mode) and FileStamp.of(status) == stamp):
                finished[name] = sums
        except (OSError, KeyError, TypeError, ValueError):
            continue  # it is written again
    return finished


def _remove_unfinished(files: Path, finished: Mapping[str, Any]) -> None:
    for path in list(files.iterdir()):
        if path.name not in finished:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
