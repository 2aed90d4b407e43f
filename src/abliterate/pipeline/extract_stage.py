"""extract as a stage of a run folder: means by position and layer, and their record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from abliterate.direction_loading import FIRST_TOKEN_MEAN
from abliterate.errors import UsageError
from abliterate.extraction.extraction import Extraction
from abliterate.extraction.kept_activations import (
    ActivationWriter,
    Wanted,
    activation_writer,
    choose_layers,
)
from abliterate.extraction.means import extract
from abliterate.extraction.robust_means import clipped, require_one_process
from abliterate.inference.in_memory import engine_of
from abliterate.inference.token_batches import budget_record
from abliterate.metrics.refusal_tokens import resolve_refusal_tokens
from abliterate.models.quantized_loading import how_it_computes
from abliterate.prompts.chat_template import parse_positions
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import (
    ACTIVATIONS,
    DIRECTIONS,
    EXTRACT,
    Session,
    prompt_keys,
    token_records,
)
from abliterate.run_rendering import describe_rendering, settle_rendering, take_date
from abliterate.run_stage import Stage
from abliterate.run_staleness import hash_prompts
from abliterate.storage.artifacts import (
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
        if (positions := session.settings.extract.positions) != "post-instruction":
            parse_positions(positions, session.tokenizer, session.chat)
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
            kind: {"given": len(flags), "used": sum(flags)}
            | unfinished_record(result.unfinished, kind)
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


def unfinished_record(unfinished: Mapping[str, int], kind: str) -> dict[str, int]:
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
