"""run: the four stages in a row, each skipped if it is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import load_direction
from abliterate.evaluation.stage import evaluate_stage
from abliterate.models.loading import Checkpoint
from abliterate.pipeline.stages import extract_stage, orthogonalize_stage, select_stage
from abliterate.run_folder import EDITED, MODEL, Session


def run_pipeline(session: Session, run: Path) -> dict[str, Any]:
    """extract, select, orthogonalize and evaluate into ``run``.

    Returns:
        The four records, by stage.
    """
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
