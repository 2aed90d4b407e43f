"""Bootstrap intervals of a mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES, CONFIDENCE = 2000, 0.95
# Indices drawn at once, so that memory does not grow with the number of values.
_CHUNK = 1 << 20


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean (2,000 resamples, seeded).

    Args:
        values: one figure per completion, at least one.
        seed: of the resampling.

    Returns:
        Lower and upper end; both are the mean itself where all values are the same.
    """
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


def summary(seed: int) -> dict[str, float]:
    """What a record says of its intervals."""
    return {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": seed}
