"""Directions that several tensors lost together, where each by itself may not show it.

Training on top of an edit, rounding to a few bits or several directions at once hide the rank of a
tensor's own difference. What is left of ``W' - W`` along the direction is proportional to what
``W`` had there all the same, in every tensor of the model (or of the layer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from abliterate.auditing.checkpoint_pairs import CheckpointPair
from abliterate.auditing.grams import (
    CLEAR,
    FIT,
    Grams,
    few_channels,
    pooled_directions,
    scale_beside,
)
from abliterate.auditing.projections import COLUMNS, SAME, sign_of
from abliterate.auditing.tensor_diff import TensorSummary

_KEPT = 16  # directions among which the shared ones are looked for
_TRIED = 4  # of them, at most
#: Fit of a tensor along a direction that others vouch for.
_VOUCHED = 0.5
_TOGETHER = 0.8  # its mean, where all tensors do and no two show it by themselves
_ROUNDS = 2  # in which a direction is made sharper
_BETTER = 1.1  # so many times as many tensors have to be named by directions of their layers


@dataclass(frozen=True)
class Measured:
    """One tensor along a shared direction.

    Attributes:
        cosine: of its own first left vector with it.
        scale: signed.
        fit: squared cosine of what changed along it with what was there.
        lost: it lost the direction.
    """

    cosine: float
    scale: float
    fit: float
    lost: bool


@dataclass(frozen=True)
class SharedDirections:
    """What tensors of one side share.

    Attributes:
        direction: float64 unit ``[d_model]`` of the stream.
        gains: behind the gains of norms.
        measured: every tensor along it, or along that of its layer.
        count: of directions.
        layers: directions of the layers, where those name more than the one of all.
    """

    direction: Tensor = field(repr=False)
    gains: bool
    measured: Mapping[str, Measured]
    count: int
    layers: Mapping[int | None, Tensor] = field(default_factory=dict, repr=False)

    def at_layer(self, layer: int | None) -> Tensor:
        """The direction at a decoder block."""
        return self.layers.get(layer, self.direction)


@dataclass(frozen=True)
class _Group:
    """Tensors that may share a direction, and the vectors among which it is looked for."""

    members: Mapping[str, TensorSummary]
    gains: bool
    basis: Tensor
    grams: dict[str, Grams]


def find_shared(
    pair: CheckpointPair, found: Mapping[str, TensorSummary], side: str
) -> SharedDirections | None:
    """The directions that differences of one side have in common, behind gains or without.

    Args:
        pair: the two checkpoints.
        found: every tensor's difference; those that differ are read again.
        side: ``writer`` or ``reader``.
    """
    members = {
        n: s
        for n, s in found.items()
        if s.place.side == side and s.vectors is not None and s.columns >= COLUMNS
    }
    every = _groups(pair, members, side)
    by_layer: dict[int | None, list[_Group]] = {}
    hidden = any(s.own is None or not s.own.whole for s in members.values())
    if hidden:  # else each tensor tells its direction itself
        for layer in sorted({s.place.layer for s in members.values() if s.place.layer is not None}):
            inside = {n: s for n, s in members.items() if s.place.layer == layer}
            by_layer[layer] = _groups(pair, inside, side) if len(inside) > 1 else []
    for name, one in members.items():  # read again: all of them would not fit in memory
        before, delta = _changed(pair, one)
        for group in (*every, *by_layer.get(one.place.layer, ())):
            here = pair.at(one.place, group.basis, group.gains)
            group.grams[name] = Grams.of(before, delta, here)
    best = _best(pair, every)
    whole = best if best is None or not hidden else _sharpened(pair, members, best)
    layers = {
        layer: _sharpened(pair, {n: members[n] for n in groups[0].members}, found_here)
        for layer, groups in by_layer.items()
        if (
            found_here := _best(
                pair, [g for g in groups if whole is None or g.gains == whole.gains]
            )
        )
    }
    if whole is not None and not _is_clear(whole):
        whole = None
    clear = {layer: one for layer, one in layers.items() if _is_clear(one)}
    if 2 * len(clear) < len(layers):  # training does as much in a layer or two
        layers = clear
    named = sum(m.lost for one in layers.values() for m in one.measured.values())
    if not layers or (whole is not None and named < _BETTER * _named(whole)):
        return whole
    first = max(layers.values(), key=_named)
    measured = dict(whole.measured) if whole is not None else {}
    for of_layer in layers.values():
        measured |= of_layer.measured
    direction = first.direction if whole is None else whole.direction
    own = {layer: one.direction for layer, one in layers.items()}
    return SharedDirections(direction, first.gains, measured, 1, own)


def _sharpened(
    pair: CheckpointPair, members: Mapping[str, TensorSummary], found: SharedDirections
) -> SharedDirections:
    """The same direction, known better, and every tensor along it.

    The first left vectors of what differs hold only a part of it where other changes are larger,
    and along a tilted direction too little seems lost. Of ``D = -s u (u^T W) + N`` the product
    ``D W^T u`` is ``u`` again but for ``N W^T u``, which averages out over columns and tensors.
    """
    best, scales = found, None
    for _ in range(_ROUNDS):
        direction = _turned(pair, members, best)
        if direction is None:
            break
        group, scales_here = _read_along(pair, members, direction, best.gains)
        measured = _measure(pair, group, torch.ones(1, dtype=torch.float64))
        sharper = SharedDirections(direction, best.gains, measured, best.count)
        if _score(sharper) < _score(best):
            break
        best, scales = sharper, scales_here
    if scales is None:
        scales = _read_along(pair, members, best.direction, best.gains)[1]
    measured = {n: replace(m, scale=scales[n]) if m.lost else m for n, m in best.measured.items()}
    return replace(best, measured=measured)


def _read_along(
    pair: CheckpointPair, members: Mapping[str, TensorSummary], direction: Tensor, gains: bool
) -> tuple[_Group, dict[str, float]]:
    """All tensors along one direction, and the scale of each beside what else changed in it."""
    group = _Group(members, gains, direction.unsqueeze(1), {})
    scales = {}
    for name, one in members.items():
        assert one.vectors is not None
        before, delta = _changed(pair, one)
        here = pair.at(one.place, group.basis, gains)
        group.grams[name] = Grams.of(before, delta, here)
        scales[name] = scale_beside(before, delta, here[:, 0], one.vectors.double())
    return group, scales


def _turned(
    pair: CheckpointPair, members: Mapping[str, TensorSummary], found: SharedDirections
) -> Tensor | None:
    """``D W^T u`` of the tensors that lost a direction, as one of the stream; None if none tells.

    Channel by channel the least squares of all tensors behind their gains, each weighted by how
    much else changed in it.
    """
    total = torch.zeros(pair.d_model, dtype=torch.float64)
    weights = torch.zeros_like(total)
    ones = torch.ones(pair.d_model, 1, dtype=torch.float64)
    for name, one in members.items():
        if not found.measured[name].lost or not _is_diagonal(one, found.gains):
            continue
        before, delta = _changed(pair, one)
        factors = pair.at(one.place, ones, found.gains)[:, 0]
        here = factors * found.direction
        had = here @ before
        length, energy = float(here @ here), float(had @ had)
        if energy == 0:
            continue
        lost = delta @ had * (length / energy)  # -s times ``here``, and what averages out
        changed = float(delta.square().sum())
        along = float((here @ delta).square().sum()) / length
        other = max(changed - along, 1e-6 * changed)
        weight = len(had) * energy / (other * length**2)
        total += weight * factors * lost
        weights += weight * factors.square()
    if not bool((weights > 0).any()):
        return None
    known = weights > 1e-6 * weights.max()
    turned = torch.where(known, total / torch.where(known, weights, ones[:, 0]), 0.0 * total)
    return turned / turned.norm() * sign_of(turned) if bool(turned.any()) else None


def _is_diagonal(one: TensorSummary, gains: bool) -> bool:
    """Between the tensor and the stream stand factors of the channels alone."""
    part = one.place.part
    if part is None:
        return True
    if part.channels is not None:
        return False
    return not gains or (len(part.ways) == 1 and not any(g.centred for g in part.ways[0]))


def _changed(pair: CheckpointPair, one: TensorSummary) -> tuple[Tensor, Tensor]:
    """The columns of a tensor that changed, and their change."""
    before, delta = pair.sample(one.place.edit)
    held = (delta != 0).any(dim=0)
    return (before, delta) if bool(held.all()) else (before[:, held], delta[:, held])


def _is_clear(one: SharedDirections) -> bool:
    """Two tensors show the direction by themselves, or all of a few do together."""
    fits = [m.fit for m in one.measured.values() if m.lost]
    return sum(fit >= FIT for fit in fits) >= 2 or sum(fits) >= _TOGETHER * max(1, len(fits))


def _score(one: SharedDirections) -> float:
    return sum(m.fit for m in one.measured.values() if m.lost)


def _named(one: SharedDirections) -> int:
    return sum(m.lost for m in one.measured.values())


def _groups(pair: CheckpointPair, members: Mapping[str, TensorSummary], side: str) -> list[_Group]:
    ways = (True, False) if side == "writer" and pair.has_gains else (True,)
    groups = []
    for gains in ways:
        basis = _common(pair, members, gains)
        if basis is not None:
            groups.append(_Group(members, gains, basis, {}))
    return groups


def _best(pair: CheckpointPair, groups: Sequence[_Group]) -> SharedDirections | None:
    """The direction that most tensors lost, of all that are tried."""
    best: tuple[float, _Group, Tensor, Tensor, dict[str, Measured]] | None = None
    for group in groups:
        tried = pooled_directions(list(group.grams.values()))[:, :_TRIED]
        first = torch.eye(group.basis.shape[1], dtype=group.basis.dtype)[:, :1]
        for inside in torch.cat([first, tried], dim=1).T:
            if few_channels((group.basis @ inside).unsqueeze(1)):
                continue
            measured = _measure(pair, group, inside)
            score = sum(m.fit for m in measured.values() if m.lost)
            if score > 0 and (best is None or score > best[0]):
                best = score, group, inside, tried, measured
    if best is None:
        return None
    _, group, inside, tried, measured = best
    hits = sum(m.lost for m in measured.values())
    others = [
        c
        for c in tried.T
        if abs(float(c @ inside)) < 0.3 and not few_channels((group.basis @ c).unsqueeze(1))
    ]
    more = sum(2 * sum(m.lost for m in _measure(pair, group, c).values()) > hits for c in others)
    direction = group.basis @ inside
    unit = direction / direction.norm()
    return SharedDirections(unit * sign_of(unit), group.gains, measured, 1 + more)


def _measure(pair: CheckpointPair, group: _Group, inside: Tensor) -> dict[str, Measured]:
    """Every tensor along ``B c``; what two or more show clearly, the others may show less so."""
    direction = (group.basis @ inside).unsqueeze(1)
    along = {
        n: _along(pair, group.members[n], g, direction, inside, group.gains)
        for n, g in group.grams.items()
    }
    sure = [n for n, m in along.items() if m.lost and m.fit >= FIT]
    vouched = sum(m.lost for m in along.values())
    if len(sure) >= 2 or (len(group.members) == vouched > 1):
        return along
    sure = [n for n in sure if group.grams[n].shows_alone(along[n].fit, inside)]
    return {
        n: m if n in sure else Measured(m.cosine, m.scale, m.fit, False) for n, m in along.items()
    }


def _along(
    pair: CheckpointPair,
    one: TensorSummary,
    grams: Grams,
    direction: Tensor,
    inside: Tensor,
    gains: bool,
) -> Measured:
    assert one.vectors is not None
    here = pair.at(one.place, direction, gains)[:, 0]
    length = float(here.norm())
    cosine = abs(float(here @ one.vectors[:, 0].double())) / length if length > 0 else 0.0
    cosine = round(cosine, 9)  # a matrix product's last digits are another's each time
    scale, fit = grams.along(inside)
    lost = (fit >= FIT and cosine**2 >= SAME) or (fit >= _VOUCHED and abs(scale) >= CLEAR)
    return Measured(cosine, scale, fit, lost and grams.beyond_decay(scale, inside))


def _common(
    pair: CheckpointPair, members: Mapping[str, TensorSummary], gains: bool
) -> Tensor | None:
    """Orthonormal ``[d_model, few]`` of the stream that the first left vectors span together."""
    stack: list[Tensor] = []
    width = 0
    for one in members.values():
        assert one.vectors is not None
        assert one.shares is not None
        back = pair.back(one.place, one.vectors.double(), gains)
        if back is None or len(back) != pair.d_model:
            continue
        # Plain tensors tell the direction best: gains are divided by.
        weight = 0.1 if gains and one.place.has_gains else 1.0
        stack.append(back / back.norm(dim=0).clamp(min=1e-300) * one.shares * weight)
        width += back.shape[1]
        if width > 4 * pair.d_model:  # no more of them than tell the same
            stack, width = [_squeezed(stack)], 0
    if not stack:
        return None
    squeezed = _squeezed(stack)
    basis: Tensor = squeezed / squeezed.norm(dim=0)
    return basis


def _squeezed(stack: Sequence[Tensor]) -> Tensor:
    left, values, _ = torch.linalg.svd(torch.cat(list(stack), dim=1), full_matrices=False)
    held = values > 1e-9 * values[0]
    squeezed: Tensor = (left * values)[:, held][:, :_KEPT]
    return squeezed
