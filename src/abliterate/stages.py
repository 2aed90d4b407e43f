"""The stages of a run folder: each reads what the one before wrote and leaves its own record.

``RUN/extract.json`` + ``directions.safetensors`` -> ``selection.json`` + ``direction.safetensors``
-> ``model/`` -> ``evaluation.json`` + ``completions/``. A record holds the hash of everything that
the stage depended on, so that ``run`` can tell a finished stage from a stale one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from abliterate.artifacts import (
    check_writable,
    hash_file,
    hash_json,
    read_json,
    versions,
    write_atomically,
    write_json,
    write_tensors,
)
from abliterate.chat import ChatFormat, encode
from abliterate.console import log
from abliterate.direction import FILE_NAME, Direction, save_direction
from abliterate.edit_options import edit_options
from abliterate.editing import RECORD, orthogonalize
from abliterate.errors import InputError, SelectionError
from abliterate.evaluation import evaluate
from abliterate.extraction import Extraction, extract, find_refusal_tokens
from abliterate.forward import input_device
from abliterate.models import Checkpoint, Loaded
from abliterate.offload import load_or_stream
from abliterate.prompts import load_prompts, prompt_key
from abliterate.scores import load_partial, save_partial, score_record
from abliterate.selection import Thresholds, select
from abliterate.settings import Settings
from abliterate.sources import Prompt

EXTRACT, DIRECTIONS = "extract.json", "directions.safetensors"
SELECTION, EVALUATION, COMPLETIONS = "selection.json", "evaluation.json", "completions"
PARTIAL = "selection.partial.json"
MODEL = "model"


@dataclass(frozen=True)
class Session:
    """A checkpoint and settings; the model itself is loaded when a stage first needs it."""

    checkpoint: Checkpoint
    settings: Settings

    @cached_property
    def loaded(self) -> Loaded:
        return self.load(self.checkpoint)

    def load(self, checkpoint: Checkpoint) -> Loaded:
        model = self.settings.model
        torch.manual_seed(model.seed)
        where = (model.device, model.dtype, model.trust_remote_code)
        loaded = load_or_stream(checkpoint, *where, model.offload, model.activation_memory)
        verb = "streaming" if loaded.stream else "loaded"
        device = input_device(loaded.model).type
        log.info("%s %s (%s, %s)", verb, checkpoint.name, loaded.model.dtype, device)
        return loaded

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.checkpoint.identity()

    @property
    def chat(self) -> ChatFormat:
        chat = self.settings.chat
        return ChatFormat(chat.system, chat.template_kwargs, chat.response_prefix)

    def base_inputs(self) -> dict[str, Any]:
        """What every stage depends on: the model, how it computes, how prompts are formatted."""
        model = self.settings.model
        return {
            "model": self.identity,
            "dtype": model.dtype,
            "device": model.device,
            "offload": model.offload,
            "seed": model.seed,
            "chat": self.settings.chat.model_dump(),
            "versions": versions(),
        }


def _finished(record: Path, inputs: str, outputs: Mapping[str, Path]) -> dict[str, Any] | None:
    """The record, if the stage ran on the same inputs and its outputs are still as it left them."""
    try:
        document: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if document["inputs"] != inputs:
            return None
        if any(document["outputs"][name] != hash_file(path) for name, path in outputs.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    log.info("%s is up to date", record)
    return document


def extract_stage(session: Session, run: Path, reuse: bool = False) -> dict[str, Any]:
    """Extract candidate directions into ``run``; returns the record ``extract.json``."""
    check_writable(run)
    settings, seed = session.settings.extract, session.settings.model.seed
    prompts = {
        kind: load_prompts(source, "train", settings.n_train, seed, option="--n-train")
        for kind, source in (("harmful", settings.harmful), ("harmless", settings.harmless))
    }
    inputs = hash_json(
        session.base_inputs()
        | {"settings": settings.model_dump(), "prompts": _keys(prompts, keep_text=True)}
    )
    tensors = run / DIRECTIONS
    if reuse and (done := _finished(run / EXTRACT, inputs, {DIRECTIONS: tensors})):
        return done
    loaded = session.loaded
    started = time.perf_counter()
    result = extract(
        loaded,
        prompts["harmful"],
        prompts["harmless"],
        settings.positions,
        settings.refusal_tokens,
        settings.filter,
        session.chat,
        session.settings.model.batch_size,
    )
    seconds = time.perf_counter() - started
    write_tensors(
        tensors,
        {"mean_harmful": result.mean_harmful, "mean_harmless": result.mean_harmless},
        {
            "positions": json.dumps(result.positions),
            "model": session.checkpoint.name,
            "abliterate": versions()["abliterate"],
        },
    )
    decode = loaded.tokenizer.decode
    record = {
        "model": session.identity,
        "model_type": loaded.model.config.model_type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": input_device(loaded.model).type,
        "offload": loaded.stream and loaded.stream.summary(),
        "positions": [
            {"position": position, "token": token}
            for position, token in zip(result.positions, result.tokens, strict=True)
        ],
        "n_layers": result.mean_harmful.shape[1],
        "d_model": result.mean_harmful.shape[2],
        "refusal_tokens": [{"id": i, "token": decode([i])} for i in result.refusal_tokens],
        "counts": {
            kind: {"given": len(kept), "used": sum(kept)}
            for kind, kept in (("harmful", result.kept_harmful), ("harmless", result.kept_harmless))
        },
        "prompts": _keys(prompts),
        "settings": session.settings.model_dump(include={"model", "chat", "extract"}),
        "seed": seed,
        "versions": versions(),
        "seconds": seconds,
        "inputs": inputs,
        "outputs": {DIRECTIONS: hash_file(tensors)},
    }
    write_json(run / EXTRACT, record)
    return record


def select_stage(session: Session, run: Path, reuse: bool = False) -> dict[str, Any]:
    """Score the candidates of ``run`` and choose one; returns the record ``selection.json``.

    Raises:
        SelectionError: no candidate passes; ``selection.json`` keeps the scores all the same.
    """
    extracted = read_json(run / EXTRACT, f"extract MODEL -o {run}")
    settings, seed = session.settings.select, session.settings.model.seed
    sources = _sources(session.settings, settings.harmful, settings.harmless)
    prompts = {
        kind: load_prompts(
            source, "val", settings.n_val, seed, extracted["prompts"][kind], "--n-val"
        )
        for kind, source in sources.items()
    }
    inputs = hash_json(
        session.base_inputs()
        | {
            "settings": settings.model_dump(),
            "prompts": _keys(prompts, keep_text=True),
            "directions": hash_file(run / DIRECTIONS) if (run / DIRECTIONS).exists() else None,
            "refusal_tokens": extracted["refusal_tokens"],
        }
    )
    direction = run / FILE_NAME
    if reuse and (done := _finished(run / SELECTION, inputs, {FILE_NAME: direction})):
        return done
    extraction = Extraction.load(run / DIRECTIONS, extracted)
    partial = run / PARTIAL
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
        load_partial(partial, inputs, extracted["n_layers"]),
        lambda scores: save_partial(partial, inputs, scores),
    )
    seconds = time.perf_counter() - started
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
        "offload": session.loaded.stream and session.loaded.stream.summary(),
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
        "prompts": _keys(prompts),
        "settings": session.settings.model_dump(include={"model", "chat", "select"}),
        "seed": seed,
        "versions": versions(),
        "seconds": seconds,
        "inputs": inputs,
        "outputs": {FILE_NAME: hash_file(direction)} if winner else {},
    }
    write_json(run / SELECTION, record)
    partial.unlink(missing_ok=True)
    try:
        result.require_winner()
    except SelectionError as error:
        raise SelectionError(f"{error}; all scores are in {run / SELECTION}") from None
    return record


def orthogonalize_stage(
    session: Session, direction: Direction, out: Path, reuse: bool = False
) -> dict[str, Any]:
    """Write the edited checkpoint; returns its record ``abliterate.json``."""
    settings = session.settings
    options = edit_options(settings.orthogonalize)
    if reuse and (out / RECORD).is_file():
        record: dict[str, Any] = read_json(out / RECORD, "orthogonalize")
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
    return dict(read_json(out / RECORD, "orthogonalize"))


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
        interventions: which to run.
        edited: further checkpoints, by the name of their row.
        run: the run folder whose prompts are never used again and whose refusal tokens count.
        out: where record and completions go, or None to write nothing.
        reuse: return an up-to-date record instead of computing it again.
    """
    if out is not None:
        check_writable(out)
    settings, seed = session.settings.evaluate, session.settings.model.seed
    records = [
        read_json(run / name, "run")
        for name in (EXTRACT, SELECTION)
        if run is not None and (run / name).is_file()
    ]
    prompts = {
        kind: load_prompts(
            source,
            "test",
            settings.n_test,
            seed,
            [key for record in records for key in record["prompts"][kind]],
            "--n-test",
        )
        for kind, source in _sources(session.settings, settings.harmful, settings.harmless).items()
    }
    named = [str(token["id"]) for record in records[:1] for token in record["refusal_tokens"]]
    named = named or list(session.settings.extract.refusal_tokens)
    inputs = hash_json(
        session.base_inputs()
        | {
            "settings": settings.model_dump(),
            "prompts": _keys(prompts, keep_text=True),
            "direction": direction and direction.sha256,
            "interventions": list(interventions),
            "edited": {name: other.identity() for name, other in edited.items()},
            "refusal_tokens": named,
        }
    )
    if reuse and out and (done := _finished(out / EVALUATION, inputs, _completion_files(out))):
        return done
    loaded = session.loaded
    started = time.perf_counter()
    size = session.settings.model.batch_size
    ids = [
        encode(loaded.tokenizer, [p.text for p in kind], session.chat) for kind in prompts.values()
    ]
    tokens = find_refusal_tokens(loaded, ids[0], ids[1], named, size)
    outcomes = evaluate(
        loaded,
        prompts["harmful"],
        prompts["harmless"],
        tokens,
        direction,
        interventions,
        {name: session.load(other) for name, other in edited.items()},
        session.chat,
        settings.max_new_tokens,
        size,
    )
    record = {
        "model": session.identity,
        "direction": direction and direction.summary(),
        "interventions": {name: outcome.summary() for name, outcome in outcomes.items()},
        "refusal_tokens": [{"id": i, "token": loaded.tokenizer.decode([i])} for i in tokens],
        "settings": session.settings.model_dump(include={"model", "chat", "evaluate"}),
        "seed": seed,
        "versions": versions(),
        "seconds": time.perf_counter() - started,
        "inputs": inputs,
        "outputs": {},
    }
    if out is not None:
        for name, outcome in outcomes.items():
            for kind in ("harmful", "harmless"):
                lines = [
                    json.dumps(asdict(completion), ensure_ascii=False) + "\n"
                    for completion in getattr(outcome, kind)
                ]
                write_atomically(
                    out / COMPLETIONS / f"{name}-{kind}.jsonl", "".join(lines).encode()
                )
        record["outputs"] = {name: hash_file(path) for name, path in _completion_files(out).items()}
        write_json(out / EVALUATION, record)
    return record


def _completion_files(out: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted((out / COMPLETIONS).glob("*.jsonl"))}


def _sources(settings: Settings, harmful: str | None, harmless: str | None) -> dict[str, str]:
    return {
        "harmful": harmful or settings.extract.harmful,
        "harmless": harmless or settings.extract.harmless,
    }


def _keys(prompts: Mapping[str, Sequence[Prompt]], keep_text: bool = False) -> dict[str, list[str]]:
    key: Callable[[str], str] = str if keep_text else prompt_key
    return {kind: [key(prompt.text) for prompt in chosen] for kind, chosen in prompts.items()}


def recorded_settings(run: Path, extracted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that ``extract`` recorded, as the base of a later stage's own.

    Raises:
        InputError: the record lacks them.
    """
    try:
        return dict(extracted["settings"])
    except KeyError:
        raise InputError(f"{run / EXTRACT} records no settings: run extract again") from None
