"""What an evaluation says of hooks and edited checkpoints, for people; imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from abliterate.evaluation.prompt_kinds import KINDS


def hooks_and_edits_lines(record: Mapping[str, Any], stale: Collection[str] = ()) -> list[str]:
    """What ``evaluation.json`` says of it, a line for each checkpoint; none of an older record.

    Args:
        record: the record.
        stale: the checkpoints that are another edit than the record's direction makes, or were
            replaced: how far such a one agrees with the hooks says nothing of the edit.
    """
    found = record.get("hooks_and_edits") or {}
    apart = "not compared, as {} is stale"
    return [
        f"ablate and {name}: {apart.format(name) if name in stale else _text(one)}"
        for name, one in found.items()
    ]


def _text(found: Mapping[str, Any]) -> str:
    parts = []
    for kind in KINDS:
        if (same := found[kind]["refusals"]) is not None:
            parts.append(f"the same verdict on {same['same']} of {same['n']} {kind} prompts")
        metric = found[kind]["refusal_metric"]
        if metric["difference"] is not None:
            parts.append(f"{kind} log-odds {metric['ablate']:+z.2f} and {metric['edit']:+z.2f}")
    kl = found["kl_divergence"]
    if kl["difference"] is not None:
        parts.append(f"harmless KL {kl['ablate']:z.4f} and {kl['edit']:z.4f} nats")
    return ", ".join(parts) or "nothing that could be compared"
