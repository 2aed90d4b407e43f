"""Model repositories on the hub: which of their files are fetched, and what kind they are of.

How the hub is asked, and what its errors mean, is ``abliterate.hub``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from abliterate.checkpoints.file_list import ADAPTER_CONFIG, adapter_base, is_adapter
from abliterate.checkpoints.safetensors_header import (
    FileStamp,
    TensorEntry,
    header_length,
    parse_shard,
)
from abliterate.checkpoints.shards import (
    INDEX,
    ShardSet,
    join_shards,
    read_index,
    shard_names,
)
from abliterate.errors import CheckpointError, DiskSpaceError
from abliterate.hub import RETRIES, HubError, HubRepo, asking, patiently

#: What a command takes of a checkpoint: its configuration (and headers), what runs the model, or
#: all that an edited copy of it holds.
Need = Literal["headers", "run", "copy"]

# Weights in other formats: never opened (pickle runs code), so never downloaded.
NOT_FETCHED = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot"),
    *("*.pkl", "*.pickle", "*.npz", "*.tflite", "*.mlmodel", "*.mlpackage/*", "*.llamafile"),
    *("original/*", "consolidated*", "onnx/*", "adapter_model.*", "checkpoint-*/*"),
)
# What a model runs without: other sets of its weights, pictures and recordings.
_NOT_RUN = (
    *("*/*.safetensors", "*.mp4", "*.mov", "*.webm", "*.gif", "*.png", "*.jpg", "*.jpeg"),
    *("*.webp", "*.svg", "*.pdf", "*.mp3", "*.wav", "*.flac", "*.ogg", "*.zip", "*.tar*"),
    *("*.ipynb", "events.out.tfevents*"),
)
# Of a model whose weights stay where they are.
_CONFIGURATION = ["*config*.json", "*.index.json", "*.py"]
_HEADER_GUESS = 100_000  # most headers are shorter: one request gets length and header


def remote_adapter_base(repo: HubRepo) -> str | None:
    """What a repository's ``adapter_config.json`` names as its base model, if it can be read."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repo.id, ADAPTER_CONFIG, revision=repo.revision)
    except Exception:  # gated, or not there: it only makes an error message better
        return None
    return adapter_base(Path(path))


def _patterns(need: Need, shards: bool) -> tuple[list[str] | None, list[str]]:
    """Which files are allowed (None: all) and which are left out."""
    if need == "headers":
        return _CONFIGURATION, list(NOT_FETCHED)
    others = () if need == "copy" else _NOT_RUN
    return None, [*NOT_FETCHED, *others, *(() if shards else ("*.safetensors",))]


def fetch_snapshot(repo: HubRepo, revision: str | None, need: Need, shards: bool) -> Path:
    """A model's files in the hub's cache.

    Args:
        repo: which, and at which commit.
        revision: the name that the user has for this commit, which the cache remembers.
        need: what for.
        shards: the safetensors too.

    Raises:
        CheckpointError: the hub does not give them.
        DiskSpaceError: the cache has no room for them.
    """
    from huggingface_hub import snapshot_download

    allowed, ignored = _patterns(need, shards)
    _check_room(repo, allowed, ignored)

    def download(at: str | None) -> Path:
        return Path(
            snapshot_download(repo.id, revision=at, allow_patterns=allowed, ignore_patterns=ignored)
        )

    what = f"model '{repo.id}'"
    try:
        with asking(repo.id, revision):
            path = patiently(lambda: download(revision), what, RETRIES)
            if path.name != repo.revision:  # it moved on since it was looked up
                path = patiently(lambda: download(repo.revision), what, RETRIES)
    except HubError as error:
        kept = "; finished files are kept: the same command fetches the rest"
        raise CheckpointError(f"{error}{kept if error.passing else ''}") from None
    return path


def cached_snapshot(repo: str, commit: str, need: Need) -> Path | None:
    """The same from the cache alone; None if it does not hold all of them."""
    from huggingface_hub import snapshot_download

    allowed, ignored = _patterns(need, True)
    try:
        path = Path(
            snapshot_download(
                repo,
                revision=commit,
                allow_patterns=allowed,
                ignore_patterns=ignored,
                local_files_only=True,
            )
        )
    except Exception:  # whoever asked has the reason why the hub was not asked
        return None
    if need == "headers":
        return path if (path / "config.json").is_file() else None
    names: Sequence[str] = [file.name for file in path.glob("*.safetensors")]
    if (path / INDEX).is_file():
        names = sorted(set(read_index(path / INDEX)["weight_map"].values()))
    return path if names and all((path / name).is_file() for name in names) else None


def _check_room(repo: HubRepo, allowed: list[str] | None, ignored: list[str]) -> None:
    """Refuse what does not fit before a byte of it comes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    names = filter_repo_objects(repo.sizes, allow_patterns=allowed, ignore_patterns=ignored)
    needed = sum(repo.sizes[name] for name in names if repo.cached(name) is None)
    cache = Path(constants.HF_HUB_CACHE).absolute()
    there = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DiskSpaceError(
            f"model '{repo.id}' needs {needed / 1e9:.1f} GB more in the hub's cache {cache}, whose "
            f"disk has {free / 1e9:.1f} GB left: free some, or set HF_HOME to a larger one"
        )
    if needed and not os.access(there, os.W_OK):
        raise CheckpointError(
            f"model '{repo.id}' is not whole in the hub's cache {cache}, which cannot be written: "
            "set HF_HOME to a folder that can"
        )


def read_remote_shards(folder: Path, repo: HubRepo) -> ShardSet:
    """Every header of a checkpoint whose shards lie on the hub.

    Args:
        folder: its other files.
        repo: where the shards are.

    Raises:
        CheckpointError: a header is damaged, or index and shards disagree.
        FetchError: the hub does not give a header.
    """
    present = [
        n for n in repo.sizes if n.endswith(".safetensors") and "/" not in n and not is_adapter(n)
    ]
    names, index = shard_names(folder, present)
    shards = {}
    for name in names:
        # Where it would lie in the cache; where it does lie is for the editor to say.
        path, size = folder / name, repo.sizes.get(name)
        if size is None:
            raise CheckpointError(f"shard {repo.id}/{name} is missing")
        first = repo.read(name, 0, min(size, _HEADER_GUESS))
        length = header_length(path, first, size)
        raw = first[8 : 8 + length]
        if len(raw) < length:
            raw = repo.read(name, 8, length)
        # A commit's files never change: what is downloaded later must have this header.
        shards[name] = parse_shard(path, raw, FileStamp(size, 0))

    def read(entry: TensorEntry) -> bytes:
        return repo.read(entry.file.name, entry.start, entry.end - entry.start)

    return join_shards(folder, shards, index, read)
