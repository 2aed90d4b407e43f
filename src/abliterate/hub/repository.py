"""A repository at one commit: what it holds, and parts of its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.console import safe_bar
from abliterate.errors import FetchError
from abliterate.hub.patience import patiently
from abliterate.hub.reasons import HubError, asking, explain
from abliterate.storage.guarded_files import naming

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 60.0  # seconds without a byte
# A download is itself patient with single requests.
RETRIES = 2


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit's hash, which never means anything else later."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def known_commit(repo: str, revision: str | None, kind: str = "model") -> str | None:
    """The commit of a revision as far as the cache knows: the last that the hub named for it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if is_commit(revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type=kind))
    try:
        commit = (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return commit if is_commit(commit) else None


def look_up(repo: str, revision: str | None, kind: str = "model") -> Any:
    """What the hub says of a repository: its commit, and its files with their sizes.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit.
        kind: ``model`` or ``dataset``.

    Raises:
        HubError: it says nothing, or that there is no such repository or revision.
    """
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().repo_info(
            repo,
            repo_type=kind,
            revision=revision,
            files_metadata=kind == "model",
            timeout=_TIMEOUT,
        )

    with asking(repo, revision, kind):
        info = patiently(ask, f"{kind} '{repo}'")
    if not is_commit(info.sha):
        raise HubError(f"{kind} '{repo}': the hub names no commit: check HF_ENDPOINT")
    return info


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
        """Some bytes of a file; no more than these ever come into memory.

        Raises:
            FetchError: the hub does not give them.
        """
        if (path := self.cached(name)) is not None:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(length)
        if length == 0:
            return b""
        try:
            with asking(f"{self.id}/{name}", self.revision):
                return patiently(lambda: self._read(name, start, length), f"{self.id}/{name}")
        except HubError as error:
            raise FetchError(str(error)) from None

    def _read(self, name: str, start: int, length: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        part = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET",
            hf_hub_url(self.id, name, revision=self.revision),
            headers={**build_hf_headers(), **part},
            follow_redirects=True,
            timeout=_TIMEOUT,
        ) as response:
            if response.status_code >= 400:
                hf_raise_for_status(response)
            content = bytearray()
            if response.status_code == 206:
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > length:
                        break
        if response.status_code != 206 or len(content) != length:
            raise HubError(
                f"{self.id}/{name}: the hub's server gives no part of a file: leave out "
                "--low-disk, or download the model first and give its folder"
            )
        return bytes(content)

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

        def download() -> str:
            return str(
                hf_hub_download(
                    self.id,
                    name,
                    revision=self.revision,
                    local_dir=folder,
                    tqdm_class=_stoppable_bar(stopped),
                )
            )

        try:
            with naming(folder / name):
                return Path(patiently(download, f"{self.id}/{name}", RETRIES))
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk: the caller says what it means
            reason = explain(error, f"{self.id}/{name}", self.revision, "model")
            raise FetchError(str(reason)) from None


def _stoppable_bar(stopped: Callable[[], bool]) -> Any:
    """A progress bar class: the one place where a download of the library's can be stopped."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(safe_bar(tqdm)):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> bool | None:
            if stopped():
                raise FetchError("stopped")
            return bool(super().update(n))

    return Bar
