"""Directions for the layers of a set that have none, from those of their neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from abliterate.direction_set import DirectionSet, concatenated
from abliterate.errors import InputError, UsageError
from abliterate.storage.artifacts import hash_text

if TYPE_CHECKING:
    from torch import Tensor


# Between vectors that point this much against each other there is no way halfway.
_OPPOSITE = -1 + 1e-6


def parse_interpolation(text: str) -> tuple[str, str | None]:
    """``linear`` or ``spherical``, and the layers behind a colon, if any."""
    kind, _, layers = text.partition(":")
    return kind, layers or None


def interpolated(directions: DirectionSet, kind: str, chosen: Sequence[int] | None) -> DirectionSet:
    """Unit vectors for every layer, from those of some.

    Between two layers that have one the vectors turn from the first to the second: ``linear``
    mixes them by the distance and normalises, ``spherical`` turns by equal angles. Before the first
    and behind the last they stay.

    Args:
        directions: the set.
        kind: ``linear`` or ``spherical``.
        chosen: the layers whose vectors count; None for all that have one.

    Raises:
        InputError: two neighbours point in opposite directions.
        UsageError: a chosen layer has no direction.
    """
    held = directions.layers
    layers = held if chosen is None else sorted(set(chosen))
    for layer in layers:
        if layer not in held:
            raise UsageError(
                f"--interpolate: layer {layer} has no direction of its own in the set (those that "
                f"have: {', '.join(map(str, held)) or 'none'})"
            )
    if not layers:
        raise InputError(f"{directions.named} holds no direction: every row is zero")
    rows = directions.vectors.double()
    units = {layer: rows[layer] / rows[layer].norm() for layer in layers}
    made = [_between(units, layer, kind) for layer in range(len(rows))]
    candidates = directions.candidates or (None,) * len(rows)
    return replace(
        directions,
        vectors=concatenated(*(vector[None] for vector in made)),
        candidates=tuple(c if layer in layers else None for layer, c in enumerate(candidates)),
        sha256=hash_text(str(directions.sha256), kind, str(layers)),
        interpolate=kind if chosen is None else f"{kind}:{','.join(map(str, layers))}",
    )


def _between(units: Mapping[int, Tensor], layer: int, kind: str) -> Tensor:
    below = max((one for one in units if one <= layer), default=None)
    above = min((one for one in units if one >= layer), default=None)
    if below is None or above is None or below == above:
        nearest = above if below is None else below
        assert nearest is not None
        return units[nearest]
    a, b = units[below], units[above]
    share, cosine = (layer - below) / (above - below), float((a @ b).clamp(-1, 1))
    if cosine <= _OPPOSITE:
        raise InputError(
            f"the directions of layers {below} and {above} are opposite: --interpolate finds "
            "nothing between them; choose other layers"
        )
    if kind == "spherical":
        # Stable where the two are nearly the same: what b has beside a, by the angle.
        beside = b - cosine * a
        length = float(beside.norm())
        if length > 1e-12:
            angle = math.atan2(length, cosine) * share
            mixed = math.cos(angle) * a + math.sin(angle) * beside / length
        else:
            mixed = a
    else:
        mixed = (1 - share) * a + share * b
    made: Tensor = mixed / mixed.norm()
    return made
