"""What the projected tensors of a comparison have in common: which known form of edit it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, median_high
from typing import Any

import torch
from torch import Tensor

from abliterate.auditing.checkpoint_pairs import CheckpointPair, Place
from abliterate.auditing.projections import sign_of

_ONE = 0.95  # of the energy of all directions, where they are the same in every layer
_FULL, _INVERTED = 0.95, 1.5
_SPREAD = 0.1  # between scales that are not one
_KNOWN = 0.1  # of the first singular value: what the last of several directions has at least
_NOISY = 0.1  # weight of a direction that is divided by gains, or stands among other changes


@dataclass(frozen=True)
class ProjectedMatrix:
    """A matrix that was projected.

    Attributes:
        place: where it lies.
        basis: float64 ``[d_model, k]``, unit columns: what it lost, as it is there.
        scale: the signed share.
        directions: how many it lost.
        whole: nothing else changed, and the basis is its own.
        rescaled: its ``rows`` or ``columns`` were rescaled then.
    """

    place: Place
    basis: Tensor = field(repr=False)
    scale: float
    directions: int
    whole: bool
    rescaled: str | None = None


@dataclass(frozen=True, kw_only=True)
class EditForm:
    """Which known form an edit has.

    Attributes:
        kinds: such as ``one direction``, ``by layer``, ``3 directions``, ``readers``, ``partial``,
            ``amplified``, ``inverted``.
        text: the same in a sentence.
        side: ``writer`` or ``reader``: which tensors name the directions.
        gains: directions are the stream's, behind the gains of norms; False: the matrices' own.
        count: directions of a tensor.
        by_layer: they differ from layer to layer.
        shared: float64 unit ``[d_model]``: the direction, or the one that most tensors share.
        directions: float64 ``[n_layers, d_model]``: unit, or zero in layers that lost none.
        outside: the direction of the embedding, unit ``[d_model]``, or None.
        subspaces: of several directions at once all, float64 ``[n_layers, count, d_model]`` with
            orthonormal rows, zero in layers that lost none; None where there is but one, or no more
            of them is known.
        scales: median scale of each layer's tensors, NaN where there are none.
        scale: median of all.
        keeps_norms: ``rows`` or ``columns``, where most tensors show that those were rescaled
            after the projection; else None.
    """

    kinds: tuple[str, ...]
    text: str
    side: str
    gains: bool
    count: int
    by_layer: bool
    shared: Tensor = field(repr=False)
    directions: Tensor = field(repr=False)
    outside: Tensor | None = field(repr=False)
    subspaces: Tensor | None = field(repr=False)
    scales: tuple[float, ...]
    scale: float
    keeps_norms: str | None

    def at_layer(self, layer: int | None) -> Tensor | None:
        """The direction at a block, or outside of the blocks."""
        if not self.by_layer:
            return self.shared
        if layer is None:
            return self.outside
        row = self.directions[layer]
        return row if bool(row.any()) else None

    def basis_at(self, layer: int | None) -> Tensor | None:
        """All directions at a block that are known, or outside of the blocks; ``[d_model, k]``."""
        if self.subspaces is not None and layer is not None and bool(self.subspaces[layer].any()):
            return self.subspaces[layer].T
        if layer is None and self.subspace is not None:
            return self.subspace.T
        direction = self.at_layer(layer)
        return None if direction is None else direction.unsqueeze(1)

    @property
    def subspace(self) -> Tensor | None:
        """All of several directions, ``[count, d_model]``, where layers do not differ; or None."""
        if self.by_layer or self.subspaces is None:
            return None
        return next((rows for rows in self.subspaces if bool(rows.any())), None)

    def document(self) -> dict[str, Any]:
        """For JSON, without the directions' values."""
        return {
            "kinds": list(self.kinds),
            "text": self.text,
            "side": self.side,
            "behind_gains": self.gains,
            "directions": self.count,
            "by_layer": self.by_layer,
            "scale": self.scale,
            "keeps_norms": self.keeps_norms,
            "layer_scales": [None if math.isnan(s) else s for s in self.scales],
        }


def describe(
    pair: CheckpointPair,
    matrices: Sequence[ProjectedMatrix],
    hints: Mapping[str, tuple[Tensor, bool]],
) -> EditForm | None:
    """Name the form of an edit.

    Args:
        pair: the two checkpoints.
        matrices: those that were projected.
        hints: for each side the direction that its tensors share, and whether behind the gains.
    """
    if not matrices:
        return None
    readers = [m for m in matrices if m.place.side == "reader"]
    writers = [m for m in matrices if m.place.side == "writer"]
    side, members = ("writer", writers) if writers else ("reader", readers)
    # Narrow matrices tell fewer than there are.
    count = median_high([m.directions for m in members])
    ways = (True, False) if writers and pair.has_gains else (True,)
    stacks = {gains: _stacked(pair, members, gains) for gains in ways}
    # max keeps the first of equals: the stream's own direction.
    gains = max(ways, key=lambda way: round(_agreement(stacks[way], count), 6))
    stack = stacks[gains]
    hint = hints.get(side)
    whole = sum(m.whole for m in members)
    shared = _first(stack) if stack else None
    if hint is not None and hint[1] == gains and (shared is None or 2 * whole < len(members)):
        shared = hint[0]
    if shared is None:  # the gains of each let nothing be told
        shared = hint[0] if hint else members[0].basis[:, 0]
    shared = shared * sign_of(shared)
    by_layer = bool(stack) and _share([c for _, c in stack], count) < _ONE
    directions = torch.zeros(pair.n_layers, pair.d_model, dtype=torch.float64)
    scales = [math.nan] * pair.n_layers
    for layer in range(pair.n_layers):
        here = [m for m in members if m.place.layer == layer]
        if here:
            own = [one for one in stack if one[0].place.layer == layer]
            found = _first(own) if by_layer and own else shared
            directions[layer] = found * _towards(found, shared)
            scales[layer] = median(m.scale for m in here)
    tables = [one for one in stack if one[0].place.layer is None]
    outside = None
    if any(m.place.layer is None for m in members):
        outside = _first(tables) if by_layer and tables else shared
        outside = outside * _towards(outside, shared)
    subspaces = _subspaces(pair, members, stack, count, by_layer) if count > 1 else None
    kinds = _kinds(members, bool(writers), bool(readers), count, by_layer)
    return EditForm(
        kinds=kinds,
        text=_text(kinds, members, readers if writers else [], side, count, by_layer),
        side=side,
        gains=gains,
        count=count,
        by_layer=by_layer,
        shared=shared,
        directions=directions,
        outside=outside,
        subspaces=subspaces,
        scales=tuple(scales),
        scale=median(m.scale for m in members),
        keeps_norms=_rescaled(members),
    )


