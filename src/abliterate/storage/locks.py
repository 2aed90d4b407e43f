"""One writer at a time: a lock on a folder or a file that says who holds it.

The system frees it when its process ends, however that ends; what says who held it is a file beside
it that the next holder overwrites.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from abliterate.errors import InputError
from abliterate.storage.guarded_files import (
    check_regular,
    is_temporary,
    naming,
    remove_temporaries,
)
from abliterate.storage.json_text import parse_json
from abliterate.storage.system_calls import BINARY, NOFOLLOW

log = logging.getLogger("abliterate")

LOCK = ".abliterate.lock"
_OF_LOCK = re.compile(r"\.abliterate(-\w+)?\.(lock|holder\.json)")
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
# A holder that is just ending: not worth an error.
_PATIENCE, _POLL = 0.2, 0.02
# The locks of this thread: what runs within a stage that holds one may take it again.
_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())


def holder_file(lock: Path) -> Path:
    """What says who holds the lock."""
    return lock.with_name(f"{lock.stem}.holder.json")


def is_of_lock(name: str) -> bool:
    """Whether a file of that name is a lock, its holder's, or was left by a kill: never data."""
    return bool(_OF_LOCK.fullmatch(name)) or is_temporary(name)


@contextmanager
def hold_folder(folder: Path, command: str, part: str = "") -> Iterator[None]:
    """Keep other processes from writing to a folder; made if need be, and removed if left empty.

    Args:
        folder: a run folder, say.
        command: what this process does there, for the others.
        part: of the folder, which others may write to the rest of; none for all of it.

    Raises:
        InputError: another process holds it, or the lock's name is taken by a link.
    """
    lock = folder / (f".abliterate-{part}.lock" if part else LOCK)
    with hold(lock, folder / part if part else folder, command):
        if not part:
            remove_temporaries(folder)
        yield


@contextmanager
def hold_file(path: Path, command: str) -> Iterator[None]:
    """Keep other processes from writing to a file, by a hidden one beside it.

    Raises:
        InputError: another process holds it, or the lock's name is taken by a link.
    """
    with hold(path.with_name(f".{path.name}.lock"), path, command):
        yield


@contextmanager
def hold(lock: Path, subject: Path, command: str) -> Iterator[None]:
    """Hold the lock on ``subject``; within the same thread it may be held more than once.

    Args:
        lock: the file that is locked; removed at the end if it is empty.
        subject: what the lock is on, for the error.
        command: what this process does, for the others.

    Raises:
        InputError: another process holds it, or the name is taken by a link.
        OSError: the lock cannot be made.
    """
    key = os.path.join(os.path.realpath(lock.parent), lock.name)
    if key in _held.get():
        yield
        return
    made = [above for above in (lock.parent, *lock.parent.parents) if not above.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        for path in (lock, holder_file(lock)):
            if check_regular(path) and path.stat().st_nlink != 1:
                raise InputError(f"{path} has a further name (a hard link): remove it")
        # No soft lock, which a kill would leave behind.
        native = FileLock(lock, timeout=_PATIENCE, poll_interval=_POLL, fallback_to_soft=False)
        try:
            with naming(lock):
                native.acquire()
        except Timeout:
            raise InputError(_in_use(subject, holder_file(lock))) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("the filesystem of %s has no locks: keep other processes away", subject)
        token = _held.set(_held.get() | {key})
        try:
            _sign(holder_file(lock), command)
            yield
        finally:
            _held.reset(token)
            with suppress(OSError):
                holder_file(lock).unlink()
            with suppress(OSError):  # while it is held: who waits sees that it is gone
                if lock.stat().st_size == 0:
                    lock.unlink()
            native.release()
            if os.name == "nt":  # which removes no file that is open, the next holder's included
                with suppress(OSError):
                    if lock.stat().st_size == 0:
                        lock.unlink()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()  # only if nothing came into it


def _sign(path: Path, command: str) -> None:
    who = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": command,
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    path.unlink(missing_ok=True)  # of a process that was killed
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW | BINARY, 0o666)
        try:
            os.write(descriptor, json.dumps(who).encode() + b"\n")
        finally:
            os.close(descriptor)


def _in_use(subject: Path, path: Path) -> str:
    """The error line, with what is said of the holder, as far as it can be believed."""
    who = ""
    with suppress(OSError, ValueError, KeyError, TypeError, InputError):
        if check_regular(path):
            said = parse_json(path.read_bytes()[:4096])
            words = {key: str(said[key]) for key in ("pid", "host", "command", "started")}
            if all(re.fullmatch(r"[\w.:+-]{1,64}", word, re.ASCII) for word in words.values()):
                who = ": `abliterate {command}`, pid {pid} on {host}, since {started}"
                who = who.format(**words)
    return f"{subject} is in use by another process{who}; wait for it to end"
