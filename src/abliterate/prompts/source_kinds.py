"""Of which kind the prompts of well-known sources are, to say so where others are asked for.

What a file holds is its owner's to know.
"""

from __future__ import annotations

from collections.abc import Mapping

from abliterate.prompts.hub_datasets import HubDataset
from abliterate.prompts.sources import BORDERLINE, PRESETS, cut_column

_HARMLESS = {"alpaca", "jailbreakbench-benign", "xstest", "orbench-hard"}
_BUNDLED = {"harmful": "harmful", "harmless": "harmless", BORDERLINE: "harmless"}


def known_kind(spec: str) -> str | None:
    """``harmful`` or ``harmless``, of a bundled set, a preset or the data set that one stands for;
    None of another source."""
    if spec in _BUNDLED:
        return _BUNDLED[spec]
    place, _ = cut_column(spec)
    asked = _split_of(place)
    for name, preset in PRESETS.items():
        if place.lower() == name or (asked and asked == _split_of(cut_column(preset)[0])):
            return "harmless" if name in _HARMLESS else "harmful"
    return None


def wrong_kinds(sources: Mapping[str, str]) -> list[str]:
    """Sentences about sources that are asked for as what they are not.

    Args:
        sources: by what their prompts are to be: ``harmful``, ``harmless`` or ``borderline``.
    """
    found = []
    for kind, spec in sources.items():
        wanted = "harmful" if kind == "harmful" else "harmless"
        known = known_kind(spec)
        if known not in (None, wanted):
            why = ", and to refuse those is no over-refusal" if kind == BORDERLINE else ""
            found.append(f"--{kind} {spec}: these are {known} prompts{why}")
    if "harmful" in sources:
        same = [k for k, spec in sources.items() if k != "harmful" and spec == sources["harmful"]]
        found += [
            f"--harmful and --{kind} are the same prompts: {sources[kind]}"
            for kind in same
            if known_kind(sources[kind]) is None
        ]
    return found


def _split_of(place: str) -> tuple[str, str | None, str] | None:
    """A data set of the hub, its configuration and split, whatever slice and revision."""
    found = HubDataset.parse(place)
    if found is None:
        return None
    return found.id.lower(), found.config, found.split.partition("[")[0]
