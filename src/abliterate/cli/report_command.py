"""The command report: a run folder as one page, or several runs compared in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.console import print_json, print_line
from abliterate.errors import UsageError

if TYPE_CHECKING:
    from abliterate.report import Report


@opt.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folder; several are compared in one page.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write; replaces an earlier report, nothing else. "
            "Default of one run: RUN/report.html.",
            show_default=False,
        ),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option(
            "--completions/--no-completions",
            help="Put prompts and answers into the file; a comparison holds none.",
        ),
    ] = True,
    png: Annotated[
        Path | None,
        typer.Option("--png", help="Also write the figures as PNG here.", show_default=False),
    ] = None,
    edited: opt.Edited = None,
    as_json: opt.Json = False,
) -> None:
    """Write one self-contained page of everything that a run folder holds, or compare several."""
    if len(runs) > 1 and output is None:
        raise UsageError(
            f"-o is missing: a comparison of {len(runs)} runs belongs to none of their folders, so "
            "name the file to write"
        )
    if len(runs) > 1 and edited is not None:
        raise UsageError("--edited belongs to one run: leave it out, or report on that run alone")
    path = output or runs[0] / "report.html"
    if path.is_dir():
        raise UsageError(f"-o {path} is a folder: name the file to write")
    document = (
        _of_one(runs[0], path, completions, png, edited)
        if len(runs) == 1
        else _of_several(runs, path, png)
    )
    if as_json:
        return print_json(document)
    told = ", ".join(document["sections"])
    print_line(f"wrote {path} ({document['bytes'] / 1e6:.1f} MB; {told})")
    for picture in document["png"]:
        print_line(f"wrote {picture}")
    return None


def _of_one(
    run: Path, path: Path, completions: bool, png: Path | None, edited: Path | None
) -> dict[str, Any]:
    from abliterate.cli.stale_parts import tell_stale
    from abliterate.report import build_report, read_run

    held = read_run(run, edited)
    _claim(path)
    page = build_report(held, completions, edited)
    return _written(page, path, png) | {"stale": tell_stale(held, edited)}


def _of_several(runs: Sequence[Path], path: Path, png: Path | None) -> dict[str, Any]:
    from abliterate.cli.stale_parts import tell_stale
    from abliterate.report.comparison import compare, read_runs
    from abliterate.report.comparison_page import build_comparison

    held = read_runs(runs)
    _claim(path)
    compared = compare(held)
    page = build_comparison(held, compared)
    written = _written(page, path, png)
    for each in held:
        tell_stale(each.run)
    return written | compared


def _claim(path: Path) -> None:
    from abliterate.storage.artifacts import check_writable
    from abliterate.storage.ownership import claim_file, is_page

    check_writable(path.parent)
    claim_file(path, is_page, "report")


def _written(page: Report, path: Path, png: Path | None) -> dict[str, Any]:
    """Write the page and its pictures; returns what ``--json`` says of them."""
    from abliterate.report import write_pngs
    from abliterate.storage.artifacts import write_atomically

    # Pictures first: what can fail there must not leave a page behind.
    pictures = [] if png is None else write_pngs(page.figures, png)
    content = page.html.encode()
    write_atomically(path, content)
    return {
        "report": str(path),
        "bytes": len(content),
        "sections": list(page.sections),
        "figures": list(page.figures),
        "png": [str(picture) for picture in pictures],
    }
