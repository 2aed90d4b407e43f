"""Are there directions that the writers avoid together, far beyond what chance explains?

Each writer has directions of little energy, in places of its own. The mean over writers of their
emptiness ``K = t (G + t)^-1`` levels those out (its bulk narrows as ``1 / sqrt(n)``), while an edit
``A <- (I - s r r^T) A`` raises ``r^T K r`` from ``c`` to ``c / (c + (1 - s)^2 (1 - c))``, whatever
the spectra are. So the test asks whether the largest eigenvalue of the mean stands apart from the
ones below it, and whether two disjoint halves of the writers name the same direction. An edit of
``k`` directions raises ``k`` eigenvalues alike, so that the gap lies below the ``k``-th. What the
probabilities rest on is in docs/audit.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.auditing.soft_null_space import upper_edge

_WITHIN = 8  # spacings below the largest that its distance is compared with
# Largest of a Gaussian orthogonal ensemble: P(ratio > 0.5) = 0.04, P(ratio > 1) = 7e-5 (measured on
# 30,000 each of width 64 to 1000); its tail falls faster than this exponential through both.
_TAIL_START, _TAIL_RATE, _TAIL_AT_START = 0.5, 12.0, 0.04
# That is the null of writers whose eigenbases are independent. It fails where they are shared, as
# in nearly every group of the real pretrained models that were measured: there 8 of 33 ratios
# exceed 0.5, by 0.2 in the mean (the largest is 1.12), and an exponential through them falls less
# than half as fast. Behind what was measured it is taken to fall as the other.
_SHARED_RATE, _SHARED_AT_START, _SHARED_UNTIL = 5.0, 0.25, 1.5
# How many directions beside the candidate tell of it, and from which excess over chance on: random
# halves have 1 (and 0.2 of spread), models trained for minutes up to 1.9, real ones 1.7 to 67.
_BESIDE, _MOST_SHARED = 8, 3.0
LEAST_WIDTH = 4 * _WITHIN
#: Directions at once that are looked for, at most.
MOST = 5
# So many times the p-value of several: all numbers of directions together cost 4% of the level.
_SEVERAL = 100
_ROUNDING = 1e-4


@dataclass(frozen=True)
class SoftNullProjector:
    """Where a writer has little energy: ``matrix + vectors diag(signs) vectors^T``.

    Attributes:
        matrix: ``[d, d]``, symmetric, eigenvalues in 0 ... 1.
        vectors: ``[d, m]``, changes to it that need no new inverse.
        signs: ``[m]``.
    """

    matrix: Tensor = field(repr=False)
    vectors: Tensor = field(repr=False)
    signs: Tensor = field(repr=False)

    def times(self, columns: Tensor) -> Tensor:
        """``K x`` for columns ``[d, m]``, on the matrix's device."""
        here = columns.to(self.vectors)
        changes = self.vectors @ (self.signs.unsqueeze(1) * (self.vectors.T @ here))
        out: Tensor = self.matrix.to(here.dtype) @ here + changes
        return out

    def along(self, direction: Tensor) -> float:
        """``r^T K r``."""
        column = direction.unsqueeze(1)
        return float((column.to(self.vectors) * self.times(column)).sum())

    def add_to(self, total: Tensor) -> None:
        """``total += K``."""
        total.add_(self.matrix.to(total.dtype))  # slow between dtypes
        if len(self.signs):
            total.addmm_((self.vectors * self.signs).to(total), self.vectors.T.to(total))

    def without(self, directions: Tensor) -> SoftNullProjector:
        """As if ``A`` ran in the complement of orthonormal columns ``[d, m]`` alone.

        That is the Schur complement of ``G + t``; along the columns themselves nothing is empty.
        """
        image = self.times(directions)
        inner = directions.to(image).T @ image
        inner = (inner + inner.T) / 2
        if self.matrix.dtype == torch.float16:
            # What is written thousands of times more strongly than most is lost in rounding.
            inner.diagonal().add_(_ROUNDING)
        factor = torch.linalg.cholesky(inner)
        vectors = torch.linalg.solve_triangular(factor, image.T, upper=False).T
        return self._changed(vectors, [-1.0] * vectors.shape[1])

    def edited(self, direction: Tensor, scale: float) -> SoftNullProjector:
        """After an edit ``A <- (I - s r r^T) A``, at the same shift.

        Args:
            direction: unit ``r``, ``[d]``.
            scale: ``s``.
        """
        unit = direction.to(self.vectors)
        image = self.times(unit.unsqueeze(1))[:, 0]
        along = float(unit @ image)
        kept = (1 - scale) ** 2 * (1 / along - 1)
        moved = (unit + (1 - scale) * (image / along - unit)) / math.sqrt(1 + kept)
        return self._changed(torch.stack([image / math.sqrt(along), moved], dim=1), [-1.0, 1.0])

    def _changed(self, vectors: Tensor, signs: Sequence[float]) -> SoftNullProjector:
        return SoftNullProjector(
            self.matrix,
            torch.cat([self.vectors, vectors], dim=1),
            torch.cat([self.signs, torch.tensor(signs).to(self.signs)]),
        )


