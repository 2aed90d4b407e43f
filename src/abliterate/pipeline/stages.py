"""extract, select and orthogonalize as stages of a run folder: each reads what the one before wrote
and leaves its own record (``abliterate.run_folder``)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import FILE_NAME, Direction, save_direction
from abliterate.editing.file_names import RECORD
from abliterate.editing.options import edit_options
from abliterate.editing.orthogonalize import orthogonalize
from abliterate.errors import InputError, SelectionError, UsageError
from abliterate.extraction.kept_activations import (
    ActivationWriter,
    Wanted,
    activation_writer,
    choose_layers,
)
from abliterate.extraction.means import Extraction, extract
from abliterate.inference.in_memory import engine_of
from abliterate.models.model_classes import text_config
from abliterate.prompts.chat_template import parse_positions
from abliterate.prompts.sampling import load_prompts
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import (
    ACTIVATIONS,
    DIRECTIONS,
    EXTRACT,
    PARTIAL,
    SELECTION,
    Session,
    load_if_current,
    prompt_keys,
    prompt_sources,
    writing,
)
from abliterate.run_records import read_extract
from abliterate.selection.candidate_filters import Score
from abliterate.selection.score_table import load_partial, save_partial, score_record
from abliterate.selection.search import Thresholds, select
from abliterate.selection.search_inputs import Key
from abliterate.storage.artifacts import (
    hash_file,
    hash_json,
    read_record,
    versions,
    write_json,
    write_tensors,
)
from abliterate.storage.ownership import Kind, has_metadata, is_mapping, is_record
from abliterate.writers import decoder_blocks

EXTRACT_FILES: dict[str, Kind] = {
    EXTRACT: is_record,
    DIRECTIONS: has_metadata("abliterate", "positions", "model"),
    ACTIVATIONS: has_metadata("layers", "positions", "model"),
}
SELECT_FILES: dict[str, Kind] = {
    SELECTION: is_record,
    FILE_NAME: has_metadata("position", "layer", "model"),
    PARTIAL: is_mapping("inputs", "candidates"),
}


def extract_stage(session: Session, run: Path, reuse: bool = False) -> dict[str, Any]:
    """Extract candidate directions into ``run``; returns the record ``extract.json``."""
    with writing(session.placement.ranks, run, "extract", EXTRACT_FILES):
        return _extract(session, run, reuse)


def _extract(session: Session, run: Path, reuse: bool) -> dict[str, Any]:
    ranks = session.placement.ranks
    settings, seed = session.settings.extract, session.settings.model.seed
    prompts = {
        kind: load_prompts(source, "train", settings.n_train, seed, option="--n-train")
        for kind, source in (("harmful", settings.harmful), ("harmless", settings.harmless))
    }
    inputs = hash_json(
        session.base_inputs()
        | {"settings": settings.model_dump(), "prompts": prompt_keys(prompts, keep_text=True)}
    )
    tensors, kept_file = run / DIRECTIONS, run / ACTIVATIONS
    outputs = {DIRECTIONS: tensors} | (
        {ACTIVATIONS: kept_file} if settings.save_activations else {}
    )
    if settings.save_activations and not ranks.is_unsplit:
        raise UsageError("--save-activations needs all prompts in one process: run it by itself")
    ranks.assert_equal(inputs, "model, prompt set or package version")
    if reuse and (
        done := ranks.run_on_main(lambda: load_if_current(run / EXTRACT, inputs, outputs))
    ):
        return done
    loaded = session.loaded
    started = time.perf_counter()
    with _activations(session, run, prompts) as writer:
        result = extract(
            loaded,
            prompts["harmful"],
            prompts["harmless"],
            settings.positions,
            settings.refusal_tokens,
            settings.filter,
            session.chat,
            session.settings.model.batch_size,
            None if writer is None else writer.put,
        )
        if writer is not None:
            writer.finish({"harmful": result.kept_harmful, "harmless": result.kept_harmless})
    seconds = time.perf_counter() - started
    decode, engine = loaded.tokenizer.decode, engine_of(loaded)

    def write() -> dict[str, Any]:
        if writer is None:
            kept_file.unlink(missing_ok=True)  # of an earlier extraction, so of other prompts
        write_tensors(
            tensors,
            {"mean_harmful": result.mean_harmful, "mean_harmless": result.mean_harmless},
            {
                "positions": json.dumps(result.positions),
                "model": session.checkpoint.name,
                "abliterate": versions()["abliterate"],
            },
        )
        record = {
            "model": session.identity,
            "model_type": loaded.model.config.model_type,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": engine.devices,
            "offload": engine.summary(),
            "positions": [
                {"position": position, "token": token}
                for position, token in zip(result.positions, result.tokens, strict=True)
            ],
            "n_layers": result.mean_harmful.shape[1],
            "d_model": result.mean_harmful.shape[2],
            "refusal_tokens": [{"id": i, "token": decode([i])} for i in result.refusal_tokens],
            "counts": {
                kind: {"given": len(kept), "used": sum(kept)}
                for kind, kept in (
                    ("harmful", result.kept_harmful),
                    ("harmless", result.kept_harmless),
                )
            },
            "prompts": prompt_keys(prompts),
            "settings": session.settings.model_dump(include={"model", "chat", "extract"}),
            "seed": seed,
            "versions": versions(),
            "seconds": seconds,
            "inputs": inputs,
            "outputs": {name: hash_file(path) for name, path in outputs.items()},
        }
        if writer is not None:
            record["activations"] = {
                "layers": list(writer.wanted.layers),
                "positions": list(writer.wanted.kept_positions),
            }
        write_json(run / EXTRACT, record)
        return record

    return ranks.run_on_main(write)


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

    Raises:
        SelectionError: no candidate passes; ``selection.json`` keeps the scores all the same.
    """
    with writing(session.placement.ranks, run, "select", SELECT_FILES):
        return _select(session, run, reuse)


