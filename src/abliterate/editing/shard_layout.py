"""What each shard of the edited checkpoint will hold, byte for byte, before any is written."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from abliterate.checkpoints.safetensors_header import BITS, Shard, TensorEntry
from abliterate.checkpoints.shards import ShardSet


@dataclass(frozen=True)
class NewTensor:
    """A tensor that the source does not hold in this form.

    Attributes:
        dtype: the format's name of its dtype.
        shape: its shape.
        origin: the tensor whose bytes it takes, or None if it is computed or constant.
        content: its bytes where they are constant, else None.
    """

    dtype: str
    shape: tuple[int, ...]
    origin: TensorEntry | None = None
    content: bytes | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorChanges:
    """How the set of tensors changes.

    Attributes:
        added: by shard and name, what is appended to the shard.
        replaced: by the name of the tensor whose place it takes, new name and tensor.
        removed: names of tensors that are left out.
    """

    added: Mapping[str, Mapping[str, NewTensor]] = field(default_factory=dict)
    replaced: Mapping[str, tuple[str, NewTensor]] = field(default_factory=dict)
    removed: Collection[str] = ()


@dataclass(frozen=True)
class TensorOffsets:
    """A tensor of the edited shard.

    Attributes:
        name: in the edited checkpoint.
        start: its first byte in the file.
        size: its bytes.
        origin: the tensor whose bytes it takes, or None.
        content: its bytes where they are constant, else None.
        replaces: name of the source's tensor whose place it takes.
    """

    name: str
    start: int
    size: int
    origin: TensorEntry | None
    content: bytes | None = None
    replaces: str | None = None


@dataclass(frozen=True)
class ShardLayout:
    """A shard of the edited checkpoint.

    Attributes:
        shard: the source's.
        header: its new first bytes, or None where they stay as they are.
        tensors: in the order of their bytes.
        size: bytes of the whole file.
    """

    shard: Shard
    header: bytes | None
    tensors: tuple[TensorOffsets, ...]
    size: int


def lay_out(shard: Shard, changes: TensorChanges) -> ShardLayout:
    """Where every tensor of a shard will lie."""
    appended = changes.added.get(shard.path.name, {})
    names = shard.tensors.keys()
    if not appended and not names & {*changes.replaced, *changes.removed}:
        same = tuple(
            TensorOffsets(entry.name, entry.start, entry.end - entry.start, entry)
            for entry in sorted(shard.tensors.values(), key=lambda entry: (entry.start, entry.end))
        )
        return ShardLayout(shard, None, same, shard.stamp.size)
    return _new_layout(shard, changes, appended)


def _new_layout(
    shard: Shard, changes: TensorChanges, appended: Mapping[str, NewTensor]
) -> ShardLayout:
    fresh: dict[str, NewTensor] = {}  # in the order of the source's header
    replaces: dict[str, str] = {}
    for name, entry in shard.tensors.items():
        if name in changes.replaced:
            new, tensor = changes.replaced[name]
            fresh[new], replaces[new] = tensor, name
        elif name not in changes.removed:
            fresh[name] = NewTensor(entry.dtype, entry.shape, entry)

    def position(name: str) -> tuple[int, int]:
        return shard.tensors[replaces.get(name, name)].start, fresh[name].size

    by_bytes = sorted(fresh, key=position)
    fresh |= appended
    starts, end = {}, 0
    for name in (*by_bytes, *appended):
        starts[name], end = end, end + fresh[name].size
    header: dict[str, Any] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    for name, tensor in fresh.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], starts[name] + tensor.size],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns the data to eight bytes
    begin = 8 + len(raw)
    placed = tuple(
        TensorOffsets(
            name,
            begin + starts[name],
            fresh[name].size,
            fresh[name].origin,
            fresh[name].content,
            replaces.get(name),
        )
        for name in (*by_bytes, *appended)
    )
    return ShardLayout(shard, len(raw).to_bytes(8, "little") + raw, placed, begin + end)


def new_index(shards: ShardSet, changes: TensorChanges) -> dict[str, Any] | None:
    """The index of the edited checkpoint; None if it stays as it is or there is none."""
    if shards.index is None or changes == TensorChanges():
        return None
    weight_map, total = {}, 0
    for name, file in shards.index["weight_map"].items():
        entry = shards.tensors[name]
        if name in changes.replaced:
            new, tensor = changes.replaced[name]
            weight_map[new] = file
            total += tensor.size - (entry.end - entry.start)
        elif name in changes.removed:
            total -= entry.end - entry.start
        else:
            weight_map[name] = file
    for file, tensors in changes.added.items():
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.size for tensor in tensors.values())
    metadata = shards.index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, Mapping) else {}
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += total
    return {**shards.index, "metadata": metadata, "weight_map": weight_map}
