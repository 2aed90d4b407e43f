"""trace: how prompts, with and without a suffix, move along the direction (paper, section 5).

-> ``RUN/trace.json``: the cosine of the last token's ``resid_pre`` with the direction at every
layer, and the attention heads whose contribution along it changes most with the suffix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.analysis.trace_request import TraceRequest
from abliterate.console import log
from abliterate.direction import Direction
from abliterate.direction_loading import load_directions
from abliterate.direction_set import DirectionSet
from abliterate.inference.attention_heads import (
    HeadsUnknown,
    HeadView,
    OutProjection,
    out_projections,
    watch_heads,
)
from abliterate.inference.direction_fit import check_fit
from abliterate.inference.forward import Batch, capture_resid_pre, for_each_batch, last_logits
from abliterate.inference.in_memory import engine_of
from abliterate.inference.interventions import unit_direction
from abliterate.metrics.intervals import bootstrap, bootstrap_settings
from abliterate.metrics.paired_tests import holm, signed_rank
from abliterate.metrics.spread import spread
from abliterate.models.loading import LoadedModel
from abliterate.precision import widened, widest
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.sampling import load_prompts, prompt_key
from abliterate.prompts.suffixes import Marked, Marker, Span
from abliterate.run_folder import TRACE, Session, prompt_keys
from abliterate.run_records import read_used, used_prompts
from abliterate.run_rendering import extracted_of, settle_rendering
from abliterate.run_stage import Stage
from abliterate.run_staleness import hash_prompts
from abliterate.writers import find_writers, stream_width

TRACE_STAGE = Stage("trace", TRACE, sections=frozenset({"model", "chat"}), reads_only=True)
CONDITIONS = ("harmful", "harmless", "suffix", "random")


@dataclass
class TraceValues:
    """What one condition's prompts showed, in their order.

    Attributes:
        cosines: float64 ``[n, n_layers]``.
        heads: ``[n, n_attention_layers, n_heads]``, or None.
        mass: ``[n, n_attention_layers, n_heads, 2]``: attention of the last token to instruction
            and suffix, NaN where a layer's weights are not known; or None.
        error: the worst :attr:`HeadView.error`.
    """

    cosines: Tensor
    heads: Tensor | None = None
    mass: Tensor | None = None
    error: float = 0.0


def trace_stage(session: Session, run: Path, request: TraceRequest) -> dict[str, Any]:
    """Trace prompts along the direction of a run; returns the record ``trace.json``.

    Raises:
        InputError: an artifact or prompt source cannot be used.
        UsageError: the suffix does not reach the prompt.
    """
    with TRACE_STAGE.open(session, run) as stage:
        direction = load_directions(run)
        check_fit(session.checkpoint, direction, session.settings.model.trust_remote_code)
        texts, sources = _prompts(session, run, request)
        settle_rendering(session, run, extracted_of(session, run))
        stage.start_clock()
        loaded = session.load_in_memory()
        own = session.settings.model
        found = trace(
            loaded, direction, texts, request, session.chat, own.batch_size, seed=own.seed
        )
        for note in found["notes"]:
            log.info("%s", note)
        stage.depends_on(
            {
                "direction": direction.key,
                "suffix": request.suffix,
                "prompts": texts,
                "n_heads": request.n_heads,
            }
        )
        return stage.finish(
            {
                "direction": found["direction"],
                "prompts": sources,
                "made_from": _made_from(run, texts, request),
                "request": asdict(request),
            }
            | found
        )


def trace(
    loaded: LoadedModel,
    direction: Direction | DirectionSet,
    texts: Mapping[str, Sequence[str]],
    request: TraceRequest,
    chat: ChatFormat,
    batch_size: int | str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Curves and heads of prompts along a direction, as records hold them.

    Args:
        loaded: the model in memory.
        direction: along which.
        texts: ``harmful`` and ``harmless`` prompts.
        request: the suffix and how many heads are listed.
        chat: how prompts become conversations.
        batch_size: prompts per forward pass, or ``auto``.
        seed: of the random suffixes.

    Raises:
        UsageError: the suffix does not reach the prompt, or the model is streamed.
    """
    prompts = _marked_prompts(Marker(loaded.tokenizer, chat), texts, request, seed)
    tracer = Tracer(loaded, direction, batch_size)
    if request.suffix is not None:
        tracer.find_heads()
    seen = {kind: tracer.run(rows, kind) for kind, rows in prompts.items()}
    return {
        "direction": direction.summary(),
        "suffix": _suffix_record(request.suffix, prompts.get("suffix", [])),
        "cosines": {kind: _curve(one.cosines) for kind, one in seen.items()},
        "heads": _head_record(tracer, seen, request.n_heads, seed) if request.suffix else None,
        "notes": tracer.notes,
    }


