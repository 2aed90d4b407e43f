"""extract, select and orthogonalize as stages of a run folder: each reads what the one before wrote
and leaves its own record (``abliterate.run_stage``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import FILE_NAME, FIRST_TOKEN_MEAN, Direction, save_direction
from abliterate.direction_set import DirectionSet
from abliterate.editing.file_names import RECORD
from abliterate.editing.options import EditOptions, edit_options
from abliterate.editing.orthogonalize import orthogonalize
from abliterate.editing.replay import (
    check_source,
    read_recorded_edit,
    replayed_options,
    warn_of_other_bits,
)
from abliterate.errors import InputError, SelectionError, UsageError
from abliterate.extraction.kept_activations import (
    ActivationWriter,
    Wanted,
    activation_writer,
    choose_layers,
)
from abliterate.extraction.means import Extraction, extract
from abliterate.extraction.robust_means import clipped, require_one_process
from abliterate.inference.in_memory import engine_of
from abliterate.inference.token_batches import budget_record
from abliterate.metrics.refusal_tokens import resolve_refusal_tokens
from abliterate.models.model_classes import text_config
from abliterate.models.quantized_loading import how_it_computes
from abliterate.pipeline.scores_file import ScoresFile
from abliterate.projection import Projection
from abliterate.prompts.chat_template import parse_positions
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import (
    ACTIVATIONS,
    DIRECTIONS,
    EXTRACT,
    SCORES,
    SELECTION,
    Session,
    prompt_keys,
    prompt_sources,
    token_records,
)
from abliterate.run_records import read_extract, used_prompts
from abliterate.run_rendering import describe_rendering, settle_rendering, take_date
from abliterate.run_stage import Stage
from abliterate.run_staleness import hash_prompts
from abliterate.selection.attention_sink import explain_attention_sink
from abliterate.selection.per_layer import best_by_layer, set_of_candidates
from abliterate.selection.score_table import score_record
from abliterate.selection.search import Selection, Thresholds, choose_from_kept, select
from abliterate.selection.search_inputs import Search
from abliterate.storage.artifacts import (
    hash_file,
    read_record,
    versions,
    write_tensors,
)
from abliterate.storage.ownership import has_metadata
from abliterate.writers import decoder_blocks

EXTRACT_STAGE = Stage(
    "extract",
    EXTRACT,
    {
        DIRECTIONS: has_metadata("abliterate", "positions", "model"),
        ACTIVATIONS: has_metadata("layers", "positions", "model"),
    },
    frozenset({"model", "chat", "extract"}),
)
SELECT_STAGE = Stage(
    "select",
    SELECTION,
    {
        FILE_NAME: has_metadata("position", "layer", "model"),
        SCORES: has_metadata("abliterate", "inputs", "kl_on"),
    },
    frozenset({"model", "chat", "extract", "select"}),
)


def extract_stage(session: Session, run: Path, reuse: bool = False) -> dict[str, Any]:
    """Extract candidate directions into ``run``; returns the record ``extract.json``.

    Raises:
        InputError: prompts cannot be used, another process writes to ``run``, or a file there is a
            link or foreign.
        UsageError: activations are to be kept by several ranks.
    """
    settings = session.settings.extract
    with EXTRACT_STAGE.open(session, run) as stage:
        if settings.save_activations and not stage.ranks.is_unsplit:
            raise UsageError(
                "--save-activations needs all prompts in one process: run it by itself"
            )
        require_one_process(settings.robust, stage.ranks)
        skips = session.settings.chat.thinking == "skip"
        if settings.save_activations and skips and settings.positions == "post-instruction":
            raise UsageError(
                "--save-activations with --thinking skip needs --positions, such as last: which "
                "tokens end the thought shows only once it is thought"
            )
        sources = {"harmful": settings.harmful, "harmless": settings.harmless}
        prompts = session.draw(sources, "train", settings.n_train, "--n-train")
        names = [DIRECTIONS, *([ACTIVATIONS] if settings.save_activations else [])]
        inputs = {
            "settings": settings.model_dump(),
            "prompts": prompt_keys(prompts, keep_text=True),
        }
        outputs = {name: run / name for name in names}
        if reuse:
            take_date(session, run)
            stage.depends_on(inputs, outputs)
            if done := stage.finished():
                return done
        settle_rendering(session)
        # Before the model is loaded, which takes long.
        resolve_refusal_tokens(session.tokenizer, session.settings.extract.refusal_tokens)
        stage.depends_on(inputs, outputs)
        _ = session.loaded  # whose loading does not count
        stage.start_clock()
        result, kept = _extract(session, run, prompts)
        body = _extract_record(session, prompts, result, kept)
        return stage.finish(body, lambda: _write_means(session, run, result))


def _extract(
    session: Session, run: Path, prompts: Mapping[str, Sequence[Prompt]]
) -> tuple[Extraction, Wanted | None]:
    """The means, and which activations were kept in ``RUN/activations.safetensors``, if any."""
    settings = session.settings.extract
    with _activations(session, run, prompts) as writer:
        result = extract(
            session.loaded,
            prompts["harmful"],
            prompts["harmless"],
            positions=settings.positions,
            refusal_tokens=settings.refusal_tokens,
            filter=settings.filter,
            chat=session.chat,
            batch_size=session.settings.model.batch_size,
            keep=None if writer is None else writer.put,
            seed=session.settings.model.seed,
            robust=settings.robust,
            winsor_quantile=settings.winsor_quantile,
        )
        if writer is None:
            return result, None
        writer.finish({"harmful": result.kept_harmful, "harmless": result.kept_harmless})
    return result, writer.wanted


def _extract_record(
    session: Session,
    prompts: Mapping[str, Sequence[Prompt]],
    result: Extraction,
    kept: Wanted | None,
) -> dict[str, Any]:
    loaded, engine = session.loaded, engine_of(session.loaded)
    used = {"harmful": result.kept_harmful, "harmless": result.kept_harmless}
    record = {
        "model_type": loaded.model.config.model_type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        **how_it_computes(loaded.model),
        **budget_record(loaded.model),
        "device": engine.devices,
        "offload": engine.summary(),
        "positions": [
            {"position": position, "token": token}
            for position, token in zip(result.positions, result.tokens, strict=True)
        ],
        "n_layers": result.mean_harmful.shape[1],
        "d_model": result.mean_harmful.shape[2],
        "refusal_tokens": token_records(loaded.tokenizer, result.refusal_tokens),
        "counts": {
            kind: {"given": len(flags), "used": sum(flags)} | _apart(result.unfinished, kind)
            for kind, flags in used.items()
        },
        "prompts": prompt_keys(prompts),
        "made_from": {"prompts": hash_prompts(prompt_keys(prompts))},
        "rendering": describe_rendering(session),
    }
    if result.stability is not None:
        record["stability"] = {
            name: values.tolist() for name, values in asdict(result.stability).items()
        }
    settings = session.settings.extract
    if settings.robust == "winsor":
        ends = {kind: clipped(sum(f), settings.winsor_quantile) for kind, f in used.items()}
        record["robust"] = {"mean": "winsor", "quantile": settings.winsor_quantile, "clipped": ends}
    elif settings.robust == "median":
        record["robust"] = {"mean": "median"}
    if kept is not None:
        record["activations"] = {
            "layers": list(kept.layers),
            "positions": list(kept.kept_positions),
        }
    return record


def _apart(unfinished: Mapping[str, int], kind: str) -> dict[str, int]:
    """About how many prompts the thought did not end, where there was to be one."""
    return {"unfinished": unfinished[kind]} if unfinished else {}


def _write_means(session: Session, run: Path, result: Extraction) -> None:
    if session.settings.extract.save_activations is None:
        (run / ACTIVATIONS).unlink(missing_ok=True)  # of an earlier extraction, so of other prompts
    write_tensors(
        run / DIRECTIONS,
        {
            "mean_harmful": result.mean_harmful,
            "mean_harmless": result.mean_harmless,
            FIRST_TOKEN_MEAN: result.mean_first_token,
        },
        {
            "positions": json.dumps(result.positions),
            "model": session.checkpoint.name,
            "abliterate": versions()["abliterate"],
        },
    )


@contextmanager
def _activations(
    session: Session, run: Path, prompts: Mapping[str, Sequence[Prompt]]
) -> Iterator[ActivationWriter | None]:
    """The writer of ``RUN/activations.safetensors``, or None if nobody asked for it."""
    settings = session.settings.extract
    if settings.save_activations is None:
        yield None
        return
    loaded = session.loaded
    wanted = Wanted(
        choose_layers(settings.save_activations, len(decoder_blocks(loaded.model))),
        parse_positions(settings.positions, loaded.tokenizer, session.chat),
        settings.activation_positions,
    )
    counts = {kind: len(chosen) for kind, chosen in prompts.items()}
    with activation_writer(run / ACTIVATIONS, wanted, counts, session.checkpoint.name) as writer:
        yield writer


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
        message = f"{error}{sink}; all scores are in {run / SELECTION}"
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
            kind: {"given": settings.n_val, "used": used} | _apart(result.unfinished, kind)
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


def orthogonalize_stage(
    session: Session, direction: Direction | DirectionSet, out: Path, reuse: bool = False
) -> dict[str, Any]:
    """Write the edited checkpoint; returns its record ``abliterate.json``."""
    settings = session.settings
    options = edit_options(settings.orthogonalize)
    if reuse and (out / RECORD).is_file():
        record = read_record(out / RECORD, "orthogonalize")
        same = record.get("source") == session.identity and record.get("versions") == versions()
        same = same and record.get("options") == options.summary()
        if same and record.get("direction") == direction.summary():
            log.info("%s is up to date", out)
            return record
    return _edit(session, direction, options, out, reuse)


def replay_stage(session: Session, record: Path, out: Path) -> dict[str, Any]:
    """Repeat the edit that ``record`` (an ``abliterate.json``) tells of; returns the new record.

    Raises:
        CheckpointError: the session's checkpoint is not the recorded source.
        InputError: it is no record of an edit.
        UsageError: the settings ask for another edit.
    """
    recorded = read_recorded_edit(record)
    options = replayed_options(recorded, session.settings.orthogonalize)
    check_source(recorded, session.checkpoint)
    warn_of_other_bits(recorded, options)
    return _edit(session, recorded.direction, options, out)


def _edit(
    session: Session,
    direction: Direction | DirectionSet,
    options: EditOptions,
    out: Path,
    overwrite: bool = False,
) -> dict[str, Any]:
    settings = session.settings
    orthogonalize(
        session.checkpoint,
        direction,
        out,
        overwrite=overwrite or settings.orthogonalize.overwrite,
        trust_remote_code=settings.model.trust_remote_code,
        allow_leak=settings.orthogonalize.allow_leak,
        options=options,
    )
    return read_record(out / RECORD, "orthogonalize")
