"""The commands of the method: extract, select, orthogonalize, and run, which chains all stages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.push import Public, PushToHub, check_push, push
from abliterate.cli.stale_parts import say_stale, say_stale_table, saying_stale
from abliterate.console import log, print_json
from abliterate.errors import InputError, UsageError
from abliterate.settings import (
    Settings,
    given_options,
    load_settings,
    parse_layers,
    refuse_without,
)

if TYPE_CHECKING:
    from abliterate.checkpoints.checkpoint import Checkpoint
    from abliterate.checkpoints.hub import Need
    from abliterate.run_folder import Session
    from abliterate.run_records import HubSource


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
    from abliterate.pipeline.extract_stage import extract_stage

    with saying_stale(output):
        record = extract_stage(session, output)
        print_json(record) if as_json else show_extraction(record, output)


# What --scores looks at; all else of select makes scores.
_OF_SCORES = ("select.kl_threshold", "select.induce_threshold", "select.prune_layers")


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
    if scores is None:
        refuse_without("--scores FILE", {}, n_layers=n_layers)
    else:
        names = [f"{table}.{key}" for table in given for key in given[table]]
        idle = [name for name in names if name not in _OF_SCORES]
        for option in given_options(given, idle, {"model": model}):
            raise UsageError(
                f"{option} has no effect with --scores, which chooses again among the scores that "
                "the table holds: leave one of the two out"
            )
        from abliterate.cli.selection_tables import showing_front
        from abliterate.cli.tables import choose_again, show_choice

        say_stale_table(scores)
        with showing_front():
            choice = choose_again(scores, n_layers, load_settings(config, given))
        return print_json(choice) if as_json else show_choice(choice)
    assert run is not None
    from abliterate.cli.selection_tables import showing_front
    from abliterate.cli.tables import show_selection

    session = later_session(run, model, config, given)
    from abliterate.pipeline.select_stage import select_stage

    with saying_stale(run), showing_front():
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
    push_to_hub: PushToHub = None,
    public: Public = False,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> int:
    """Write a checkpoint that cannot write along the direction.

    With the abliterate.json of an edited checkpoint as --direction, that edit is made again: same
    direction, same options, and of the same source only.
    """
    settings = load_settings(config, given)
    from abliterate.cli.tables import show_edit
    from abliterate.direction_loading import (
        find_direction,
        is_edit_record,
        load_directions,
    )
    from abliterate.projection import Projection

    parse_layers(settings.orthogonalize.layers)
    chosen = settings.select
    path = find_direction(direction, chosen.position)
    from abliterate.run_records import source_of_direction

    session = open_session(
        model,
        settings,
        settings.orthogonalize.low_disk,
        need="copy",
        sources=[source_of_direction(direction)],
    )
    check_push(push_to_hub, public, session)
    if is_edit_record(path):
        if chosen.interpolate is not None:
            raise UsageError(
                f"--interpolate is not what {path} records, whose edit is repeated as it was: "
                "leave the option out, or give a run folder or a file as --direction"
            )
        from abliterate.pipeline.edit_stage import replay_stage

        record = replay_stage(session, path, output)
    else:
        vector = load_directions(
            direction, Projection.asked(chosen), chosen.position, chosen.interpolate
        )
        from abliterate.pipeline.edit_stage import orthogonalize_stage

        record = orthogonalize_stage(session, vector, output)
    print_json(record) if as_json else show_edit(record, output)
    if Path(direction).is_dir():
        say_stale(Path(direction), "selection", "evaluation")
    if push_to_hub is None:
        return 0
    vector = load_directions(
        direction, Projection.asked(chosen), chosen.position, chosen.interpolate
    )
    return push(push_to_hub, public, session, vector, output, show=not as_json)


@opt.command(last=("filter",))
def run(
    model: opt.Model,
    output: opt.RunOut,
    given: opt.Given,
    push_to_hub: PushToHub = None,
    public: Public = False,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> int:
    """extract, select, orthogonalize and evaluate; finished stages are skipped."""
    settings = load_settings(config, given, every=True)
    chosen = settings.select
    if chosen.position is None and not chosen.per_layer:
        refuse_without("--per-layer or --position", given, "select.interpolate")
    from abliterate.cli.selection_tables import showing_front
    from abliterate.cli.tables import show_run
    from abliterate.evaluation.judge_completions import check_evaluation
    from abliterate.storage.artifacts import believing

    session = _begun_session(output, model, settings)
    check_push(push_to_hub, public, session)
    from abliterate.pipeline.run import run_pipeline

    with saying_stale(output, failed_only=True), showing_front():
        record = run_pipeline(session, output)
    # Of stages that were up to date it holds what lies there.
    with believing(output, "run"):
        print_json(record) if as_json else show_run(record, output)
        check_evaluation(record["evaluate"])
    if push_to_hub is None:
        return 0
    from abliterate.direction_loading import load_direction
    from abliterate.run_folder import MODEL

    vector = load_direction(output)
    return push(push_to_hub, public, session, vector, output / MODEL, show=not as_json)


def _begun_session(run: Path, model: str, settings: Settings) -> Session:
    """A session for all stages: where they were begun, on what the first of them took."""
    from abliterate.run_folder import EXTRACT
    from abliterate.run_records import read_extract, recorded_commits, source_of_extract

    sources, commits = [], dict[str, str]()
    # Code of a checkpoint runs at no commit that only a record names.
    if (run / EXTRACT).is_file() and not settings.model.trust_remote_code:
        with suppress(InputError):  # then extract makes it again
            extracted = read_extract(run)
            sources.append(source_of_extract(run, extracted))
            commits = recorded_commits([extracted])
    return open_session(model, settings, need="copy", sources=sources, commits=commits)


def open_session(
    model: str,
    settings: Settings,
    leave_shards: bool = False,
    *,
    need: Need = "run",
    sources: Sequence[HubSource | None] = (),
    commits: dict[str, str] | None = None,
) -> Session:
    """A session on a checkpoint; imports no torch, so that a wrong name is told at once.

    Args:
        model: folder or hub id.
        settings: of the stages.
        leave_shards: as of ``find_checkpoint``.
        need: likewise.
        sources: what records name, the nearest first, as of :func:`find_recorded`.
        commits: of hub data sets, that records name.
    """
    from abliterate.extras import require_extra
    from abliterate.run_folder import Session

    own = settings.model
    if own.load_in != "none":  # told before anything is fetched
        require_extra("bitsandbytes", f"--load-in {own.load_in}", "bitsandbytes", "quantized")
    checkpoint = find_recorded(
        model, own.revision, sources, own.trust_remote_code, leave_shards, need
    )
    return Session(checkpoint, settings, commits or {})


def find_recorded(
    model: str,
    revision: str | None,
    sources: Sequence[HubSource | None],
    trusts_code: bool = False,
    leave_shards: bool = False,
    need: Need = "run",
    how: str = "--revision",
) -> Checkpoint:
    """The checkpoint of that name: of a hub id that a record names, the recorded commit.

    Another one needs to be asked for, and is said in one line.

    Args:
        model: folder, or hub id with or without ``@REVISION``.
        revision: the one asked for.
        sources: what records name, the nearest first.
        trusts_code: the checkpoint's own code may run.
        leave_shards: as of ``find_checkpoint``.
        need: likewise.
        how: what names another revision.

    Raises:
        UsageError: code would run at a revision that only a record names.
    """
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.run_records import check_trusted_revision

    recorded = next((s for s in sources if s is not None and s.is_of(model)), None)
    if recorded is not None and revision is None and "@" not in model:
        check_trusted_revision(model, recorded.commit, recorded.record, trusts_code, how)
        revision = recorded.commit
    checkpoint = find_checkpoint(model, revision, leave_shards, need)
    if recorded is not None and checkpoint.revision != recorded.commit:
        log.warning(
            "%s is taken at commit %s; %s names commit %s",
            checkpoint.name,
            checkpoint.revision,
            recorded.record,
            recorded.commit,
        )
    return checkpoint


def later_session(run: Path, model: str | None, config: Path | None, given: opt.Given) -> Session:
    """A session on what ``extract`` recorded in ``run``; file and options win over it."""
    from abliterate.run_records import (
        check_trust,
        read_extract,
        read_used,
        recorded_commits,
        source_of_extract,
        take_base,
    )

    extracted = read_extract(run)
    base = take_base(run, extracted, model, load_settings(config, given))
    settings = load_settings(config, given, base)
    check_trust(run, extracted, settings)
    source = source_of_extract(run, extracted)
    commits = recorded_commits([extracted])
    with suppress(InputError):  # of selection.json: whoever needs it says so
        commits = recorded_commits(read_used(run))
    return open_session(
        model or extracted["model"]["id"], settings, sources=[source], commits=commits
    )
