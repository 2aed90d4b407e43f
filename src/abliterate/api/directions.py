"""From prompts to a direction: activations, extract, select."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from abliterate.api.inputs import (
    PromptsLike,
    as_positions,
    as_prompts,
    as_token_names,
    check_arguments,
)
from abliterate.api.language_model import LanguageModel, ModelLike, as_model
from abliterate.console import log
from abliterate.direction import Direction
from abliterate.errors import InputError, UsageError
from abliterate.extraction import means
from abliterate.extraction.extraction import Extraction
from abliterate.inference.engine import BatchActivations
from abliterate.inference.interventions import check_layer
from abliterate.inference.thoughts import ask
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.sampling import prompt_key
from abliterate.prompts.sources import Prompt
from abliterate.result_tables import to_frame, to_html, to_json
from abliterate.selection import search
from abliterate.selection.candidate_filters import Score, Thresholds
from abliterate.selection.resampling import Resamples
from abliterate.selection.score_table import score_record
from abliterate.selection.search_inputs import Search

KINDS = ("harmful", "harmless")


def activations(
    model: ModelLike, prompts: PromptsLike, *, layer: int | None = None, position: int = -1
) -> Tensor:
    """``resid_pre`` of prompts: the residual stream that enters a decoder block.

    Args:
        model: the model.
        prompts: texts, Prompt objects or a source.
        layer: the block, 0-based; None for all of them.
        position: the token, counted from the prompt's end: -1 is its last, where the answer starts.

    Returns:
        ``[n, d_model]`` on the CPU, in float32 or wider; ``[n, n_layers, d_model]`` of all layers.

    Raises:
        InputError: there are no prompts, or there is no such layer, or a prompt is too short.
        UsageError: the position is no negative number.

    Source:
        Section 2.1, equation 1.

    Examples:
        >>> ab.activations(lm, harmful, layer=5, position=-1).shape
        torch.Size([16, 128])
    """
    lm = as_model(model)
    chosen = as_prompts(prompts, "given")
    if layer is not None:
        check_layer(layer, lm.n_layers)
    if not isinstance(position, int) or isinstance(position, bool) or position >= 0:
        raise UsageError(f"the position must be a negative number such as -1, not {position!r}")
    ids = texts_as_ids(lm, chosen, "given")
    shortest = min(map(len, ids))
    if shortest < -position:
        raise InputError(
            f"position {position} lies before the start of a prompt of {shortest} tokens"
        )
    reader = lm.engine.resid_pre({"": ids}, [position], lm.batch_size)
    dtype = torch.promote_types(lm.model.dtype, torch.float32)
    _, n_layers, width = reader.shape
    values = torch.empty(len(ids), n_layers if layer is None else 1, width, dtype=dtype)
    which = slice(None) if layer is None else slice(layer, layer + 1)

    def keep(batch: BatchActivations) -> None:
        values[list(batch.rows)] = batch.activations[:, 0, which].cpu().to(dtype)

    reader.read("", range(len(ids)), keep, "activations")
    return values if layer is None else values[:, 0]


def texts_as_ids(lm: LanguageModel, prompts: Sequence[Prompt], kind: str) -> list[list[int]]:
    """Token ids of prompts up to where the answer begins, behind the model's thought."""
    texts = [prompt.text for prompt in prompts]
    return ask(lm.loaded, texts, lm.chat, lm.batch_size, kind).finished(kind)


def extract(
    model: ModelLike,
    harmful: PromptsLike,
    harmless: PromptsLike,
    positions: str | int | Sequence[int] = "post-instruction",
    refusal_tokens: Sequence[str | int] = (),
    filter: bool = True,
    chat: ChatFormat | None = None,
    batch_size: int | str | None = None,
    *,
    seed: int = 0,
) -> Extraction:
    """Candidate directions: the difference of means at every position and layer.

    ``r[i, l] = mean of h[l, i] over harmful prompts - mean over harmless ones``, h being
    ``resid_pre``.

    Args:
        model: the model.
        harmful: training prompts that the model should refuse; of a source its train split.
        harmless: training prompts that it should answer.
        positions: ``post-instruction``, ``last`` or negative numbers, counted from the prompt's
            end.
        refusal_tokens: first tokens that count as refusing; found from the model if empty.
        filter: drop harmful prompts that are not refused and harmless ones that are.
        chat: how prompts become conversations; None for the model's.
        batch_size: prompts per forward pass; None for the model's.
        seed: of the halves of the prompts whose candidates are compared.

    Returns:
        The candidates; ``[position, layer]`` is one of them.

    Raises:
        InputError: there are too few prompts, or too few are left, or one is shorter than a
            position.
        UsageError: a position or refusal token does not exist.

    Source:
        Section 2.3, equations 1 and 2.

    Examples:
        >>> ex = ab.extract(lm, harmful, harmless)
        >>> ex[-1, 5].vector.shape
        torch.Size([128])
    """
    lm = as_model(model)
    check_arguments(filter=filter, chat=chat, batch_size=batch_size, seed=seed)
    prompts = as_prompts(harmful, "harmful"), as_prompts(harmless, "harmless")
    found = means.extract(
        lm.loaded,
        *prompts,
        positions=as_positions(positions),
        refusal_tokens=as_token_names(refusal_tokens),
        filter=filter,
        chat=chat or lm.chat,
        batch_size=lm.batch_size if batch_size is None else batch_size,
        seed=seed,
    )
    keys = [tuple(prompt_key(prompt.text) for prompt in chosen) for chosen in prompts]
    return replace(found, model=lm.name, prompts=dict(zip(KINDS, keys, strict=True)))


