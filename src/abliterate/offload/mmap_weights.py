"""A checkpoint's tensors as views of its mapped files, and reading ahead.

The mapping is shared and read-only, so its pages are the page cache's own: they count neither as
data of the process nor against what it may allocate, and the system drops them when it needs room.
(The mapping that ``safetensors`` makes for torch is private and writable, which a data limit counts
in full.) Nothing here may write to such a tensor.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from abliterate.checkpoints.safetensors_header import DTYPES as FLOATS
from abliterate.checkpoints.safetensors_header import TensorEntry
from abliterate.checkpoints.shards import ShardSet
from abliterate.errors import CheckpointError
from abliterate.storage.system_calls import BINARY, read_at

_DTYPES = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_READ = 4 << 20
# Missing on Windows and macOS, where the mapping's pages stay until it is closed.
_FORGET = getattr(mmap, "MADV_DONTNEED", None)


class Mapped:
    """The tensors of a checkpoint, mapped from its files; nothing is read before it is used.

    Attributes:
        transient: pages that have been used leave the page cache too. Right where the files do not
            fit into it: they would push out what is used again, and count against the limit of a
            control group. Else a second pass would read in vain.
        bytes_read: what :meth:`fetch` and :meth:`ahead` have read from the files so far.
    """

    def __init__(self, shards: ShardSet) -> None:
        self.entries = shards.tensors
        self.transient = False
        self.bytes_read = 0
        self._maps: dict[Path, mmap.mmap] = {}
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._coming: tuple[frozenset[str], Future[int]] | None = None

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies."""
        return self.entries[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor, a read-only view of the file's pages.

        Raises:
            CheckpointError: its dtype is one that torch does not have.
        """
        entry = self.entries[name]
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"tensor '{name}' in {entry.file} is stored as {entry.dtype}, which --offload "
                "cannot read: use --no-offload"
            )
        dtype = _DTYPES[entry.dtype]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        count = (entry.end - entry.start) // dtype.itemsize
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no read-only tensors
            flat = torch.frombuffer(
                self._map(entry.file), dtype=dtype, count=count, offset=entry.start
            )
        return flat.view(entry.shape)

    def size(self, names: Iterable[str]) -> int:
        """Bytes of these tensors on disk."""
        return sum(self.entries[name].end - self.entries[name].start for name in names)

    def ahead(self, names: Iterable[str]) -> None:
        """Start to read tensors into the page cache; no memory of this process is used."""
        wanted = frozenset(names)
        if self._coming is None:
            self._coming = wanted, self._pool.submit(self._read, sorted(wanted))

    def fetch(self, names: Iterable[str]) -> None:
        """Have tensors in the page cache, waiting for what :meth:`ahead` has begun."""
        left = frozenset(names)
        if self._coming is not None:
            started, future = self._coming
            self._coming = None
            self.bytes_read += future.result()
            left -= started
        self.bytes_read += self._read(sorted(left))

    def forget(self, names: Iterable[str]) -> None:
        """Take the pages of tensors out of the process; the page cache may keep them."""
        if _FORGET is None:
            return
        page = mmap.ALLOCATIONGRANULARITY
        drop = self.transient and hasattr(os, "posix_fadvise")
        for name in names:
            entry = self.entries[name]
            if entry.file in self._maps and entry.end > entry.start:
                start = entry.start // page * page
                self._maps[entry.file].madvise(_FORGET, start, entry.end - start)
                if drop:
                    file, size = self._file(entry.file), entry.end - entry.start
                    os.posix_fadvise(file, entry.start, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Stop reading ahead. The mappings go with the last tensor that uses them."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        self._maps.clear()

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            self._maps[path] = mmap.mmap(self._file(path), 0, access=mmap.ACCESS_READ)
        return self._maps[path]

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | BINARY)
        return self._files[path]

    def _read(self, names: Sequence[str]) -> int:
        """Read the tensors once, in the order in which they lie, into nothing."""
        total, buffer = 0, bytearray(_READ)
        spans = sorted((str(e.file), e.start, e.end, e.file) for e in map(self.entry, names))
        for _, start, end, path in spans:
            file = self._file(path)
            while start < end:
                view = memoryview(buffer)[: min(_READ, end - start)]
                got = read_at(file, view, start)
                if not got:
                    raise CheckpointError(f"{path} has become shorter while it was read")
                start += got
                total += got
        return total
