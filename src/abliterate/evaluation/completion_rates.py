"""What completions come to: refusal and safety scores, with intervals, and how they change."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low
from typing import Any

from abliterate.evaluation.completion import Completion
from abliterate.metrics.intervals import newcombe_paired, wilson
from abliterate.metrics.paired_tests import mcnemar


def no_scores() -> dict[str, Any]:
    """What :func:`scores` gives, of completions that nobody made: no count, no share."""
    shares = (
        "refused",
        "no_verdict",
        "refusal_rate",
        "refusal_score",
        "refusal_score_ci",
        "refused_at_start",
        "refused_later",
        "refused_later_at",
        "broken",
        "broken_refused",
        "classifier_rate",
        "classifier_rate_ci",
    )
    judged = {"safety_score": None, "safety_score_ci": None, "judged": 0, "judge_failed": 0}
    judged |= {"second_safety_score": None, "second_safety_score_ci": None}
    judged |= {"second_judged": 0, "second_judge_failed": 0}
    judged |= {"classified": 0, "classifier_truncated": 0}
    return {"n": 0} | dict.fromkeys(shares) | judged | {"categories": {}}


def rates(completions: Sequence[Completion]) -> dict[str, Any]:
    """Refusal and safety scores with Wilson's intervals (paper, section 2.2 and appendix D).

    ``refusal_score`` is the share that holds a refusal phrase among the answers: a completion whose
    thought has not ended is none, and counts under ``no_verdict``. ``safety_score`` is the share
    that the judge calls safe among those it judged. ``refusal_rate`` repeats ``refusal_score``.
    ``refused_at_start`` counts the refusals that open the answer, ``refused_later`` those behind a
    preamble, of ``refused_later_at`` tokens in the median. ``broken`` counts answers that loop, are
    garbled or empty, ``broken_refused`` those of them that hold a refusal phrase.
    """
    verdicts = [c.refused for c in completions if c.refused is not None]
    refused = sum(verdicts)
    safe = [c.safe for c in completions if c.safe is not None]
    score = refused / len(verdicts) if verdicts else None
    later = [c.refused_at for c in completions if c.refused_at]
    broken = [c for c in completions if c.broken is not None]
    labelled = [c.labelled for c in completions if c.labelled is not None]
    hits = sum(one.hit for one in labelled)
    seconds = [c.second for c in completions if c.second is not None]
    second = [one.safe for one in seconds if one.safe is not None]
    return {
        "n": len(completions),
        "refused": refused,
        "no_verdict": len(completions) - len(verdicts),
        "refusal_rate": score,
        "refusal_score": score,
        "refusal_score_ci": wilson(refused, len(verdicts)) if verdicts else None,
        "refused_at_start": refused - len(later),
        "refused_later": len(later),
        "refused_later_at": median_low(later) if later else None,
        "broken": len(broken),
        "broken_refused": sum(bool(c.refused) for c in broken),
        "safety_score": sum(safe) / len(safe) if safe else None,
        "safety_score_ci": wilson(sum(safe), len(safe)) if safe else None,
        "second_safety_score": sum(second) / len(second) if second else None,
        "second_safety_score_ci": wilson(sum(second), len(second)) if second else None,
        "second_judged": len(second),
        "second_judge_failed": sum(one.error is not None for one in seconds),
        "classifier_rate": hits / len(labelled) if labelled else None,
        "classifier_rate_ci": wilson(hits, len(labelled)) if labelled else None,
        "classified": len(labelled),
        "classifier_truncated": sum(one.truncated for one in labelled),
        "judged": len(safe),
        "judge_failed": sum(c.judge_error is not None for c in completions),
    }


def scores(completions: Sequence[Completion]) -> dict[str, Any]:
    """:func:`rates` of all completions, and of each category under ``categories``."""
    names = sorted({c.category for c in completions if c.category is not None})
    return rates(completions) | {
        "categories": {
            name: rates([c for c in completions if c.category == name]) for name in names
        }
    }


def share_changes(
    now: Sequence[Completion] | None, before: Sequence[Completion] | None
) -> dict[str, Any]:
    """How refusal and safety scores of the same prompts differ, with Newcombe's paired intervals.

    Args:
        now: completions under an intervention, or None if none were generated.
        before: those of the baseline, in the same order.

    Returns:
        ``refusal_score``, ``safety_score``, ``second_safety_score`` (of a second judge) and
        ``classifier_rate``, each the difference over the
        prompts that have the figure in both, ``..._ci`` its interval, ``..._n`` how many prompts
        these are and ``..._p`` the exact McNemar test's; None, None, 0 and None where there are
        none.
    """
    together = list(zip(now or (), before or (), strict=now is not None and before is not None))
    refused = [
        (one.refused, other.refused)
        for one, other in together
        if one.refused is not None and other.refused is not None
    ]
    safe = [
        (one.safe, other.safe)
        for one, other in together
        if one.safe is not None and other.safe is not None
    ]
    labelled = [
        (one.labelled.hit, other.labelled.hit)
        for one, other in together
        if one.labelled is not None and other.labelled is not None
    ]
    second = [
        (one.second.safe, other.second.safe)
        for one, other in together
        if one.second is not None
        and one.second.safe is not None
        and other.second is not None
        and other.second.safe is not None
    ]
    changes: dict[str, Any] = {}
    for score, pairs in (
        ("refusal_score", refused),
        ("safety_score", safe),
        ("second_safety_score", second),
        ("classifier_rate", labelled),
    ):
        gained = sum(one - other for one, other in pairs)
        changes[score] = gained / len(pairs) if pairs else None
        changes[f"{score}_ci"] = newcombe_paired(pairs) if pairs else None
        changes[f"{score}_n"] = len(pairs)
        changes[f"{score}_p"] = mcnemar(pairs) if pairs else None
    return changes
