"""Filters and choice among scored candidates (paper, appendix C); no model needed."""

from __future__ import annotations

import math
from collections import Counter
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


def explain_no_candidate(judged: Sequence[Score], thresholds: Thresholds) -> str:
    """Why no candidate passes, in one line."""
    counts = Counter(score.reason for score in judged)
    names = {
        "nan": "without a direction or with a score that is not finite",
        "layer": f"in the last {thresholds.prune_layers:.0%} of layers",
        "kl": f"KL above {thresholds.kl:g}",
        "induce": f"induce below {thresholds.induce:g}",
    }
    summary = ", ".join(f"{counts[why]} {text}" for why, text in names.items() if counts[why])
    nearest = (
        _nearest_by_kl(judged, thresholds),
        _nearest_by_induce(judged),
        _nearest_by_layer(judged, thresholds),
    )
    misses = [miss for miss in nearest if miss]
    if counts["layer"] and not nearest[2] and counts["layer"] + counts["nan"] == len(judged):
        misses.append("all that could be scored lie in the pruned layers (--prune-layers 0)")
    hint = "; nearest: " + "; ".join(misses) if misses else ""
    return f"none of {len(judged)} candidates passes ({summary}){hint}"


def _nearest_by_kl(judged: Sequence[Score], thresholds: Thresholds) -> str | None:
    """The candidate with the lowest KL of those that fail by nothing else, and what admits it."""
    failing = [s for s in judged if s.reason == "kl" and _induces(s, thresholds)]
    if not failing:
        return None
    near = min(failing, key=_kl_or_bound)
    kl, is_bound = _kl_or_bound(near), near.kl_divergence is None
    option = "a larger --kl-threshold" if is_bound else f"--kl-threshold {_round_up(kl)}"
    return (
        f"position {near.position} layer {near.layer} has {'a ' * is_bound}KL "
        f"{'of at least ' * is_bound}{kl:.4g} ({option} admits it)"
    )


def _nearest_by_induce(judged: Sequence[Score]) -> str | None:
    """The candidate with the highest induce of those that fail by it, and what admits it."""
    failing = [score for score in judged if score.reason == "induce"]
    if not failing:
        return None
    near = max(failing, key=_induce_or_bound)
    induce, is_bound = _induce_or_bound(near), near.induce_score is None
    option = (
        "a lower --induce-threshold" if is_bound else f"--induce-threshold={_round_up(-induce, -1)}"
    )
    return (
        f"position {near.position} layer {near.layer} has {'an ' * is_bound}induce "
        f"{'of at most ' * is_bound}{induce:.4g} ({option} admits it"
        f"{' if its KL does' * (near.kl_divergence is None)})"
    )


def _nearest_by_layer(judged: Sequence[Score], thresholds: Thresholds) -> str | None:
    """The earliest of the candidates that only lie too late, and what admits it."""
    failing = [
        score
        for score in judged
        if score.reason == "layer"
        and score.computed == METRICS
        and score.why_dropped(thresholds) is None
    ]
    if not failing:
        return None
    near = min(failing, key=lambda score: (score.layer, require_score(score.bypass_score)))
    return (
        f"position {near.position} layer {near.layer} fails by its layer only "
        "(--prune-layers 0 admits it)"
    )


def _induces(score: Score, thresholds: Thresholds) -> bool:
    return score.induce_score is not None and score.induce_score >= thresholds.induce


def _induce_or_bound(score: Score) -> float:
    return require_score(score.induce_at_most if score.induce_score is None else score.induce_score)


def _kl_or_bound(score: Score) -> float:
    return require_score(score.kl_at_least if score.kl_divergence is None else score.kl_divergence)


def _round_up(value: float, sign: int = 1) -> str:
    """``sign * value`` rounded away so that a threshold of it admits the value."""
    return f"{sign * (math.ceil(value * 1000) / 1000):g}"
