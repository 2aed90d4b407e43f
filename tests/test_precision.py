"""Sums without float64 are as exact as with it."""

from __future__ import annotations

import torch

from abliterate.precision import _two_sums, has_float64, summed_rows, to_host, widened, widest


def test_two_sums_keep_what_float32_would_round_away() -> None:
    """A large channel, as models have them, in which the kinds differ little."""
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 7, 64, 129):
        rows = 1e4 + torch.randn(n, 3, 50, generator=generator)
        high, low = _two_sums(rows)
        exact = rows.double().sum(0)
        assert high.dtype == low.dtype == torch.float32
        assert ((high.double() + low.double()) - exact).abs().max() <= 1e-12 * exact.abs().max()
        if n > 64:
            assert (rows.sum(0).double() - exact).abs().max() > 1e-3  # or this would test nothing


def test_only_rows_that_count_are_summed() -> None:
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [3.0, 4.0]])
    (total,) = summed_rows(rows, torch.tensor([True, False, True]))
    assert total.tolist() == [4.0, 6.0]
    assert total.dtype == torch.float64


def test_a_cpu_has_float64_and_nothing_moves() -> None:
    here = torch.ones(2, dtype=torch.bfloat16)
    assert has_float64(here.device)
    assert widest(here.device) == widened(here).dtype == torch.float64
    flags, values = to_host(torch.tensor([True, False]), torch.ones(2, 3))
    assert flags.tolist() == [1.0, 0.0]
    assert values.shape == (2, 3)
