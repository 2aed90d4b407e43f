"""select as a stage of a run folder: every candidate's scores, the direction and their record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import (
    FILE_NAME,
    save_direction,
)
from abliterate.errors import InputError, SelectionError
from abliterate.extraction.extraction import Extraction
from abliterate.inference.token_batches import budget_record
from abliterate.models.model_classes import text_config
from abliterate.models.quantized_loading import how_it_computes
from abliterate.pipeline.extract_stage import unfinished_record
from abliterate.pipeline.scores_file import ScoresFile
from abliterate.projection import Projection
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import (
    DIRECTIONS,
    EXTRACT,
    SCORES,
    SELECTION,
    Session,
    prompt_keys,
    prompt_sources,
)
from abliterate.run_records import read_extract, used_prompts
from abliterate.run_rendering import settle_rendering
from abliterate.run_stage import Stage
from abliterate.run_staleness import hash_prompts
from abliterate.selection.attention_sink import explain_attention_sink
from abliterate.selection.per_layer import best_by_layer, set_of_candidates
from abliterate.selection.score_table import score_record
from abliterate.selection.search import Selection, Thresholds, choose_from_kept, select
from abliterate.selection.search_inputs import Search
from abliterate.storage.artifacts import (
    hash_file,
)
from abliterate.storage.ownership import has_metadata

SELECT_STAGE = Stage(
    "select",
    SELECTION,
    {
        FILE_NAME: has_metadata("position", "layer", "model"),
        SCORES: has_metadata("abliterate", "inputs", "kl_on"),
    },
    frozenset({"model", "chat", "extract", "select"}),
)


def select_stage(session: Session, run: Path, reuse: bool = False) -> dict[str, Any]:
    """Score the candidates of ``run`` and choose one; returns the record ``selection.json``.

    What an earlier selection has scored on the same prompts is not computed again
    (``scores.safetensors``); where nothing is missing no model is opened.

    Raises:
        InputError: an artifact or prompts cannot be used, another process writes to ``run``, or a
            file there is a link or foreign.
        SelectionError: no candidate passes; ``selection.json`` keeps the scores all the same.
    """
    with SELECT_STAGE.open(session, run) as stage:
        main = stage.ranks.run_on_main
        extracted = main(lambda: read_extract(run))
        settings = session.settings.select
        sources = prompt_sources(session.settings, settings.harmful, settings.harmless)
        used = used_prompts([extracted])  # by extraction
        prompts = session.draw(sources, "val", settings.n_val, "--n-val", used)
        scored_on = {
            "prompts": prompt_keys(prompts, keep_text=True),
            "directions": main(lambda: _hash_if_there(run / DIRECTIONS)),
            "refusal_tokens": extracted["refusal_tokens"],
        }
        projection = Projection.asked(settings)
        scored_on |= projection.record  # empty: records stay what they were without it
        inputs = {"settings": settings.model_dump(), **scored_on}
        outputs = {FILE_NAME: run / FILE_NAME}
        stage.depends_on(inputs, outputs)
        if reuse and (done := stage.finished()):
            return done
        settle_rendering(session, run, extracted)
        stage.depends_on(inputs, outputs)  # the date may have been open
        extraction = replace(
            main(lambda: Extraction.load(run / DIRECTIONS, extracted)),
            project_harmless=projection.harmless,
            project_first_token=projection.first_token,
        )
        scores = ScoresFile(stage, run / SCORES, extraction, prompts, scored_on)
        had_one = main(lambda: (run / FILE_NAME).exists())
        stage.start_clock()
        result = _choose(session, run, extraction, prompts, scores)
        record = stage.finish(
            _select_record(session, extracted, prompts, result, scores.offload())
            | {"made_from": _scored_from(scored_on["directions"], prompts)},
            lambda: _write_direction(session, run, extracted, extraction, result),
        )
    try:
        result.require_winner()
    except SelectionError as error:
        sink = f"; {line}" if (line := explain_attention_sink(extraction, result)) else ""
        gone = f"; the earlier choice, {run / FILE_NAME}, is removed" if had_one else ""
        message = f"{error}{sink}; all scores are in {run / SELECTION}{gone}"
        raise SelectionError(message, error.front) from None
    if line := explain_attention_sink(extraction, result):
        log.info(line)
    return record


def _hash_if_there(path: Path) -> str | None:
    return hash_file(path) if path.exists() else None


def _choose(
    session: Session,
    run: Path,
    extraction: Extraction,
    prompts: Mapping[str, Sequence[Prompt]],
    scores: ScoresFile,
) -> Selection:
    settings, seed = session.settings.select, session.settings.model.seed
    thresholds = Thresholds(settings.kl_threshold, settings.induce_threshold, settings.prune_layers)
    # Each layer's best is known once all of its candidates are.
    search: Search = "exhaustive" if settings.per_layer else settings.search
    scores.say_what_is_kept()
    known = choose_from_kept(
        scores.table,
        extraction,
        thresholds,
        filter=settings.filter,
        search=search,
        all_layers=settings.all_layers,
        seed=seed,
    )
    if known is not None:
        log.info("all scores that the choice needs are there: the model is not opened")
        scores.take_computed()
        return known
    _check_refusal_tokens(session, extraction, run)
    scores.compare_dtype()
    return select(
        session.loaded,
        extraction,
        prompts["harmful"],
        prompts["harmless"],
        thresholds=thresholds,
        filter=settings.filter,
        chat=session.chat,
        batch_size=session.settings.model.batch_size,
        search=search,
        all_layers=settings.all_layers,
        kl_on=settings.kl_on,
        kept=scores.table,
        save=scores.save,
        seed=seed,
    )


def _select_record(
    session: Session,
    extracted: Mapping[str, Any],
    prompts: Mapping[str, Sequence[Prompt]],
    result: Selection,
    offload: Any,
) -> dict[str, Any]:
    settings, winner = session.settings.select, result.winner
    return {
        "winner": winner and {"position": winner.position, "layer": winner.layer},
        **({"per_layer": _per_layer_record(result)} if settings.per_layer else {}),
        "candidates": [score_record(score) for score in result.scores],
        "front": result.front(),
        "bootstrap": result.resamples and result.resamples.record,
        "n_layers": extracted["n_layers"],
        "search": "exhaustive" if settings.per_layer else settings.search,
        "kl_on": settings.kl_on,
        "offload": offload,
        **_how_scored(session, extracted),
        "baselines": {
            "harmful_refusal_score": result.harmful_score,
            "harmless_refusal_score": result.harmless_score,
        },
        "thresholds": asdict(result.thresholds),
        "refusal_tokens": extracted["refusal_tokens"],
        "counts": {
            kind: {"given": settings.n_val, "used": used}
            | unfinished_record(result.unfinished, kind)
            for kind, used in (("harmful", result.n_harmful), ("harmless", result.n_harmless))
        },
        "prompts": prompt_keys(prompts),
    }


def _scored_from(candidates: Any, prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, Any]:
    return {"candidates": candidates, "prompts": hash_prompts(prompt_keys(prompts))}


def _per_layer_record(result: Selection) -> list[dict[str, Any] | None]:
    """Each layer's best candidate, and the filter that drops it, if one does."""
    best = best_by_layer(result.scores, result.thresholds)
    return [
        {"position": score.position, "reason": score.why_dropped(result.thresholds)}
        if (score := best.get(layer))
        else None
        for layer in range(1 + max(score.layer for score in result.scores))
    ]


