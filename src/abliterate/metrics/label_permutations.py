"""How far two kinds of vectors lie apart along a direction, and how far chance alone sets them.

In d dimensions n vectors with random labels lie apart along their own difference of means as well:
an AUC of 1 is nothing where d is large and n is not. What labels mean shows against the same with
the labels dealt out anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
# Numbers that are sorted at once.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Separation:
    """How two kinds of numbers lie apart, each of the attributes ``[rows]``.

    Attributes:
        auc: the chance that one of the first kind is larger than one of the second, ties a half.
        silhouette: mean silhouette of the numbers, -1 to 1.
    """

    auc: Array
    silhouette: Array


def separation(values: Array, first: Flags) -> Separation:
    """AUC and silhouette of numbers of two kinds.

    Args:
        values: ``[rows, n]``.
        first: which of them are of the first kind, ``[rows, n]``; at least two of either kind.
    """
    order = np.argsort(values, axis=1, kind="stable")
    sorted_values = np.take_along_axis(values, order, 1)
    is_first = np.take_along_axis(first, order, 1)
    return Separation(_auc(sorted_values, is_first), _silhouette(sorted_values, is_first))


def _auc(values: Array, first: Flags) -> Array:
    """Of sorted ``values``: mean ranks, equal ones sharing theirs, of the first kind."""
    n = values.shape[1]
    places = np.arange(n)
    starts = np.concatenate(
        [np.ones((len(values), 1), bool), values[:, 1:] != values[:, :-1]], axis=1
    )
    ends = np.concatenate([starts[:, 1:], np.ones((len(values), 1), bool)], axis=1)
    low = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    high = np.minimum.accumulate(np.where(ends, places, n - 1)[:, ::-1], axis=1)[:, ::-1]
    ranks = (low + high) / 2 + 1
    count = first.sum(1)
    above = (ranks * first).sum(1) - count * (count + 1) / 2
    found: Array = above / (count * (n - count))
    return found


def _silhouette(values: Array, first: Flags) -> Array:
    """Of sorted ``values``, with sums instead of all pairs."""
    centred = values - values.mean(1, keepdims=True)
    sums = []
    for kind in (first, ~first):
        count, total = kind.cumsum(1), (centred * kind).cumsum(1)
        below = centred * count - total
        above = (total[:, -1:] - total) - centred * (count[:, -1:] - count)
        sums.append((below + above, count[:, -1:]))
    (to_first, n_first), (to_second, n_second) = sums
    own = np.where(first, to_first / (n_first - 1), to_second / (n_second - 1))
    other = np.where(first, to_second / n_second, to_first / n_first)
    larger = np.maximum(own, other)
    scores = np.where(larger > 0, (other - own) / np.where(larger > 0, larger, 1), 0.0)
    found: Array = scores.mean(1)
    return found


def permutation_null(first: Array, second: Array, seed: int, count: int) -> dict[str, Any]:
    """Separation along the own difference of means, against that with the labels dealt out anew.

    Args:
        first: ``[n_first, d]``.
        second: ``[n_second, d]``; at least two of either.
        seed: of the permutations.
        count: how many.

    Returns:
        For ``auc``, ``silhouette`` and ``norm`` (the length of the difference of means) the
        ``mean`` and ``q95`` of the permutations, and ``p``: the share of labellings, the true one
        counted among them, that do as well.
    """
    points = np.concatenate([first, second])
    points = points - points.mean(0)
    # What follows needs the vectors' products alone: one table, however wide they are.
    products = points @ points.T
    n, n_first = len(points), len(first)
    rng = np.random.default_rng(seed)
    true = np.arange(n)[None] < n_first
    figures: list[dict[str, Array]] = [_along_means(products, true)]
    at_once = max(1, _CHUNK // n)
    for start in range(0, count, at_once):
        drawn = np.repeat(true, min(at_once, count - start), axis=0)
        figures.append(_along_means(products, rng.permuted(drawn, axis=1)))
    found = {}
    for name in figures[0]:
        real, *parts = (part[name] for part in figures)
        null = np.concatenate(parts)
        # Rounding must not tell a labelling from its like.
        as_good = null >= real[0] - 1e-12 * max(1.0, abs(float(real[0])))
        found[name] = {
            "mean": float(null.mean()),
            "q95": float(np.quantile(null, 0.95)),
            "p": float((1 + as_good.sum()) / (1 + count)),
        }
    return found


def _along_means(products: Array, first: Flags) -> dict[str, Array]:
    """Of labellings ``[rows, n]``: separation along each one's difference of means; its norm."""
    weights = first / first.sum(1, keepdims=True) - ~first / (~first).sum(1, keepdims=True)
    along = weights @ products
    held = separation(along, first)
    norms = np.sqrt(np.maximum((along * weights).sum(1), 0.0))
    return {"auc": held.auc, "silhouette": held.silhouette, "norm": norms}
