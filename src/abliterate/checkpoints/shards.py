"""Safetensors shards on disk: their headers, and where each tensor lies.

The format is eight bytes of header length, a JSON header that gives each tensor's dtype, shape and
byte range, and the data. Reading it here (rather than through ``safetensors``) tells where each
tensor lies, so that a tensor can be edited in the copy of a file of any size. A checkpoint may come
from anyone: nothing in a header or an index is believed before it is checked.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abliterate.errors import CheckpointError
from abliterate.storage.json_text import parse_json

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
_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
# Read at once where stored bytes are compared.
_COMPARED_BYTES = 32 << 20
_MAX_RANK = 16  # far past any real tensor; a product of endless factors would never end
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_CONFIG = 32 << 20  # bytes of a config.json: no model's is larger
ADAPTER_CONFIG = "adapter_config.json"
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


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


@dataclass(frozen=True)
class ShardSet:
    """All shards of a checkpoint.

    Attributes:
        folder: the checkpoint.
        shards: by file name, in order.
        index: the parsed index, or None for a single file.
        tensors: of all shards, by name.
        read: gives a (small) tensor's bytes, wherever its shard lies.
    """

    folder: Path
    shards: Mapping[str, Shard]
    index: Mapping[str, Any] | None
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    read: Callable[[TensorEntry], bytes] = field(repr=False, compare=False)

    def values(self, name: str) -> torch.Tensor:
        """A (small) tensor's values.

        Raises:
            CheckpointError: it is stored in a dtype that is no plain floating point.
        """
        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"tensor '{name}' is stored as {entry.dtype}, not as floats")
        raw = bytearray(self.read(entry))
        return torch.frombuffer(raw, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


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
    if size < 8 or len(first) < 8 or length > min(_MAX_HEADER, size - 8):
        raise CheckpointError(f"{path} is truncated or no safetensors file")
    return length


def parse_shard(path: Path, raw: bytes, stamp: FileStamp) -> Shard:
    """Check a shard's header, without its length; raises as :func:`read_shard` does."""
    data_start = 8 + len(raw)
    try:
        header = parse_json(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
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
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name occurs twice")
    for name in unique:
        name.encode()  # JSON can spell half a surrogate pair, which no file name or terminal can
        if any(ord(letter) < 32 for letter in name):
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


def read_shards(folder: Path) -> ShardSet:
    """Read every header of a checkpoint, through its index if it has one.

    Raises:
        CheckpointError: a shard is missing or damaged, or index and shards disagree.
    """
    present = weight_files(folder)
    names, index = shard_names(folder, present)
    shards = {name: read_shard(inside(folder, folder / name)) for name in names}
    return join_shards(folder, shards, index, _read_local)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files in a folder that may hold a model's weights.

    An adapter that lies beside a model is no part of it.
    """
    return [path.name for path in folder.glob("*.safetensors") if not is_adapter(path.name)]


def is_adapter(name: str) -> bool:
    """Whether a file is one of those that PEFT writes for an adapter."""
    return name == ADAPTER_CONFIG or name.startswith("adapter_model.")


def shard_names(
    folder: Path, present: Collection[str]
) -> tuple[list[str], Mapping[str, Any] | None]:
    """Which files hold the weights, and the index if there is one.

    Args:
        folder: the checkpoint; the index lies in it.
        present: names of its safetensors files.

    Raises:
        CheckpointError: the index is damaged, or there is neither index nor a single file, or the
            loading library would take other files than these.
    """
    _refuse_other_weights(folder)
    parts = sorted(name for name in present if _DISTRIBUTED.match(name))
    if parts:  # the loading library would take these, whatever else there is
        raise CheckpointError(
            f"{folder} holds parts of a distributed checkpoint ({parts[0]}): save the whole model "
            "with transformers first"
        )
    if SINGLE in present:
        return [SINGLE], None
    if (folder / INDEX).is_file():
        index = read_index(folder / INDEX)
        return sorted(set(index["weight_map"].values())), index
    # Without an index the loading libraries would not find these either, save a lone file.
    if len(present) != 1:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    return sorted(present), None


def _refuse_other_weights(folder: Path) -> None:
    path = folder / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG:
            return
        named = parse_json(path.read_bytes()).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # who reads the configuration says what is wrong with it
    if named is not None and named not in (SINGLE, INDEX):
        raise CheckpointError(
            f"{path} names other weights (transformers_weights: "
            f"{str(named)[:80]!r}) than {SINGLE} or {INDEX}: rename them and leave the entry out"
        )


def join_shards(
    folder: Path,
    shards: Mapping[str, Shard],
    index: Mapping[str, Any] | None,
    read: Callable[[TensorEntry], bytes],
) -> ShardSet:
    """The shards as one checkpoint.

    Raises:
        CheckpointError: a tensor occurs twice, or index and shards disagree.
    """
    tensors: dict[str, TensorEntry] = {}
    for shard in shards.values():
        for name, entry in shard.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor '{name}' is in both {tensors[name].file} and {shard.path}"
                )
            tensors[name] = entry
    if index is not None:
        for name, file in index["weight_map"].items():
            if name not in shards[file].tensors:
                raise CheckpointError(
                    f"{folder / INDEX} places '{name}' in {file}, which does not hold it"
                )
        extra = sorted(set(tensors) - set(index["weight_map"]))
        if extra:
            raise CheckpointError(f"{folder / INDEX} does not list tensor '{extra[0]}'")
    return ShardSet(folder, shards, index, tensors, read)


def _read_local(entry: TensorEntry) -> bytes:
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.end - entry.start)


def inside(folder: Path, path: Path) -> Path:
    """``path``, if what it leads to lies in ``folder`` or is a blob of the same hub-cache entry.

    Raises:
        CheckpointError: it is a symlink that leaves the checkpoint, or leads nowhere.
    """
    try:
        root, real = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, or a link that leads nowhere") from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be followed: {error}") from None
    allowed = [root]
    if root.parent.name == "snapshots":  # <cache>/models--org--name/{blobs,snapshots/<revision>}
        allowed.append(root.parent.parent / "blobs")
    if not any(base in real.parents for base in allowed):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint: put the file itself there"
        )
    return path


def read_index(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint's index.

    Raises:
        CheckpointError: it is damaged or names a file outside its folder.
    """
    try:
        if inside(path.parent, path).stat().st_size > _MAX_HEADER:
            raise ValueError("it is too large")
        text = path.read_text(encoding="utf-8")
        index = parse_json(text, object_pairs_hook=_unique_keys)
        names = list(index["weight_map"].values())
        good = all(isinstance(name, str) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error)[:200]!r})") from None
    for name in names if good else ():
        if not _is_plain_name(name):
            raise CheckpointError(
                f"{path} names the shard {name[:200]!r}, which is no plain file name"
            )
    if not good or not index["weight_map"]:
        raise CheckpointError(f"{path} is damaged (weight_map)")
    return dict(index)


def _is_plain_name(name: str) -> bool:
    """Whether ``name`` is a file of the folder itself on every system."""
    return (
        name.endswith(".safetensors")
        and len(name) <= 255
        and name.isprintable()
        and not set(name) & set("/\\:")
        and not name.startswith("..")
    )


def check_unchanged(shards: ShardSet) -> None:
    """Refuse shards that are no longer those whose headers were read.

    Raises:
        CheckpointError: a file's size or time of change is another.
    """
    for shard in shards.shards.values():
        try:
            same = FileStamp.of(shard.path.stat()) == shard.stamp
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{shard.path} changed while it was read: run the command again once nothing "
                "writes to it"
            )


def same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors are stored as the same bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        remaining = a.end - a.start
        while remaining:
            size = min(remaining, _COMPARED_BYTES)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True
