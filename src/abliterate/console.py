"""What a person or a pipeline sees: results on stdout, progress and logs on stderr.

Nothing else in the package writes to a terminal (a test looks), and nothing here writes what it was
given as it is: prompts, names, answers and records come from strangers, and :func:`safe` shows
their control characters instead of sending them.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import IO, Any, TypeVar

from abliterate.errors import addressed
from abliterate.safe_text import CELL, LINE, UNSAFE_IN_JSON, forget, one_line, without_users
from abliterate.safe_text import hide as hide
from abliterate.safe_text import redact as redact
from abliterate.safe_text import safe as safe
from abliterate.storage.artifacts import finite
from abliterate.storage.guarded_files import naming

T = TypeVar("T")

log = logging.getLogger("abliterate")
#: What an error about it calls it.
STDOUT = "standard output"


def _write(stream: IO[str], text: str) -> None:
    """Write to a stream whose encoding may lack some of the characters."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with naming(STDOUT if stream is sys.stdout else "standard error"):
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the ``sys.stderr`` of the moment, and keeps progress bars whole."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


class _SafeRecord(logging.LogRecord):
    """A record of any library's logger, whose text is safe whatever handler writes it."""

    def getMessage(self) -> str:
        return one_line(super().getMessage())


def _new_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _SafeRecord(*args, **kwargs)
    if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
        record.exc_text = _trace(record.exc_info[1])  # formatters take it as it is
    return record


def _make_safe(record: logging.LogRecord) -> bool:
    """A filter that also holds where :func:`set_up` was not called, as in a notebook."""
    record.msg, record.args = one_line(addressed(record.getMessage())), ()
    return True


log.addFilter(_make_safe)


def set_up(quiet: bool, debug: bool) -> None:
    """Configure logging and hush the libraries' own bars and warnings.

    Args:
        quiet: warnings and errors only, no progress bars.
        debug: libraries may speak, and our debug messages show.
    """
    forget()
    log.handlers = [_StderrHandler()]
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    # What libraries log, and what they warn of, comes through the same handler.
    logging.setLogRecordFactory(_new_record)
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        root.addHandler(_StderrHandler(logging.WARNING))
    logging.captureWarnings(True)
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


_progress = True


def set_progress(shown: bool) -> None:
    """Show progress bars, as it is to begin with, or none from now on.

    Bars are ``tqdm.auto``'s: widgets in a notebook, lines on a terminal. They come after two
    seconds, and stay off where standard error is neither.

    Args:
        shown: whether there are any.

    Source:
        No part of the paper.

    Examples:
        >>> ab.set_progress(False)
        >>> ab.set_progress(True)
    """
    global _progress
    _progress = bool(shown)


def bars_hidden() -> bool:
    """Whether progress bars stay off: with ``--quiet``, where stderr is neither a terminal nor a
    notebook's, on all ranks of a team but the first, and when :func:`set_progress` says so."""
    follows = os.environ.get("RANK", "0") != "0"
    seen = sys.stderr.isatty() or _in_notebook()
    return not _progress or log.level > logging.INFO or follows or not seen


def _in_notebook() -> bool:
    """Whether a kernel runs this, whose standard error a notebook shows."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_ipython(), "kernel", None) is not None


def safe_bar(base: Any) -> Any:
    """``base``, a class of tqdm's, whose descriptions and notes are safe."""

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, desc: str | None = None, **kwargs: Any) -> None:
            super().__init__(*args, desc=desc and safe(redact(desc), CELL), **kwargs)

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            super().set_description(desc and safe(redact(desc), CELL), refresh)

        def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            super().set_postfix_str(safe(redact(s), CELL), refresh)

    return Bar


