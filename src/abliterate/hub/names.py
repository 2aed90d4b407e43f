"""How a repository is written: ``org/name``, or ``org/name@REVISION``."""

from __future__ import annotations

import re

_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A page of a model, as a browser, git, ollama or fsspec writes it; no page of a data set or space.
_PAGE = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?!(?:datasets|spaces)/)"
    r"(?P<id>[\w.-]+/[\w.-]+?)(?:\.git)?(?:@(?P<at>[^/?#]+))?"
    r"(?:/(?:tree|commit|blob|resolve)/(?P<revision>[^/?#]+))?(?:[/?#:].*)?",
    re.IGNORECASE,
)


def split_id(name: str) -> tuple[str, str | None] | None:
    """The id and the revision (or None) of ``org/name[@REVISION]``; None if it is no such name."""
    repo, at, revision = name.partition("@")
    if _ID.fullmatch(repo) is None or name.startswith(".") or (at and not revision):
        return None
    return repo, revision or None


def suggested_id(name: str) -> str | None:
    """How to write what is a page of the hub, or an id with a slash too many; None if neither."""
    if (page := _PAGE.fullmatch(name)) is not None:
        revision = page["revision"] or page["at"]
        return page["id"] if revision in (None, "main") else f"{page['id']}@{revision}"
    bare = name.strip().rstrip("/")
    return bare if bare != name and split_id(bare) is not None else None
