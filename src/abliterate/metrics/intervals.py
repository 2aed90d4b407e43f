"""95% intervals: Wilson's of a share, Newcombe's of a paired difference, the bootstrap's of a mean.

A share of few prompts, or one of 0 or 1, is where resampling fails: it gives 0 of 120 the interval
0 to 0, and covers a true 1% in 65 of 100 experiments. Wilson's interval inverts the score test and
gives 0 to 3.1%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

RESAMPLES, CONFIDENCE = 2000, 0.95
# Indices drawn at once, so that memory does not grow with the number of values.
_CHUNK = 1 << 20
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of the share ``count / n``, without continuity correction.

    Args:
        count: how many of them, 0 to ``n``.
        n: how many there are, at least one.

    Returns:
        Lower and upper end; the share lies between them, and 0 and 1 are met exactly.
    """
    share, slack = count / n, _Z * _Z / n
    middle = (share + slack / 2) / (1 + slack)
    half = math.sqrt(slack * share * (1 - share) + slack * slack / 4) / (1 + slack)
    low = 0.0 if count == 0 else middle - half
    high = 1.0 if count == n else middle + half
    return low, high


def newcombe_paired(pairs: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    """Newcombe's 95% interval of the difference of two shares that were seen on the same prompts.

    Method 10 of Newcombe (Statistics in Medicine 17, 1998, 2635-2650): the two Wilson intervals
    put together by way of the correlation phi of the pairs, which is corrected for continuity
    where it is positive.

    Args:
        pairs: for each prompt what the first and what the second counts, at least one.

    Returns:
        Lower and upper end of the share of the first less that of the second.
    """
    n = len(pairs)
    both = sum(one and other for one, other in pairs)
    only_first = sum(one and not other for one, other in pairs)
    only_second = sum(other and not one for one, other in pairs)
    neither = n - both - only_first - only_second
    first, second = both + only_first, both + only_second
    (low1, high1), (low2, high2) = wilson(first, n), wilson(second, n)
    share1, share2, difference = first / n, second / n, (only_first - only_second) / n
    margins = first * (n - first) * second * (n - second)
    agreement: float = both * neither - only_first * only_second
    if agreement > 0:
        agreement = max(agreement - n / 2, 0.0)
    phi = agreement / math.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        # Never below zero: phi is -1 to 1. Rounding must not make it so.
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    return (
        difference - reach(share1 - low1, high2 - share2),
        difference + reach(high1 - share1, share2 - low2),
    )


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean (2,000 resamples, seeded).

    For figures that are no shares: those have :func:`wilson`.

    Args:
        values: one figure per prompt, at least one.
        seed: of the resampling.

    Returns:
        Lower and upper end; both are the mean itself where all values are the same.
    """
    import numpy as np  # shares, which are shown without it, need none

    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(data))
    means = np.concatenate(
        [
            data[rng.integers(len(data), size=(min(rows, RESAMPLES - start), len(data)))].mean(1)
            for start in range(0, RESAMPLES, rows)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def share_methods() -> dict[str, Any]:
    """What a record says of the intervals of its shares."""
    return {
        "confidence": CONFIDENCE,
        "shares": "Wilson",
        "differences": "Newcombe, paired (method 10)",
    }


def bootstrap_settings(seed: int) -> dict[str, float]:
    """What a record says of the intervals of its means."""
    return {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": seed}
