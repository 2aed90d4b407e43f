"""Tables of scores as JSON, and choosing again from them; no model needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from abliterate.errors import InputError, SelectionError
from abliterate.selection.candidate_filters import (
    METRICS,
    Score,
    Thresholds,
    apply_filters,
    best_candidate,
)
from abliterate.selection.no_candidate import explain_no_candidate
from abliterate.selection.pareto_front import front_records


def choose_again(
    scores: list[Score], n_layers: int, thresholds: Thresholds, where: str = "the table"
) -> tuple[Score, list[Score]]:
    """The winner under ``thresholds`` and all verdicts.

    Raises:
        InputError: a score that the search left out could change the choice.
        SelectionError: no candidate passes.
    """
    judged = apply_filters(scores, n_layers, thresholds)
    unknown = [score for score in judged if score.reason == "unknown"]
    if unknown:
        first = unknown[0]
        missing = next(metric for metric in METRICS[::-1] if metric not in first.computed)
        raise InputError(
            f"{where} cannot answer for these thresholds: the {missing.replace('_', ' ')} of "
            f"position {first.position} layer {first.layer}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + " was not computed, as stricter thresholds dropped it: run select with these "
            "thresholds, or with --search exhaustive"
        )
    winner = best_candidate(judged)
    if winner is None:
        raise SelectionError(
            explain_no_candidate(judged, thresholds), front_records(judged, n_layers, thresholds)
        )
    return winner, judged


def score_record(score: Score) -> dict[str, Any]:
    """A judged score as ``selection.json`` has it.

    ``computed`` names the metrics that were measured (null among them: not finite), ``unneeded``
    gives for each of the others the filter that made it unnecessary.
    """
    missing = [metric for metric in METRICS if metric not in score.computed]
    return asdict(score) | {
        "computed": list(score.computed),
        "unneeded": dict.fromkeys(missing, score.reason),
    }


def read_scores(document: Any, n_layers: int | None, where: str) -> tuple[list[Score], int]:
    """Scores from a saved table: our ``selection.json`` or the paper repository's list.

    Args:
        document: parsed JSON.
        n_layers: number of layers of the model; the paper's list does not say it.
        where: the file, for error messages.

    Raises:
        InputError: an entry lacks a key, or the number of layers is not known.
    """
    if isinstance(document, Mapping) and isinstance(document.get("candidates"), list):
        rows, n_layers = document["candidates"], n_layers or document.get("n_layers")
        keys = ("bypass_score", "induce_score", "kl_divergence")
    elif isinstance(document, list):
        rows, keys = document, ("refusal_score", "steering_score", "kl_div_score")
        if rows and isinstance(rows[0], Mapping) and "bypass_score" in rows[0]:
            keys = ("bypass_score", "induce_score", "kl_divergence")
    else:
        raise InputError(f"{where} is neither a selection.json nor a JSON list of scores")
    if not isinstance(n_layers, int) or n_layers < 1:
        raise InputError(f"{where} does not say how many layers the model has: pass --n-layers")
    if not rows:
        raise InputError(f"{where} holds no candidates")
    return [
        _read_score(row, keys, n_layers, f"{where}, entry {i}") for i, row in enumerate(rows, 1)
    ], n_layers


def _read_score(row: Any, keys: tuple[str, str, str], n_layers: int, where: str) -> Score:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object")
    for key in ("position", "layer", *keys):
        if key not in row:
            raise InputError(f"{where} has no key '{key}'")
    computed = row.get("computed", METRICS)

    def value(metric: str, key: str) -> float | None:
        if metric not in computed:
            return None
        return math.nan if row[key] is None else float(row[key])

    try:
        bypass, induce, kl = map(value, METRICS, keys)
        kl_at_least, induce_at_most = (
            None if row.get(bound) is None else float(row[bound])
            for bound in ("kl_at_least", "induce_at_most")
        )
        score = Score(
            int(row["position"]),
            int(row["layer"]),
            bypass,
            induce,
            kl,
            kl_at_least,
            induce_at_most,
        )
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: a value is no number") from None
    if not 0 <= score.layer < n_layers:
        raise InputError(
            f"{where}: layer {score.layer} is not one of {n_layers} layers: check --n-layers"
        )
    return score
