"""The commands that look at a run folder: inspect and trace."""

from __future__ import annotations

from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.commands import later_session
from abliterate.cli.stale_parts import say_stale
from abliterate.console import print_json


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
