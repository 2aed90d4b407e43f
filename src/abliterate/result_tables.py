"""Results as tables: pandas, and HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.extras import import_extra
from abliterate.storage.artifacts import finite

Row = Mapping[str, Any]


def to_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """A result as JSON takes it: what is not finite is None, as in the command line's records."""
    cleaned: dict[str, Any] = finite(document)
    return cleaned


def to_frame(rows: Sequence[Row]) -> Any:
    """A ``pandas.DataFrame`` of rows.

    Raises:
        UsageError: pandas is not installed.
    """
    pandas = import_extra("pandas", "to_pandas()", "pandas", "pandas")
    return pandas.DataFrame([dict(row) for row in rows])


def to_html(caption: str, rows: Sequence[Row], marked: int | None = None, limit: int = 12) -> str:
    """An HTML table with a caption; texts are escaped, further rows are counted.

    Args:
        caption: what stands above.
        rows: mappings with the same keys, which are the headings.
        marked: the row in bold.
        limit: most rows that are shown.
    """
    heads = list(rows[0]) if rows else []
    parts = [f"<table><caption>{html.escape(caption)}</caption><thead><tr>"]
    parts += [f"<th>{html.escape(head.replace('_', ' '))}</th>" for head in heads]
    parts.append("</tr></thead><tbody>")
    for number, row in enumerate(rows[:limit]):
        parts.append("<tr style='font-weight:bold'>" if number == marked else "<tr>")
        parts += [f"<td>{html.escape(_shown(row[head]))}</td>" for head in heads]
        parts.append("</tr>")
    parts.append("</tbody></table>")
    if len(rows) > limit:
        parts.append(f"<small>and {len(rows) - limit} more: to_pandas() has them all</small>")
    return "".join(parts)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
