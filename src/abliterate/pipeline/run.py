"""run: the four stages in a row, each skipped if it is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import load_direction
from abliterate.editing.workspace import check_absent, is_begun
from abliterate.evaluation.stage import EVALUATE_FILES, evaluate_stage
from abliterate.models.loading import Checkpoint
from abliterate.pipeline.stages import (
    EXTRACT_FILES,
    SELECT_FILES,
    extract_stage,
    orthogonalize_stage,
    select_stage,
)
from abliterate.run_folder import MODEL, Session, writing

EDITED = "orthogonalized"


def run_pipeline(session: Session, run: Path) -> dict[str, Any]:
    """extract, select, orthogonalize and evaluate into ``run``.

    Returns:
        The four records, by stage.

    Raises:
        InputError: another process writes to ``run``, or it holds a foreign file of such a name.
        UsageError: ``run / "model"`` is there and was not made by this command.
    """
    team, files = session.placement.team, EXTRACT_FILES | SELECT_FILES | EVALUATE_FILES
    with writing(team, run, "run", files):
        # Before hours of work; the editor looks again before it replaces anything.
        if not is_begun(run / MODEL):
            team.lead(lambda: check_absent(run / MODEL, overwrite=True))
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
