"""Data sets on the Hugging Face hub, named ``org/name[/config][@revision][:split]``."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.hub import (
    RETRIES,
    HubError,
    asking,
    is_commit,
    known_commit,
    look_up,
    patiently,
)

_HUB_ID = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.\[\]%+:-]+))?"
)


class HubDatasetError(Exception):
    """The hub does not give the rows; says why in one line."""


@dataclass(frozen=True)
class HubDataset:
    """A split of a data set.

    Attributes:
        id: ``org/name``.
        config: its configuration, or None for the default.
        revision: branch, tag or commit, or None.
        split: the split's name.
    """

    id: str
    config: str | None
    revision: str | None
    split: str

    @classmethod
    def parse(cls, name: str) -> HubDataset | None:
        """The data set of that name; None if it is no such name, or a path."""
        match = _HUB_ID.fullmatch(name)
        if match is None or name.startswith((".", "/", "~")):
            return None
        return cls(match["id"], match["config"], match["revision"], match["split"] or "train")

    @property
    def name(self) -> str:
        """``org/name``, or ``org/name@revision``: what a commit is remembered by."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    def rows(self, commits: MutableMapping[str, str]) -> list[Any]:
        """All rows.

        Args:
            commits: by :attr:`name`, the commits to read from; one that is looked up is added.

        Raises:
            HubDatasetError: the hub does not give them.
        """
        return self._load(commits, None)

    def first_rows(self, count: int | None, commits: MutableMapping[str, str]) -> list[Any]:
        """The first rows (None: all), streamed: of hundreds of gigabytes a slice may be wanted.

        Raises:
            HubDatasetError: the hub does not give them.
        """
        return self._load(commits, count, streaming=True)

    def _load(
        self, commits: MutableMapping[str, str], count: int | None, streaming: bool = False
    ) -> list[Any]:
        def read() -> list[Any]:
            builder = self._cached(commit) if hub_is_gone else self._builder(commit)
            if streaming and not hub_is_gone:
                return list(islice(builder.as_streaming_dataset(split=self.split), count))
            builder.download_and_prepare()
            return list(islice(builder.as_dataset(split=self.split), count))

        try:
            commit, hub_is_gone = self._find_commit(commits.get(self.name))
            with asking(self.id, self.revision or commit, "dataset"):
                rows = patiently(read, f"dataset '{self.id}'", RETRIES)
        except HubError as error:
            raise HubDatasetError(str(error)) from None
        commits[self.name] = commit
        return rows

    def _find_commit(self, known: str | None) -> tuple[str, bool]:
        """The commit to read, and whether the hub gives nothing now.

        ``datasets`` itself takes whatever revision it has in its cache where the hub fails.
        """
        revision = known or self.revision
        try:
            commit = str(look_up(self.id, revision, "dataset").sha)
        except HubError as error:
            commit = "" if error.missing else known_commit(self.id, revision, "dataset") or ""
            if not commit or not self._cache_folders(commit):
                raise
            if not _is_offline():
                log.warning("%s: going on with the cache's copy of commit %s", error, commit)
            return commit, True
        if not is_commit(revision):
            _remember(self.id, revision)
        return commit, False

    def _builder(self, commit: str) -> Any:
        import datasets

        builder = datasets.load_dataset_builder(self.id, self.config, revision=commit)
        if builder.hash != commit:
            return self._cached(commit)  # the hub failed meanwhile, and another one was taken
        return builder

    def _cached(self, commit: str) -> Any:
        """The rows that ``datasets`` prepared of this commit, and of no other.

        Raises:
            HubError: it has none.
        """
        from datasets.packaged_modules.cache.cache import Cache

        folders = self._cache_folders(commit)
        if len(folders) != 1:
            configs = ", ".join(sorted(folder.parts[-3] for folder in folders))
            which = f"several configurations ({configs}): name one" if folders else "no rows"
            raise HubError(f"dataset '{self.id}': the cache holds {which} of commit {commit}")
        config, version, _ = folders[0].parts[-3:]
        return Cache(
            repo_id=self.id,
            dataset_name=self.id.partition("/")[2],
            config_name=config,
            version=version,
            hash=commit,
        )

    def _cache_folders(self, commit: str) -> list[Path]:
        from datasets import config
        from datasets.naming import camelcase_to_snakecase

        owner, _, name = self.id.partition("/")
        root = Path(config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}"
        wanted = escape(self.config) if self.config else "*"
        return sorted(path for path in root.glob(f"{wanted}/*/{commit}") if path.is_dir())


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _remember(repo: str, revision: str | None) -> None:
    """Let the hub's cache note which commit a branch is at now, for when the hub is gone."""
    from huggingface_hub import hf_hub_download

    with suppress(Exception):  # that there is no such file is noted as well
        hf_hub_download(repo, "README.md", repo_type="dataset", revision=revision)