@cache
def _bar() -> Any:
    from tqdm.auto import tqdm

    return safe_bar(tqdm)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar and ETA on stderr, shown only on a terminal and after two seconds."""
    yield from _bar()(
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
    with _bar()(
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
    """Write ``document`` to stdout as one JSON document.

    What :func:`safe` would show as an escape is written as JSON's escape of it, so that whoever
    parses the document has the very same text.
    """
    text = json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False)
    escaped = UNSAFE_IN_JSON.sub(lambda match: json.dumps(match[0])[1:-1], text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        escaped.encode(encoding)
    except UnicodeEncodeError:
        escaped = json.dumps(finite(document), indent=2, allow_nan=False)
    with naming(STDOUT):
        sys.stdout.write(escaped + "\n")


def print_table(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    left: int = 1,
    beside_results: bool = False,
) -> None:
    """Print a rich table to stdout; the first ``left`` columns are text, the rest numbers.

    Args:
        title: what it says.
        columns: their headings.
        rows: the cells.
        left: how many columns, from the first, are text.
        beside_results: it explains why there is no result, and goes to stderr.
    """
    from abliterate.table_layout import laid_out

    stream, name = (sys.stderr, "standard error") if beside_results else (sys.stdout, STDOUT)
    console = _console(stream, width=_width(stream), highlight=False)
    cells = [[_cell(cell) for cell in row] for row in rows]
    heads = [_cell(column) for column in columns]
    with naming(name):
        console.print(laid_out(console, _cell(title), heads, cells, left))


def is_plain() -> bool:
    """Whether no escape codes are wanted, at a terminal either (https://no-color.org).

    Rich alone would keep those of bold and dim text.
    """
    return bool(os.environ.get("NO_COLOR"))


def _console(stream: IO[str], **how: Any) -> Any:
    """What writes to a stream with rich."""
    from rich.console import Console

    return Console(file=stream, color_system=None if is_plain() else "auto", **how)


def _width(stream: Any) -> int | None:
    """How wide tables may be; None for a terminal, which says so itself.

    Off a terminal rich would fold everything into 80 columns: there each table is as wide as it
    is, unless COLUMNS says otherwise.
    """
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    from abliterate.table_layout import UNBOUNDED

    return None if stream.isatty() else UNBOUNDED


def _cell(text: object) -> Any:
    """Text of a table, in which brackets are no markup."""
    from rich.text import Text

    shown = safe(redact(str(text)), CELL)
    encoding = sys.stdout.encoding or "utf-8"
    return Text(shown.encode(encoding, "backslashreplace").decode(encoding))


def print_line(text: str = "") -> None:
    """Write a line of a result to stdout."""
    _write(sys.stdout, safe(redact(text), LINE) + "\n")


def print_command(label: str, *words: object) -> None:
    """Write ``label: abliterate WORDS`` to stdout, quoted for a shell."""
    print_line(f"{label}: {command(*words)}")


def command(*words: object) -> str:
    """``abliterate WORDS`` as a shell takes it."""
    return shlex.join(["abliterate", *map(str, words)])


def print_text(text: str) -> None:
    """Write a piece of an answer to stdout at once; its line breaks and tabs stay.

    Each character is made safe by itself, so an escape sequence may be split over pieces.
    """
    _write(sys.stdout, safe(text, lines=True))
    sys.stdout.flush()


def print_thought(text: str) -> None:
    """Write a piece of what a model thinks: dimmed at a terminal, else to stderr."""
    if not sys.stdout.isatty():
        _write(sys.stderr, safe(text, lines=True))
        return
    from rich.text import Text

    with naming(STDOUT):
        shown = Text(safe(text, lines=True), style="dim")
        _console(sys.stdout, highlight=False).print(shown, end="", soft_wrap=True)
        sys.stdout.flush()


def print_note(text: str) -> None:
    """Write something beside the results to stderr; its line breaks stay."""
    _write(sys.stderr, safe(redact(text), lines=True) + "\n")


def print_error(message: str) -> None:
    """Write the line ``error: MESSAGE`` to stderr."""
    _write(sys.stderr, f"error: {one_line(message)}\n")


def print_traceback(error: BaseException) -> None:
    """Write where ``error`` came from to stderr, behind bars, so that no line passes for ours."""
    _write(sys.stderr, _trace(error) + "\n")


def _trace(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    text = without_users(redact(text))
    return "\n".join(f"| {line}" for line in safe(text, lines=True).split("\n"))


@contextmanager
def live_columns(labels: Sequence[str]) -> Iterator[list[Callable[..., None]]]:
    """Texts that grow side by side on stdout: a function per column that appends to it.

    Each takes a piece of text, and as its second argument a style such as ``dim``.
    """
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    columns = [Text() for _ in labels]
    table = Table(expand=True, show_lines=False)
    for label in labels:
        table.add_column(_cell(label), ratio=1)
    table.add_row(*columns)
    with Live(table, console=_console(sys.stdout), vertical_overflow="visible") as live:

        def append_to(column: Text) -> Callable[..., None]:
            def append(piece: str, style: str = "") -> None:
                column.append(safe(piece, lines=True), style=style)
                live.refresh()

            return append

        yield [append_to(column) for column in columns]


def flush_output() -> None:
    """Hand on what was written to stdout: a full disk behind it must not pass unseen."""
    with naming(STDOUT):
        sys.stdout.flush()


def stop_output() -> None:
    """Say no more: the reader of our output went away."""
    sys.stderr.close()
