"""95% intervals: Wilson's of a share, Newcombe's of a paired difference, the bootstrap's of a mean.

A share of few prompts, or one of 0 or 1, is where resampling fails: it gives 0 of 120 the interval
0 to 0, and covers a true 1% in 65 of 100 experiments. Wilson's interval inverts the score test and
gives 0 to 3.1%.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


def bootstrap(
    values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of a mean over prompts (2,000 resamples, seeded).

    The ends are the quantiles 0.025 and 0.975 of the resampled means, interpolated linearly between
    order statistics (type 7 of Hyndman and Fan). For figures that are no shares: those have
    :func:`wilson`. Differences of the same prompts give a paired interval.

    Args:
        values: one figure per prompt, at least one.
        seed: of the resampling.
        weights: of each prompt: the interval is that of ``sum(values) / sum(weights)``, such as
            nats per token.

    Returns:
        Lower and upper end; both are the mean itself where all values are the same.
    """
    import numpy as np  # shares, which are shown without it, need none

    data = np.asarray(values, dtype=np.float64)
    parts = None if weights is None else np.asarray(weights, dtype=np.float64)
    means = [
        data[rows].mean(1) if parts is None else data[rows].sum(1) / parts[rows].sum(1)
        for rows in resamples(len(data), seed)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def resamples(n: int, seed: int) -> Iterator[Any]:
    """Rows of the 2,000 resamples of ``n`` prompts, drawn with replacement, some at a time.

    Args:
        n: how many prompts, at least one.
        seed: of the draws.

    Yields:
        Arrays of row numbers ``[resamples, n]``.
    """
    import numpy as np

    rng, at_once = np.random.default_rng(seed), max(1, _CHUNK // n)
    for start in range(0, RESAMPLES, at_once):
        yield rng.integers(n, size=(min(at_once, RESAMPLES - start), n))


def share_methods() -> dict[str, Any]:
    """What a record says of the intervals of its shares."""
    return {
        "confidence": CONFIDENCE,
        "shares": "Wilson",
        "differences": "Newcombe, paired (method 10)",
        "difference_tests": "McNemar, exact, two-sided",
    }


def bootstrap_settings(seed: int) -> dict[str, float]:
    """What a record says of the intervals of its means."""
    return {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": seed}