def _marked_prompts(
    marker: Marker, texts: Mapping[str, Sequence[str]], request: TraceRequest, seed: int
) -> dict[str, list[Marked]]:
    """Token ids with their spans: both kinds, and harmful ones with the suffix and a random one."""
    prompts = {kind: marker.plain(texts[kind]) for kind in ("harmful", "harmless")}
    if request.suffix is not None:
        prompts["suffix"] = marker.suffixed(texts["harmful"], request.suffix)
        prompts["random"] = marker.randomised(prompts["suffix"], seed)
    return prompts


def _prompts(
    session: Session, run: Path, request: TraceRequest
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The texts of each kind, and what the record says of them.

    A source that is named is taken as it is; the run's own are less what it has used already.
    """
    used = used_prompts(read_used(run))
    seed = session.settings.model.seed
    texts: dict[str, list[str]] = {}
    sources: dict[str, Any] = {}
    count = request.n_prompts
    for kind in ("harmful", "harmless"):
        named = getattr(request, kind)
        source = named or getattr(session.settings.extract, kind)
        exclude = () if named else used[kind]
        session.warn_of_kinds({kind: source})
        chosen = load_prompts(
            source, "test", count, seed, exclude, "--n-prompts", commits=session.commits
        )
        texts[kind] = [prompt.text for prompt in chosen]
        keys = prompt_keys({kind: chosen})[kind]
        sources[kind] = {"source": source, "n": len(chosen), "keys": keys}
    return texts, sources


def _made_from(
    run: Path, texts: Mapping[str, Sequence[str]], request: TraceRequest
) -> dict[str, Any]:
    """The hashes of the prompts, and of those that the run had used where they were left out."""
    keys = {kind: [prompt_key(text) for text in chosen] for kind, chosen in texts.items()}
    made: dict[str, Any] = {"prompts": hash_prompts(keys)}
    if request.harmful is None or request.harmless is None:
        made["used_prompts"] = hash_prompts(used_prompts(read_used(run)))
    return made


def _suffix_record(suffix: str | None, prompts: Sequence[Marked]) -> dict[str, Any] | None:
    if suffix is None:
        return None
    lengths = [p.suffix.stop - p.suffix.start for p in prompts if p.suffix is not None]
    return {"text": suffix, "n_tokens": {"min": min(lengths), "max": max(lengths)}}


def _curve(cosines: Tensor) -> dict[str, Any]:
    """Mean, standard deviation (``n - 1``) and standard error over prompts, by layer."""
    count = len(cosines)
    spread = cosines.std(0) if count > 1 else torch.zeros_like(cosines[0])
    return {
        "n": count,
        "mean": cosines.mean(0).tolist(),
        "std": spread.tolist(),
        "standard_error": (spread / count**0.5).tolist() if count > 1 else None,
        "median": cosines.quantile(0.5, dim=0).tolist(),
    }


@dataclass
class Tracer:
    """Runs prompts and looks at their last token.

    Attributes:
        loaded: model and tokenizer.
        direction: along which; of a set ``resid_pre`` of each layer along its own.
        batch_size: prompts per forward pass, or ``auto``.
        projections: the attention layers watched; empty until :meth:`find_heads`.
        notes: what could not be seen, and why.
    """

    loaded: LoadedModel
    direction: Direction | DirectionSet
    batch_size: int | str = "auto"
    projections: list[OutProjection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.direction, DirectionSet):
            plan = find_writers(self.loaded.model)
            width = stream_width(self.loaded.model, plan)
            # [n_layers, d_model]; zero where a layer has none, along which nothing is.
            self.unit = self.direction.units(len(plan.blocks), width)[1:]
            return
        width = self.direction.vector.shape[0]
        self.unit = unit_direction(self.direction.vector, width)

    def find_heads(self) -> None:
        """Watch the attention heads too, from now on, if they can be told apart."""
        try:
            with self._model() as model:
                self.projections = out_projections(model, self.unit)
        except HeadsUnknown as error:
            self._no_heads(error)

    def _model(self) -> AbstractContextManager[PreTrainedModel]:
        return engine_of(self.loaded).in_memory("trace")

    def _no_heads(self, error: HeadsUnknown) -> None:
        kind = self.loaded.model.config.model_type
        self.notes.append(f"no head table: the heads of a '{kind}' cannot be told apart: {error}")
        self.projections = []

    def run(self, prompts: Sequence[Marked], description: str) -> TraceValues:
        """Cosines and, where heads are watched, what each of them writes and where it looks."""
        cosines: list[Tensor | None] = [None] * len(prompts)
        views: list[tuple[tuple[int, ...], HeadView]] = []
        with torch.inference_mode(), ExitStack() as stack:
            model = stack.enter_context(self._model())
            captured = stack.enter_context(capture_resid_pre(model, [-1]))
            heads = None
            if self.projections:
                stack.enter_context(_eager(model))
                heads = stack.enter_context(watch_heads(model, self.projections, self.unit))

            def run(batch: Batch) -> None:
                nonlocal heads
                last_logits(model, batch)
                stream = captured()[:, 0]
                hidden = stream.to(widest(stream.device))
                along = (hidden * self.unit.to(hidden)).sum(-1) / hidden.norm(dim=-1).clamp_min(
                    1e-30
                )
                for row, values in zip(batch.rows, widened(along).cpu(), strict=True):
                    cosines[row] = values
                if heads is not None:
                    try:
                        views.append((batch.rows, heads()))
                    except HeadsUnknown as error:
                        heads = None
                        self._no_heads(error)

            ids = [prompt.ids for prompt in prompts]
            for_each_batch(model, ids, run, self.batch_size, f"trace: {description}")
        seen = TraceValues(torch.stack([values for values in cosines if values is not None]))
        if heads is not None and self.projections:
            self._gather(seen, prompts, views)
        return seen

    def _gather(
        self,
        seen: TraceValues,
        prompts: Sequence[Marked],
        views: Sequence[tuple[tuple[int, ...], HeadView]],
    ) -> None:
        first = views[0][1].contributions
        seen.heads = torch.zeros(len(prompts), *first.shape[1:])
        seen.mass = torch.full((*seen.heads.shape, 2), float("nan"))
        for rows, view in views:
            seen.heads[list(rows)] = view.contributions
            seen.error = max(seen.error, view.error)
            for layer, weights in enumerate(view.attention):
                for index, row in enumerate(rows if weights is not None else ()):
                    assert weights is not None
                    seen.mass[row, layer] = _mass(weights[index], prompts[row])


def _mass(weights: Tensor, prompt: Marked) -> Tensor:
    """Attention ``[n_heads, 2]`` to instruction and suffix, of weights ``[n_heads, keys]``.

    The keys are the prompt's last ones: a sliding window may hold part of a span, or none of it.
    """
    keys = weights.shape[1]

    def on(span: Span | None) -> Tensor:
        if span is None:
            return torch.full((len(weights),), float("nan"))
        # From the front, as a span that ends the prompt stops at -0.
        return weights[:, max(0, keys + span.start) : max(0, keys + span.stop)].sum(1)

    return torch.stack([on(prompt.instruction), on(prompt.suffix)], dim=1)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention that hands out its weights, where the architecture has it."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
    except Exception as error:  # architectures refuse in their own ways; they show no weights then
        log.debug("no eager attention: %s", error)
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _head_record(
    tracer: Tracer, seen: Mapping[str, TraceValues], count: int, seed: int
) -> dict[str, Any] | None:
    """The heads whose contribution along the direction changes most with the suffix."""
    parts = {kind: seen[kind].heads for kind in ("harmful", "suffix", "random")}
    harmful, suffixed = parts["harmful"], parts["suffix"]
    if harmful is None or suffixed is None or parts["random"] is None:
        return None
    change = (suffixed - harmful).double()
    means = change.mean(0)
    order = means.abs().flatten().argsort(descending=True, stable=True)[:count]
    n_heads = means.shape[1]
    tests = {
        "change": _tested(change),
        "against_random": _tested((suffixed - parts["random"]).double()),
    }
    rows = []
    for flat in order.tolist():
        index, head = divmod(flat, n_heads)  # index among the attention layers
        of_head = change[:, index, head]
        rows.append(
            {
                "layer": tracer.projections[index].layer,
                "head": head,
                "change": float(means[index, head]),
                "change_std": float(of_head.std()) if len(of_head) > 1 else 0.0,
                "change_ci": bootstrap(of_head.tolist(), seed),
                "change_standard_error": spread(of_head.tolist())["standard_error"],
                "p": {name: p_values[flat] for name, (p_values, _) in tests.items()},
                "p_holm": {name: corrected[flat] for name, (_, corrected) in tests.items()},
                "contribution": {
                    kind: float(part[:, index, head].double().mean())
                    for kind, part in parts.items()
                    if part is not None
                },
                "attention": {kind: _masses(seen[kind].mass, index, head) for kind in parts},
            }
        )
    return {
        "rows": rows,
        "n_heads": n_heads,
        "layers": [projection.layer for projection in tracer.projections],
        "largest_error": max(seen[kind].error for kind in parts),
        "test": {
            "method": "Wilcoxon signed rank, two-sided, over the prompts",
            "correction": "Holm, over all heads",
            "n_tests": means.numel(),
            "bootstrap": bootstrap_settings(seed),
        },
    }


def _tested(change: Tensor) -> tuple[list[float], list[float]]:
    """P-values of every head's change ``[n, layers, heads]``, flat, and these after Holm."""
    found = [signed_rank(column) for column in change.flatten(1).T.tolist()]
    return found, holm(found)


def _masses(mass: Tensor | None, index: int, head: int) -> dict[str, float | None]:
    assert mass is not None
    values = mass[:, index, head].double().mean(0).tolist()
    return {
        name: None if value != value else value
        for name, value in zip(("instruction", "suffix"), values, strict=True)
    }
