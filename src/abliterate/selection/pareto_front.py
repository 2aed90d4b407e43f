"""The candidates that no other beats in bypass, induce and KL at once: what is left to choose from
when none passes the filters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from abliterate.selection.candidate_filters import (
    METRICS,
    Score,
    Thresholds,
    first_pruned_layer,
    require_score,
)


class Corner(NamedTuple):
    """Bypass, induce and KL of a candidate, or the best that they can be."""

    bypass: float
    induce: float
    kl: float


class Miss(NamedTuple):
    """A filter that a candidate fails.

    Attributes:
        filter: ``kl``, ``induce`` or ``layer``.
        by: how far it is from passing: in nats, in log-odds, in layers.
        option: what on the command line admits it.
    """

    filter: str
    by: float
    option: str


def may_be_on_front(best: Corner, known: Iterable[Corner]) -> bool:
    """Whether a candidate whose scores are at best ``best`` may be beaten by none of ``known``."""
    return not any(_beats(other, best) for other in known)


def _beats(one: Corner, other: Corner) -> bool:
    """Whether ``one`` is nowhere worse and somewhere better."""
    nowhere_worse = one.bypass <= other.bypass and one.induce >= other.induce and one.kl <= other.kl
    return nowhere_worse and one != other


def exact_scores(scores: Iterable[Score]) -> list[Score]:
    """Those of which all three metrics were computed and are finite."""
    return [
        score
        for score in scores
        if score.computed == METRICS and all(math.isfinite(value) for value in corner(score))
    ]


def corner(score: Score) -> Corner:
    """The scores of a candidate that has all three."""
    return Corner(
        require_score(score.bypass_score),
        require_score(score.induce_score),
        require_score(score.kl_divergence),
    )


def pareto_front(scores: Sequence[Score], n_layers: int, thresholds: Thresholds) -> list[Score]:
    """The exactly scored candidates that no other beats, by bypass.

    One whose layer would be taken is not beaten by one that lies too late.
    """
    exact, pruned = exact_scores(scores), first_pruned_layer(n_layers, thresholds)
    front = [
        score
        for score in exact
        if may_be_on_front(
            corner(score),
            [corner(o) for o in exact if o.layer < pruned or score.layer >= pruned],
        )
    ]
    return sorted(front, key=lambda score: require_score(score.bypass_score))


def misses(score: Score, thresholds: Thresholds, late: int) -> list[Miss]:
    """Which filters an exactly scored candidate fails, by how much, and what admits it.

    Args:
        score: the candidate.
        thresholds: the filters.
        late: by how many layers it lies behind those that are not pruned; 0 or less for none.
    """
    _, induce, kl = corner(score)
    found = []
    if late > 0:
        found.append(Miss("layer", late, "--prune-layers 0"))
    if kl > thresholds.kl:
        found.append(Miss("kl", kl - thresholds.kl, f"--kl-threshold {_above(kl)}"))
    if induce < thresholds.induce:
        option = f"--induce-threshold={_below(induce)}"
        found.append(Miss("induce", thresholds.induce - induce, option))
    return found


def _above(value: float) -> str:
    """A threshold in few digits that is not below ``value``."""
    return next(text for text in _rounded(value, math.ceil) if float(text) >= value)


def _below(value: float) -> str:
    """A threshold in few digits that is not above ``value``."""
    return next(text for text in _rounded(value, math.floor) if float(text) <= value)


def _rounded(value: float, to: Any) -> Iterable[str]:
    yield f"{to(value * 1000) / 1000:g}"  # of more than six digits it may miss
    yield repr(to(value * 1000) / 1000)
    yield repr(value)


def front_records(
    judged: Sequence[Score], n_layers: int, thresholds: Thresholds
) -> list[dict[str, Any]]:
    """The front as ``selection.json`` has it."""
    last = first_pruned_layer(n_layers, thresholds) - 1
    return [
        {
            "position": score.position,
            "layer": score.layer,
            **dict(zip(METRICS, corner(score), strict=True)),
            "fails": [miss._asdict() for miss in misses(score, thresholds, score.layer - last)],
        }
        for score in pareto_front(judged, n_layers, thresholds)
    ]
