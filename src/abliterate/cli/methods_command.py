"""The command methods: what a paper says of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.stale_parts import tell_stale
from abliterate.console import print_json, print_line
from abliterate.errors import InputError, UsageError


@opt.command()
def methods(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="md or latex.")] = "md",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write; replaces an earlier one of this command, nothing else. "
            "Default: stdout.",
            show_default=False,
        ),
    ] = None,
    edited: opt.Edited = None,
    as_json: opt.Json = False,
) -> None:
    """Write a paragraph and tables for a paper, from the records of a run folder alone."""
    if form not in ("md", "latex"):
        raise UsageError(f"--format must be md or latex, not '{form}'")
    if output is not None and output.is_dir():
        raise UsageError(f"-o {output} is a folder: name the file to write")
    from abliterate.report.collect import read_run
    from abliterate.report.methods import BIBTEX, describe_methods
    from abliterate.report.methods_text import is_methods, render
    from abliterate.storage.artifacts import OTHER_THINGS, check_writable, write_atomically
    from abliterate.storage.ownership import claim_file

    held = read_run(run, edited)
    if output is not None:
        check_writable(output.parent)
        claim_file(output, is_methods, "methods")
    try:
        found = describe_methods(held)
        text = render(found, form)
        stale = tell_stale(held, edited)
    except OTHER_THINGS as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"a record in {run} does not hold what methods needs ({reason:.200}): make it again "
            "with this version"
        ) from None
    if output is not None:
        write_atomically(output, text.encode("utf-8", "backslashreplace"))
    if as_json:
        document = {"format": form, "file": output and str(output), "text": text}
        return print_json(document | {"bibtex": BIBTEX, "stale": stale} | asdict(found))
    if output is not None:
        return print_line(f"wrote {output}")
    for line in text.splitlines():
        print_line(line)
    return None
