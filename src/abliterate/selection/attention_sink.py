"""Whether a candidate lies along the first token's massive activation, and what to do about it."""

from __future__ import annotations

from abliterate.extraction.extraction import Extraction
from abliterate.selection.candidate_filters import Score, require_score
from abliterate.selection.pareto_front import exact_scores
from abliterate.selection.search import Selection


def explain_attention_sink(extraction: Extraction, selection: Selection) -> str | None:
    """A line about ``--project-first-token`` where that may bring the KL down; else None.

    It is about the winner, or where there is none about the candidate with the lowest bypass among
    those that fail by their KL. Ablating unit r takes ``|r . first|`` away from the first token's
    stream. Where that is more than the whole length of the mean harmless activation, which stands
    for any other token, it outweighs what is taken away anywhere else.
    """
    first = extraction.mean_first_token
    if first is None or extraction.project_first_token:
        return None
    failing = [score for score in exact_scores(selection.scores) if score.reason == "kl"]
    best = min(failing, key=lambda score: require_score(score.bypass_score), default=None)
    score = selection.winner or best
    if score is None or (share := taken_from_first_token(extraction, score)) <= 1:
        return None
    return (
        f"ablating position {score.position} layer {score.layer} takes {share:.1f} times another "
        "token's whole activation away from the first token, an attention sink, which raises KL "
        "and perplexity: --project-first-token leaves it as it is"
    )


def taken_from_first_token(extraction: Extraction, score: Score) -> float:
    """What ablating a candidate takes from the first token's mean stream, in lengths of the mean
    harmless activation at its own position and layer; 0 where there is no such length."""
    assert extraction.mean_first_token is not None
    row = extraction.positions.index(score.position)
    direction = extraction.directions[row, score.layer].double()
    first = extraction.mean_first_token[score.layer].double()
    other = extraction.mean_harmless[row, score.layer].double().norm() * direction.norm()
    return float((direction @ first).abs() / other) if float(other) else 0.0
