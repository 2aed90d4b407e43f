"""The shards of a checkpoint: which files hold its weights, by its index, and all their tensors.

A checkpoint may come from anyone: nothing in an index is believed before it is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abliterate.checkpoints.file_list import MAX_CONFIG as MAX_CONFIG
from abliterate.checkpoints.file_list import is_adapter as is_adapter
from abliterate.checkpoints.safetensors_header import (
    DTYPES,
    MAX_HEADER,
    FileStamp,
    Shard,
    TensorEntry,
    read_shard,
    unique_keys,
)
from abliterate.errors import CheckpointError
from abliterate.storage.json_text import parse_json
from abliterate.storage.portable_names import is_portable

# Read at once where stored bytes are compared.
_COMPARED_BYTES = 32 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


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
        if inside(path.parent, path).stat().st_size > MAX_HEADER:
            raise ValueError("it is too large")
        text = path.read_text(encoding="utf-8")
        index = parse_json(text, object_pairs_hook=unique_keys)
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
        and is_portable(name)
        and not name.startswith("..")
    )


def check_unchanged(shards: ShardSet) -> None:
    """Refuse shards that are no longer those whose headers were read.

    Raises:
        CheckpointError: a file's size or time of change is another.
    """
    check_stamps({shard.path: shard.stamp for shard in shards.shards.values()}, "it")


def check_stamps(stamps: Mapping[Path, FileStamp], written: str) -> None:
    """Refuse files that were written to since they were stamped.

    Args:
        stamps: how each stood.
        written: what nothing may write to, in words.

    Raises:
        CheckpointError: a file's size or time of change is another.
    """
    for path, stamp in stamps.items():
        try:
            same = FileStamp.of(path.stat()) == stamp
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{path} changed while it was read: run the command again once nothing writes to "
                f"{written}"
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
