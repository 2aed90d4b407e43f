"""How sure the choice is: the filters and the choice on resamples of the validation prompts.

Resamples draw harmful and harmless prompts with replacement, as many as there are, and judge every
candidate by its means over them: no model, only the table of scores by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.metrics.intervals import CONFIDENCE
from abliterate.selection.candidate_filters import METRICS, Score, best_candidate
from abliterate.selection.pareto_front import exact_scores
from abliterate.selection.search_inputs import Key
from abliterate.selection.search_state import SearchState

RESAMPLES = 1000
# Winners whose cosines are recorded.
_LISTED = 16

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Resamples:
    """What became of the choice.

    Attributes:
        record: as ``selection.json`` has it: ``chosen`` is the share of resamples in which the
            winner won, ``none`` of those in which no candidate passed, ``undecided`` of those in
            which one might have won whose KL was not measured; ``covered`` of ``scored``
            candidates have all three scores, and are ``candidates``: ``wins`` and ``passes`` are
            shares of resamples, and the metrics have their 95% intervals. ``cosines`` are those
            among ``winners``: the one chosen, and those that won at times, most often first.
    """

    record: dict[str, Any]


def resample(state: SearchState, judged: Sequence[Score], seed: int) -> Resamples | None:
    """Bootstrap over the prompts; None if no candidate has all three scores.

    Args:
        state: the scores by prompt.
        judged: the scores with the filters' verdicts, by position, then layer.
        seed: of the resampling.
    """
    asked = set(state.usable)  # an earlier search may have scored others, too
    keys = [(score.position, score.layer) for score in exact_scores(judged)]
    keys = [key for key in keys if key in asked]
    if not keys:
        return None
    weights = _weights(state, seed)
    bypass, induce, kl = (
        _means(state, metric, keys, weights[metric]) for metric in ("bypass", "induce", "kl")
    )
    thresholds, pruned = state.grid.thresholds, state.grid.first_pruned
    in_time = np.array([layer < pruned for _, layer in keys])
    passes = in_time & (kl <= thresholds.kl) & (induce >= thresholds.induce)
    ranked = np.where(passes, bypass, np.inf)
    best = ranked.argmin(1)  # the first of those that have the lowest
    lowest = ranked[np.arange(RESAMPLES), best]
    undecided = _rivals(state, judged, weights) < lowest
    none = np.isinf(lowest) & ~undecided
    decided = ~np.isinf(lowest) & ~undecided
    wins = np.bincount(best[decided], minlength=len(keys)) / RESAMPLES
    won = best_candidate(judged)
    winner = None if won is None else keys.index((won.position, won.layer))
    others = [int(i) for i in np.argsort(-wins, kind="stable") if wins[i] > 0 and i != winner]
    often = [*([] if winner is None else [winner]), *others][:_LISTED]
    tail = (1 - CONFIDENCE) / 2
    spans = {
        metric: np.quantile(values, [tail, 1 - tail], axis=0)
        for metric, values in zip(METRICS, (bypass, induce, kl), strict=True)
    }
    return Resamples(
        {
            "resamples": RESAMPLES,
            "confidence": CONFIDENCE,
            "seed": seed,
            "chosen": None if winner is None else float(wins[winner]),
            "none": float(none.mean()),
            "undecided": float(undecided.mean()),
            "covered": len(keys),
            "scored": len(state.usable),
            "candidates": [
                {
                    "position": position,
                    "layer": layer,
                    "wins": float(wins[i]),
                    "passes": float(passes[:, i].mean()),
                    **{metric: spans[metric][:, i].tolist() for metric in METRICS},
                }
                for i, (position, layer) in enumerate(keys)
            ],
            "winners": [{"position": keys[i][0], "layer": keys[i][1]} for i in often],
            "cosines": _cosines(state, [keys[i] for i in often]),
        }
    )


def _weights(state: SearchState, seed: int) -> dict[str, Floats]:
    """By metric, how much each prompt counts in each resample, ``[resamples, prompts]``."""
    numbers = np.random.default_rng(seed)

    def drawn(n: int) -> Floats:
        counts: Floats = numbers.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
        return counts

    harmful, harmless = (drawn(len(state.used[metric])) for metric in ("bypass", "induce"))
    # The same resample of harmless prompts: induce and KL of a candidate go together.
    return {"bypass": harmful, "induce": harmless, "kl": harmless}


def _means(state: SearchState, metric: str, keys: Sequence[Key], weights: Floats) -> Floats:
    """Of each resample and candidate, ``[resamples, candidates]``."""
    means: Floats = weights @ state.rows(metric, keys).numpy().T
    return means


def _rivals(state: SearchState, judged: Sequence[Score], weights: dict[str, Floats]) -> Floats:
    """The lowest bypass of those that may pass in a resample as far as is known: whose KL was not
    measured, as they cannot win on all prompts; infinite where there are none, ``[resamples]``."""
    keys = [(score.position, score.layer) for score in judged if score.reason == "bypass"]
    if not keys:
        return np.full(RESAMPLES, np.inf)
    bypass, induce = (_means(state, m, keys, weights[m]) for m in ("bypass", "induce"))
    lowest: Floats = np.where(induce >= state.grid.thresholds.induce, bypass, np.inf).min(1)
    return lowest


def _cosines(state: SearchState, keys: Sequence[Key]) -> list[list[float]]:
    if not keys:
        return []
    vectors = state.grid.vectors(keys)
    units = vectors / vectors.norm(dim=1, keepdim=True)
    cosines: list[list[float]] = (units @ units.T).tolist()
    return cosines
