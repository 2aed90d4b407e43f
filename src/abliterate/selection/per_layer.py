"""Each layer's own best candidate, by the scores of all: the set of ``select --per-layer``."""

from __future__ import annotations

from collections.abc import Sequence

from abliterate.direction_set import DirectionSet
from abliterate.extraction.extraction import Extraction
from abliterate.selection.candidate_filters import Score, Thresholds


def best_by_layer(scores: Sequence[Score], thresholds: Thresholds) -> dict[int, Score]:
    """The best candidate of each layer.

    Of those that pass the filters of KL and induce the one with the lowest bypass score; where none
    of a layer does, the one with the lowest bypass score. The filter of the last layers does not
    count: each layer has its own. Ties go to the earlier position.

    Args:
        scores: of every candidate, computed to the end.
        thresholds: of the filters.

    Returns:
        By layer; one all of whose candidates have no finite score is left out.
    """
    best: dict[int, tuple[bool, float, Score]] = {}
    for score in scores:
        why = score.why_dropped(thresholds)
        if why == "nan" or score.bypass_score is None:
            continue
        rank = (why is not None, score.bypass_score)
        if score.layer not in best or rank < best[score.layer][:2]:
            best[score.layer] = (*rank, score)
    return {layer: entry[2] for layer, entry in sorted(best.items())}


def set_of_candidates(extraction: Extraction, chosen: dict[int, Score]) -> DirectionSet:
    """The vectors of chosen candidates, by layer.

    Args:
        extraction: the candidates.
        chosen: of :func:`best_by_layer`.
    """
    candidates = extraction.directions
    n_layers = candidates.shape[1]
    vectors = candidates.new_zeros(n_layers, candidates.shape[2])
    for layer, score in chosen.items():
        vectors[layer] = candidates[extraction.positions.index(score.position), layer]
    return DirectionSet(
        vectors,
        candidates=tuple(
            (chosen[layer].position, layer) if layer in chosen else None
            for layer in range(n_layers)
        ),
        projection=extraction.projection,
    )