_Stack = list[tuple[ProjectedMatrix, Tensor]]


def _stacked(pair: CheckpointPair, members: Sequence[ProjectedMatrix], gains: bool) -> _Stack:
    """Each matrix's directions in the stream, weighted by how well they are known."""
    stack: _Stack = []
    for one in members:
        back = pair.back(one.place, one.basis, gains)
        if back is None or len(back) != pair.d_model:
            continue
        weight = _NOISY if (gains and one.place.has_gains) or not one.whole else 1.0
        lengths = back.norm(dim=0).clamp(min=1e-300)
        stack.append((one, back / lengths * weight))
    return stack


def _agreement(stack: _Stack, count: int) -> float:
    """How far directions agree, in all of the model and within each layer."""
    if not stack:
        return 0.0
    layers: dict[int | None, list[Tensor]] = {}
    for one, columns in stack:
        layers.setdefault(one.place.layer, []).append(columns)
    several = [_share(of, count) for of in layers.values() if len(of) > 1]
    inside = sum(several) / len(several) if several else 0.0
    return inside + _share([columns for _, columns in stack], count)


def _share(columns: Sequence[Tensor], count: int) -> float:
    """Energy of the first ``count`` directions of all, each matrix with the same weight."""
    alike = torch.cat([c / c.norm(dim=0) for c in columns], dim=1)
    values = torch.linalg.svdvals(alike).square()
    return float(values[:count].sum() / values.sum())


def _first(stack: _Stack) -> Tensor:
    columns = torch.cat([c for _, c in stack], dim=1)
    first: Tensor = torch.linalg.svd(columns, full_matrices=False)[0][:, 0]
    return first


def _subspaces(
    pair: CheckpointPair,
    members: Sequence[ProjectedMatrix],
    stack: _Stack,
    count: int,
    by_layer: bool,
) -> Tensor | None:
    """All directions that each layer lost, ``[n_layers, count, d_model]``; None if not all show."""
    found = torch.zeros(pair.n_layers, count, pair.d_model, dtype=torch.float64)
    for layer in sorted({m.place.layer for m in members if m.place.layer is not None}):
        own = [c for one, c in stack if not by_layer or one.place.layer == layer]
        if not own:
            return None
        left, values, _ = torch.linalg.svd(torch.cat(own, dim=1), full_matrices=False)
        if len(values) < count or float(values[count - 1]) < _KNOWN * float(values[0]):
            return None
        found[layer] = left[:, :count].T
    return found if bool(found.any()) else None


def _towards(vector: Tensor, other: Tensor) -> float:
    return 1.0 if float(vector @ other) >= 0 else -1.0


def _kinds(
    members: Sequence[ProjectedMatrix], writers: bool, readers: bool, count: int, by_layer: bool
) -> tuple[str, ...]:
    kinds = [f"{count} directions"] if count > 1 else [] if by_layer else ["one direction"]
    kinds += ["by layer"] * by_layer
    kinds += ["readers"] * readers
    kinds += ["writers"] * (writers and readers)
    scale = median(m.scale for m in members)
    if scale < 0:
        kinds.append("amplified")
    elif scale < _FULL:
        kinds.append("partial")
    elif scale > _INVERTED:
        kinds.append("inverted")
    return tuple(kinds)


def _rescaled(members: Sequence[ProjectedMatrix]) -> str | None:
    for axis in ("rows", "columns"):
        if 2 * sum(m.rescaled == axis for m in members) > len(members):
            return axis
    return None


def _text(
    kinds: Sequence[str],
    members: Sequence[ProjectedMatrix],
    readers: Sequence[ProjectedMatrix],
    side: str,
    count: int,
    by_layer: bool,
) -> str:
    what = "one direction" if count == 1 else f"{count} directions"
    if by_layer:
        what = "a direction" if count == 1 else what
        what += " of its own in each layer"
    scales = sorted(m.scale for m in members)
    low, high = scales[len(scales) // 20], scales[-1 - len(scales) // 20]
    number = f"{low:z.2f} to {high:z.2f}" if high - low > _SPREAD else f"{median(scales):z.2f}"
    verbs = {"amplified": "amplified in", "partial": "partly projected out of",
             "inverted": "inverted in"}  # fmt: skip
    verb = next((verbs[kind] for kind in kinds if kind in verbs), "projected out of")
    text = f"{what}, {verb} {_counted(len(members), side)} (scale {number})"
    return text + (f", and read by {_counted(len(readers), 'reader')} no more" if readers else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"
