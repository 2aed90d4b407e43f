"""The candidates of other layers at the position of the selected direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.direction import Direction
from abliterate.extraction.extraction import Extraction


def other_layers(
    means: Path, extracted: Mapping[str, Any], direction: Direction, count: int
) -> dict[int, Tensor]:
    """At most ``count`` candidates of other layers, spread evenly over them, by layer.

    Args:
        means: ``directions.safetensors`` of a run folder.
        extracted: its ``extract.json``.
        direction: the selected one, or one of another place.
        count: how many.

    Returns:
        None of a direction whose position the run did not extract, or where the means are gone.

    Raises:
        InputError: the means are damaged.
    """
    if not means.is_file() or direction.layer is None:
        return {}
    extraction = Extraction.load(means, extracted)
    if direction.position not in extraction.positions:
        return {}
    projected = replace(
        extraction,
        project_harmless=direction.project_harmless,
        project_first_token=direction.project_first_token,
    )
    candidates = projected.directions[extraction.positions.index(direction.position)]
    lengths = candidates.norm(dim=1)
    usable = [
        layer
        for layer in range(len(candidates))
        # What is the same for every prompt has no direction but rounding.
        if layer != direction.layer and float(lengths[layer]) > 1e-9 * float(lengths.max())
    ]
    few = min(count, len(usable))
    chosen = sorted({usable[(2 * i + 1) * len(usable) // (2 * few)] for i in range(few)})
    return {layer: candidates[layer].double() for layer in chosen}
