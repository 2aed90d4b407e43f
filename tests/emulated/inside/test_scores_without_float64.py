"""Scores that are made on a device without float64 are those of float64, at any size."""

from __future__ import annotations

from collections.abc import Callable

import accelerator
import pytest
import torch
from torch import Tensor

from abliterate import precision
from abliterate.metrics.logit_metrics import BaselineLogits, refusal_metric
from abliterate.metrics.refusal import kl_divergence, kl_floor, refusal_score

_TOKENS = (7, 40, 30_000)


@pytest.fixture
def logits() -> Tensor:
    """``[6, 50000]`` from flat to certain, for a refusal token and against all of them."""
    generator = torch.Generator().manual_seed(5)
    made = 3 * torch.randn(6, 50_000, generator=generator)
    made[1, 7] = made[2, 7] = 40  # 1 - p is below the epsilon, then of about its size
    made[2, 9] = 22
    made[3, 9] = 45
    made[4] *= 0.01
    return made.bfloat16()


def _near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.dtype == torch.float64
    assert (ours.cpu() - theirs).abs().max() <= tolerance


def test_scores_agree_with_float64(logits: Tensor) -> None:
    near = logits + 0.05 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    expected = (
        refusal_score(logits, _TOKENS),
        kl_divergence(logits, near),
        kl_divergence(logits, logits.flip(0)),
        kl_floor(logits),
    )
    precision._computes_float64.cache_clear()
    with accelerator.accelerator(float64=False) as state:
        here, other = logits.to("emu"), near.to("emu")
        state.waits.clear()
        found = (
            refusal_score(here, _TOKENS),
            kl_divergence(here, other),
            kl_divergence(here, here.flip(0)),
            precision.widened(kl_floor(here)),
        )
        assert state.synchronisations() == 4
    for ours, theirs, tolerance in zip(found, expected, (2e-5, 2e-6, 2e-5, 5e-8), strict=True):
        _near(ours, theirs, tolerance)
    assert expected[3].abs().max() > 1e-6  # or the bound would be lost in the tolerance


def test_metrics_of_candidates_take_one_transfer(logits: Tensor) -> None:
    """However many parts they are made in."""
    several = torch.stack([logits, logits.roll(1, 1)]).unsqueeze(2)
    counts = [1] * len(logits)
    rows = tuple(range(len(logits)))
    baseline = BaselineLogits.of([(several[0], rows)], counts)
    expected = refusal_metric(_TOKENS)(several, rows), baseline.kl(several, rows)
    precision._computes_float64.cache_clear()
    with accelerator.accelerator(float64=False) as state:
        precision.has_float64(torch.device("emu"))
        here = several.to("emu")
        state.waits.clear()
        own = BaselineLogits.of([(here[0], rows)], counts)
        assert state.synchronisations() == 1
        measures: tuple[Callable[..., Tensor], ...] = (refusal_metric(_TOKENS), own.kl)
        for measure, theirs in zip(measures, expected, strict=True):
            before = state.synchronisations()
            _near(measure(here, rows), theirs, 2e-5)
            assert state.synchronisations() == before + 1
    _near(own.floor, baseline.floor, 5e-8)
