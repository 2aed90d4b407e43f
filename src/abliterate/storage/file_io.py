"""Moving bytes between files: by the kernel where it can, and never in one huge piece."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock

from abliterate.storage.guarded_files import check_regular, naming
from abliterate.storage.system_calls import BINARY, NOFOLLOW, read_at, write_at

PAGE = mmap.PAGESIZE
_CHUNK = 8 << 20
_LEAST_DIRECT = 1 << 20  # below, waiting for the disk costs more than the page cache
_FICLONE = 0x40049409  # Linux: share a whole file's blocks (btrfs, XFS, bcachefs, overlayfs)
_SYNC_FILE_RANGE_WRITE = 2
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# What a filesystem or kernel says that has no such operation, for this pair of files or at all.
_CANNOT = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EPERM,
    errno.ETXTBSY,
    errno.EBADF,
}


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SourceFile:
    """An open file to read from; its errors carry its name.

    Attributes:
        path: the file.
        descriptor: open for reading.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | BINARY)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from byte ``offset``.

        Raises:
            OSError: the file cannot be read, or ends too early.
        """
        while buffer:
            try:
                got = read_at(self.descriptor, buffer, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            if got == 0:
                raise OSError(errno.EIO, "ended while it was read", str(self.path))
            buffer, offset = buffer[got:], offset + got

    def expect(self, offset: int, length: int) -> None:
        """Ask the system to read a range ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self.descriptor)


class TargetFile:
    """An open file to write to, from several threads.

    The system lets one thread at a time write to a file, and keeps the others spinning on a core
    that has better things to do; here they sleep.

    Attributes:
        path: the file.
        descriptor: open for reading and writing.
        lock: held while something is written through the page cache.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        """Open it.

        Args:
            path: the file.
            keep: what it holds already; else there must be no such file yet.

        Raises:
            InputError: it is a link, or no regular file.
            OSError: it cannot be opened, or is there already.
        """
        self.path = path
        check_regular(path)
        flags = os.O_RDWR | NOFOLLOW | BINARY | (0 if keep else os.O_CREAT | os.O_EXCL)
        self.descriptor = os.open(path, flags, 0o666)
        self.lock = Lock()
        # Where the same file is being read, the page cache stays in between.
        self._direct = None if keep else _open_direct(path)

    def write(self, content: memoryview, offset: int) -> None:
        """Write ``content`` at byte ``offset``."""
        if not content:
            return  # without waiting for the lock
        with self.lock, naming(self.path):
            while content:
                written = write_at(self.descriptor, content, offset)
                content, offset = content[written:], offset + written

    def write_past_cache(self, content: memoryview, offset: int) -> None:
        """Write ``content`` at byte ``offset``, whole pages of it straight to the disk.

        That spares the copy into the page cache and the memory for it, and several threads can do
        it at once. Where the filesystem cannot, it is :meth:`write`.

        Args:
            content: lies in memory as far behind the start of a page as ``offset`` in the file.
            offset: in bytes.
        """
        first = -offset % PAGE
        last = len(content) - (offset + len(content)) % PAGE
        if self._direct is not None and last - first >= _LEAST_DIRECT:
            # A page is written one way or the other: the two do not see each other's bytes.
            self.write(content[:first], offset)
            first += self._write_direct(content[first:last], offset + first)
            content, offset = content[first:], offset + first
        self.write(content, offset)

    def _write_direct(self, content: memoryview, offset: int) -> int:
        """How much could be written that way."""
        assert self._direct is not None
        try:
            return write_at(self._direct, content, offset)
        except OSError as error:
            if error.errno in _CANNOT:
                return 0
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def resize(self, size: int) -> None:
        """Make it ``size`` bytes long."""
        with naming(self.path):
            os.ftruncate(self.descriptor, size)

    def reserve(self, offset: int, length: int) -> None:
        """Ask for the disk's blocks of a range: then threads need not take turns at getting them.

        It is advice only: where it cannot be had, each write gets its own.
        """
        operation = _libc("fallocate")
        if operation is not None and self._direct is not None and length >= _LEAST_DIRECT:
            operation(
                ctypes.c_int(self.descriptor),
                ctypes.c_int(0),
                ctypes.c_int64(offset),
                ctypes.c_int64(length),
            )

    def begin_writeback(self, offset: int, length: int) -> None:
        """Start bringing a range to disk without waiting: the flush at the end finds little."""
        operation = _libc("sync_file_range")
        if operation is not None:
            operation(
                ctypes.c_int(self.descriptor),
                ctypes.c_int64(offset),
                ctypes.c_int64(length),
                ctypes.c_uint(_SYNC_FILE_RANGE_WRITE),
            )

    def close(self) -> None:
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)


def _open_direct(path: Path) -> int | None:
    """For writing past the page cache, if system and filesystem can."""
    flag = getattr(os, "O_DIRECT", None)  # Linux
    try:
        return None if flag is None else os.open(path, os.O_WRONLY | flag | NOFOLLOW)
    except OSError:
        return None


def clone_file(source: SourceFile, target: TargetFile) -> bool:
    """Let ``target`` share all blocks of ``source``, if the filesystem can."""
    try:
        ioctl = import_module("fcntl").ioctl
    except ImportError:  # Windows
        return False
    try:
        ioctl(target.descriptor, _FICLONE, source.descriptor)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise OSError(error.errno, error.strerror, str(target.path)) from None
    return True


def copy_range(source: SourceFile, start: int, target: TargetFile, to: int, length: int) -> None:
    """Copy ``length`` bytes from byte ``start`` of ``source`` to byte ``to`` of ``target``.

    Raises:
        OSError: either file fails, or the source ends too early.
    """
    copied = _copy_in_kernel(source, start, target, to, length)
    if copied == length:
        return
    buffer = memoryview(bytearray(min(_CHUNK, length - copied)))
    while copied < length:
        part = buffer[: length - copied]
        source.read_into(part, start + copied)
        target.write(part, to + copied)
        copied += len(part)


def _copy_in_kernel(
    source: SourceFile, start: int, target: TargetFile, to: int, length: int
) -> int:
    """How much the kernel copied by itself."""
    copied = 0
    operation = getattr(os, "copy_file_range", None)  # Linux
    while operation is not None and copied < length:
        try:
            with target.lock:
                got = operation(
                    source.descriptor,
                    target.descriptor,
                    min(_CHUNK, length - copied),
                    start + copied,
                    to + copied,
                )
        except OSError as error:
            if error.errno in _CANNOT:
                break
            file = target if error.errno in _NO_ROOM else source
            raise OSError(error.errno, error.strerror, str(file.path)) from None
        if got == 0:  # the end, or a filesystem that pretends: reading tells which
            break
        copied += got
    return copied


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, if system and filesystem can."""
    operation = _libc("renameat2")
    return operation is not None and not operation(
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(one)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(other)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )


@cache
def _libc(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):  # the last of Windows, which has no such library
        return None
    return found


def sync_file(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk.

    Windows flushes files alone, and only those that are open for writing.
    """
    folders = hasattr(os, "O_DIRECTORY")
    if not folders and path.is_dir():
        return
    try:
        descriptor = os.open(path, (os.O_RDONLY if folders else os.O_RDWR) | BINARY)
    except PermissionError:
        if folders:
            raise
        return  # a copy that has the source's mark "read only"
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
