"""The commands that measure answers: evaluate, and score for answers made elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.commands import find_recorded, later_session, open_session
from abliterate.cli.stale_parts import say_stale
from abliterate.console import print_json
from abliterate.errors import UsageError
from abliterate.settings import load_settings, refuse_without


@opt.command()
def evaluate(
    *,
    model: opt.Model,
    direction: opt.DirectionFrom = None,
    intervention: Annotated[
        list[str] | None,
        typer.Option(
            "--intervention",
            help="baseline, ablate, add, subtract or checkpoint (all of --checkpoint); "
            "repeatable. Default: all but subtract that --direction and --checkpoint allow.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            help="An edited checkpoint to compare, [NAME=]DIR or hub id; repeatable.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder for evaluation.json and completions. Default: the run folder of "
            "--direction.",
            show_default=False,
        ),
    ] = None,
    given: opt.Given,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> None:
    """Complete test prompts under each intervention; count refusals, judge, check capability.

    Interrupted, the same command goes on where it stopped.
    """
    from abliterate.cli.evaluation_tables import show_evaluation
    from abliterate.direction import Direction
    from abliterate.direction_loading import find_direction, load_directions
    from abliterate.evaluation.intervention_names import check_name
    from abliterate.projection import Projection
    from abliterate.run_records import source_of_direction, sources_of_evaluation

    if direction is None:
        count = given["evaluate"]["controls"] or None  # 0 asks for none, and gets none
        refuse_without("--direction", given, *opt.OF_DIRECTION, controls=count)
    for name in intervention or ():
        check_name(name, direction, checkpoint or ())
    if direction is not None:
        find_direction(direction, load_settings(config, given).select.position)
    named = name_checkpoints(checkpoint or [])
    run = Path(direction) if direction and Path(direction).is_dir() else None
    session = (
        open_session(
            model,
            load_settings(config, given),
            sources=[] if direction is None else [source_of_direction(direction)],
        )
        if run is None
        else later_session(run, model, config, given)
    )
    made = session.settings.select
    vector = None
    if direction is not None:
        vector = load_directions(direction, Projection.asked(made), made.position, made.interpolate)
    # A set is ablated alone: no one layer's vector is the one to add.
    usual = ["baseline", "ablate", *(["add"] if isinstance(vector, Direction) else [])]
    names = intervention or (usual if vector else ["baseline"])
    # One experiment, one commit, of what is compared too.
    held = {} if (place := output or run) is None else sources_of_evaluation(place)
    edited = {
        name: find_recorded(
            folder,
            None,
            [held.get(name), *held.values()],
            session.settings.model.trust_remote_code,
            how=f"--checkpoint {folder}@REVISION",
        )
        for name, folder in named.items()
    }
    from abliterate.evaluation.judge_completions import check_evaluation
    from abliterate.evaluation.stage import evaluate_stage

    record = evaluate_stage(session, vector, names, edited, run, output or run)
    shown = output or run
    told = [] if shown is None else say_stale(shown, "selection", "evaluation")
    stale = [row for found in told for row in found["rows"]]
    print_json(record) if as_json else show_evaluation(record, stale)
    check_evaluation(record)


def name_checkpoints(specs: list[str]) -> dict[str, str]:
    """Folders or hub ids by the name of their row: the one given, or that of the folder.

    Raises:
        UsageError: two have the same name, or one has that of an intervention or no plain name.
    """
    from abliterate.evaluation.intervention_names import CHECKPOINT, INTERVENTIONS
    from abliterate.hub import split_id
    from abliterate.storage.artifacts import is_plain_name

    found: dict[str, str] = {}
    for spec in specs:
        name, equals, folder = spec.partition("=")
        # The equals sign may be part of a path.
        if not equals or _exists(spec) or ("/" in name and not _exists(folder)):
            name, folder = "", spec
        repo = None if _exists(folder) else split_id(folder)
        place = folder if repo is None else repo[0]
        name = name or Path(place.replace("\0", " ")).resolve().name
        if not is_plain_name(name):
            raise UsageError(
                f"--checkpoint {spec}: '{name}' is no plain name, give one as "
                f"--checkpoint NAME={folder}"
            )
        # Names become files': where case does not count, A and a are one.
        taken = {other.casefold() for other in (*found, *INTERVENTIONS, CHECKPOINT)}
        if name.casefold() in taken:
            raise UsageError(
                f"--checkpoint {spec}: the name '{name}' is taken, give another as "
                f"--checkpoint NAME={folder}"
            )
        found[name] = folder
    return found


def _exists(path: str) -> bool:
    return "\0" not in path and os.path.lexists(path)


@opt.command()
def score(
    *,
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON list or JSONL of objects with prompt, response and optional category.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="JSONL file for each completion with its scores. Verdicts that it holds are kept; "
            "a file that score did not write is refused.",
            show_default=False,
        ),
    ] = None,
    given: opt.Given,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> None:
    """Score completions made elsewhere; needs no model."""
    settings = load_settings(config, given)
    if settings.evaluate.judge is None and settings.evaluate.classifier is None:
        of_models = [f"model.{key}" for key in given["model"] if key != "seed"]
        refuse_without("--judge or --classifier", given, *of_models)
    from abliterate.cli.evaluation_tables import show_score
    from abliterate.evaluation.judge_completions import check_verdicts
    from abliterate.evaluation.score_completions import score_file

    document = score_file(file, settings, output)
    print_json(document) if as_json else show_score(document)
    check_verdicts([document["scores"]], document["judge_failures"])