def of_matrix(matrix: Tensor) -> SoftNullProjector:
    """An emptiness without changes; products with it are float32 at least."""
    dtype = torch.float32 if matrix.dtype == torch.float16 else matrix.dtype
    nothing = torch.zeros(len(matrix), 0, dtype=dtype, device=matrix.device)
    return SoftNullProjector(matrix, nothing, nothing[0])


@dataclass(frozen=True)
class Gap:
    """How a group of units stands at the upper edge of its mean emptiness.

    Attributes:
        ratio: distance of the last of the directions' eigenvalues from the next, over the spread
            of those below.
        distance: that distance itself, in units of emptiness.
        agreement: least squared cosine of the principal angles between the directions that two
            disjoint halves of the units name.
        shared: how much more than by chance the two halves have in common among the directions
            that come next; 1 where their eigenbases are independent.
        p_gap: chance of such a ratio: at the edge of a random symmetric matrix, or among unedited
            pretrained models where the eigenbases are shared.
        p_agreement: chance of such a cosine between random directions; trained writers share more
            than chance, so it can speak against a direction and never for one.
        directions: the emptiest ones, orthonormal, ``[width, k]``.
    """

    ratio: float
    distance: float
    agreement: float
    shared: float
    p_gap: float
    p_agreement: float
    directions: Tensor = field(repr=False)

    @property
    def count(self) -> int:
        """How many directions stand apart."""
        return self.directions.shape[1]

    @property
    def p_value(self) -> float:
        """That of the gap, unless the halves do not agree; several directions cost more."""
        p_value = max(self.p_gap, self.p_agreement)
        return p_value if self.count == 1 else min(1.0, _SEVERAL * p_value)


def gap(units: Sequence[SoftNullProjector], halves: Sequence[bool]) -> Gap:
    """Test a group of units for one direction, and for several.

    Args:
        units: their emptiness.
        halves: which half each belongs to.

    Returns:
        The number of directions with the smallest p-value; of equals, the fewest.
    """
    sums, ends = [], []
    for half, members in _by_half(units, halves):
        sums.append(_sum(members))
        ends.append(_end(sums[-1], half))
    total = sums[0]
    if len(sums) == 2:
        total += sums[1]
    del sums
    values, vectors = _edge(total, len(units))
    return _judged(values, vectors, ends)


def claims(units: Sequence[SoftNullProjector], halves: Sequence[bool], level: float) -> bool:
    """Whether the p-value of :func:`gap` is at most ``level``, often for a third of the work.

    No p-value is below that of its gap by the kinder of the two nulls, so that where all those are
    larger the halves need not be looked at.
    """
    values, vectors = _edge(_sum(units), len(units))
    kindest = []
    for count in range(1, MOST + 1):
        ratio = _ratio(values, count)[0]
        least = min(_p_gap(ratio, shared) for shared in (False, True))
        kindest.append(least if count == 1 else _SEVERAL * least)
    if min(kindest) > level:
        return False
    ends = [_end(_sum(members), half) for half, members in _by_half(units, halves)]
    return _judged(values, vectors, ends).p_value <= level


def _by_half(
    units: Sequence[SoftNullProjector], halves: Sequence[bool]
) -> list[tuple[bool, list[SoftNullProjector]]]:
    """The units of each half that has any."""
    split = [
        (half, [one for one, which in zip(units, halves, strict=True) if which is half])
        for half in (False, True)
    ]
    return [(half, members) for half, members in split if members]


