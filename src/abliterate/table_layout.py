"""A table of a result laid out for a width: as it is, folded, or one row below the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: Columns of a place that ends no line.
UNBOUNDED = 10_000
# Folded beyond this, the lines of a row no longer read as one row.
_FOLDED = 1.6


def number_text(value: float, form: str) -> str:
    """A number as ``format`` gives it, but for a zero with a minus before it: -0.0004 is 0.000."""
    sign, rest = (form[0], form[1:]) if form[:1] in ("+", "-", " ") else ("", form)
    return format(value, f"{sign}z{rest}")


def laid_out(
    console: Console,
    title: Text,
    columns: Sequence[Text],
    rows: Sequence[Sequence[Text]],
    left: int,
) -> Any:
    """What to print, no wider than the console.

    Args:
        console: says how wide.
        title: what the table says.
        columns: their headings.
        rows: the cells.
        left: how many columns, from the first, are text; the rest are numbers.
    """
    from rich.measure import Measurement

    table = _table(columns, rows, left)
    least, most = Measurement.get(console, console.options.update(width=UNBOUNDED), table)
    room = console.width
    if most <= room or (least <= room and (most <= _FOLDED * room or len(columns) < 3)):
        if title.cell_len > min(most, room):  # in the table it would be folded to its width
            return _with_title(title, table)
        table.title, table.title_justify = title, "left"
        return table
    return _stacked(title, columns, rows) if len(columns) > 2 else _with_title(title, table)


def _table(columns: Sequence[Text], rows: Sequence[Sequence[Text]], left: int) -> Any:
    from rich.table import Table

    # A list of facts has no headings, and no empty line for them.
    table = Table(header_style="bold", show_header=any(column.plain for column in columns))
    for index, column in enumerate(columns):
        # What has no room goes on below: nothing of a result is left out.
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _with_title(title: Text, table: Any) -> Any:
    from rich.console import Group

    return Group(title, table)


def _stacked(title: Text, columns: Sequence[Text], rows: Sequence[Sequence[Text]]) -> Any:
    """Each row as lines of heading and cell; empty cells are left out."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table

    parts: list[Any] = [title]
    for row in rows:
        first, *rest = zip(columns, row, strict=True)
        head = first[0].copy()
        head.append(" " if head.plain else "").append_text(first[1])
        head.stylize("bold")
        lines = Table.grid(padding=(0, 1))
        lines.add_column(overflow="fold")
        lines.add_column(overflow="fold")
        for column, cell in rest:
            if cell.plain:
                lines.add_row(column, cell)
        parts += [head, Padding(lines, (0, 0, 0, 2), expand=False)]
    return Group(*parts)