def _select(session: Session, run: Path, reuse: bool) -> dict[str, Any]:
    ranks = session.placement.ranks
    extracted = ranks.run_on_main(lambda: read_extract(run))
    settings, seed = session.settings.select, session.settings.model.seed
    sources = prompt_sources(session.settings, settings.harmful, settings.harmless)
    prompts = {
        kind: load_prompts(
            source, "val", settings.n_val, seed, extracted["prompts"][kind], "--n-val"
        )
        for kind, source in sources.items()
    }
    tensors, direction, partial = run / DIRECTIONS, run / FILE_NAME, run / PARTIAL
    inputs = hash_json(
        session.base_inputs()
        | {
            "settings": settings.model_dump(),
            "prompts": prompt_keys(prompts, keep_text=True),
            "directions": ranks.run_on_main(
                lambda: hash_file(tensors) if tensors.exists() else None
            ),
            "refusal_tokens": extracted["refusal_tokens"],
        }
    )
    ranks.assert_equal(inputs, "model, prompt set or package version")
    outputs = {FILE_NAME: direction}
    if reuse and (
        done := ranks.run_on_main(lambda: load_if_current(run / SELECTION, inputs, outputs))
    ):
        return done
    extraction = ranks.run_on_main(lambda: Extraction.load(tensors, extracted))
    known = ranks.run_on_main(lambda: load_partial(partial, inputs, extracted["n_layers"]))

    def save(scores: Mapping[Key, Score]) -> None:
        if ranks.is_main:
            save_partial(partial, inputs, scores)

    _check_refusal_tokens(session, extraction, run)
    started = time.perf_counter()
    result = select(
        session.loaded,
        extraction,
        prompts["harmful"],
        prompts["harmless"],
        Thresholds(settings.kl_threshold, settings.induce_threshold, settings.prune_layers),
        settings.filter,
        session.chat,
        session.settings.model.batch_size,
        settings.search,
        settings.all_layers,
        settings.kl_on,
        known,
        save,
    )
    seconds = time.perf_counter() - started

    def write() -> dict[str, Any]:
        winner = result.winner
        if winner is not None:
            save_direction(direction, result.direction(extraction), session.checkpoint.name)
        else:
            direction.unlink(missing_ok=True)
        record = {
            "model": session.identity,
            "winner": winner and {"position": winner.position, "layer": winner.layer},
            "candidates": [score_record(score) for score in result.scores],
            "n_layers": extracted["n_layers"],
            "search": settings.search,
            "kl_on": settings.kl_on,
            "offload": engine_of(session.loaded).summary(),
            "baselines": {
                "harmful_refusal_score": result.harmful_score,
                "harmless_refusal_score": result.harmless_score,
            },
            "thresholds": asdict(result.thresholds),
            "refusal_tokens": extracted["refusal_tokens"],
            "counts": {
                "harmful": {"given": settings.n_val, "used": result.n_harmful},
                "harmless": {"given": settings.n_val, "used": result.n_harmless},
            },
            "prompts": prompt_keys(prompts),
            "settings": session.settings.model_dump(include={"model", "chat", "extract", "select"}),
            "seed": seed,
            "versions": versions(),
            "seconds": seconds,
            "inputs": inputs,
            "outputs": {FILE_NAME: hash_file(direction)} if winner else {},
        }
        write_json(run / SELECTION, record)
        partial.unlink(missing_ok=True)
        return record

    record = ranks.run_on_main(write)
    try:
        result.require_winner()
    except SelectionError as error:
        raise SelectionError(f"{error}; all scores are in {run / SELECTION}") from None
    return record


def _check_refusal_tokens(session: Session, extraction: Extraction, run: Path) -> None:
    """Refuse a record whose refusal tokens are not the model's."""
    rows, largest = text_config(session.loaded.model).vocab_size, max(extraction.refusal_tokens)
    if largest >= rows:
        raise InputError(
            f"{run / EXTRACT}: refusal token {largest} is none of the model's {rows} tokens: run "
            "extract again"
        )


def orthogonalize_stage(
    session: Session, direction: Direction, out: Path, reuse: bool = False
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
    orthogonalize(
        session.checkpoint,
        direction,
        out,
        overwrite=reuse or settings.orthogonalize.overwrite,
        trust_remote_code=settings.model.trust_remote_code,
        allow_leak=settings.orthogonalize.allow_leak,
        options=options,
    )
    return read_record(out / RECORD, "orthogonalize")
