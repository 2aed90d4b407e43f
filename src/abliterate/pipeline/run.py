"""run: the four stages in a row, each skipped if it is up to date."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import Direction
from abliterate.direction_interpolation import parse_interpolation
from abliterate.direction_loading import load_directions
from abliterate.editing.early_check import check_edit
from abliterate.editing.options import edit_options, named_layers
from abliterate.editing.workspace import check_absent, is_begun
from abliterate.errors import UsageError
from abliterate.evaluation.inputs import borderline_prompts, check_options
from abliterate.evaluation.lm_eval_tasks import find_tasks
from abliterate.evaluation.stage import EVALUATE_STAGE, evaluate_stage
from abliterate.inference.direction_fit import stream_shape
from abliterate.models.loading import Checkpoint
from abliterate.pipeline.edit_stage import orthogonalize_stage
from abliterate.pipeline.extract_stage import EXTRACT_STAGE, extract_stage
from abliterate.pipeline.select_stage import SELECT_STAGE, select_stage
from abliterate.projection import Projection
from abliterate.prompts.chat_template import parse_positions
from abliterate.prompts.sources import read_source
from abliterate.run_folder import EDITED, MODEL, RUN, Session
from abliterate.run_stage import writing
from abliterate.storage.artifacts import hash_json, versions, write_json
from abliterate.storage.ownership import is_record

# What orthogonalize does and the chain cannot, and why.
_ALONE = {
    "as_lora": "the edited checkpoint is evaluated, and an adapter is none",
    "low_disk": "the model is loaded whole, so its shards are there",
}


def run_pipeline(session: Session, run: Path) -> dict[str, Any]:
    """extract, select, orthogonalize and evaluate into ``run``.

    Returns:
        The four records, by stage, and under ``hash`` that of ``run.json``.

    Raises:
        UsageError: before any work, a setting that a later stage would refuse or could not follow,
            or ``run / "model"`` is there and was not made by this command.
        InputError: a prompt source that a later stage could not read, another process writes to
            ``run``, or it holds a foreign file of such a name.
    """
    ranks = session.placement.ranks
    files = EXTRACT_STAGE.files | SELECT_STAGE.files | EVALUATE_STAGE.files | {RUN: is_record}
    check_settings(session)
    with writing(ranks, run, "run", files):
        # Before hours of work; the editor looks again before it replaces anything.
        if not is_begun(run / MODEL):
            ranks.run_on_main(lambda: check_absent(run / MODEL, overwrite=True))
        return _run_stages(session, run)


def _run_stages(session: Session, run: Path) -> dict[str, Any]:
    log.info("extract")
    extracted = extract_stage(session, run, reuse=True)
    log.info("select")
    selection = select_stage(session, run, reuse=True)
    made = session.settings.select
    direction = load_directions(run, Projection.asked(made), made.position, made.interpolate)
    log.info("orthogonalize")
    edit = orthogonalize_stage(session, direction, run / MODEL, reuse=True)
    log.info("evaluate")
    evaluation = evaluate_stage(
        session,
        direction,
        ("baseline", "ablate", *(["add"] if isinstance(direction, Direction) else [])),
        {EDITED: Checkpoint(str(run / MODEL), run / MODEL)},
        run,
        run,
        reuse=True,
    )
    records = {
        "extract": extracted,
        "select": selection,
        "orthogonalize": edit,
        "evaluate": evaluation,
    }
    summary = decided_by(session, records)
    session.placement.ranks.run_on_main(lambda: write_json(run / RUN, summary))
    return {**records, "hash": summary["hash"]}


def decided_by(session: Session, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``run.json``: one hash of everything that decides the result, and what it is made of.

    The stages' own hashes cover the model's files, the prompts, all settings, the versions and what
    the stages before have left; how it was computed decides on the last bits.

    Args:
        session: of the run.
        records: of its stages.
    """
    edit = records["orthogonalize"]
    stages = {name: record["inputs"] for name, record in records.items() if name != "orthogonalize"}
    stages["orthogonalize"] = hash_json(
        {name: edit[name] for name in ("source", "direction", "options", "versions")}
    )
    parts = {
        "stages": stages,
        "computed_with": {
            name: {"device": record.get("device"), **record.get("computed_with", {})}
            for name, record in records.items()
            if name != "orthogonalize"
        },
    }
    return {
        "model": session.identity,
        "hash": hash_json(parts),
        **parts,
        "seed": session.settings.model.seed,
        "versions": versions(),
    }


def check_settings(session: Session) -> None:
    """Refuse, before any stage, settings that the chain would ignore or that would end it later.

    Raises:
        UsageError: an option contradicts another or the chain, or names what there is not.
        InputError: a prompt source cannot be read.
        CheckpointError: there is no such judge, or the model cannot be edited so.
    """
    settings = session.settings
    for name, reason in _ALONE.items():
        if getattr(settings.orthogonalize, name):
            raise UsageError(
                f"[orthogonalize] {name} is nothing for run ({reason}): leave it out, then use "
                f"`abliterate orthogonalize --{name.replace('_', '-')}` on the run folder"
            )
    chosen = settings.select
    if chosen.interpolate is not None and chosen.position is None and not chosen.per_layer:
        raise UsageError(
            "[select] interpolate has no effect without per_layer or position: add one, or leave "
            "interpolate out"
        )
    options = edit_options(settings.orthogonalize)
    options.summary()  # which looks for its device
    _check_set(session)
    check_options(session)
    evaluate = settings.evaluate
    if evaluate.tasks is not None:
        folder = None if evaluate.tasks_dir is None else Path(evaluate.tasks_dir)
        find_tasks(evaluate.tasks, folder, evaluate.task_limit)
    later = (settings.select.harmful, settings.select.harmless)
    for source in dict.fromkeys((*later, *evaluate.harmful, *evaluate.harmless)):
        if source is not None:
            read_source(source, session.commits)
    if evaluate.borderline is not None:
        borderline_prompts(session, evaluate.borderline)
    by_layer = chosen.per_layer or chosen.position is not None
    trust, allow_leak = settings.model.trust_remote_code, settings.orthogonalize.allow_leak
    check_edit(session.checkpoint, options, by_layer, trust, allow_leak)


def _check_set(session: Session) -> None:
    """Refuse a position that extract will not keep and layers that the model has not, as far as the
    settings and its configuration tell."""
    settings = session.settings
    chosen, positions = settings.select, settings.extract.positions
    # Those of the chat template are known once its tokenizer is read.
    if chosen.position is not None and positions != "post-instruction":
        kept = parse_positions(positions, None, session.chat)
        if chosen.position not in kept:
            held = ", ".join(map(str, kept))
            raise UsageError(
                f"--position {chosen.position}: extract keeps positions {held} (--positions)"
            )
    shape = stream_shape(session.checkpoint, settings.model.trust_remote_code)
    if shape is not None and chosen.interpolate is not None:
        named_layers(parse_interpolation(chosen.interpolate)[1], shape[0] - 1, "--interpolate")
