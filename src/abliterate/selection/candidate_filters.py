"""Filters and choice among scored candidates (paper, appendix C); no model needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from abliterate.errors import UsageError

METRICS = ("bypass_score", "induce_score", "kl_divergence")


@dataclass(frozen=True)
class Thresholds:
    """The three filters of appendix C.

    Attributes:
        kl: candidates with a larger KL divergence are dropped.
        induce: candidates with a lower induce score are dropped.
        prune_layers: share of the last layers whose candidates are dropped.

    Raises:
        UsageError: a threshold is not a number, or the share is not from 0 to below 1.
    """

    kl: float = 0.1
    induce: float = 0.0
    prune_layers: float = 0.2

    def __post_init__(self) -> None:
        for option, value in (("--kl-threshold", self.kl), ("--induce-threshold", self.induce)):
            if math.isnan(value):
                raise UsageError(f"{option} must be a number, not {value}")
        if not 0 <= self.prune_layers < 1:
            raise UsageError(f"--prune-layers must be from 0 to below 1, not {self.prune_layers}")


@dataclass(frozen=True)
class Score:
    """One candidate's scores, and whether the filters keep it.

    A score that is None was not computed, as it cannot change the choice; NaN was not finite.

    Attributes:
        position: source token, counted from the prompt's end.
        layer: source layer.
        bypass_score: mean refusal score on harmful prompts with the direction ablated.
        induce_score: mean refusal score on harmless prompts with the direction added.
        kl_divergence: mean KL(baseline || ablated) on harmless prompts.
        kl_at_least: what the KL cannot be below, where it was not computed to the end.
        induce_at_most: what the induce score cannot exceed, likewise.
        kept: it passes the filters.
        reason: the filter that dropped it: ``nan``, ``layer``, ``kl`` or ``induce``; where a score
            is missing, ``bypass`` if one that is kept has a lower bypass score anyway, else
            ``unknown``: the choice depends on it.
    """

    position: int
    layer: int
    bypass_score: float | None = None
    induce_score: float | None = None
    kl_divergence: float | None = None
    kl_at_least: float | None = None
    induce_at_most: float | None = None
    kept: bool = False
    reason: str | None = None

    @property
    def computed(self) -> tuple[str, ...]:
        """The metrics that were computed."""
        return tuple(metric for metric in METRICS if getattr(self, metric) is not None)

    def why_dropped(self, thresholds: Thresholds) -> str | None:
        """The filter other than its layer that drops it by what is known, in the paper's order."""
        computed_scores = [getattr(self, metric) for metric in self.computed]
        if any(map(math.isnan, computed_scores)):
            return "nan"
        kl = self.kl_at_least if self.kl_divergence is None else self.kl_divergence
        if kl is not None and kl > thresholds.kl:
            return "kl"
        induce = self.induce_at_most if self.induce_score is None else self.induce_score
        if induce is not None and induce < thresholds.induce:
            return "induce"
        return None


def first_pruned_layer(n_layers: int, thresholds: Thresholds) -> int:
    """The first of the layers whose candidates are dropped; ``n_layers`` if none is."""
    if thresholds.prune_layers <= 0:
        return n_layers
    # The paper's own expression: rounding included, so that the same layers are dropped.
    return int(n_layers * (1.0 - thresholds.prune_layers))


def apply_filters(scores: Sequence[Score], n_layers: int, thresholds: Thresholds) -> list[Score]:
    """Apply the filters, in the paper's order: NaN, last layers, KL, induce."""
    first_pruned = first_pruned_layer(n_layers, thresholds)

    def reason(score: Score) -> str | None:
        why = score.why_dropped(thresholds)
        if why != "nan" and score.layer >= first_pruned:
            return "layer"
        if why is None and len(score.computed) < len(METRICS):
            return "unknown"
        return why

    reasons = [reason(score) for score in scores]
    kept = [index for index, why in enumerate(reasons) if why is None]
    if kept:
        best = min((require_score(scores[index].bypass_score), index) for index in kept)
        for index, score in enumerate(scores):
            has_lost = score.bypass_score is not None and (score.bypass_score, index) > best
            if reasons[index] == "unknown" and has_lost:
                reasons[index] = "bypass"
    return [
        replace(score, kept=why is None, reason=why)
        for score, why in zip(scores, reasons, strict=True)
    ]


def best_candidate(judged: Sequence[Score]) -> Score | None:
    """The kept candidate with the lowest bypass score; ties go to the earlier in the list."""
    kept = [score for score in judged if score.kept]
    return min(kept, key=lambda score: require_score(score.bypass_score), default=None)


def require_score(value: float | None) -> float:
    """A score that must have been computed."""
    assert value is not None
    return value