class _Chosen(Direction):
    """The winner, which ``selection.direction(extraction)`` of 0.1 gave as well."""

    def __call__(self, extraction: Extraction) -> Direction:
        warnings.warn("selection.direction is a Direction: leave out (...)", DeprecationWarning, 2)
        return self


@dataclass(frozen=True, repr=False)
class Selection:
    """Every candidate's scores, and the winner.

    Attributes:
        scores: by position, then layer, with the filters' verdicts.
        thresholds: the filters.
        winner: the kept candidate with the lowest bypass score, or None.
        harmful_score: mean refusal score of the unmodified model on the harmful prompts used.
        harmless_score: the same on the harmless ones, both log-odds.
        n_harmful: how many harmful prompts were used.
        n_harmless: how many harmless prompts were used.
        resamples: how the choice falls on resamples of the prompts; None if nothing was scored.
        unfinished: by kind, about how many prompts a thought did not end.
        extraction: the candidates.
    """

    scores: tuple[Score, ...]
    thresholds: Thresholds
    winner: Score | None
    harmful_score: float
    harmless_score: float
    n_harmful: int
    n_harmless: int
    resamples: Resamples | None
    unfinished: Mapping[str, int]
    extraction: Extraction

    @property
    def _found(self) -> search.Selection:
        names = [field.name for field in fields(search.Selection)]
        return search.Selection(**{name: getattr(self, name) for name in names})

    def front(self) -> list[dict[str, Any]]:
        """If no candidate passes: those that no other beats in bypass, induce and KL at once."""
        return self._found.front()

    def require_winner(self) -> Score:
        """The winner's scores.

        Raises:
            SelectionError: no candidate passes; it says what dropped them and what is nearest.
        """
        return self._found.require_winner()

    @property
    def direction(self) -> Direction:
        """The winner.

        Raises:
            SelectionError: no candidate passes.
        """
        won = self.require_winner()
        found = self.extraction[won.position, won.layer]
        return _Chosen(**{field.name: getattr(found, field.name) for field in fields(found)})

    def rows(self) -> list[dict[str, Any]]:
        """A row for each candidate: scores, and whether it is kept or what dropped it."""
        tokens = dict(zip(self.extraction.positions, self.extraction.tokens, strict=True))
        return [
            {
                "position": score.position,
                "token": tokens[score.position],
                "layer": score.layer,
                "bypass_score": score.bypass_score,
                "induce_score": score.induce_score,
                "kl_divergence": score.kl_divergence,
                "kept": score.kept,
                "dropped_by": score.reason,
            }
            for score in self.scores
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it but the vectors, as ``selection.json`` names it."""
        won = self.winner
        return to_json(
            {
                "winner": won and {"position": won.position, "layer": won.layer},
                "candidates": [score_record(score) for score in self.scores],
                "front": self.front(),
                "bootstrap": self.resamples and self.resamples.record,
                "n_layers": self.extraction.mean_harmful.shape[1],
                "baselines": {
                    "harmful_refusal_score": self.harmful_score,
                    "harmless_refusal_score": self.harmless_score,
                },
                "thresholds": asdict(self.thresholds),
                "counts": {"harmful": self.n_harmful, "harmless": self.n_harmless},
            }
        )

    def to_pandas(self) -> Any:
        """:meth:`rows` as a DataFrame; scores are log-odds, KL is in nats."""
        return to_frame(self.rows())

    def __repr__(self) -> str:
        kept = sum(score.kept for score in self.scores)
        return f"Selection({self._headline()}; {kept} of {len(self.scores)} candidates pass)"

    def _headline(self) -> str:
        won = self.winner
        if won is None:
            return "no candidate passes"
        return (
            f"position {won.position}, layer {won.layer}: bypass {won.bypass_score:.3g}, induce "
            f"{won.induce_score:.3g}, KL {won.kl_divergence:.3g}"
        )

    def _repr_html_(self) -> str:
        def rank(row: Mapping[str, Any]) -> tuple[bool, float]:
            score = row["bypass_score"]
            return not row["kept"], float("inf") if score is None else score

        rows = sorted(self.rows(), key=rank)
        return to_html(f"selected: {self._headline()}", rows, None if self.winner is None else 0)


def select(
    model: ModelLike,
    extraction: Extraction,
    harmful: PromptsLike,
    harmless: PromptsLike,
    thresholds: Thresholds | None = None,
    filter: bool = True,
    chat: ChatFormat | None = None,
    batch_size: int | str | None = None,
    search: Search = "staged",
    all_layers: bool = False,
    kl_on: str = "last",
    *,
    seed: int = 0,
    project_harmless: bool = False,
    project_first_token: bool = False,
) -> Selection:
    """Score every candidate on validation prompts and choose one.

    *bypass*: mean refusal score on harmful prompts with the candidate ablated; *induce*: that on
    harmless prompts with it added; *KL*: the divergence at the last token on harmless prompts with
    it ablated. Of those that pass the filters the lowest bypass wins.

    Args:
        model: the model.
        extraction: the candidates.
        harmful: validation prompts that extraction did not use; of a source its val split.
        harmless: the same.
        thresholds: the filters; the paper's by default.
        filter: drop harmful prompts that are not refused and harmless ones that are.
        chat: how prompts become conversations; None for the model's.
        batch_size: prompts per forward pass; None for the model's.
        search: ``staged`` leaves out what cannot change the choice, ``exhaustive`` scores all.
        all_layers: ``staged`` scores the candidates of the pruned layers like the others.
        kl_on: ``last``, or ``response:N`` for the first N tokens of the unmodified answers.
        seed: of the resamples of the prompts.
        project_harmless: remove from each candidate what it has along the mean harmless activation.
        project_first_token: likewise along the mean residual stream of the prompt's first token,
            which is an attention sink in many models.

    Returns:
        Scores and winner; ``.direction`` is the winner's.

    Raises:
        InputError: too few prompts are left, or the candidates are another model's.
        UsageError: ``kl_on`` or ``search`` is none of these.

    Source:
        Section 2.3 and appendix C.

    Examples:
        >>> sel = ab.select(lm, ex, harmful_val, harmless_val)
        >>> sel.direction.position in ex.positions
        True
        >>> len(sel.to_pandas()) == len(sel.scores)
        True
    """
    lm = as_model(model)
    check_arguments(
        extraction=extraction,
        thresholds=thresholds,
        filter=filter,
        chat=chat,
        batch_size=batch_size,
        search=search,
        all_layers=all_layers,
        kl_on=kl_on,
        seed=seed,
        project_harmless=project_harmless,
        project_first_token=project_first_token,
    )
    prompts = as_prompts(harmful, "harmful", "val"), as_prompts(harmless, "harmless", "val")
    _say_used(extraction, dict(zip(KINDS, prompts, strict=True)))
    extraction = replace(
        extraction,
        model=lm.name,
        project_harmless=extraction.project_harmless or project_harmless,
        project_first_token=extraction.project_first_token or project_first_token,
    )
    found = _select(
        lm.loaded,
        extraction,
        *prompts,
        thresholds=thresholds,
        filter=filter,
        chat=chat or lm.chat,
        batch_size=lm.batch_size if batch_size is None else batch_size,
        search=search,
        all_layers=all_layers,
        kl_on=kl_on,
        seed=seed,
    )
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    return Selection(**values, extraction=extraction)


def _say_used(extraction: Extraction, prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Warn of validation prompts that the candidates were found on; the command draws none such."""
    for kind, chosen in prompts.items():
        known = set(extraction.prompts.get(kind, ()))
        used = sum(prompt_key(prompt.text) in known for prompt in chosen)
        if used:
            log.warning(
                "select: the directions were found on %d of the %d %s validation prompts, so that "
                "their scores say less of other prompts: give prompts that extract has not used",
                used,
                len(chosen),
                kind,
            )


_select = search.select
