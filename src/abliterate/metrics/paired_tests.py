"""Exact tests of paired differences, and Holm's correction where there are many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

# Beyond so many differences the distribution of the signed ranks is taken as normal.
_EXACT = 200


def mcnemar(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Exact two-sided McNemar test that two shares, seen on the same prompts, are the same.

    Of the prompts that changed, as many go either way by chance: binomial with one half, twice the
    smaller tail, at most 1.

    Args:
        pairs: for each prompt what the first and what the second counts.

    Returns:
        The p-value; 1 if no prompt changed.
    """
    gained = sum(one and not other for one, other in pairs)
    lost = sum(other and not one for one, other in pairs)
    n, least = gained + lost, min(gained, lost)
    tail: int = sum(math.comb(n, k) for k in range(least + 1))
    return min(1.0, float(2 * tail / 2**n))


def signed_rank(differences: Sequence[float]) -> float:
    """Two-sided Wilcoxon signed-rank test that paired differences lie evenly about zero.

    Differences of zero are left out, equal sizes share the mean of their ranks, and the p-value is
    twice the smaller tail of all the ways in which signs can fall on these ranks (exact, ties
    included; beyond 200 differences normal, with the ties' variance).

    Args:
        differences: one per prompt.

    Returns:
        The p-value; 1 if all are zero, NaN if one is none.
    """
    if any(math.isnan(value) for value in differences):
        return math.nan
    held = sorted((value for value in differences if value != 0), key=abs)
    if not held:
        return 1.0
    ranks: list[int] = []  # twice the ranks, so that means of two are whole
    for _, group in groupby(held, key=abs):
        size, first = len(list(group)), len(ranks) + 1
        ranks += [2 * first + size - 1] * size
    above = sum(rank for rank, value in zip(ranks, held, strict=True) if value > 0)
    least = min(above, sum(ranks) - above)
    if len(ranks) > _EXACT:
        deviation = math.sqrt(sum(rank * rank for rank in ranks) / 4)
        return min(1.0, math.erfc((sum(ranks) / 2 - least) / deviation / math.sqrt(2)))
    return min(1.0, 2 * _tails(tuple(ranks))[least])


@lru_cache(maxsize=256)
def _tails(ranks: tuple[int, ...]) -> list[float]:
    """Of each sum, the chance that ranks which get a sign by a fair coin sum to at most that."""
    import numpy as np

    chances = np.zeros(sum(ranks) + 1)
    chances[0] = 1.0
    for rank in ranks:
        shifted = np.zeros_like(chances)
        shifted[rank:] = chances[: len(chances) - rank]
        chances = (chances + shifted) / 2
    return [float(tail) for tail in chances.cumsum()]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down rule, in the order given.

    The smallest is multiplied by how many there are, the next by one less, and so on; none falls
    below one before it, and none exceeds 1. Of those that are at most a level, all are false with
    no more than that chance, whatever the tests have to do with each other.
    """
    corrected, so_far = [1.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for done, index in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - done) * p_values[index]))
        corrected[index] = so_far
    return corrected
