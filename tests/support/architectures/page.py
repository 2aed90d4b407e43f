"""docs/architectures.md, row by row: ``scripts/architectures.py`` writes it, the tests compare."""

from __future__ import annotations

from architectures.roundtrip import Outcome
from architectures.zoo import EXCLUDED

#: A checkpoint that is edited is exact up to this leak.
EXACT = 1e-5


def is_exact(outcome: Outcome) -> bool:
    return outcome.edited is not None and outcome.edited <= EXACT and outcome.verified


def edited_row(name: str, outcome: Outcome) -> str:
    """The row of a type that is edited."""
    kind = ("gain" if outcome.gains else "r") if is_exact(outcome) else "NOT EXACT"
    return (
        f"| {name} | {outcome.writers} | {outcome.tensors} | {kind} | "
        f"{outcome.before:.2f} | {outcome.edited:.1e} |"
    )


def refused_row(name: str, outcome: Outcome) -> str:
    """The row of a type that is refused, from the error."""
    reason = outcome.refusal.partition("cannot be made exact: ")[2].partition("; ")[0]
    leak = outcome.refusal.rpartition("a leak of ")[2].partition(" ")[0]
    return f"| {name} | {reason} | {leak} | {outcome.hooked:.1e} |"


def row(name: str, outcome: Outcome) -> str:
    """The row of a type."""
    return (refused_row if outcome.edited is None else edited_row)(name, outcome)


def excluded_lines() -> str:
    """The types outside the tables, by the reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in EXCLUDED.items():
        reasons.setdefault(reason, []).append(name)
    return "\n".join(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items())
