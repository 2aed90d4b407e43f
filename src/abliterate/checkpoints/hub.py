"""Repositories on the hub: what they hold, and shards that are not on this disk.

Everything goes through ``huggingface_hub``: its cache, its token, its endpoint (``HF_ENDPOINT``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.checkpoints.safetensors_header import (
    FileStamp,
    TensorEntry,
    header_length,
    parse_shard,
)
from abliterate.checkpoints.shards import ShardSet, is_adapter, join_shards, shard_names
from abliterate.console import safe_bar
from abliterate.errors import CheckpointError, FetchError, first_line
from abliterate.storage.guarded_files import naming

# Weights in other formats: never opened (pickle runs code), so never downloaded.
NOT_FETCHED = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot"),
    *("*.tflite", "original/*", "consolidated*", "onnx/*", "adapter_model.*"),
)
_PICKLES = (".bin", ".pt", ".pth")
_HEADER_GUESS = 100_000  # most headers are shorter: one request gets length and header


@dataclass(frozen=True)
class HubRepo:
    """A model repository at one commit.

    Attributes:
        id: ``org/name``.
        revision: the commit.
        sizes: bytes of each of its files.
    """

    id: str
    revision: str
    sizes: Mapping[str, int] = field(repr=False)

    def cached(self, name: str) -> Path | None:
        """The file in the hub's cache, if it is there already."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.id, name, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def read(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file.

        Raises:
            FetchError: the hub does not give them.
        """
        if (path := self.cached(name)) is not None:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(length)
        if length == 0:
            return b""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        try:
            response = http_backoff(
                "GET",
                hf_hub_url(self.id, name, revision=self.revision),
                headers={
                    **build_hf_headers(),
                    "Range": f"bytes={start}-{start + length - 1}",
                    "Accept-Encoding": "identity",
                },
                follow_redirects=True,
                timeout=60,
            )
            hf_raise_for_status(response)
        except Exception as error:  # the client's many error types have no narrower common base
            raise FetchError(_unfetched(f"{self.id}/{name}", error)) from None
        content: bytes = response.content
        if response.status_code != 206 or len(content) != length:
            raise FetchError(
                f"{self.id}/{name}: the hub's server gives no part of a file: leave out --low-disk"
            )
        return content

    def fetch(self, name: str, folder: Path, stopped: Callable[[], bool]) -> Path:
        """Download a file into a folder, unless it is there already.

        Args:
            name: of the file.
            folder: where to; nothing goes into the hub's cache.
            stopped: asked again and again; True ends the download.

        Raises:
            FetchError: the hub does not give it.
            OSError: it cannot be written.
        """
        from huggingface_hub import hf_hub_download

        try:
            with naming(folder / name):
                path = hf_hub_download(
                    self.id,
                    name,
                    revision=self.revision,
                    local_dir=folder,
                    tqdm_class=_stoppable_bar(stopped),
                )
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise FetchError(_unfetched(f"{self.id}/{name}", error)) from None
        return Path(path)


def _stoppable_bar(stopped: Callable[[], bool]) -> Any:
    """A progress bar class: the one place where a download of the library's can be stopped."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(safe_bar(tqdm)):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> bool | None:
            if stopped():
                raise FetchError("stopped")
            return bool(super().update(n))

    return Bar


def look_up(name: str, revision: str | None) -> Any:
    """What the hub says of a model and its files, with their sizes; None if it says nothing."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception:  # the download that follows says what is wrong, or finds all in the cache
        return None


def check_files(where: str, names: Collection[str]) -> None:
    """Refuse a checkpoint without safetensors weights, saying how to obtain one with them.

    Args:
        where: the folder or hub id.
        names: of its files.

    Raises:
        CheckpointError: it has none.
    """
    top = [name for name in names if "/" not in name]
    if any(name.endswith(".safetensors") and not is_adapter(name) for name in top):
        return
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        raise CheckpointError(
            f"{where} holds GGUF weights ({ggufs[0]}), which can be neither run nor edited here: "
            "use the safetensors checkpoint that they were converted from"
        )
    pickles = sorted(name for name in top if name.endswith(_PICKLES) and not is_adapter(name))
    if pickles:
        raise CheckpointError(
            f"{where} holds pickle weights ({pickles[0]}), which are never opened: convert them "
            "with safetensors (model.save_pretrained writes them) first"
        )
    if any(map(is_adapter, top)):
        raise CheckpointError(
            f"{where} holds a PEFT adapter and no model: give the model that it was made for, or "
            "merge it into that first (PEFT's merge_and_unload, then save_pretrained)"
        )
    raise CheckpointError(f"{where} has no .safetensors weights")


def fetch_snapshot(name: str, revision: str | None, shards: bool) -> Path:
    """A model's files in the hub's cache.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit.
        shards: the safetensors too.

    Raises:
        CheckpointError: the hub does not give them, and the cache does not hold them.
    """
    ignored = [*NOT_FETCHED, *(() if shards else ("*.safetensors",))]
    return _fetch(name, revision, ignored=ignored)


def fetch_configuration(name: str, revision: str | None) -> Path:
    """A model's JSON files alone in the hub's cache; otherwise as :func:`fetch_snapshot`."""
    return _fetch(name, revision, allowed=["*.json"])


def _fetch(
    name: str,
    revision: str | None,
    allowed: list[str] | None = None,
    ignored: list[str] | None = None,
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored
            )
        )
    except Exception as error:  # the client's many error types have no narrower common base
        raise CheckpointError(
            f"model '{name}' cannot be fetched from the hub ({_reason(error)}): check the id, "
            "--revision and network, set HF_TOKEN if it is gated, or give a local folder"
        ) from None


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


def _unfetched(what: str, error: Exception) -> str:
    return f"{what} cannot be fetched from the hub ({_reason(error)})"


def _reason(error: Exception) -> str:
    return first_line(error)[:200]
