"""Separation of two kinds of numbers, and what chance gives, against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest

from abliterate.metrics.label_permutations import permutation_null, separation


def _plain(values: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    pairs = values[first][:, None] - values[~first][None]
    scores = []
    for i, value in enumerate(values):
        gap, own = np.abs(values - value), first == first[i]
        inner = gap[own & (np.arange(len(values)) != i)].mean()
        outer = gap[~own].mean()
        scores.append((outer - inner) / max(inner, outer) if max(inner, outer) else 0.0)
    return float((pairs > 0).mean() + (pairs == 0).mean() / 2), float(np.mean(scores))


def test_separation_is_that_of_all_pairs_with_ties() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(0, 1, 15), rng.integers(0, 4, 15), np.ones(15)])
    first = np.stack([rng.permutation(np.arange(15) < 6) for _ in range(3)])
    found = separation(values, first)
    for row in range(3):
        assert (found.auc[row], found.silhouette[row]) == pytest.approx(
            _plain(values[row], first[row])
        )


def test_random_labels_separate_wide_vectors_and_are_seen_to_be_random() -> None:
    """An AUC of 1 that chance gives as well, beside a length that tells the two apart."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(20, 400)), rng.normal(size=(20, 400))
    chance = permutation_null(one, other, 0, 200)
    assert chance["auc"]["mean"] > 0.99
    assert chance["auc"]["p"] > 0.5
    assert 0.05 < chance["norm"]["p"] < 0.95
    assert chance == permutation_null(one, other, 0, 200) != permutation_null(one, other, 1, 200)
    shifted = permutation_null(one + 0.2, other, 0, 200)
    assert shifted["auc"]["p"] > 0.5  # no telling
    assert shifted["norm"]["p"] == pytest.approx(1 / 201)


def test_labellings_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.normal(size=(6, 3)) + 0.5, rng.normal(size=(5, 3))
    points, truth = np.concatenate([one, other]), np.arange(11) < 6
    found = permutation_null(one, other, 7, 99)
    figures = []
    labellings = np.random.default_rng(7).permuted(np.repeat(truth[None], 99, axis=0), axis=1)
    for labels in [truth, *labellings]:
        mean = points[labels].mean(0) - points[~labels].mean(0)
        figures.append((*_plain(points @ mean, labels), float(np.linalg.norm(mean))))
    (real, *null) = np.array(figures)
    for at, name in enumerate(("auc", "silhouette", "norm")):
        column = np.array([row[at] for row in null])
        assert found[name]["mean"] == pytest.approx(column.mean())
        assert found[name]["q95"] == pytest.approx(np.quantile(column, 0.95))
        assert found[name]["p"] == pytest.approx((1 + (column >= real[at] - 1e-9).sum()) / 100)
