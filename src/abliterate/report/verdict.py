"""What a run found, in sentences that a reader can quote: with n and intervals, current alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterate.report.collect import Document, Run

# An intervention, the prompts that its claim is about, and how its sentence begins.
_CLAIMS = (
    ("ablate", "harmful", "With its refusal direction ablated"),
    ("add", "harmless", "With the direction added"),
)


def verdict_sentences(run: Run) -> list[str]:
    """A sentence for each of the paper's two claims that the evaluation has measured.

    Stale parts and stale rows of the evaluation never enter, nor does a layer that another choice
    has replaced; without a current evaluation there is none.
    """
    evaluation = run.current("evaluation")
    if evaluation is None:
        return []
    results: Document = {
        name: held
        for name, held in evaluation["interventions"].items()
        if name not in run.stale_rows
    }
    found: list[str] = []
    for name, kind, start in _CLAIMS:
        now = (results.get(name) or {}).get(kind)
        if now is None or now.get("refusal_rate") is None:  # a streamed model answers nothing
            continue
        before = (results.get("baseline") or {}).get(kind)
        change = ((evaluation.get("deltas") or {}).get(name) or {}).get(kind) or {}
        found.append(
            f"{start}, {'it' if found else run.model} refused {share(now, f'{kind} test prompts')}"
            f"{_against(now, before, change)}."
        )
    return found


def share(part: Document, things: str = "") -> str:
    """``3 of 100 prompts (3.0%, 95% interval 1.0% to 8.5%)``; thoughts without an end are no
    answers."""
    answered = part["n"] - (part.get("no_verdict") or 0)
    span = part.get("refusal_score_ci")
    count = " ".join(filter(None, (f"{part['refused']} of {answered}", things)))
    return f"{count} ({float(part['refusal_rate']):z.1%}{_interval(span)})"


def _interval(span: Sequence[float] | None) -> str:
    return f", 95% interval {span[0]:z.1%} to {span[1]:z.1%}" if span else ""


def _against(now: Document, before: Document | None, change: Document) -> str:
    """The unmodified model beside it, and the difference in percentage points."""
    if before is None or before.get("refusal_rate") is None:
        return ""
    step = points(float(now["refusal_rate"]) - float(before["refusal_rate"]))
    span: Any = change.get("refusal_score_ci")
    interval = f" [{points(span[0])}, {points(span[1])}]" if span else ""
    return f"; unmodified it refused {share(before)}: {step}{interval} percentage points"


def points(difference: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * difference:+z.1f}"
