"""What is stale in a run folder: a line for each part, with the command that renews it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.console import log
from abliterate.errors import AbliterateError, SelectionError

if TYPE_CHECKING:
    from abliterate.report.collect import Run


def tell_stale(held: Run, edited: Path | None = None, parts: tuple[str, ...] = ()) -> list[Any]:
    """Log what is stale in a run.

    Args:
        held: the run.
        edited: the edited checkpoint, if it is no part of the run folder.
        parts: of which parts; empty for all.

    Returns:
        The parts that were told of, as ``report --json`` gives them.
    """
    from abliterate.report.reproduce import renewals

    if not held.stale:
        return []
    again, told = renewals(held, edited), []
    for part, found in held.stale.items():
        if parts and part not in parts:
            continue
        commands = " && ".join(again[part])
        log.warning("%s is stale: %s. Renew it with: %s", found.file, found.why, commands)
        told.append(
            {
                "part": part,
                "file": str(found.file),
                "why": list(found.reasons),
                "rows": list(found.rows),
                "renew": again[part],
            }
        )
    return told


def say_stale(run: Path, *parts: str) -> list[Any]:
    """Log what is stale in a run folder, of the parts named, or of all; returns it.

    Says nothing of a folder with a record that cannot be read: whoever needs that one does.
    """
    from abliterate.run_staleness import find_stale
    from abliterate.storage.artifacts import OTHER_THINGS

    found = find_stale(run)
    if not found or (parts and not set(parts) & set(found)):
        return []
    from abliterate.report.collect import read_run

    with suppress(AbliterateError, OSError, *OTHER_THINGS):
        return tell_stale(read_run(run), parts=parts)
    return []


@contextmanager
def saying_stale(run: Path, failed_only: bool = False) -> Iterator[None]:
    """Say in the end what a stage has made stale; a selection that chose nothing does so too.

    Args:
        run: the run folder.
        failed_only: the stages that follow are renewed, unless nothing was chosen.
    """
    try:
        yield
    except SelectionError:
        say_stale(run)
        raise
    if not failed_only:
        say_stale(run)


def say_stale_table(scores: Path) -> None:
    """Say so where a table of scores is the one of a run folder, and of other candidates."""
    from abliterate.run_folder import SELECTION

    if scores.name == SELECTION:
        say_stale(scores.parent, "extract", "selection")
