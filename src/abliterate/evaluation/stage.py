"""The evaluate stage: ``RUN/evaluation.json`` and ``RUN/completions/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.errors import InterruptedWorkError
from abliterate.evaluation.classifier import classify_files
from abliterate.evaluation.completion import Completion
from abliterate.evaluation.completions import (
    MANIFEST,
    is_completions,
    is_manifest,
)
from abliterate.evaluation.hooks_and_edits import hooks_and_edits
from abliterate.evaluation.inputs import EvaluationInputs, order_rows, read_inputs
from abliterate.evaluation.judge_completions import failures, judge_files
from abliterate.evaluation.kept_figures import MEASURED, is_memo
from abliterate.evaluation.lm_eval_tasks import Tasks, find_tasks
from abliterate.evaluation.measurements import Measurements
from abliterate.evaluation.outcomes import deltas
from abliterate.evaluation.prompt_kinds import BORDERLINE, KINDS
from abliterate.evaluation.raters import agreements
from abliterate.metrics.answer_flaws import flaw_thresholds
from abliterate.metrics.intervals import bootstrap_settings, share_methods
from abliterate.metrics.refusal_tokens import resolve_refusal_tokens
from abliterate.models.loading import Checkpoint
from abliterate.run_folder import COMPLETIONS, EVALUATION, Session, prompt_keys
from abliterate.run_rendering import extracted_of, settle_rendering
from abliterate.run_stage import Stage
from abliterate.run_staleness import hash_prompts
from abliterate.storage.guarded_files import check_folder, remove_temporaries
from abliterate.storage.ownership import claim

EVALUATE_STAGE = Stage(
    "evaluate", EVALUATION, sections=frozenset({"model", "chat", "extract", "evaluate"})
)


def evaluate_stage(
    session: Session,
    direction: Direction | DirectionSet | None,
    interventions: Sequence[str],
    edited: Mapping[str, Checkpoint],
    run: Path | None,
    out: Path | None,
    reuse: bool = False,
) -> dict[str, Any]:
    """Compare interventions on test prompts; returns the record ``evaluation.json``.

    Args:
        session: the model that is intervened on.
        direction: what to ablate or add.
        interventions: which to run; ``checkpoint`` stands for all of ``edited``, which otherwise
            come last.
        edited: further checkpoints, by the name of their row.
        run: the run folder whose prompts are never used again and whose refusal tokens count.
        out: where record and completions go, or None to write nothing.
        reuse: return an up-to-date record instead of computing it again.

    Raises:
        UsageError: an intervention, judge, corpus or task is named wrongly.
        InputError: prompts or a corpus cannot be used, another process writes to ``out``, or a file
            there is a link or foreign.
    """
    rows = order_rows(interventions, edited, direction)
    with EVALUATE_STAGE.open(session, out) as stage:
        if out is not None:
            names = _file_names(session, rows)
            stage.ranks.run_on_main(lambda: _claim_completions(out, names))
        inputs = read_inputs(session, direction, rows, edited, run)
        summary, files = inputs.summary(session), _completion_files(session, out, inputs)
        stage.depends_on(summary, files)
        if reuse and (done := stage.finished()) and not done["judge_failures"]:
            return done
        settle_rendering(session, run, extracted_of(session, run))
        stage.depends_on(summary, files)  # the date may have been open
        if inputs.here:  # before the model is loaded, which takes long
            resolve_refusal_tokens(session.tokenizer, inputs.named_tokens)
        if inputs.here and session.opener.limits:
            log.info("%s", session.opener.limits)
        if inputs.servers:
            log.info(
                "evaluate: a server answers %s: KL and first-token scores need logits, which it "
                "does not give, and are left out there",
                ", ".join(inputs.servers),
            )
        tasks = _find_tasks(session, inputs)
        stage.start_clock()
        measurements = Measurements(session, inputs, tasks, out)
        _measure(measurements, out)
        return stage.finish(_record(measurements))


def _claim_completions(out: Path, names: Sequence[str]) -> None:
    """Refuse foreign files where answers go, and clear what an interrupted write has left."""
    folder = out / COMPLETIONS
    answers = dict.fromkeys(names, is_completions)
    check_folder(folder)
    claim(folder, answers | {MANIFEST: is_manifest, MEASURED: is_memo}, home=out)
    remove_temporaries(folder)


def _completion_files(
    session: Session, out: Path | None, inputs: EvaluationInputs
) -> dict[str, Path]:
    """The files of answers that the evaluation leaves."""
    if out is None:
        return {}
    here = inputs.here if inputs.here and session.opener.generates else []
    rows = [name for name in inputs.rows if name in here or name in inputs.servers]
    return {name: out / COMPLETIONS / name for name in _file_names(session, rows)}


def _file_names(session: Session, rows: Sequence[str]) -> list[str]:
    asked = session.settings.evaluate.borderline is not None
    kinds = (*KINDS, BORDERLINE) if asked else KINDS
    return [f"{name}-{kind}.jsonl" for name in rows for kind in kinds]


def _find_tasks(session: Session, inputs: EvaluationInputs) -> Tasks | None:
    settings = session.settings.evaluate
    if not settings.tasks:
        return None
    return find_tasks(settings.tasks, inputs.tasks_dir, settings.task_limit)


def _measure(measurements: Measurements, out: Path | None) -> None:
    """Complete, measure and judge all rows; what is done is kept as it is made."""
    inputs = measurements.inputs
    try:
        if "own" in inputs.corpora:
            measurements.complete("baseline", "harmless")
        # The base before others, and the baseline first: KL is measured from where it starts.
        for name in sorted(
            inputs.rows, key=lambda name: (name in inputs.edited, name != "baseline")
        ):
            measurements.run(name)
        measurements.release()
        files = [
            measurements.files[name, kind]
            for name in inputs.rows
            for kind in inputs.prompts
            if (name, kind) in measurements.files
        ]
        if inputs.classifier is not None:
            classify_files(inputs.classifier, files)
        if inputs.judge is not None:
            judge_files(inputs.judge, files)
        if inputs.second_judge is not None:
            judge_files(inputs.second_judge, files, inputs.second_judge_key)
    except KeyboardInterrupt:
        if out is None:
            raise
        raise InterruptedWorkError(
            f"interrupted: what is done is kept in {out / COMPLETIONS}, and the same command goes "
            "on from there"
        ) from None


def _record(measurements: Measurements) -> dict[str, Any]:
    session, inputs, tasks = measurements.session, measurements.inputs, measurements.tasks
    outcomes = {name: measurements.outcome(name) for name in inputs.rows}
    completions = {
        (name, kind): getattr(outcome, kind) or ()
        for name, outcome in outcomes.items()
        for kind in inputs.prompts
    }
    corpora = measurements.corpora
    return {
        "direction": inputs.direction and inputs.direction.summary(),
        "checkpoints": {
            name: other.identity() for name, other in inputs.edited.items() if name in inputs.rows
        },
        "made_from": {
            "prompts": hash_prompts(prompt_keys(inputs.prompts)),
            **({} if inputs.used is None else {"used_prompts": hash_prompts(inputs.used)}),
        },
        **inputs.served(),
        "interventions": {name: outcome.summary() for name, outcome in outcomes.items()},
        "deltas": deltas(outcomes),
        "by_prompt": {
            "prompts": measurements.asked.scored_prompts,
            "interventions": {name: outcome.by_prompt() for name, outcome in outcomes.items()},
        },
        "controls": _controls(measurements),
        "hooks_and_edits": hooks_and_edits(outcomes, list(inputs.edited)),
        "judge": inputs.judge and inputs.judge.summary(),
        **({"second_judge": two.summary()} if (two := inputs.second_judge) else {}),
        "classifier": inputs.classifier and inputs.classifier.summary(),
        "judge_failures": failures(completions),
        **_agreement(inputs, completions, session.settings.model.seed),
        "corpora": {name: corpus.summary() for name, corpus in corpora.items() if corpus},
        "task_settings": None if tasks is None else tasks.summary(),
        "n_prompts": {kind: len(chosen) for kind, chosen in inputs.prompts.items()},
        **({"sets": {k: dict(held) for k, held in inputs.sets.items()}} if inputs.sets else {}),
        **({} if (scored := measurements.asked.scored) is None else {"n_scored": scored}),
        "intervals": share_methods(),
        "bootstrap": bootstrap_settings(session.settings.model.seed),
        "refusal_tokens": measurements.refusal_tokens,
        "refusal_phrases": inputs.phrases.summary(),
        "stop_at_verdict": measurements.session.settings.evaluate.stop_at_verdict,
        "broken_answers": flaw_thresholds(),
        "refused_at_unit": "tokens",
        "offload": measurements.readings,
    }


def _agreement(
    inputs: EvaluationInputs,
    completions: Mapping[tuple[str, str], Sequence[Completion]],
    seed: int,
) -> dict[str, Any]:
    """How far the raters of the answers agree, by row and kind; only if there are two of them."""
    if inputs.judge is None and inputs.classifier is None:
        return {}
    found = [
        {"intervention": name, "kind": kind, **pair}
        for (name, kind), answers in completions.items()
        for pair in agreements(answers, seed)
    ]
    return {"agreement": found}


def _controls(measurements: Measurements) -> dict[str, Any] | None:
    """What directions that mean nothing do, by row; None if there are none."""
    found = measurements.controls
    if not found:
        return None
    return {
        "n": measurements.n_controls,
        "seed": measurements.session.settings.model.seed,
        "covariance_of": next(iter(found.values()))["activations"] | {"prompts": "harmless test"},
        "rows": {name: held["controls"] for name, held in found.items()},
    }
