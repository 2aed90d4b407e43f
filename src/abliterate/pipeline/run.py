"""run: the four stages in a row, each skipped if it is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import load_direction
from abliterate.editing.options import edit_options
from abliterate.editing.workspace import check_absent, is_begun
from abliterate.errors import UsageError
from abliterate.evaluation.inputs import borderline_prompts, check_options
from abliterate.evaluation.lm_eval_tasks import find_tasks
from abliterate.evaluation.stage import EVALUATE_STAGE, evaluate_stage
from abliterate.models.loading import Checkpoint
from abliterate.pipeline.stages import (
    EXTRACT_STAGE,
    SELECT_STAGE,
    extract_stage,
    orthogonalize_stage,
    select_stage,
)
from abliterate.prompts.sources import read_source
from abliterate.run_folder import EDITED, MODEL, Session
from abliterate.run_stage import writing

# What orthogonalize does and the chain cannot, and why.
_ALONE = {
    "as_lora": "the edited checkpoint is evaluated, and an adapter is none",
    "low_disk": "the model is loaded whole, so its shards are there",
}


def run_pipeline(session: Session, run: Path) -> dict[str, Any]:
    """extract, select, orthogonalize and evaluate into ``run``.

    Returns:
        The four records, by stage.

    Raises:
        UsageError: before any work, a setting that a later stage would refuse or could not follow,
            or ``run / "model"`` is there and was not made by this command.
        InputError: a prompt source that a later stage could not read, another process writes to
            ``run``, or it holds a foreign file of such a name.
    """
    ranks = session.placement.ranks
    files = EXTRACT_STAGE.files | SELECT_STAGE.files | EVALUATE_STAGE.files
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
    direction = load_direction(run)
    log.info("orthogonalize")
    edit = orthogonalize_stage(session, direction, run / MODEL, reuse=True)
    log.info("evaluate")
    evaluation = evaluate_stage(
        session,
        direction,
        ("baseline", "ablate", "add"),
        {EDITED: Checkpoint(str(run / MODEL), run / MODEL)},
        run,
        run,
        reuse=True,
    )
    return {
        "extract": extracted,
        "select": selection,
        "orthogonalize": edit,
        "evaluate": evaluation,
    }


def check_settings(session: Session) -> None:
    """Refuse, before any stage, settings that the chain would ignore or that would end it later.

    Raises:
        UsageError: an option contradicts another or the chain, or names what there is not.
        InputError: a prompt source cannot be read.
        CheckpointError: there is no such judge.
    """
    settings = session.settings
    for name, reason in _ALONE.items():
        if getattr(settings.orthogonalize, name):
            raise UsageError(
                f"[orthogonalize] {name} is nothing for run ({reason}): leave it out, then use "
                f"`abliterate orthogonalize --{name.replace('_', '-')}` on the run folder"
            )
    edit_options(settings.orthogonalize).summary()  # which looks for its device
    check_options(session)
    evaluate = settings.evaluate
    if evaluate.tasks is not None:
        folder = None if evaluate.tasks_dir is None else Path(evaluate.tasks_dir)
        find_tasks(evaluate.tasks, folder, evaluate.task_limit)
    later = (settings.select.harmful, settings.select.harmless)
    for source in dict.fromkeys((*later, evaluate.harmful, evaluate.harmless)):
        if source is not None:
            read_source(source, session.commits)
    if evaluate.borderline is not None:
        borderline_prompts(session, evaluate.borderline)
