"""How far the prompts of a mean lie apart, and what that says of the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.metrics.intervals import bootstrap


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Standard deviation, standard error, median and ends of the values behind a mean.

    Args:
        values: one figure per prompt, at least one.

    Returns:
        ``n``; ``sd`` with ``n - 1``, and ``standard_error``, which is ``sd / sqrt(n)``, both None
        of a single value; ``median`` (the mean of the middle two of an even number), ``min`` and
        ``max``.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    sd = float(data.std(ddof=1)) if len(data) > 1 else None
    return {
        "n": len(data),
        "sd": sd,
        "standard_error": None if sd is None else sd / len(data) ** 0.5,
        "median": float(np.median(data)),
        "min": float(data.min()),
        "max": float(data.max()),
    }


# Of fewer draws than this the standard deviation is too rough to measure a distance in.
LEAST_DRAWS = 20


def place_among(value: float, others: Sequence[float]) -> dict[str, Any]:
    """Where a value lies among draws of a null.

    Returns:
        ``below``, how many ``of`` the draws lie below it; their ``mean`` and ``sd`` (``n - 1``);
        ``z``, by how many of these the value lies off, None of fewer than 20 draws.
    """
    import numpy as np

    mean = sum(others) / len(others)
    sd = float(np.std(others, ddof=1)) if len(others) > 1 else None
    return {
        "below": sum(other < value for other in others),
        "of": len(others),
        "mean": mean,
        "sd": sd,
        "z": (value - mean) / sd if sd and len(others) >= LEAST_DRAWS else None,
    }


def place_text(place: Mapping[str, Any]) -> str:
    """``above 4 of 4``, of enough draws with how far off."""
    text, z = f"above {place['below']} of {place['of']}", place["z"]
    # Records of old have a z of however few draws.
    return text if z is None or place["of"] < LEAST_DRAWS else f"{text}, z {z:+z.1f}"


def described(name: str, values: Sequence[float] | None, seed: int) -> dict[str, Any]:
    """A mean as records hold it: ``name``, ``name_ci`` and ``name_spread``.

    Args:
        name: of the figure.
        values: one per prompt; None or none if it was not measured, which gives None for all three.
        seed: of the bootstrap.
    """
    if not values:
        return {name: None, f"{name}_ci": None, f"{name}_spread": None}
    mean = sum(values) / len(values)
    return {name: mean, f"{name}_ci": bootstrap(values, seed), f"{name}_spread": spread(values)}


def described_change(
    name: str, now: Sequence[float] | None, before: Sequence[float] | None, seed: int
) -> dict[str, Any]:
    """As :func:`described`, of the differences of the same prompts; None where one side lacks."""
    if not now or not before or len(now) != len(before):
        return described(name, None, seed)
    differences = [one - other for one, other in zip(now, before, strict=True)]
    return described(name, differences, seed)
