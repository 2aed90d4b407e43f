"""Which units carry a direction, how strongly, and which known edit that looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from abliterate.auditing import bias_test
from abliterate.auditing.compare import Comparison
from abliterate.auditing.components import (
    AuditedComponent,
    CheckpointWriters,
    read_bias,
    read_columns,
)
from abliterate.auditing.soft_null_space import is_wide

_SAMPLE = 4  # columns of a unit, per channel
_MAX_COLUMNS = 2048  # columns where no more than an energy is measured
_FULL_ENERGY, _PART_ENERGY = 0.02, 0.6
_LITTLE = 0.01  # a bias's share of the direction that an edit may have left
_SEED = 0


@dataclass(frozen=True)
class Strength:
    """One unit against the direction.

    Attributes:
        unit: such as ``attention.3``.
        kind: its kind.
        layer: decoder block, or None.
        energy: along the direction, as a multiple of that of a typical random direction.
        removed: estimated share of the direction that it lost, 0 to 1 (``s`` of the edit).
        carries: it counts as edited.
    """

    unit: str
    kind: str
    layer: int | None
    energy: float
    removed: float
    carries: bool


def strengths(
    reading: CheckpointWriters, directions: Tensor, gains: bool, comparison: Comparison | None
) -> tuple[Strength, ...]:
    """Every unit's energy along directions; with a base, the share that it lost is exact.

    Args:
        reading: the checkpoint, or its readers.
        directions: orthonormal, ``[d_model, k]``; energies are means over them.
        gains: they are the stream's, behind the gains of norms.
        comparison: the difference from the base, if there is one.
    """
    exact: dict[str, float] = {}
    if comparison is not None:
        exact = {t.name: t.scale for t in comparison.projected if t.scale is not None}
    measured = []
    for unit in reading.units:
        max_columns = min(_SAMPLE * reading.d_model, _MAX_COLUMNS)
        columns = read_columns(reading, unit, max_columns, _SEED, gains)
        typical = _typical(columns)
        along = float((directions.T @ columns).square().sum()) / directions.shape[1]
        measured.append((unit, along / typical if typical > 0 else 1.0))
    limit = _limit([energy for _, energy in measured])
    result = []
    for unit, energy in measured:
        removed = min(1.0, max(0.0, 1 - math.sqrt(energy)))
        carries = energy < limit
        if comparison is not None:
            scales = [exact[p.edit.name] for p in unit.parts if p.edit.name in exact]
            carries = bool(scales)
            removed = sum(scales) / len(scales) if scales else 0.0
        result.append(Strength(unit.label, unit.kind, unit.layer, energy, removed, carries))
    return tuple(result)


def _typical(columns: Tensor) -> float:
    generator = torch.Generator().manual_seed(_SEED)
    tries = torch.randn(len(columns), 64, generator=generator, dtype=torch.float64)
    tries = tries / tries.norm(dim=0)
    return float((tries.T @ columns).square().sum(dim=1).median())


def _limit(energies: Sequence[float]) -> float:
    """Where the units that carry an edit end: the widest step in log energy among the low ones."""
    logs = sorted(math.log(max(energy, 1e-8)) for energy in energies)
    bound, full = math.log(_PART_ENERGY), math.log(_FULL_ENERGY)
    if len(logs) < 2 or logs[0] > full:
        return _PART_ENERGY
    # Whole edits: rounding, noise or requantization leaves little, other units have about one.
    pairs = [p for p in pairwise(logs) if p[0] < bound and p[1] > full]
    steps = [(b - a, (a + b) / 2) for a, b in pairs]
    widest = max(steps, default=(0.0, bound))
    return math.exp(widest[1]) if widest[0] > math.log(5) else _PART_ENERGY


def biases_included(
    reading: CheckpointWriters, direction: Tensor, comparison: Comparison | None
) -> bool | None:
    """Whether the biases lost the direction too.

    None where that cannot be told: there are fewer than three, or so few that what they have along
    the direction is little, and yet no less than chance leaves in one of 1000 models.
    """
    if comparison is not None:
        names = {part.edit.name for part in reading.biases}
        changes = [t for t in comparison.tensors if t.name in names and t.state != "recast"]
        return any(t.projected for t in changes) if changes else None
    held = []
    max_vectors = max(1, bias_test.MAX_VECTORS // max(1, len(reading.biases)))
    for part in reading.biases:
        vectors = read_bias(reading, part)
        vectors = vectors[:, vectors.square().sum(dim=0) > 0]
        held.append(vectors[:, :: -(-vectors.shape[1] // max_vectors) or 1])
    biases = torch.cat(held, dim=1) if held else torch.empty(reading.d_model, 0)
    if biases.shape[1] < 3:
        return None
    if bias_test.p_value(biases, direction) <= bias_test.LEVEL:
        return True
    cosines = direction @ (biases / biases.norm(dim=0))
    median_share = bias_test.median_share(cosines, reading.d_model)
    return None if float(median_share) < _LITTLE else False


def name_style(
    reading: CheckpointWriters,
    units: Sequence[Strength],
    direction: Tensor,
    gains: bool,
    comparison: Comparison | None,
    side: str = "writers",
) -> str | None:
    """The known edit that the carrying units look like.

    Whether norms were kept is told by a base, and without one only where no norm stands behind the
    writers, whose gains would look the same.
    """
    carrying = [unit for unit in units if unit.carries]
    inside = [unit for unit in units if unit.layer is not None]
    kinds = {unit.kind for unit in carrying}
    layers = sorted({unit.layer for unit in carrying if unit.layer is not None})
    every = sorted({unit.layer for unit in inside if unit.layer is not None})
    if not carrying:
        return None
    if len(carrying) == len(units):
        style = f"all {side}"
    elif (
        side == "writers"
        and layers == every
        and len([u for u in carrying if u.layer is not None]) == len(inside)
    ):
        style = "attention and MLP only"
    elif layers and len(layers) < len(every) and layers == list(range(layers[0], layers[-1] + 1)):
        style = f"layers {layers[0]}-{layers[-1]}"
    else:
        style = ", ".join(sorted(kinds)) + " of some layers"
    if not gains:
        style += ", the gains of norms overlooked"
    if comparison is not None and comparison.form is not None:
        keeps = comparison.form.keeps_norms is not None
    else:
        keeps = not reading.has_gains and _keeps_norms(reading, carrying, direction, gains)
    if keeps:
        style += ", norm-preserving"
    return style


def _keeps_norms(
    reading: CheckpointWriters, carrying: Sequence[Strength], direction: Tensor, gains: bool
) -> bool:
    """Rows were rescaled after the projection: each unit's own null direction is ``r_i / n_i``.

    It is much emptier than the common one, close to it, and as each row's norm ``n_i`` grew by
    about ``r_i^2`` and more, it is flatter where ``r`` is large. In wide models ``r_i^2`` is too
    small for it to show beside the rounding of 16 bits.
    """
    if is_wide(reading.d_model):
        return False
    labels = {unit.unit for unit in carrying if unit.layer is not None and unit.removed > 0.8}
    chosen: list[AuditedComponent] = [unit for unit in reading.units if unit.label in labels][:8]
    votes = []
    for unit in chosen:
        columns = read_columns(reading, unit, _SAMPLE * reading.d_model, _SEED, gains)
        gram = columns @ columns.T
        typical = _typical(columns)
        if typical <= 0:
            continue
        damped = gram + 1e-9 * typical * torch.eye(len(gram), dtype=torch.float64)
        null_direction = torch.linalg.solve(damped, direction)
        null_direction = null_direction / null_direction.norm()
        before = float(direction @ gram @ direction) / typical
        after = float(null_direction @ gram @ null_direction) / typical
        near = float(null_direction @ direction) ** 2 > 0.8
        votes.append(near and before > 3e-5 and after < before / 30)
    return len(votes) > 0 and sum(votes) * 2 > len(votes)