def _how_scored(session: Session, extracted: Mapping[str, Any]) -> dict[str, Any]:
    """How the model computes; where it was not opened, as extract found it."""
    if "loaded" in session.__dict__:
        model = session.loaded.model
        return {**how_it_computes(model), **budget_record(model)}
    return {name: extracted[name] for name in ("quantization", "attention") if name in extracted}


def _write_direction(
    session: Session,
    run: Path,
    extracted: Mapping[str, Any],
    extraction: Extraction,
    result: Selection,
) -> None:
    """The chosen direction; without one, none that an earlier choice left either."""
    if result.winner is None:
        (run / FILE_NAME).unlink(missing_ok=True)
    else:
        # Of the commit whose activations it is the difference of.
        revision = extracted["model"].get("revision")
        direction = result.direction(extraction)
        name, directions = session.checkpoint.name, None
        if session.settings.select.per_layer:
            best = best_by_layer(result.scores, result.thresholds)
            directions = set_of_candidates(extraction, best)
        save_direction(run / FILE_NAME, direction, name, revision, directions)


def _check_refusal_tokens(session: Session, extraction: Extraction, run: Path) -> None:
    """Refuse a record whose refusal tokens are not the model's."""
    rows, largest = text_config(session.loaded.model).vocab_size, max(extraction.refusal_tokens)
    if largest >= rows:
        raise InputError(
            f"{run / EXTRACT}: refusal token {largest} is none of the model's {rows} tokens: run "
            "extract again"
        )
