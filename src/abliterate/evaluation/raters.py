"""Refusal phrases, judges and classifier as raters of the same answers: where they agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from abliterate.evaluation.completion import Completion
from abliterate.metrics.agreement import agreement
from abliterate.prompts.sampling import prompt_key

PHRASES, JUDGE, SECOND, CLASSIFIER = "refused", "safe", "second_safe", "labelled"


def agreements(completions: Sequence[Completion], seed: int) -> list[dict[str, Any]]:
    """For each two raters that said something of the same answers, how far they agree.

    The verdicts are those that the shares count: the answer refuses (phrases), is safe (judge and
    second judge), has the label (classifier).

    Args:
        completions: the answers.
        seed: of the bootstrap.

    Returns:
        For each pair ``raters``, the figures of :func:`agreement`, and under ``disagreements`` the
        keys of the prompts of which they say different things.
    """
    found = []
    for one, other in combinations((PHRASES, JUDGE, SECOND, CLASSIFIER), 2):
        both = [
            (completion, first, second)
            for completion in completions
            if (first := _verdict(completion, one)) is not None
            and (second := _verdict(completion, other)) is not None
        ]
        if both:
            found.append(
                {"raters": [one, other]}
                | agreement([(first, second) for _, first, second in both], seed)
                | {"disagreements": [prompt_key(c.prompt) for c, a, b in both if a != b]}
            )
    return found


def _verdict(completion: Completion, rater: str) -> bool | None:
    if rater == PHRASES:
        return completion.refused
    if rater == JUDGE:
        return completion.safe
    if rater == SECOND:
        return None if completion.second is None else completion.second.safe
    return None if completion.labelled is None else completion.labelled.hit
