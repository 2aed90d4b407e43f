"""What audit computes the cheaper way is what the plain definition gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abliterate.auditing import soft_null_space
from abliterate.auditing.eigengap_test import SoftNullProjector, claims, gap, of_matrix
from abliterate.auditing.projections import left_vectors

WIDTH = 264


def _random(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _gram(power: float, seed: int = 0) -> Tensor:
    """Of a writer whose energies fall as rank^-power."""
    turn = torch.linalg.qr(_random(WIDTH, WIDTH, seed))[0]
    return turn * torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -power @ turn.T


def test_emptiness_of_a_flat_spectrum_is_the_same_in_float32() -> None:
    gram = _gram(0.5)
    fine = soft_null_space.emptiness(gram.clone(), 0, 0.2)[0]
    coarse = soft_null_space.emptiness(gram.float(), 0, 0.2)[0]
    assert soft_null_space.precision(WIDTH) == torch.float32
    assert fine is not None
    assert coarse is not None
    assert float(torch.linalg.eigvalsh(fine).mean()) == pytest.approx(0.2, abs=1e-9)
    assert float((coarse - fine).abs().max()) < 2e-6


@pytest.mark.parametrize("power", [0.5, 3.0])
def test_emptiness_of_a_direction_not_written_or_a_steep_spectrum_takes_float64(
    power: float,
) -> None:
    gram = _gram(power)
    if power < 1:
        unit = torch.full((WIDTH, 1), WIDTH**-0.5, dtype=torch.float64)
        cut = torch.eye(WIDTH, dtype=torch.float64) - unit @ unit.T
        gram = cut @ gram @ cut
    assert soft_null_space.emptiness(gram.float(), 0, 0.2)[0] is None
    found = soft_null_space.emptiness(gram.clone(), 0, 0.2)[0]
    assert found is not None
    values = torch.linalg.eigvalsh(found)
    written = values[:-1] if power < 1 else values
    assert float(written.mean()) == pytest.approx(0.2, abs=1e-6)


def test_left_vectors_of_a_change_are_its_singular_vectors() -> None:
    unit = torch.linalg.qr(_random(WIDTH, 3, 1))[0]
    before = _random(WIDTH, 280, 2)
    dense = 1e-2 * _random(WIDTH, 280, 3)
    one = -unit[:, :1] @ (unit[:, :1].T @ before)
    three = -unit @ (unit.T @ before)
    for delta in (one, one + 1e-3 * dense, three + dense, dense, (0.3 * one + dense).T):
        left, shares = left_vectors(delta, 8)
        vectors, values, _ = torch.linalg.svd(delta, full_matrices=False)
        energy = values.square() / values.square().sum()
        held = left.shape[1]
        assert held == (1 if delta is one else 8)
        torch.testing.assert_close(shares[:held], energy[:held], rtol=1e-7, atol=1e-12)
        cosines = (left * vectors[:, :held]).sum(dim=0).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_claims_says_what_the_p_value_of_the_gap_says(count: int) -> None:
    units: list[SoftNullProjector] = []
    for seed in range(8):
        matrix = soft_null_space.emptiness(_gram(0.5, seed)[:64, :64].contiguous(), 0, 0.2)[0]
        assert matrix is not None
        units.append(of_matrix(matrix.float()))
    halves = [index % 2 == 1 for index in range(8)]
    vectors = torch.linalg.qr(_random(64, count, 30))[0]
    seen = set()
    for scale in (0.0, 0.3, 0.5, 0.8, 1.0):
        planted = units
        for vector in vectors.T:
            planted = [unit.edited(vector, scale) for unit in planted]
        p_value = gap(planted, halves).p_value
        for level in (1e-9, 1e-5, 1e-3, 0.2):
            assert claims(planted, halves, level) is (p_value <= level)
            seen.add(p_value <= level)
    assert seen == {True, False}
