"""The test of the biases: its error rate is what it says, by simulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abliterate.auditing.bias_test import LEVEL, median_share, p_value

_MODELS = 400


def _unit(generator: torch.Generator, d_model: int) -> Tensor:
    drawn = torch.randn(d_model, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm()


def _biases(generator: torch.Generator, d_model: int, count: int, shared: float) -> Tensor:
    """Random biases, with one large channel in all of them where ``shared`` is not zero."""
    vectors = torch.randn(d_model, count, generator=generator, dtype=torch.float64)
    vectors[0] += shared * d_model**0.5
    return vectors


@pytest.mark.parametrize(("count", "before"), [(3, 0.018), (4, 0.034), (5, 0.0045)])
def test_a_fixed_bound_of_the_median_is_no_test(count: int, before: float) -> None:
    """What a median below 0.01 happens in: not one of 1000."""
    generator = torch.Generator().manual_seed(0)
    cosines = torch.randn(200_000, count, generator=generator, dtype=torch.float64) / 256**0.5
    rate = float((median_share(cosines, 256) < 0.01).double().mean())
    assert rate == pytest.approx(before, rel=0.15)


@pytest.mark.parametrize(
    ("count", "d_model", "shared"), [(3, 64, 0.0), (4, 64, 2.0), (5, 64, 0.0), (12, 8, 0.0)]
)
def test_the_rate_of_false_alarms_is_the_level(count: int, d_model: int, shared: float) -> None:
    """p-values of unrelated directions are uniform, so one in 1000 lies below 1/1000.

    Told at levels that this many models can show; with independent biases and with biases that
    share a channel, and with more biases than channels.
    """
    generator = torch.Generator().manual_seed(count)
    biases = _biases(generator, d_model, count, shared)
    found = torch.tensor(
        [p_value(biases, _unit(generator, d_model), 199, seed) for seed in range(_MODELS)]
    )
    for level in (0.02, 0.1, 0.5):
        rate, spread = float((found <= level).double().mean()), (level / _MODELS) ** 0.5
        assert abs(rate - level) < 4 * spread


@pytest.mark.parametrize("count", [3, 4, 5])
def test_one_in_a_thousand_at_the_level_itself(count: int) -> None:
    """The whole distribution of the median, drawn once, against 100,000 other directions."""
    generator = torch.Generator().manual_seed(count)
    d_model = 64
    biases = _biases(generator, d_model, count, 0.5)
    units = biases / biases.norm(dim=0)
    others = torch.randn(100_000, d_model, generator=generator, dtype=torch.float64)
    others = others / others.norm(dim=1, keepdim=True)
    shares = median_share(others @ units, d_model)
    # The largest share that the test calls an edit, by bisection over directions in a plane.
    d_model_is_columns = torch.linalg.qr(torch.cat([units, others[:1].T], dim=1)).Q[:, count]
    along = units.sum(dim=1) / units.sum(dim=1).norm()
    low, high = 0.0, 0.5
    for _ in range(14):
        middle = (low + high) / 2
        direction = d_model_is_columns + middle * along
        direction = direction / direction.norm()
        low, high = (middle, high) if p_value(biases, direction) <= LEVEL else (low, middle)
    direction = d_model_is_columns + low * along
    limit = median_share(direction / direction.norm() @ units, d_model)
    rate = float((shares <= limit).double().mean())
    assert 0.0003 < rate < 0.002


def test_edited_biases_are_told() -> None:
    generator = torch.Generator().manual_seed(1)
    for count in (3, 4, 5, 40):
        biases = _biases(generator, 256, count, 0.0)
        direction = _unit(generator, 256)
        edited = biases - direction[:, None] * (direction @ biases)
        assert p_value(edited.bfloat16().double(), direction) <= LEVEL
        assert p_value(biases, direction) > LEVEL
    # One vector thrice tells no more than once.
    same = biases[:, :1].repeat(1, 3)
    nearly = same - 0.97 * direction[:, None] * (direction @ same)
    assert p_value(nearly, direction) > LEVEL
