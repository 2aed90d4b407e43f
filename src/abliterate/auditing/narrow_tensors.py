"""Biases, routers of few experts and the like: too narrow to show a direction of their own.

What changed along the directions of its layer alone, and in proportion, goes with the others. Of
one column the proportion is no evidence, and the scale ``-(r . D) / (r . b)`` is as good as ``r``
is known: where ``b`` lies almost across ``r``, a small tilt makes it any number. So it is told only
where its error is small, judged by how far the change lies beside the directions and how far those
of the matrices that name them lie apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from abliterate.auditing.checkpoint_pairs import CheckpointPair, Place
from abliterate.auditing.edit_form import EditForm, ProjectedMatrix
from abliterate.auditing.grams import FIT
from abliterate.auditing.projections import COLUMNS, SAME
from abliterate.auditing.tensor_diff import TensorDiff, TensorSummary

#: Largest error of a scale that is told.
_NEAR = 0.05
# Errors as large as so many times the usual one are allowed for; fewer where the scale is the same
# along the change itself, up to that.
_SAFE, _AGREED, _AGREE = 3.0, 2.0, 0.02


def with_narrow(
    pair: CheckpointPair,
    found: Mapping[str, TensorSummary],
    tensors: Sequence[TensorDiff],
    form: EditForm,
    matrices: Sequence[ProjectedMatrix],
) -> list[TensorDiff]:
    """All differences, with those of narrow tensors completed.

    Args:
        pair: the two checkpoints.
        found: every tensor's difference, before it was known what it shares with others.
        tensors: the differences.
        form: of the edit.
        matrices: those that were projected.
    """
    measured = {
        t.name: along
        for t in tensors
        if (along := _measured(pair, found[t.name], t, form)) is not None
    }
    tilts = _tilts(pair, form, matrices)
    for name, along in measured.items():  # each holds the tilt and what else changed in it
        layer = _layer(form, found[name].place)
        if along.lost:
            tilts[layer] = min(tilts.get(layer, 1.0), along.off)
    finished = []
    for one in tensors:
        along = measured.get(one.name)
        if along is not None:
            told = along.lost and along.is_told(tilts[_layer(form, found[one.name].place)])
            one = replace(
                one,
                cosine=along.share**0.5,
                scale=along.scale if told else None,
                fit=along.fit,
                projected=along.lost,
                directions=along.count * along.lost,
            )
        finished.append(one)
    return finished


def _measured(
    pair: CheckpointPair, one: TensorSummary, diff: TensorDiff, form: EditForm
) -> _Along | None:
    """A narrow tensor along the directions of its layer; None of others, and where none are."""
    place = one.place
    narrow = place.side == "bias" or (
        place.side in ("writer", "reader") and 0 < one.columns < COLUMNS
    )
    if not narrow or diff.projected or diff.state in ("unchanged", "recast", "reshaped"):
        return None
    basis = form.basis_at(place.layer)
    if basis is None or (form.side != "writer" and place.side != "reader"):
        return None
    before, delta = pair.sample(place.edit)
    here = pair.at(place, basis, form.gains)
    if not bool(here.any(dim=0).all()) or not bool(delta.any()):
        return None
    return _Along.of(before, delta, torch.linalg.qr(here)[0])


def _layer(form: EditForm, place: Place) -> int | None:
    """Where directions are those of a place; None where they are the same everywhere."""
    return place.layer if form.by_layer else None


@dataclass(frozen=True)
class _Along:
    """A narrow tensor along the directions of its layer.

    Attributes:
        share: of the change's energy that lies along them.
        fit: squared cosine of that with what was there.
        scale: along them.
        own_scale: the same if the change were a projection by itself, ``-|D|^2 / <D, W>``.
        across: how many times as large as its part along them the tensor is.
        count: of the directions.
        beside: how many there are besides.
        values: along all of them.
    """

    share: float
    fit: float
    scale: float
    own_scale: float
    across: float
    count: int
    beside: int
    values: int

    @classmethod
    def of(cls, before: Tensor, delta: Tensor, basis: Tensor) -> _Along:
        """Of ``[d_model, m]`` and its change, along orthonormal ``[d_model, k]``."""
        lost, had = basis.T @ delta, basis.T @ before
        both, cross = float((lost * had).sum()), float((delta * before).sum())
        lost_energy, had_energy = float(lost.square().sum()), float(had.square().sum())
        changed, energy = float(delta.square().sum()), float(before.square().sum())
        return cls(
            share=lost_energy / changed,
            fit=both**2 / (lost_energy * had_energy) if lost_energy and had_energy else 0.0,
            scale=-both / had_energy if had_energy else 0.0,
            own_scale=-changed / cross if cross else 0.0,
            across=(energy / had_energy) ** 0.5 if had_energy else float("inf"),
            count=basis.shape[1],
            beside=max(1, len(basis) - basis.shape[1]),
            values=had.numel(),
        )

    @property
    def lost(self) -> bool:
        """It lost them."""
        return self.share >= SAME and self.fit >= FIT

    @property
    def off(self) -> float:
        """Sine of the angle of the change with them."""
        return math.sqrt(max(0.0, 1 - self.share))

    def is_told(self, tilt: float) -> bool:
        """Whether the scale is known.

        What lies beside the directions, of the change or of the directions themselves, is one of
        many and has its usual part in each: of a unit vector ``1 / sqrt(d)``. What is not in
        proportion tells the standard error of the regression, where there is more than one value.

        Args:
            tilt: sine of the angle by which the directions may be off.
        """
        turned = tilt * self.across
        uneven = max(0.0, 1 / self.fit - 1) / max(1, self.values - 1)
        usual = abs(self.scale) * math.sqrt((self.off**2 + turned**2) / self.beside + uneven)
        agreed = abs(self.scale - self.own_scale) <= _AGREE
        return (_AGREED if agreed else _SAFE) * usual <= _NEAR


def _tilts(
    pair: CheckpointPair, form: EditForm, matrices: Sequence[ProjectedMatrix]
) -> dict[int | None, float]:
    """Sines of the angles of matrices' own directions with those of their layer, the median.

    Those are means of several, and so nearer to the truth than each of these. Missing where less
    than two matrices show theirs alone, or most do not; of one direction for all it is at None.
    """
    angles: dict[int | None, list[float]] = {}
    counts: Counter[int | None] = Counter()
    for one in matrices:
        basis = form.basis_at(one.place.layer)
        if one.place.side != form.side or basis is None:
            continue
        layer = _layer(form, one.place)
        counts[layer] += 1
        if one.whole and one.basis.shape[1] == basis.shape[1]:
            here = torch.linalg.qr(pair.at(one.place, basis, form.gains))[0]
            cosine = float(torch.linalg.svdvals(here.T @ one.basis)[-1])
            angles.setdefault(layer, []).append(max(0.0, 1 - cosine**2) ** 0.5)
    return {
        layer: median(found)
        for layer, found in angles.items()
        if len(found) > 1 and 2 * len(found) > counts[layer]
    }
