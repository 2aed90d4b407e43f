"""The header of a safetensors file: where each tensor lies.

The format is eight bytes of header length, a JSON header that gives each tensor's dtype, shape and
byte range, and the data. Reading it here (rather than through ``safetensors``) tells where each
tensor lies, so that a tensor can be edited in the copy of a file of any size. A checkpoint may come
from anyone: nothing in a header is believed before it is checked.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abliterate.errors import CheckpointError
from abliterate.storage.json_text import parse_json
from abliterate.storage.system_calls import BINARY, NONBLOCK

_CONTROL = re.compile(r"[\x00-\x1f]")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
_MAX_RANK = 16  # far past any real tensor; a product of endless factors would never end


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: its name on disk.
        dtype: the format's name of its dtype (``BF16``).
        shape: its shape.
        file: the shard that holds it.
        start: absolute byte offset in that file.
        end: offset of the byte behind it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class FileStamp:
    """How a file stood when it was first looked at; an edit of a file that moved on is refused."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its tensors and metadata in the header's order, its first data byte."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    stamp: FileStamp


def read_shard(path: Path) -> Shard:
    """Read and check a shard's header.

    Raises:
        CheckpointError: the file is truncated, or its header is damaged or contradicts itself.
    """
    return parse_shard(path, *_read_header(path))


def header_length(path: Path, first: bytes, size: int) -> int:
    """The bytes of a shard's header, from its first eight bytes and the file's size.

    Raises:
        CheckpointError: the file has not so many.
    """
    length = int.from_bytes(first[:8], "little")
    if size < 8 or len(first) < 8 or length > min(MAX_HEADER, size - 8):
        raise CheckpointError(f"{path} is truncated or no safetensors file")
    return length


def parse_shard(path: Path, raw: bytes, stamp: FileStamp) -> Shard:
    """Check a shard's header, without its length; raises as :func:`read_shard` does."""
    data_start = 8 + len(raw)
    try:
        header = parse_json(raw.decode("utf-8"), object_pairs_hook=unique_keys)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no strings")
        entries = [_entry(path, name, value, data_start) for name, value in header.items()]
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({str(error)[:200]!r})") from None
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise CheckpointError(
                f"{path}: tensor {entry.name[:200]!r} overlaps another or leaves a gap"
            )
        position = entry.end
    if position != stamp.size:
        raise CheckpointError(f"{path} should have {position} bytes but has {stamp.size}")
    return Shard(path, {entry.name: entry for entry in entries}, metadata, data_start, stamp)


def _read_header(path: Path) -> tuple[bytes, FileStamp]:
    try:
        # Without O_NONBLOCK a FIFO of that name would wait for a writer for ever.
        with open(os.open(path, os.O_RDONLY | NONBLOCK | BINARY), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"shard {path} is no regular file")
            length = header_length(path, file.read(8), status.st_size)
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"shard {path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"shard {path} cannot be read: {error.strerror}") from None
    if len(raw) != length:
        raise CheckpointError(f"{path} is truncated or no safetensors file")
    return raw, FileStamp.of(status)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name occurs twice")
    for name in unique:
        name.encode()  # JSON can spell half a surrogate pair, which no file name or terminal can
        if _CONTROL.search(name):
            raise ValueError(f"the name {name[:80]!r} holds control characters")
    return unique


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    dtype, shape = value["dtype"], tuple(value["shape"])
    start, end = value["data_offsets"]
    if dtype not in BITS:
        raise CheckpointError(f"{path}: tensor '{name}' has the unknown dtype {str(dtype)[:40]!r}")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)):
        raise ValueError(f"tensor '{name}' has a malformed shape or offset")
    if len(shape) > _MAX_RANK or start > end:
        raise ValueError(f"tensor '{name}' has a malformed shape or offset")
    if (end - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise CheckpointError(
            f"{path}: tensor '{name}' has {end - start} bytes, which its shape "
            f"{list(shape)} and dtype {dtype} contradict"
        )
    return TensorEntry(name, dtype, shape, path, data_start + start, data_start + end)
