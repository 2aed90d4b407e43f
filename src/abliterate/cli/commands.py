"""The commands of the method: extract, select, orthogonalize, and run, which chains all stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli import options as opt
from abliterate.console import print_json
from abliterate.errors import UsageError
from abliterate.settings import Settings, load_settings, parse_layers

if TYPE_CHECKING:
    from abliterate.run_folder import Session


@opt.command()
def extract(
    model: opt.Model,
    output: opt.RunOut,
    given: opt.Given,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> None:
    """Extract candidate directions: difference of means at each position and layer."""
    settings = load_settings(config, given)
    from abliterate.cli.tables import show_extraction

    session = open_session(model, settings)
    from abliterate.pipeline.stages import extract_stage

    record = extract_stage(session, output)
    print_json(record) if as_json else show_extraction(record, output)


@opt.command()
def select(
    *,
    run: Annotated[
        Path | None, typer.Argument(help="Run folder of extract.", show_default=False)
    ] = None,
    model: opt.MovedModel = None,
    given: opt.Given,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores", help="Choose again from a saved table; needs no model.", show_default=False
        ),
    ] = None,
    n_layers: Annotated[
        int | None,
        typer.Option(
            "--n-layers", help="Layers of the model, if the table does not say.", show_default=False
        ),
    ] = None,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> None:
    """Score every candidate by bypass, induce and KL, and choose the direction."""
    if (run is None) == (scores is None):
        raise UsageError("give either the run folder of extract or --scores FILE")
    if scores is not None:
        from abliterate.cli.selection_tables import showing_front
        from abliterate.cli.tables import choose_again, show_choice

        with showing_front():
            choice = choose_again(scores, n_layers, load_settings(config, given))
        return print_json(choice) if as_json else show_choice(choice)
    assert run is not None
    from abliterate.cli.selection_tables import showing_front
    from abliterate.cli.tables import show_selection

    session = later_session(run, model, config, given)
    from abliterate.pipeline.stages import select_stage

    with showing_front():
        record = select_stage(session, run)
    return print_json(record) if as_json else show_selection(record, run)


@opt.command()
def orthogonalize(
    model: opt.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)
    ],
    direction: opt.Direction,
    given: opt.Given,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> None:
    """Write a checkpoint that cannot write along the direction."""
    settings = load_settings(config, given)
    from abliterate.cli.tables import show_edit
    from abliterate.direction import find_direction, load_direction

    parse_layers(settings.orthogonalize.layers)
    find_direction(direction)
    session = open_session(model, settings, settings.orthogonalize.low_disk)
    vector = load_direction(direction)
    from abliterate.pipeline.stages import orthogonalize_stage

    record = orthogonalize_stage(session, vector, output)
    print_json(record) if as_json else show_edit(record, output)


@opt.command(last=("filter",))
def run(
    model: opt.Model,
    output: opt.RunOut,
    given: opt.Given,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> None:
    """extract, select, orthogonalize and evaluate; finished stages are skipped."""
    settings = load_settings(config, given)
    from abliterate.cli.selection_tables import showing_front
    from abliterate.cli.tables import show_run
    from abliterate.storage.artifacts import believing

    session = open_session(model, settings)
    from abliterate.pipeline.run import run_pipeline

    with showing_front():
        record = run_pipeline(session, output)
    # Of stages that were up to date it holds what lies there.
    with believing(output, "run"):
        print_json(record) if as_json else show_run(record, output)


def open_session(model: str, settings: Settings, leave_shards: bool = False) -> Session:
    """A session on a checkpoint; imports no torch, so that a wrong name is told at once."""
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.extras import require_extra
    from abliterate.run_folder import Session

    if (load_in := settings.model.load_in) != "none":  # told before anything is fetched
        require_extra("bitsandbytes", f"--load-in {load_in}", "bitsandbytes", "quantized")
    return Session(find_checkpoint(model, settings.model.revision, leave_shards), settings)


def later_session(run: Path, model: str | None, config: Path | None, given: opt.Given) -> Session:
    """A session on what ``extract`` recorded in ``run``; file and options win over it."""
    from abliterate.run_records import check_trust, read_extract, take_base

    extracted = read_extract(run)
    base = take_base(run, extracted, model, load_settings(config, given))
    settings = load_settings(config, given, base)
    check_trust(run, extracted, settings)
    return open_session(model or extracted["model"]["id"], settings)
