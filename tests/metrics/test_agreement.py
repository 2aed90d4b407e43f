"""Cohen's kappa against its definition."""

from __future__ import annotations

import pytest

from abliterate.metrics.agreement import agreement, kappa_text


def _pairs(both: int, first: int, second: int, neither: int) -> list[tuple[bool, bool]]:
    kinds = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second
    return kinds + [(False, False)] * neither


def test_kappa_is_what_is_left_beyond_chance() -> None:
    found = agreement(_pairs(20, 5, 10, 15), 0)  # the example of the textbooks
    assert (found["n"], found["agreed"]) == (50, pytest.approx(0.7))
    assert found["kappa"] == pytest.approx((0.7 - 0.5) / 0.5)
    low, high = found["kappa_ci"]
    assert 0.1 < low < 0.25 < 0.55 < high < 0.7
    assert agreement(_pairs(20, 5, 10, 15), 1)["kappa_ci"] != [low, high]
    assert agreement(_pairs(10, 0, 0, 10), 0)["kappa"] == pytest.approx(1)
    assert agreement(_pairs(0, 10, 10, 0), 0)["kappa"] == pytest.approx(-1)
    # Nine in ten agree, and as many would by chance.
    assert agreement(_pairs(81, 9, 9, 1), 0)["kappa"] == pytest.approx(0, abs=1e-9)


def test_raters_that_say_one_thing_alone_have_no_kappa() -> None:
    found = agreement(_pairs(7, 0, 0, 0), 0)
    assert (found["agreed"], found["kappa"], found["kappa_ci"]) == (1.0, None, None)
    assert found["undefined"] == 2000
    assert kappa_text(found) == "not defined: each always says one thing"


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ((5, 3, 0, 0), "0.00 (no interval: the first always says one thing)"),
        ((5, 0, 3, 0), "0.00 (no interval: the second always says one thing)"),
        ((5, 0, 0, 3), "1.00 (no interval: they agree on every answer)"),
    ],
)
def test_an_interval_without_width_is_none(counts, shown) -> None:
    found = agreement(_pairs(*counts), 0)
    assert found["kappa_ci"] is None
    assert kappa_text(found) == shown
    # Records of old hold the interval without width.
    old = found | {"no_interval": None, "kappa_ci": [found["kappa"]] * 2}
    assert "no interval" in kappa_text(old)
