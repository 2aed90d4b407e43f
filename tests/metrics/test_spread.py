"""Spread of prompts, exact paired tests and Holm's correction, against their definitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from abliterate.metrics.intervals import bootstrap
from abliterate.metrics.paired_tests import holm, mcnemar, signed_rank
from abliterate.metrics.spread import described, described_change, spread


def test_spread_divides_by_one_less_and_has_the_middle_two() -> None:
    found = spread([1.0, 2.0, 4.0, 9.0])
    assert found["sd"] == pytest.approx(math.sqrt((9 + 4 + 0 + 25) / 3))
    assert found["standard_error"] == pytest.approx(found["sd"] / 2)
    assert (found["n"], found["median"], found["min"], found["max"]) == (4, 3.0, 1.0, 9.0)
    assert spread([5.0])["sd"] is spread([5.0])["standard_error"] is None
    assert described("x", None, 0) == {"x": None, "x_ci": None, "x_spread": None}


def test_differences_are_drawn_with_both_their_sides() -> None:
    """A shift that every prompt shares is certain, however far the prompts lie apart."""
    before = np.random.default_rng(0).normal(0, 10, 30).tolist()
    found = described_change("x", [value + 2 for value in before], before, 0)
    assert found["x"] == pytest.approx(2)
    assert found["x_ci"] == pytest.approx((2, 2))
    assert found["x_spread"]["sd"] == pytest.approx(0, abs=1e-9)
    assert described_change("x", before, None, 0)["x"] is None


def test_the_bootstrap_of_a_ratio_draws_texts_with_their_tokens() -> None:
    sums, counts = [6.0, 1.0, 9.0], [3, 1, 2]
    rows = np.random.default_rng(5).integers(3, size=(2000, 3))
    ratios = np.array(sums)[rows].sum(1) / np.array(counts)[rows].sum(1)
    expected = np.quantile(ratios, [0.025, 0.975])
    assert bootstrap(sums, 5, counts) == pytest.approx(tuple(expected))
    assert bootstrap([2.0, 4.0], 0, [1, 2]) == (2.0, 2.0)  # the same per token everywhere


def test_mcnemar_is_the_binomial_of_those_that_changed() -> None:
    def of(gained: int, lost: int) -> float:
        both = [(True, True)] * 5
        return mcnemar([*both, *[(True, False)] * gained, *[(False, True)] * lost])

    assert of(0, 0) == of(3, 3) == 1.0
    assert of(0, 6) == of(6, 0) == pytest.approx(2 / 64)
    assert of(1, 7) == pytest.approx(2 * (1 + 8) / 256)
    assert 0 < of(0, 900) < 1e-200


@pytest.mark.parametrize(
    "differences",
    [
        [1.0, -2.0, 3.0, 4.0, 5.0, -6.0, 7.5],
        [1.0, 1.0, -1.0, 2.0, 2.0, -3.0, 0.0],  # ties, and one that did not change
        [0.5, 0.5, 0.5, 0.5],
    ],
)
def test_signed_ranks_count_every_way_in_which_signs_can_fall(differences: list[float]) -> None:
    held = [value for value in differences if value]
    sizes = np.abs(held)
    ranks = [(sizes < s).sum() + ((sizes == s).sum() + 1) / 2 for s in sizes]
    seen = sum(rank for rank, value in zip(ranks, held, strict=True) if value > 0)
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in product((0, 1), repeat=len(held))
    ]
    tails = (np.mean([s <= seen for s in sums]), np.mean([s >= seen for s in sums]))
    assert signed_rank(differences) == pytest.approx(min(1.0, 2 * min(tails)))
    assert signed_rank([-value for value in differences]) == signed_rank(differences)


def test_signed_ranks_of_many_prompts_are_normal() -> None:
    values = np.random.default_rng(1).normal(0.15, 1, 201).tolist()
    exact, normal = signed_rank(values[:200]), signed_rank(values)
    assert normal == pytest.approx(exact, rel=0.3)
    assert signed_rank([0.0, 0.0]) == 1.0
    assert math.isnan(signed_rank([1.0, math.nan]))


def test_holm_steps_down_and_never_falls() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
