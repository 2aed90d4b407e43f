"""How sure the choice is, in words: out of ``selection.json``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Directions as alike as this point the same way.
_ALIKE = 0.9


def often_first(bootstrap: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The candidates of the resamples: those that win most often first, then those that pass."""
    return sorted(bootstrap["candidates"], key=lambda c: (-c["wins"], -c["passes"]))


def sentences(selection: Mapping[str, Any]) -> list[str]:
    """What the resamples say, as a list of sentences; empty for a record without them."""
    held = selection.get("bootstrap")
    if not held:
        return []
    said = [_choice(held)]
    doubts = {"undecided": "a candidate whose KL was not computed might win", "none": "none passes"}
    said += [f"in {held[key]:.1%} of them {what}" for key, what in doubts.items() if held[key] > 0]
    if is_partial(held):
        said.append(
            f"of {held['scored']} candidates {held['covered']} took part, as the others lack a "
            "score that could not change the choice: --search exhaustive lets all take part"
        )
    return said


def is_partial(bootstrap: Mapping[str, Any]) -> bool:
    """Whether candidates without all scores took no part in the resamples."""
    return bool(bootstrap["covered"] < bootstrap["scored"])


def _choice(held: Mapping[str, Any]) -> str:
    count = f"{held['resamples']:,} resamples of the validation prompts"
    winners, cosines = held["winners"], held["cosines"]
    if held["chosen"] is None:
        often = "none chooses" if not winners else "some choose"
        return f"no candidate passes on all prompts; of {count} {often} one"
    said = f"chosen in {held['chosen']:.0%} of {count}"
    if len(winners) < 2:
        if held["covered"] < 2 <= held["scored"]:
            return f"{said}, in which no other candidate took part"
        return f"{said}; no other candidate wins in any of them"
    alike = cosines[0][1:]
    low, high = f"{min(alike):.2f}", f"{max(alike):.2f}"
    span = f"cosine {low}" if low == high else f"cosine {low} to {high}"
    if min(alike) >= _ALIKE:
        return f"{said}; the runners-up point the same way, {span}"
    return f"{said}; not all runners-up point the same way, {span}"
