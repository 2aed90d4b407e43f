"""Why no candidate passes, which came nearest, and what admits them: from exact scores alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from abliterate.selection.candidate_filters import Score, Thresholds, require_score
from abliterate.selection.pareto_front import Miss, corner, exact_scores, misses


def explain_no_candidate(judged: Sequence[Score], thresholds: Thresholds) -> str:
    """Why no candidate passes, in one line.

    Names candidates with exact scores only: a bound says nothing of what admits a candidate.
    """
    counts = Counter(score.reason for score in judged)
    names = {
        "nan": "without a direction or with a score that is not finite",
        "layer": f"in the last {thresholds.prune_layers:.0%} of layers",
        "kl": f"KL above {thresholds.kl:g}",
        "induce": f"induce below {thresholds.induce:g}",
    }
    summary = ", ".join(f"{counts[why]} {text}" for why, text in names.items() if counts[why])
    return (
        f"none of {len(judged)} candidates passes ({summary}){_advice(judged, thresholds, counts)}"
    )


def _advice(
    judged: Sequence[Score], thresholds: Thresholds, counts: Mapping[str | None, int]
) -> str:
    if found := nearest(judged, thresholds):
        return "; nearest: " + "; ".join(_hint(*one) for one in found)
    if counts["layer"] and counts["layer"] + counts["nan"] == len(judged):
        return "; all with a direction lie in the pruned layers (--prune-layers 0 scores them)"
    if counts["kl"] or counts["induce"]:  # a table that an older version has left
        return "; none is scored to the end: run select on the run folder to score the best of them"
    return ""


def nearest(judged: Sequence[Score], thresholds: Thresholds) -> list[tuple[Score, list[Miss]]]:
    """Of those that fail by the fewest filters the nearest, for each set of filters, and by what
    each fails."""
    found = [
        # How many layers too late it lies does not matter here.
        (score, misses(score, thresholds, int(score.reason == "layer")))
        for score in exact_scores(judged)
    ]
    failing = [(score, why) for score, why in found if why]
    fewest = min((len(why) for _, why in failing), default=0)
    by_filters: dict[tuple[str, ...], list[tuple[Score, list[Miss]]]] = {}
    for score, why in failing:
        if len(why) == fewest:
            by_filters.setdefault(tuple(miss.filter for miss in why), []).append((score, why))
    return [min(by_filters[filters], key=_distance) for filters in sorted(by_filters)[::-1]]


def _distance(missed: tuple[Score, list[Miss]]) -> tuple[float, ...]:
    """Those that make the model answer come first, then the nearest to the thresholds."""
    score, why = missed
    bypass = require_score(score.bypass_score)
    return (float(bypass >= 0), *(miss.by for miss in why), score.layer, bypass)


def _hint(score: Score, why: Sequence[Miss]) -> str:
    bypass, induce, kl = corner(score)
    options = " ".join(miss.option for miss in why)
    return (
        f"position {score.position} layer {score.layer} with bypass {bypass:.4g}, induce "
        f"{induce:.4g}, KL {kl:.4g} ({options} admits it)"
    )
