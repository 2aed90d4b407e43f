"""The stages of a run folder: each reads what the one before wrote and leaves its own record.

``RUN/extract.json`` + ``directions.safetensors`` -> ``selection.json`` + ``direction.safetensors``
-> ``model/`` -> ``evaluation.json`` + ``completions/``. A record holds the hash of everything that
the stage depended on, so that ``run`` can tell a finished stage from a stale one.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from abliterate.activations import FILE_NAME as ACTIVATIONS
from abliterate.activations import ActivationWriter, Wanted, activation_writer, choose_layers
from abliterate.artifacts import (
    check_writable,
    hash_file,
    hash_json,
    read_json,
    versions,
    write_json,
    write_tensors,
)
from abliterate.chat import ChatFormat, parse_positions
from abliterate.choice import Score
from abliterate.console import log
from abliterate.direction import FILE_NAME, Direction, save_direction
from abliterate.edit_options import edit_options
from abliterate.editing import RECORD, orthogonalize
from abliterate.errors import InputError, SelectionError, UsageError
from abliterate.extraction import Extraction, extract
from abliterate.forward import input_device
from abliterate.models import Checkpoint, Loaded
from abliterate.offload import load_or_stream, must_stream
from abliterate.offload.opening import too_large
from abliterate.placement import Placement, devices, find_placement
from abliterate.prompts import load_prompts, prompt_key
from abliterate.scores import load_partial, save_partial, score_record
from abliterate.scoring import Key
from abliterate.selection import Thresholds, select
from abliterate.settings import Settings
from abliterate.sources import Prompt
from abliterate.team import Team, join_team
from abliterate.writers import decoder_blocks

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

    @cached_property
    def team(self) -> Team:
        return join_team()

    @cached_property
    def placement(self) -> Placement:
        model = self.settings.model
        return find_placement(self.team, model.device, model.device_map, model.tensor_parallel)

    @cached_property
    def offload(self) -> bool | None:
        """Whether models are streamed, as told or by what is free now.

        Decided once: a checkpoint that is compared with the model has its size, and figures of the
        two ways differ in their last digits. None where several devices or processes share them.
        """
        model, where = self.settings.model, self.placement
        if model.offload is not None or where.is_spread or where.team.size > 1:
            return model.offload
        return must_stream(self.checkpoint, model.device, model.dtype, model.trust_remote_code)

    def load(self, checkpoint: Checkpoint) -> Loaded:
        model, where = self.settings.model, self.placement
        torch.manual_seed(model.seed)
        with where.team.working():
            loaded = load_or_stream(
                checkpoint,
                model.device,
                model.dtype,
                model.trust_remote_code,
                self.offload,
                model.activation_memory,
                where,
            )
        verb = "streaming" if loaded.stream else "loaded"
        place = input_device(loaded.model).type if loaded.stream else where.describe(loaded.model)
        log.info("%s %s (%s, %s)", verb, checkpoint.name, loaded.model.dtype, place)
        return loaded

    def whole(self) -> Loaded:
        """The model in memory, for what does not stream it, whatever ``--offload`` says.

        Raises:
            UsageError: the weights do not fit.
        """
        model, where = self.settings.model, self.placement
        if "loaded" not in self.__dict__ and not where.is_spread and where.team.size == 1:
            at = (model.device, model.dtype, model.trust_remote_code)
            if lacking := too_large(self.checkpoint, *at):
                raise UsageError(
                    f"{lacking}: this command needs the model in memory, use a smaller --dtype or "
                    "a larger machine"
                )
            self.__dict__["offload"] = False
        return self.loaded

    def release(self) -> None:
        """Let go of the model; it is loaded again when it is next needed."""
        if (loaded := self.__dict__.pop("loaded", None)) is not None:
            if loaded.stream is not None:
                loaded.stream.close()
            del loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

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


def finished(record: Path, inputs: str, outputs: Mapping[str, Path]) -> dict[str, Any] | None:
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
    team = session.placement.team
    team.lead(lambda: check_writable(run))
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
    if settings.save_activations and not team.alone:
        raise UsageError("--save-activations needs all prompts in one process: run it by itself")
    team.same(inputs, "model, prompt set or package version")
    if reuse and (done := team.lead(lambda: finished(run / EXTRACT, inputs, outputs))):
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
    decode = loaded.tokenizer.decode

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
            "device": input_device(loaded.model).type
            if loaded.stream
            else ", ".join(devices(loaded.model)),
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

    return team.lead(write)


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
    team = session.placement.team
    extracted = team.lead(lambda: read_json(run / EXTRACT, f"extract MODEL -o {run}"))
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
            "directions": team.lead(lambda: hash_file(tensors) if tensors.exists() else None),
            "refusal_tokens": extracted["refusal_tokens"],
        }
    )
    team.same(inputs, "model, prompt set or package version")
    outputs = {FILE_NAME: direction}
    if reuse and (done := team.lead(lambda: finished(run / SELECTION, inputs, outputs))):
        return done
    extraction = team.lead(lambda: Extraction.load(tensors, extracted))
    known = team.lead(lambda: load_partial(partial, inputs, extracted["n_layers"]))

    def save(scores: Mapping[Key, Score]) -> None:
        if team.leads:
            save_partial(partial, inputs, scores)

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
            "prompts": prompt_keys(prompts),
            "settings": session.settings.model_dump(include={"model", "chat", "select"}),
            "seed": seed,
            "versions": versions(),
            "seconds": seconds,
            "inputs": inputs,
            "outputs": {FILE_NAME: hash_file(direction)} if winner else {},
        }
        write_json(run / SELECTION, record)
        partial.unlink(missing_ok=True)
        return record

    record = team.lead(write)
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


def prompt_sources(settings: Settings, harmful: str | None, harmless: str | None) -> dict[str, str]:
    """A stage's prompt sources by kind; None for the one of ``extract``."""
    return {
        "harmful": harmful or settings.extract.harmful,
        "harmless": harmless or settings.extract.harmless,
    }


def prompt_keys(
    prompts: Mapping[str, Sequence[Prompt]], keep_text: bool = False
) -> dict[str, list[str]]:
    """Prompts by kind, as their hashes (or, to be hashed themselves, their texts)."""
    key: Callable[[str], str] = str if keep_text else prompt_key
    return {kind: [key(prompt.text) for prompt in chosen] for kind, chosen in prompts.items()}


def recorded_settings(run: Path, extracted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that ``extract`` recorded, as the base of a later stage's own.

    Raises:
        InputError: the record lacks them.
    """
    try:
        settings = dict(extracted["settings"])
    except KeyError:
        raise InputError(f"{run / EXTRACT} records no settings: run extract again") from None
    # Where the weights lie is each command's own affair: it goes with how that was launched.
    elsewhere = ("device_map", "tensor_parallel")
    model = {key: value for key, value in settings["model"].items() if key not in elsewhere}
    return settings | {"model": model}