def _end(matrix: Tensor, half: bool) -> Tensor:
    """What a half of the units names, ``[width, k]``."""
    return upper_edge(matrix, MOST + _BESIDE, 1 + half, kept=MOST + _BESIDE)[1]


def _edge(total: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """The uppermost eigenvalues of the mean over units, and the first vectors."""
    values, vectors = upper_edge(total, _WITHIN + MOST + 1, 0, kept=MOST)
    return values / units, vectors


def _ratio(values: Tensor, count: int) -> tuple[float, float]:
    """How far the first eigenvalues stand apart, over the spread below; and the distance."""
    within = min(_WITHIN, len(values) - 1 - count)
    distance = float(values[count - 1] - values[count])
    spread = float(values[count] - values[count + within])
    return distance / spread if spread > 0 else 0.0, distance


def _judged(values: Tensor, vectors: Tensor, ends: Sequence[Tensor]) -> Gap:
    """The number of directions with the smallest p-value, given the edge and the halves'."""
    found = []
    for count in range(1, MOST + 1):
        ratio, distance = _ratio(values, count)
        agreement = _agreement(ends, count) if len(ends) == 2 else 0.0
        shared = _shared(ends, vectors[:, :count]) if len(ends) == 2 else 1.0
        p_gap = _p_gap(ratio, shared > _MOST_SHARED)
        p_agree = p_agreement(agreement, len(vectors), count)
        found.append(Gap(ratio, distance, agreement, shared, p_gap, p_agree, vectors[:, :count]))
    return min(found, key=lambda one: one.p_value)


def _p_gap(ratio: float, shared: bool) -> float:
    beyond = ratio - _TAIL_START
    if not shared:
        return min(1.0, _TAIL_AT_START * math.exp(-_TAIL_RATE * beyond))
    far = max(0.0, ratio - _SHARED_UNTIL)
    return min(1.0, _SHARED_AT_START * math.exp(-_SHARED_RATE * (beyond - far) - _TAIL_RATE * far))


def _shared(ends: Sequence[Tensor], directions: Tensor) -> float:
    """The overlap of what two halves name beside the directions, in units of chance.

    Of two random subspaces of ``m`` dimensions the squared cosines add up to ``m^2 / d``.
    """
    width, count = directions.shape
    bases = []
    for end in ends:
        beside = end[:, : count + _BESIDE]
        beside = beside - directions @ (directions.T @ beside)
        bases.append(torch.linalg.svd(beside, full_matrices=False)[0][:, :_BESIDE])
    overlap = float((bases[0].T @ bases[1]).square().sum())
    return overlap * width / _BESIDE**2


def _agreement(ends: Sequence[Tensor], count: int) -> float:
    cosines = torch.linalg.svdvals(ends[0][:, :count].T @ ends[1][:, :count])
    return float(cosines[-1]) ** 2


def emptiest(units: Sequence[SoftNullProjector], count: int) -> Tensor:
    """The first directions of a group's mean, unit, float64 ``[d, count]`` on the CPU."""
    # One is wanted exactly; several are only known together.
    size = 1 if count == 1 else _WITHIN + count
    return upper_edge(_sum(units), size, 0, 1e-3, kept=count)[1]


def _sum(units: Sequence[SoftNullProjector]) -> Tensor:
    matrix = units[0].matrix
    total = torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device)
    for one in units:
        one.add_to(total)
    return total


def p_agreement(squared: float, width: int, count: int = 1) -> float:
    """Chance that two random subspaces have no smaller squared cosine than this; never 0.

    Between two directions it is Beta(1/2, (d - 1)/2); the bound ``(1 - c)^((d - 1)/2)`` holds for
    every c in [0, 1]. The least of k is no larger than the share of any direction of one subspace
    in the other, which is Beta(k/2, (d - k)/2), with the Chernoff bound of that.
    """
    c = min(squared, 1.0)
    if count == 1:
        return max(1e-300, float((1 - c) ** ((width - 1) / 2)))
    mean = count / width
    if c <= mean:
        return 1.0
    if c == 1.0:
        return 1e-300
    log = count * math.log(c / mean) + (width - count) * math.log((1 - c) / (1 - mean))
    return max(1e-300, math.exp(log / 2))
