"""Intervals of shares, of paired differences and of means: their coverage, by simulation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from abliterate.metrics.intervals import bootstrap, newcombe_paired, wilson

_TRIES = 4000


@cache
def _paired(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    kinds = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second
    return newcombe_paired([*kinds, *[(False, False)] * neither])


@pytest.mark.parametrize(
    ("n", "share"), [(120, 0.01), (120, 0.05), (20, 0.1), (32, 0.5), (100, 0.9), (8, 0.3)]
)
def test_wilson_covers_the_true_share(n: int, share: float) -> None:
    counts = np.random.default_rng(0).binomial(n, share, _TRIES)
    spans = [wilson(int(count), n) for count in counts]
    covered = np.mean([low <= share <= high for low, high in spans])
    assert 0.925 < covered <= 1.0


def test_wilson_at_the_ends() -> None:
    """0 of 120 does not show that there are none: 3% would give it in one of 40 samples."""
    low, high = wilson(0, 120)
    assert low == 0.0
    assert high == pytest.approx(0.0310, abs=1e-4)
    assert wilson(120, 120) == (pytest.approx(1 - high), 1.0)
    assert wilson(0, 1)[1] > 0.79
    for n in range(1, 30):
        for count in range(n + 1):
            low, high = wilson(count, n)
            assert 0 <= low <= count / n <= high <= 1
    # The ends solve |share - p| = z sqrt(p (1 - p) / n).
    for end in wilson(12, 100):
        assert abs(0.12 - end) == pytest.approx(1.959964 * (end * (1 - end) / 100) ** 0.5, rel=1e-6)


def test_the_bootstrap_is_no_interval_of_a_rare_share() -> None:
    """Why shares have another: it covers a true 1% of 120 prompts in about 65 of 100."""
    counts = np.random.default_rng(0).binomial(120, 0.01, 200)
    ends = {int(c): bootstrap([1.0] * c + [0.0] * (120 - c)) for c in sorted(set(counts))}
    covered = np.mean([ends[count][0] <= 0.01 <= ends[count][1] for count in counts])
    assert covered < 0.8
    assert np.mean([wilson(int(c), 120)[1] >= 0.01 for c in counts]) == 1.0


@pytest.mark.parametrize(
    ("n", "chances"),
    [
        (120, (0.01, 0.9, 0.01, 0.08)),  # an edit that works
        (120, (0.0, 0.01, 0.0, 0.99)),  # one refusal in a hundred, and none after
        (32, (0.4, 0.3, 0.1, 0.2)),
        (50, (0.72, 0.24, 0.04, 0.0)),
        (100, (0.05, 0.05, 0.05, 0.85)),  # no change
    ],
)
def test_newcombe_covers_the_true_difference(n: int, chances: tuple[float, ...]) -> None:
    draws = np.random.default_rng(0).multinomial(n, chances, _TRIES)
    true = chances[1] - chances[2]
    spans = [_paired(*map(int, draw)) for draw in draws]
    covered = np.mean([low <= true <= high for low, high in spans])
    assert 0.93 < covered <= 1.0


def test_newcombe_on_pairs() -> None:
    assert _paired(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    # Turned round, the ends change places and signs.
    assert _paired(36, 2, 12, 0) == pytest.approx((-0.3404, -0.0569), abs=1e-4)
    # No prompt changed: the difference is zero, and more prompts make that surer.
    few, many = _paired(0, 0, 0, 20), _paired(0, 0, 0, 2000)
    assert few[0] == -few[1] < many[0] == -many[1] < 0
    for pair in (few, many, _paired(0, 20, 0, 0), _paired(0, 0, 1, 0), _paired(7, 0, 0, 5)):
        assert -1 <= pair[0] <= pair[1] <= 1
    # Pairs that go together tell more than two samples that do not.
    together, apart = _paired(50, 10, 0, 40), _paired(30, 30, 20, 20)
    assert together[1] - together[0] < apart[1] - apart[0]


def test_bootstrap_intervals_are_those_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 400).tolist()
    low, high = bootstrap(values, seed=0)
    error = np.std(values) / 20
    assert (low, high) == bootstrap(values, seed=0) != bootstrap(values, seed=1)
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.3 * error)
    assert bootstrap([1.5] * 20) == (1.5, 1.5)
