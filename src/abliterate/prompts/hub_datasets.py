"""Data sets on the Hugging Face hub, named ``org/name[/config][@revision][:split]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from abliterate.errors import first_line

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

    def rows(self) -> list[Any]:
        """All rows.

        Raises:
            HubDatasetError: the hub does not give them.
        """
        return self._load(None)

    def first_rows(self, count: int | None) -> list[Any]:
        """The first rows (None: all), streamed: of hundreds of gigabytes a slice may be wanted.

        Raises:
            HubDatasetError: the hub does not give them.
        """
        return self._load(count, streaming=True)

    def _load(self, count: int | None, **options: bool) -> list[Any]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.id, self.config, split=self.split, revision=self.revision, **options
            )
            return list(islice(rows, count))
        except Exception as error:  # the client's many error types have no narrower common base
            raise HubDatasetError(first_line(error)) from None
