"""Is there one direction that the writers avoid together, far beyond what chance explains?

Each writer's gram matrix ``G_w = A_w A_w^T`` has small eigenvalues of its own, in directions of its
own. The mean of the matrix logarithms ``L = mean_w log G_w`` levels those out (its bulk narrows as
``1 / sqrt(n)``), while an edit ``A <- (I - s r r^T) A`` moves ``r^T L r`` by ``2 log(1 - s)`` or
more whatever the spectra are. So the test asks whether the lowest eigenvalue of ``L`` stands apart
from the ones above it, and whether two disjoint halves of the writers name the same direction. What
the probabilities rest on is in docs/audit.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.audit.spectra import eigh, emptiest, lower_edge, lowest_vector

# Eigenvalues as multiples of the median: below the floor rounding, fine-tuning and FP8 speak; above
# the ceiling a few shared directions (the embeddings' mean) would drown the rest.
_FLOOR, _CEILING = 1e-3, 20.0
_WITHIN = 8  # spacings above the lowest that its distance is compared with
# Largest of a Gaussian orthogonal ensemble: P(ratio > 0.5) = 0.04, P(ratio > 1) = 7e-5 (measured on
# 30,000 each of width 64 to 1000); its tail falls faster than this exponential through both.
_TAIL_START, _TAIL_RATE, _TAIL_AT_START = 0.5, 12.0, 0.04
LEAST_WIDTH = 4 * _WITHIN


@dataclass(frozen=True)
class Gap:
    """How a group of units stands at the lower edge of its joint spectrum.

    Attributes:
        ratio: distance of the lowest eigenvalue from the next, over the spread of those above.
        distance: that distance itself, in units of log energy.
        agreement: squared cosine of the lowest directions of two disjoint halves of the units.
        p_gap: chance of such a ratio at the edge of a random symmetric matrix.
        p_agreement: chance of such a cosine between random directions.
        direction: the lowest direction, unit, ``[width]``.
    """

    ratio: float
    distance: float
    agreement: float
    p_gap: float
    p_agreement: float
    direction: Tensor

    @property
    def p_value(self) -> float:
        """The larger of the two: both have to be beyond chance."""
        return max(self.p_gap, self.p_agreement)


def log_gram(gram: Tensor) -> Tensor:
    """``log(G / median eigenvalue)``, clipped, as a symmetric matrix.

    Args:
        gram: ``[d, d]``, positive semidefinite.
    """
    values, vectors = eigh(gram, _FLOOR)
    present = values[values > 1e-9 * values[-1]]
    if not len(present):
        return torch.zeros_like(gram)
    logs = torch.log((values / present.median()).clamp(_FLOOR, _CEILING))
    out: Tensor = (vectors * logs) @ vectors.T
    return out


def gap(logs: Sequence[Tensor], halves: Sequence[bool]) -> Gap:
    """Test a group of units.

    Args:
        logs: their ``log_gram``, ``[d, d]`` each.
        halves: which half each belongs to.
    """
    values, lowest = lower_edge(_mean(logs), 0)
    within = min(_WITHIN, len(values) - 2)
    distance = float(values[1] - values[0])
    spread = float(values[within + 1] - values[1])
    ratio = distance / spread if spread > 0 else 0.0
    ends = []
    for half in (False, True):
        own = [one for one, which in zip(logs, halves, strict=True) if which is half]
        if not own:
            break
        ends.append(lowest_vector(_mean(own), 1 + half))
    agreement = float(ends[0] @ ends[1]) ** 2 if len(ends) == 2 else 0.0
    p_gap = min(1.0, _TAIL_AT_START * math.exp(-_TAIL_RATE * (ratio - _TAIL_START)))
    return Gap(ratio, distance, agreement, p_gap, p_agreement(agreement, len(values)), lowest)


def _mean(logs: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(logs[0])
    for one in logs:
        total += one
    return total / len(logs)


def p_agreement(squared: float, width: int) -> float:
    """Chance that two random directions have a squared cosine of at least this.

    It is Beta(1/2, (d - 1)/2); the bound ``(1 - c)^((d - 1)/2)`` holds for every c in [0, 1].
    """
    return float((1 - min(squared, 1.0)) ** ((width - 1) / 2))


def energy_along(gram: Tensor, direction: Tensor) -> float:
    """``r^T G r``, for a direction on the CPU."""
    here = direction.to(gram)
    return float(here @ (gram @ here))


def edited(grams: Sequence[Tensor], direction: Tensor, scale: float) -> list[Tensor]:
    """Grams after an edit ``A <- (I - s r r^T) A``: what a planted edit would look like.

    Args:
        grams: ``[d, d]``.
        direction: unit ``r``, ``[d]``.
        scale: ``s``.
    """
    planted = []
    direction = direction.to(grams[0])
    for gram in grams:
        left = gram - scale * torch.outer(direction, direction @ gram)
        planted.append(left - scale * torch.outer(left @ direction, direction))
    return planted


def emptied(log: Tensor, direction: Tensor) -> Tensor:
    """A ``log_gram`` after a whole edit, to first order: what ``edited`` gives without another
    eigendecomposition.

    Args:
        log: ``[d, d]``.
        direction: unit, ``[d]``.
    """
    here = direction.to(log)
    left = log - torch.outer(here, here @ log)
    left -= torch.outer(left @ here, here)
    out: Tensor = left + math.log(_FLOOR) * torch.outer(here, here)
    return out


def refine(
    grams: Sequence[Tensor], start: Tensor, weights: Sequence[float], steps: int = 8
) -> Tensor:
    """The direction that minimises ``sum_w log(q_w(v) + floor)``, from a start nearby.

    Majorise and minimise: the logarithm lies below its tangents, so each step's smallest
    eigenvector cannot do worse.

    Args:
        grams: of the units that carry the edit, ``[d, d]``.
        start: unit direction.
        weights: an energy for each that counts as typical.
        steps: how many at most.
    """
    current = start
    for _ in range(steps):
        total = torch.zeros_like(grams[0])
        for gram, weight in zip(grams, weights, strict=True):
            total += gram / (energy_along(gram, current) + weight * _FLOOR / 10)
        best = emptiest(total, current)
        if float(best @ start) ** 2 < 0.5:
            break  # it left for another minimum
        best = best * torch.sign(best @ start)
        moved, current = 1 - float(best @ current) ** 2, best
        if moved < 1e-12:
            break
    return current
