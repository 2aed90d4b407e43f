"""A checkpoint, found by its folder or hub id: where its files lie, and what identifies it.

Imports no torch: a name that is wrong is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.errors import CheckpointError, UsageError
from abliterate.storage.artifacts import hash_file

if TYPE_CHECKING:
    from abliterate.checkpoints.hub import HubRepo


# Of weights, configurations, templates, code and vocabularies.
_READ = (".safetensors", ".json", ".jinja", ".py", ".txt", ".model", ".tiktoken", ".bin")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        name: the folder or hub id as the user gave it.
        folder: where its files lie (for a hub id, the cache's snapshot).
        revision: the hub commit, or None for a local folder.
        remote: where its shards lie, if they are still on the hub and everything else is here.
    """

    name: str
    folder: Path
    revision: str | None = None
    remote: HubRepo | None = None

    def identity(self) -> dict[str, Any]:
        """What artifacts record of it: name and hub commit, or the hashes of its files."""
        if self.revision is not None:
            return {"id": self.name, "revision": self.revision}
        files = sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file() and path.suffix in (".safetensors", ".json", ".jinja", ".model")
        )
        return {"id": self.name, "files": {path.name: hash_file(path) for path in files}}


def check_regular_files(folder: Path) -> None:
    """Refuse pipes, sockets and devices under names that libraries read: it would never end.

    Raises:
        CheckpointError: there is one, or a link to one.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ and path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is a pipe, socket or device, and no file: remove it")


def find_checkpoint(
    name: str, revision: str | None = None, leave_shards: bool = False
) -> Checkpoint:
    """Resolve a local folder, or download a hub id into the cache (token from ``HF_TOKEN``).

    Args:
        name: the folder or hub id.
        revision: branch, tag or commit of the hub id.
        leave_shards: download everything but the weights.

    Raises:
        CheckpointError: no such folder, or the hub does not give it.
        UsageError: ``leave_shards`` for a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if leave_shards:
            raise UsageError(
                f"--low-disk is for hub ids: {name} is a folder, which is never deleted"
            )
        if not (folder / "config.json").is_file():
            raise _no_config(folder)
        check_regular_files(folder)
        return Checkpoint(name, folder)
    if folder.exists():
        raise CheckpointError(f"{name} is a file: give the checkpoint's folder or a hub id")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"model '{name}' is neither an existing folder nor a hub id")
    return _find_on_hub(name, revision, leave_shards)


def _no_config(folder: Path) -> CheckpointError:
    """What a folder without a configuration holds instead, if that can be told."""
    if any(folder.glob("*.gguf")):
        return CheckpointError(
            f"{folder} holds GGUF weights, which can be neither run nor edited here: use "
            "the safetensors checkpoint that they were converted from"
        )
    if (folder / "adapter_config.json").is_file():
        from abliterate.checkpoints.hub import check_files
        from abliterate.checkpoints.shards import ADAPTER_CONFIG, weight_files

        check_files(str(folder), weight_files(folder) or [ADAPTER_CONFIG])
    return CheckpointError(f"{folder} has no config.json: it is no transformers checkpoint")


def _find_on_hub(name: str, revision: str | None, leave_shards: bool) -> Checkpoint:
    from abliterate.checkpoints.hub import HubRepo, check_files, fetch_snapshot, look_up

    info = look_up(name, revision)
    if info is not None:
        check_files(name, [file.rfilename for file in info.siblings or ()])
    elif leave_shards:
        raise CheckpointError(
            f"model '{name}' cannot be found on the hub, which --low-disk needs: check the id, "
            "--revision and network, and set HF_TOKEN if it is gated"
        )
    if not leave_shards:
        path = fetch_snapshot(name, revision, True)
        return Checkpoint(name, path, path.name)
    path = fetch_snapshot(name, info.sha, False)
    sizes = {file.rfilename: file.size for file in info.siblings or () if file.size is not None}
    return Checkpoint(name, path, info.sha, HubRepo(name, info.sha, sizes))


def find_config(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint's configuration; of a hub id its small files alone are fetched.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json: it is no transformers checkpoint")
        check_regular_files(folder)
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"model '{name}' is neither an existing folder nor a hub id")
    from abliterate.checkpoints.hub import fetch_configuration

    return fetch_configuration(name, revision)
