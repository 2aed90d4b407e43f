"""What a person or a pipeline sees: results on stdout, progress and logs on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from abliterate.storage.artifacts import finite
from abliterate.storage.guarded_files import naming

T = TypeVar("T")

log = logging.getLogger("abliterate")
#: What an error about it calls it.
STDOUT = "standard output"


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the ``sys.stderr`` of the moment, and keeps progress bars whole."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def set_up(quiet: bool, debug: bool) -> None:
    """Configure logging and hush the libraries' own bars and warnings.

    Args:
        quiet: warnings and errors only, no progress bars.
        debug: libraries may speak, and our debug messages show.
    """
    log.handlers = [_StderrHandler()]
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        import warnings

        warnings.filterwarnings("ignore")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def debugging() -> bool:
    """Whether ``--debug`` was given."""
    return log.level == logging.DEBUG


def bars_hidden() -> bool:
    """Whether progress bars stay off: with ``--quiet``, where stderr is no terminal, and on all
    ranks of a team but the first."""
    follows = os.environ.get("RANK", "0") != "0"
    return log.level > logging.INFO or follows or not sys.stderr.isatty()


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar and ETA on stderr, shown only on a terminal and after two seconds."""
    from tqdm import tqdm

    yield from tqdm(
        items,
        desc=description,
        total=total,
        disable=bars_hidden(),
        delay=2,
        leave=False,
        file=sys.stderr,
    )


@contextmanager
def progress_bar(description: str, total: int, unit: str = "it") -> Iterator[Any]:
    """A bar to advance by hand (``bar.update(n)``); hidden as :func:`progress` is."""
    from tqdm import tqdm

    with tqdm(
        desc=description,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        disable=bars_hidden(),
        delay=2,
        leave=False,
        file=sys.stderr,
    ) as bar:
        yield bar


def print_json(document: Any) -> None:
    """Write ``document`` to stdout as one JSON document."""
    text = json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False)
    with naming(STDOUT):
        sys.stdout.write(text + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]], left: int = 1) -> None:
    """Print a rich table to stdout; the first ``left`` columns are text, the rest numbers."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # Off a terminal rich would fold everything into 80 columns: let each table be as wide as it is.
    width = None if sys.stdout.isatty() else 1000
    with naming(STDOUT):
        Console(file=sys.stdout, width=width, highlight=False).print(table)


def print_line(text: str = "") -> None:
    """Write a line of a result to stdout."""
    with naming(STDOUT):
        sys.stdout.write(text + "\n")
