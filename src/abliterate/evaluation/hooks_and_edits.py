"""Whether ablation's hooks and edited checkpoints do the same, prompt by prompt and in the means.

Behind a post-norm their logits differ (docs/writers.md); elsewhere they agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.evaluation.completion import Completion
from abliterate.evaluation.outcomes import Outcome
from abliterate.evaluation.prompt_kinds import KINDS


def hooks_and_edits(outcomes: Mapping[str, Outcome], edited: Sequence[str]) -> dict[str, Any]:
    """How far the hooks of ``ablate`` and each edited checkpoint agree.

    Args:
        outcomes: by intervention or name.
        edited: the names of the checkpoints.

    Returns:
        By checkpoint: for each kind under ``refusals`` how many prompts have a verdict in both
        (``n``) and how many the same one (``same``), None where there are no answers; the refusal
        metric and KL of both with their difference. Empty without ``ablate``.
    """
    if "ablate" not in outcomes:
        return {}
    hooks = outcomes["ablate"]
    return {name: _agrees(hooks, outcomes[name]) for name in edited if name in outcomes}


def _agrees(hooks: Outcome, edit: Outcome) -> dict[str, Any]:
    left, right = hooks.summary(), edit.summary()
    of_kinds = {
        kind: {
            "refusals": _same_verdicts(getattr(hooks, kind), getattr(edit, kind)),
            "refusal_metric": _both(left[kind]["refusal_metric"], right[kind]["refusal_metric"]),
        }
        for kind in KINDS
    }
    return {**of_kinds, "kl_divergence": _both(left["kl_divergence"], right["kl_divergence"])}


def _both(hooks: float | None, edit: float | None) -> dict[str, float | None]:
    difference = None if hooks is None or edit is None else edit - hooks
    return {"ablate": hooks, "edit": edit, "difference": difference}


def _same_verdicts(
    one: Sequence[Completion] | None, other: Sequence[Completion] | None
) -> dict[str, int] | None:
    """A thought that has not ended is no verdict."""
    if one is None or other is None:
        return None
    pairs = [(a.refused, b.refused) for a, b in zip(one, other, strict=True)]
    known = [pair for pair in pairs if None not in pair]
    return {"n": len(known), "same": sum(a == b for a, b in known)}
