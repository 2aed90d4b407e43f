"""The evaluate stage: ``RUN/evaluation.json`` and ``RUN/completions/``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import Direction
from abliterate.errors import InputError, InterruptedWorkError, UsageError
from abliterate.evaluation.compare import (
    KINDS,
    check_intervention,
    deltas,
)
from abliterate.evaluation.completions import MANIFEST, is_completions, is_manifest
from abliterate.evaluation.intervention_names import CHECKPOINT, INTERVENTIONS, check_name
from abliterate.evaluation.judge_completions import failures, judge_files
from abliterate.evaluation.judges import Judge, find_judge
from abliterate.evaluation.lm_eval_tasks import find_tasks
from abliterate.evaluation.measurements import MEASURED, Work, is_memo
from abliterate.metrics.intervals import bootstrap_settings, share_methods
from abliterate.models.loading import Checkpoint, load_config, text_config
from abliterate.prompts.corpora import parse_corpora, read_corpus
from abliterate.prompts.sampling import load_prompts
from abliterate.run_folder import (
    COMPLETIONS,
    EVALUATION,
    Session,
    load_if_current,
    prompt_keys,
    prompt_sources,
    writing,
)
from abliterate.run_records import read_used
from abliterate.storage.artifacts import (
    hash_file,
    hash_json,
    is_plain_name,
    versions,
    write_json,
)
from abliterate.storage.guarded_files import check_folder, remove_temporaries
from abliterate.storage.ownership import Kind, claim, is_record

EVALUATE_FILES: dict[str, Kind] = {EVALUATION: is_record}


def evaluate_stage(
    session: Session,
    direction: Direction | None,
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
    ranks = session.placement.ranks
    rows = order_rows(interventions, edited, direction)
    if out is None:
        return _evaluate(session, direction, rows, edited, run, out, reuse)
    answers = dict.fromkeys(_completion_files(out, rows), is_completions)
    beside = {MANIFEST: is_manifest, MEASURED: is_memo}
    with writing(ranks, out, "evaluate", EVALUATE_FILES):
        ranks.run_on_main(lambda: check_folder(out / COMPLETIONS))
        ranks.run_on_main(lambda: claim(out / COMPLETIONS, answers | beside, home=out))
        ranks.run_on_main(lambda: remove_temporaries(out / COMPLETIONS))
        return _evaluate(session, direction, rows, edited, run, out, reuse)


def _evaluate(
    session: Session,
    direction: Direction | None,
    rows: Sequence[str],
    edited: Mapping[str, Checkpoint],
    run: Path | None,
    out: Path | None,
    reuse: bool,
) -> dict[str, Any]:
    ranks = session.placement.ranks
    settings, seed = session.settings.evaluate, session.settings.model.seed
    _check_vocabulary(session, edited)
    # All that can be wrong with the options shows before hours are spent.
    judge = check_options(session)
    corpora = {
        name: None if name == "own" else read_corpus(name, source, settings.corpus_texts, seed)
        for name, source in parse_corpora(settings.corpus).items()
    }
    folder = None if settings.tasks_dir is None else Path(settings.tasks_dir)
    records = ranks.run_on_main(lambda: [] if run is None else read_used(run))
    sources = prompt_sources(session.settings, settings.harmful, settings.harmless)
    used = {kind: [key for record in records for key in record["prompts"][kind]] for kind in KINDS}
    prompts = {
        kind: load_prompts(sources[kind], "test", settings.n_test, seed, used[kind], "--n-test")
        for kind in KINDS
    }
    named = list(session.settings.extract.refusal_tokens) or [
        str(token["id"]) for record in records[:1] for token in record["refusal_tokens"]
    ]
    inputs = hash_json(
        session.base_inputs()
        | {
            "settings": settings.model_dump(),
            "prompts": prompt_keys(prompts, keep_text=True),
            "direction": direction and direction.sha256,
            "rows": rows,
            "edited": {name: other.identity() for name, other in edited.items()},
            "refusal_tokens": named,
            "judge": judge and judge.summary(),
            "corpora": [corpus.summary() for corpus in corpora.values() if corpus],
            "tasks_dir": _folder_hash(folder),
            "intervals": share_methods(),
        }
    )
    ranks.assert_equal(inputs, "model, prompt set or package version")
    files = {} if session.offload else _completion_files(out or Path(), rows)
    if (
        reuse
        and out
        and (done := ranks.run_on_main(lambda: load_if_current(out / EVALUATION, inputs, files)))
        and not done["judge_failures"]
    ):
        return done
    if session.offload:
        log.info(
            "answers are not generated under --offload: refusal metrics and KL are measured, "
            "refusals in completions are not"
        )
    tasks = settings.tasks and find_tasks(settings.tasks, folder, settings.task_limit)
    started = time.perf_counter()
    work = Work(
        session,
        direction,
        edited,
        rows,
        {kind: tuple(chosen) for kind, chosen in prompts.items()},
        named,
        corpora,
        tasks or None,
        _folder_hash(folder),
        out,
        None if judge is None else hash_json(judge.summary()),
    )
    try:
        if "own" in corpora:
            work.complete("baseline", "harmless")
        for name in sorted(rows, key=lambda name: name in edited):  # the base model first
            work.run(name)
        work.release()
        if judge is not None:
            judge_files(judge, [work.files[name, kind] for name in rows for kind in KINDS])
    except KeyboardInterrupt:
        if out is None:
            raise
        raise InterruptedWorkError(
            f"interrupted: what is done is kept in {out / COMPLETIONS}, and the same command goes "
            "on from there"
        ) from None
    outcomes = {name: work.outcome(name, judge is not None) for name in rows}
    results = {name: outcome.summary() for name, outcome in outcomes.items()}
    completions = {
        (name, kind): getattr(outcome, kind) or ()
        for name, outcome in outcomes.items()
        for kind in KINDS
    }
    record = {
        "model": session.identity,
        "direction": direction and direction.summary(),
        "checkpoints": {name: other.identity() for name, other in edited.items() if name in rows},
        "interventions": results,
        "deltas": deltas(outcomes),
        "judge": judge and judge.summary(),
        "judge_failures": failures(completions),
        "corpora": {name: corpus.summary() for name, corpus in work.corpora.items() if corpus},
        "task_settings": tasks.summary() if tasks else None,
        "n_prompts": {kind: len(chosen) for kind, chosen in prompts.items()},
        "intervals": share_methods(),
        "bootstrap": bootstrap_settings(seed),
        "refusal_tokens": work.refusal_tokens,
        "offload": work.logits.readings if session.offload else None,
        "settings": session.settings.model_dump(include={"model", "chat", "extract", "evaluate"}),
        "seed": seed,
        "versions": versions(),
        "seconds": time.perf_counter() - started,
        "inputs": inputs,
        "outputs": {},
    }

    def write() -> dict[str, Any]:
        if out is not None:
            record["outputs"] = {name: hash_file(path) for name, path in files.items()}
            write_json(out / EVALUATION, record)
        return record

    return ranks.run_on_main(write)


def check_options(session: Session) -> Judge | None:
    """Find what is wrong with the settings of an evaluation before any model is loaded.

    Returns:
        The judge that they name.

    Raises:
        UsageError: they contradict each other, or the model, or name what there is not.
        CheckpointError: there is no such judge.
    """
    settings, model = session.settings.evaluate, session.settings.model
    given = {"--judge": settings.judge, "--tasks": settings.tasks}
    if session.placement.ranks.size > 1 and any(given.values()):
        raise UsageError(
            f"{next(name for name, value in given.items() if value)} does not run on several "
            "ranks: leave it out, then run evaluate with it in one process, which finds the "
            "completions done"
        )
    _check_streamed(session)
    parse_corpora(settings.corpus)
    further = settings.tasks_dir is not None or settings.task_limit is not None
    if settings.tasks is None and further:
        raise UsageError("--tasks-dir and --task-limit need --tasks")
    return find_judge(
        settings,
        {
            "device": model.device,
            "dtype": model.dtype,
            "batch_size": model.batch_size,
            "trust_remote_code": model.trust_remote_code,
        },
    )


def order_rows(
    interventions: Sequence[str], edited: Mapping[str, Checkpoint], direction: Direction | None
) -> list[str]:
    """The names of the rows, each once, checked.

    Raises:
        UsageError: an unknown intervention, one that lacks its direction, or a name taken twice.
    """
    rows: list[str] = []
    for name in interventions:
        check_name(name, direction, edited)
    for name in interventions if CHECKPOINT in interventions else [*interventions, CHECKPOINT]:
        if name == CHECKPOINT:
            rows += edited
        else:
            check_intervention(name, direction)
            rows.append(name)
    for name in edited:
        if not is_plain_name(name):
            raise UsageError(f"--checkpoint {name!r}: the name becomes a file's, give a plain one")
        if name in (*INTERVENTIONS, CHECKPOINT):
            raise UsageError(f"--checkpoint {name}: that is an intervention's name, give another")
    return list(dict.fromkeys(rows))


def _check_vocabulary(session: Session, edited: Mapping[str, Checkpoint]) -> None:
    """Refuse a checkpoint that is no edit of the model: their distributions cannot be compared."""
    trust = session.settings.model.trust_remote_code

    def size(checkpoint: Checkpoint) -> int | None:
        return getattr(text_config(load_config(checkpoint, trust)), "vocab_size", None)

    for name, other in edited.items():
        own, base = size(other), size(session.checkpoint)
        if own != base:
            raise InputError(
                f"--checkpoint {name} has a vocabulary of {own}, {session.checkpoint.name} one of "
                f"{base}: give a checkpoint made from that model"
            )


def _check_streamed(session: Session) -> None:
    """Refuse what a streamed model does not give, before anything is read."""
    settings = session.settings.evaluate
    given = {
        "--judge": settings.judge,
        "--judge-url": settings.judge_url,
        "--corpus": settings.corpus,
        "--tasks": settings.tasks,
    }
    asked = next((option for option, value in given.items() if value), None)
    if asked and session.offload:
        raise UsageError(
            f"{asked} does not run on a streamed model, of which first tokens alone are scored: "
            "leave it out, or use --no-offload on a machine with room for the weights"
        )


def _folder_hash(folder: Path | None) -> str | None:
    """The hash of the files of a folder of task definitions, data that lies with them included."""
    if folder is None or not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hash_json({str(path.relative_to(folder)): hash_file(path) for path in files})


def _completion_files(out: Path, rows: Sequence[str]) -> dict[str, Path]:
    names = [f"{name}-{kind}.jsonl" for name in rows for kind in KINDS]
    return {name: out / COMPLETIONS / name for name in names}
