"""Did the biases lose a direction, or do they lie across it by chance?

The biases ``b_1 .. b_n`` are edited together or not at all, so the statistic is the median of their
shares ``d cos^2(r, b_i)``, each about one where ``r`` has nothing to do with them. Under that null
hypothesis ``r`` is uniform on the unit sphere of ``R^d``, whatever the biases are, and the median's
distribution follows from it exactly:

- ``cos^2`` of one bias is Beta(1/2, (d - 1)/2);
- of several, the biases' own angles matter: biases that share a large channel all lie across the
  same directions, and their median varies as much as a single share. With ``G`` the Gram matrix of
  the ``b_i / |b_i|``, of rank ``k`` and ``G = L L'`` (``L`` is ``[n, k]``), the cosines are
  ``L g / sqrt(|g|^2 + c)`` for ``g`` standard normal in ``k`` dimensions and ``c`` a chi-square of
  ``d - k`` degrees of freedom: ``g`` is ``r``'s part in the biases' span, ``c`` what is left of it.

So the median is drawn as often as asked, and the p-value ``(1 + number as low) / (draws + 1)`` is
valid as it stands: below 1/1000 in one of 1000 unedited models, however few biases there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 9_999
# The largest p-value that counts as an edit.
LEVEL = 1e-3
# Biases looked at: more would not change the verdict, and the draws cost their number squared.
MAX_VECTORS = 512
# Normal numbers held at once.
_CHUNK = 1 << 22


def median_share(cosines: Tensor, d_model: int) -> Tensor:
    """The (lower) median of ``d cos^2`` over the last axis of ``cosines [..., n]``."""
    return cosines.square().median(dim=-1).values * d_model


def p_value(vectors: Tensor, direction: Tensor, draws: int = DRAWS, seed: int = 0) -> float:
    """How often a random direction lies across the biases as much as this one does.

    Args:
        vectors: the biases, float64 ``[d_model, n]``, none of them zero.
        direction: unit, float64 ``[d_model]``.
        draws: of random directions.
        seed: of the draws.

    Returns:
        At least ``1 / (draws + 1)``.
    """
    d_model, count = vectors.shape
    units = vectors / vectors.norm(dim=0)
    observed = median_share(direction @ units, d_model)
    values, vectors_of_gram = torch.linalg.eigh(units.T @ units)
    held = values > values[-1] * 1e-12
    root = vectors_of_gram[:, held] * values[held].sqrt()
    rank = root.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rest = _chi_square(d_model - rank, draws, generator)
    lower, size = 0, max(1, _CHUNK // count)
    for start in range(0, draws, size):
        remaining = rest[start : start + size, None]
        inside = torch.randn(len(remaining), rank, generator=generator, dtype=torch.float64)
        length = (inside.square().sum(dim=1, keepdim=True) + remaining).sqrt()
        lower += int((median_share(inside @ root.T / length, d_model) <= observed).sum())
    return (1 + lower) / (draws + 1)


def _chi_square(degrees: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws of a chi-square, float64 ``[count]``; zero for no degree of freedom."""
    if degrees <= 0:
        return torch.zeros(count, dtype=torch.float64)
    shape = torch.full((count,), degrees / 2, dtype=torch.float64)
    drawn: Tensor = torch._standard_gamma(shape, generator=generator)  # type: ignore[attr-defined]
    return 2 * drawn
