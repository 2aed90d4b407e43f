"""The commands that look at a run folder: inspect, trace and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.commands import later_session
from abliterate.cli.stale_parts import say_stale
from abliterate.console import print_json, print_line
from abliterate.errors import UsageError


@opt.command()
def inspect(
    *,
    run: opt.SelectedRun,
    model: opt.MovedModel = None,
    position: Annotated[
        int | None,
        typer.Option(
            "--position",
            help="Whose activations, counted from the prompt's end. Default: the last kept.",
            show_default=False,
        ),
    ] = None,
    given: opt.Given,
    as_json: opt.Json = False,
) -> None:
    """Describe the directions: PCA, separation, cosines, norms and logit lens, layer by layer."""
    from abliterate.analysis.inspection_record import finished_inspection
    from abliterate.cli.analysis_tables import show_inspection
    from abliterate.run_folder import INSPECT
    from abliterate.storage.artifacts import believing

    session = later_session(run, model, None, given)
    record = finished_inspection(session, run, position)
    if record is None:
        from abliterate.analysis.inspection import inspect_stage

        record = inspect_stage(session, run, position)
    with believing(run / INSPECT, "inspect"):  # it may be the one that was there
        print_json(record) if as_json else show_inspection(record, run)
    say_stale(run, "selection", "inspect")


@opt.command()
def trace(
    *,
    run: opt.SelectedRun,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="Harmful prompts: set name, file or hub dataset. Default: the run's test prompts.",
            show_default=False,
        ),
    ] = None,
    harmless: Annotated[
        str | None,
        typer.Option(
            "--harmless",
            help="Harmless prompts. Default: the run's test prompts.",
            show_default=False,
        ),
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            help="Text (or a file of it) to put after each harmful prompt; compared with random "
            "tokens of the same number.",
            show_default=False,
        ),
    ] = None,
    n_prompts: Annotated[
        int | None,
        typer.Option("--n-prompts", help="Prompts per kind. Default: all.", show_default=False),
    ] = None,
    heads: Annotated[int, typer.Option("--heads", help="Attention heads to list.")] = 10,
    model: opt.MovedModel = None,
    given: opt.Given,
    as_json: opt.Json = False,
) -> None:
    """Follow prompts along the direction, with and without a suffix of yours."""
    from abliterate.analysis.trace_request import TraceRequest, check_request
    from abliterate.cli.analysis_tables import show_trace
    from abliterate.prompts.suffixes import read_suffix

    text = None if suffix is None else read_suffix(suffix)
    request = TraceRequest(prompts, harmless, n_prompts, text, heads)
    check_request(request)
    session = later_session(run, model, None, given)
    from abliterate.analysis.direction_trace import trace_stage

    record = trace_stage(session, run, request)
    print_json(record) if as_json else show_trace(record, run)
    say_stale(run, "selection", "trace")


@opt.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write; replaces an earlier report, nothing else. "
            "Default: RUN/report.html.",
            show_default=False,
        ),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option(
            "--completions/--no-completions", help="Put prompts and answers into the file."
        ),
    ] = True,
    png: Annotated[
        Path | None,
        typer.Option("--png", help="Also write the figures as PNG here.", show_default=False),
    ] = None,
    edited: opt.Edited = None,
    as_json: opt.Json = False,
) -> None:
    """Write one self-contained page of everything that a run folder holds."""
    from abliterate.cli.stale_parts import tell_stale
    from abliterate.report import build_report, read_run, write_pngs
    from abliterate.storage.artifacts import check_writable, write_atomically
    from abliterate.storage.ownership import claim_file, is_page

    path = output or run / "report.html"
    if path.is_dir():
        raise UsageError(f"-o {path} is a folder: name the file to write")
    held = read_run(run, edited)
    check_writable(path.parent)
    claim_file(path, is_page, "report")
    page = build_report(held, completions, edited)
    # Pictures first: what can fail there must not leave a page behind.
    pictures = [] if png is None else write_pngs(page.figures, png)
    content = page.html.encode()
    write_atomically(path, content)
    stale = tell_stale(held, edited)
    if as_json:
        return print_json(
            {
                "report": str(path),
                "bytes": len(content),
                "sections": list(page.sections),
                "figures": list(page.figures),
                "png": [str(picture) for picture in pictures],
                "stale": stale,
            }
        )
    print_line(f"wrote {path} ({len(content) / 1e6:.1f} MB; {', '.join(page.sections)})")
    for picture in pictures:
        print_line(f"wrote {picture}")
    return None
