"""The README as a package index shows it: there its relative links would lead nowhere.

``url`` of ``[tool.hatch.metadata.hooks.custom]`` in pyproject.toml is where the repository's files
can be seen, once there is such a place: links and pictures then lead there. Until then a link is
its text with the file's name, and pictures are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://)([^)\s]+)\)")
_SAID = (
    "Pictures and links here are relative: they work in a checkout and in the source distribution."
)
_SAYS = "Files named here are in the source distribution."


def for_an_index(text: str, url: str) -> str:
    """A README without relative links.

    Args:
        text: Markdown whose links and pictures are relative to the repository.
        url: what stands before a file's path in a public place, or nothing.
    """

    def absolute(match: re.Match[str]) -> str:
        picture, label, place = match.groups()
        if place.startswith("#"):
            return match[0]
        if url:
            return f"{picture}[{label}]({url.rstrip('/')}/{place})"
        file = place.partition("#")[0]
        return "" if picture else label if label == file else f"{label} ({file})"

    replaced = text.replace(_SAID, "" if url else _SAYS)
    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(absolute, replaced))


class Readme(MetadataHookInterface):
    """Sets the one field that pyproject.toml leaves open."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the README into the metadata."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        told = for_an_index(text, self.config.get("url", ""))
        metadata["readme"] = {"content-type": "text/markdown", "text": told}
