"""Opening files to write in a folder that may have come from somebody else.

No name in such a folder is trusted: a symbolic or hard link there could lead to a file elsewhere, a
FIFO could block for ever. A whole file is written under a random name that did not exist, and then
takes its place; a file that is added to must be a regular one with this name alone. Links are
refused, never followed. The folder that the user named may itself be a link; nothing in it may.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from abliterate.errors import InputError

# Where there are no such flags (Windows) the checks before opening stand alone.
from abliterate.storage.system_calls import BINARY, NOFOLLOW, NONBLOCK

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


@contextmanager
def naming(path: Path | str, instead_of: Path | None = None) -> Iterator[None]:
    """Give every ``OSError`` of the block its file: a full disk then says which.

    Args:
        path: what the block writes.
        instead_of: a temporary name of it, which would tell nobody anything.
    """
    try:
        yield
    except OSError as error:
        other = error.filename is not None and error.filename != str(instead_of)
        if error.errno is None or other:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_regular(path: Path) -> bool:
    """Refuse a name that cannot be written to safely; returns whether there is such a file.

    Raises:
        InputError: it is a symbolic link, or no regular file.
    """
    try:
        with naming(path):
            mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(mode):
        raise InputError(f"{path} is a symbolic link, which is never written through: remove it")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is in the way and no regular file: remove it")
    return True


def check_folder(folder: Path) -> None:
    """Refuse a folder within the one that the user named, if it leads elsewhere.

    Raises:
        InputError: it is a link, or no folder.
    """
    junction = getattr(os.path, "isjunction", lambda path: False)  # Windows, Python 3.12
    if folder.is_symlink() or junction(folder):
        raise InputError(f"{folder} is a symbolic link, which is never written through: remove it")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is in the way and no folder: remove it")


def make_folder(folder: Path) -> None:
    """Make a folder within the one that the user named, unless it is there.

    Raises:
        InputError: it is a link, or no folder.
    """
    check_folder(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path``, whole and flushed, when the context ends well.

    Raises:
        InputError: ``path`` is a link, or no regular file.
        OSError: it cannot be written; named so.
    """
    check_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW | BINARY
    with naming(path, temporary):
        file = os.fdopen(os.open(temporary, flags, 0o666), "w+b")
    try:
        yield file
        with naming(path, temporary):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            check_regular(path)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # a full disk refuses what is still buffered, too
            file.close()
        with suppress(OSError):
            temporary.unlink()
        raise


def open_to_extend(path: Path, create: bool = True) -> BinaryIO:
    """Open a file that is read and added to, such as a journal.

    Raises:
        InputError: it is a link, has a further name, or is no regular file.
        OSError: it cannot be opened.
    """
    check_regular(path)
    flags = os.O_RDWR | os.O_APPEND | NOFOLLOW | NONBLOCK | BINARY
    with naming(path):
        descriptor = os.open(path, flags | (os.O_CREAT if create else 0), 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise InputError(
            f"{path} has a further name (a hard link), which would change with it: put a copy of "
            "the file in its place"
        )
    return os.fdopen(descriptor, "a+b")


def is_temporary(name: str) -> bool:
    """Whether :func:`replacing` makes such names."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove what :func:`replacing` left in a folder when it was killed.

    Only for the one process that writes there.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            if is_temporary(path.name) and not path.is_symlink() and path.is_file():
                path.unlink()
