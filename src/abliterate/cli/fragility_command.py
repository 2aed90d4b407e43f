"""The command fragility: how much of refusal hangs on one direction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.commands import later_session
from abliterate.cli.control_tables import show_controls
from abliterate.cli.stale_parts import say_stale
from abliterate.console import print_json, print_line, print_table
from abliterate.errors import UsageError


@opt.command()
def fragility(
    *,
    run: opt.SelectedRun,
    model: opt.MovedModel = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder to write. Default: the run folder.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Fractions from 0 to 1.")] = 11,
    given: opt.Given,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Draw fragility.html.")
    ] = True,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", help="Also png or svg (needs a Chrome); repeatable.", show_default=False
        ),
    ] = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> None:
    """Measure how much of refusal hangs on one direction: remove it by and by."""
    for kind in image or ():
        if kind not in ("png", "svg"):
            raise UsageError(f"--image must be png or svg, not '{kind}'")
    if image and not picture:
        raise UsageError("--image and --no-picture exclude each other")
    from abliterate.run_records import read_extract

    read_extract(run)
    from abliterate.report.fragility_page import (
        POINTS,
        claim_pictures,
        draw,
        point_rows,
        require_plotly,
    )

    if picture:
        require_plotly()
    session = later_session(run, model, config, given)
    chosen, out = session.settings.evaluate, output or run
    if picture:
        claim_pictures(out, image or ())
    # As many prompts at every fraction: less than evaluate takes, unless somebody says so.
    longest = chosen.max_new_tokens if "max_new_tokens" in chosen.model_fields_set else 64
    from abliterate.analysis.fragility import FRAGILITY, fragility_stage

    record = fragility_stage(session, run, out, steps, chosen.n_test or 32, longest)
    say_stale(run, "selection")
    written = [out / FRAGILITY, *(draw(record, out, image or ()) if picture else [])]
    if as_json:
        return print_json(record)
    counts = ", ".join(f"{kind} n={count}" for kind, count in record["n_prompts"].items())
    print_table(
        f"{record['model']['id']} ({counts}; 95% intervals; means ± standard error)",
        POINTS,
        point_rows(record),
    )
    number, half = record["fragility"], record["half_fraction"]
    if number is None:
        print_line("fragility: the model refuses none of these prompts to begin with")
    else:
        low, high = record["fragility_bounds"]
        print_line(
            f"fragility {number:z.3f}{_interval(record['fragility_ci'])}; the steps alone leave "
            f"{low:z.3f} to {high:z.3f}"
        )
        if half is None:
            print_line("half of the refusals are gone at no step")
        else:
            print_line(
                f"half of the refusals are gone between {record['half_after']:z.2f} and {half:z.2f}"
                f"{_interval(record['half_fraction_ci'], '.2f')}"
            )
    show_controls(record["controls"])
    return print_line(f"written: {', '.join(map(str, written))}")


def _interval(span: Sequence[float | None] | None, form: str = ".3f") -> str:
    """A 95% interval; an end that there is none of is a half that no step reaches."""
    if span is None:
        return ""
    low, high = ("never" if end is None else format(end, form) for end in span)
    return f" (95% interval {low} to {high})"
