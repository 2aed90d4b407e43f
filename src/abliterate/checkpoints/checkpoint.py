"""A checkpoint, found by its folder or hub id: where its files lie, and what identifies it.

Imports no torch: a name that is wrong is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.checkpoints.file_list import ADAPTER_CONFIG, adapter_base, check_files
from abliterate.console import log
from abliterate.errors import CheckpointError, UsageError
from abliterate.hub.names import split_id, suggested_id
from abliterate.settings.values import check_revision
from abliterate.storage.artifacts import hash_file

if TYPE_CHECKING:
    from abliterate.checkpoints.hub import Need
    from abliterate.hub import HubError, HubRepo


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
    name: str, revision: str | None = None, leave_shards: bool = False, need: Need = "run"
) -> Checkpoint:
    """Resolve a local folder, or download a hub id into the cache (token from ``HF_TOKEN``).

    Args:
        name: the folder, or the hub id as ``org/name`` or ``org/name@REVISION``.
        revision: branch, tag or commit of the hub id.
        leave_shards: download everything but the weights.
        need: what for: of a hub id no more is fetched than that takes. For ``headers`` the weights
            stay where they are, and ``remote`` reads of them.

    Raises:
        CheckpointError: no such folder, or the hub does not give it.
        UsageError: ``leave_shards`` for a folder, or two revisions.
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
    repo, asked = hub_name(name, revision)
    return _find_on_hub(repo, asked, leave_shards, need)


def hub_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The hub id and the revision (or None) that a user's name for a checkpoint means.

    Args:
        name: ``org/name`` or ``org/name@REVISION``.
        revision: the one given beside it.

    Raises:
        CheckpointError: it is no hub id.
        UsageError: it names another revision than the one beside it, or one that git cannot have.
    """
    found = split_id(name)
    if found is None:
        if (written := suggested_id(name)) is not None:
            raise CheckpointError(f"model '{name}' is no existing folder: write {written}")
        raise CheckpointError(f"model '{name}' is neither an existing folder nor a hub id")
    repo, named = found
    if named is None:
        return repo, revision
    try:
        check_revision(named)
    except ValueError as error:
        raise UsageError(f"{name}: what follows the @ {error}") from None
    if revision not in (None, named):
        raise UsageError(f"{name} and --revision {revision} name two revisions: leave one out")
    return repo, named


def _no_config(folder: Path) -> CheckpointError:
    """What a folder without a configuration holds instead, if that can be told."""
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*")]
    try:
        check_files(str(folder), names, lambda: adapter_base(folder / ADAPTER_CONFIG))
    except CheckpointError as error:
        told = ("GGUF", "adapter", "consolidated", "pickle")
        if any(kind in str(error).removeprefix(str(folder)) for kind in told):
            return error
    return CheckpointError(f"{folder} has no config.json: it is no transformers checkpoint")


def _find_on_hub(name: str, revision: str | None, leave_shards: bool, need: Need) -> Checkpoint:
    from abliterate.hub import HubError, HubRepo, look_up

    try:
        info = look_up(name, revision)
    except HubError as error:
        return _find_in_cache(name, revision, need, error)
    files = info.siblings or ()
    sizes = {file.rfilename: file.size for file in files if file.size is not None}
    repo = HubRepo(name, info.sha, sizes)

    def base() -> str | None:
        from abliterate.checkpoints.hub import remote_adapter_base

        return remote_adapter_base(repo)

    check_files(name, [file.rfilename for file in files], base)
    from abliterate.checkpoints.hub import fetch_snapshot

    if leave_shards or need == "headers":
        return Checkpoint(name, fetch_snapshot(repo, revision, need, False), info.sha, repo)
    return Checkpoint(name, fetch_snapshot(repo, revision, need, True), info.sha)


def _find_in_cache(name: str, revision: str | None, need: Need, reason: HubError) -> Checkpoint:
    """What the cache holds whole of a revision whose commit it knows, where the hub gives none."""
    from huggingface_hub import constants

    from abliterate.hub import known_commit

    if reason.missing or (commit := known_commit(name, revision)) is None:
        raise CheckpointError(str(reason)) from None
    from abliterate.checkpoints.hub import cached_snapshot

    path = cached_snapshot(name, commit, need)
    if path is None:
        raise CheckpointError(str(reason)) from None
    check_files(name, [file.name for file in path.iterdir()])
    if not constants.HF_HUB_OFFLINE:
        log.warning("%s: going on with the cache's copy of commit %s", reason, commit)
    return Checkpoint(name, path, commit)
