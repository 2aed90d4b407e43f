"""A page about one thing: what is said of it, its figures, its tables; looks like the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.report.rendering import render
from abliterate.report.style import dark_scales
from abliterate.storage.artifacts import versions


@dataclass(frozen=True)
class PageFigure:
    """A figure of a page.

    Attributes:
        name: what its files are called.
        figure: of plotly, or None: then it is left out.
        caption: what it shows, with units.
        wide: on a phone it scrolls in a box of its own.
    """

    name: str
    figure: Any | None
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table of a page.

    Attributes:
        name: its heading.
        columns: their headings; none for a list of facts.
        rows: left out if there are none.
        text: how many columns, from the left, are text.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1


def figure_page(
    title: str,
    about: str,
    lines: Sequence[str],
    figures: Sequence[PageFigure],
    tables: Sequence[PageTable] = (),
    fine: str = "",
) -> str:
    """The page as text.

    Args:
        title: what it is about, also its heading.
        about: what kind of page it is.
        lines: plain text; the first is what a reader quotes.
        figures: those that were drawn are shown.
        tables: those with rows are shown.
        fine: in small print, how numbers are counted.

    Raises:
        UsageError: plotly is missing.
    """
    shown = [each for each in figures if each.figure is not None]
    drawn: dict[str, Any] = {each.name: each.figure for each in shown}
    page = {
        "title": title,
        "about": about,
        "lines": lines,
        "shown": shown,
        "tables": [each for each in tables if each.rows],
        "fine": fine,
        "figures": drawn,
        "versions": versions(),
    }
    payload = {
        "figures": {name: json.loads(made.to_json()) for name, made in drawn.items()},
        "scales": dark_scales(),
    }
    return render("figure.html.j2", page, payload)
