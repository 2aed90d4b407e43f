"""What not every system has (Windows, above all) by another way: slower, with the same bytes.

Each is looked for by its name when it is used, never by the name of the system.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from threading import Lock

#: For ``os.open``; nothing where the system has no such flag. Without ``BINARY`` Windows would
#: translate line ends in the middle of a tensor.
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
NONBLOCK = getattr(os, "O_NONBLOCK", 0)
BINARY = getattr(os, "O_BINARY", 0)

_UNIT = 4096  # of a filesystem's blocks, where the system does not say
# Where a read or write at an offset takes two calls, nobody may come in between.
_seeking = Lock()


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into ``buffer`` from byte ``offset``; returns how many bytes came, none at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        content = os.read(descriptor, len(buffer))
    buffer[: len(content)] = content
    return len(content)


def write_at(descriptor: int, content: memoryview, offset: int) -> int:
    """Write ``content`` at byte ``offset``; returns how many bytes went."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, content)


def block_size(folder: Path) -> int:
    """Bytes of the filesystem's units: a file takes a whole number of them."""
    return os.statvfs(folder).f_frsize if hasattr(os, "statvfs") else _UNIT


def free_bytes(folder: Path) -> int:
    """What this user may still write to the filesystem."""
    if hasattr(os, "statvfs"):
        system = os.statvfs(folder)
        return system.f_bavail * system.f_frsize
    return shutil.disk_usage(folder).free


def bytes_on_disk(path: Path) -> int:
    """What a file takes of its filesystem already; its length where the system does not say."""
    status = path.stat()
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else blocks * 512
