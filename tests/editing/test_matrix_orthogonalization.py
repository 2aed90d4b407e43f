"""Weight orthogonalization of one matrix, on tensors: ``W - s B^T B W`` whatever the blocks are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from abliterate.editing import matrix_orthogonalization
from abliterate.editing.matrix_orthogonalization import (
    DirectionEnergy,
    EditStrength,
    orthogonalize_matrix,
    project,
)
from abliterate.errors import CheckpointError

D_MODEL, COLUMNS = 24, 10


@dataclass
class InMemory:
    """A matrix that lies in memory in float64."""

    values: Tensor
    row_step: int = 1
    splits: bool = True

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def load(self, first: int, last: int) -> Tensor:
        return self.values[first:last].clone()

    def store(self, first: int, block: Tensor) -> Tensor:
        self.values[first : first + len(block)] = block
        return block

    def part(self) -> InMemory:
        return self

    def close(self) -> None:
        pass


@pytest.fixture(params=[1, 3, 7, 1000], ids=lambda rows: f"blocks of {rows}")
def blocks(request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_orthogonalization, "_BLOCK_ELEMENTS", request.param * COLUMNS)


def random_weight(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(D_MODEL, COLUMNS, generator=generator, dtype=torch.float64)


def orthonormal_rows(k: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(D_MODEL, k, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(values).Q.T.contiguous()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("d_model_is_columns", [False, True])
def test_project_is_equation_5(d_model_is_columns: bool, k: int, scale: float) -> None:
    """Catches: a wrong sign, axis or scale, a block that is skipped or subtracted twice."""
    W, B = random_weight(), orthonormal_rows(k)
    expected = W - scale * B.T @ (B @ W)
    matrix = InMemory((W.T if d_model_is_columns else W).clone())
    sums = project(matrix, B, EditStrength(scale), d_model_is_columns)
    edited = matrix.values.T if d_model_is_columns else matrix.values
    assert torch.allclose(edited, expected, atol=1e-12)
    assert sums.energy == pytest.approx(float(W.square().sum()))
    assert sums.along_before == pytest.approx(float((B @ W).square().sum()))
    left = float((B @ expected).square().sum())
    assert sums.along_after == pytest.approx(left, rel=1e-9, abs=1e-20)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("d_model_is_columns", [False, True])
def test_coefficients_are_what_lies_along(d_model_is_columns: bool) -> None:
    W, B = random_weight(), orthonormal_rows(2)
    matrix = InMemory(W.T.contiguous() if d_model_is_columns else W)
    found, energy = orthogonalize_matrix(matrix, B, d_model_is_columns)
    assert torch.allclose(found, B @ W, atol=1e-12)
    assert energy == pytest.approx(float(W.square().sum()))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("d_model_is_columns", [False, True])
def test_kept_norms_are_those_of_stored_rows(d_model_is_columns: bool) -> None:
    W, B = random_weight(), orthonormal_rows(1)
    stored = W.T.clone() if d_model_is_columns else W.clone()
    matrix = InMemory(stored.clone())
    project(matrix, B, EditStrength(keep_norms="rows"), d_model_is_columns)
    assert torch.allclose(matrix.values.norm(dim=1), stored.norm(dim=1))
    if d_model_is_columns:  # scaling W's columns leaves nothing along r
        assert float((matrix.values @ B.T).abs().max()) < 1e-12


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("d_model_is_columns", [False, True])
def test_kept_norms_of_columns_are_those_of_what_each_input_writes(
    d_model_is_columns: bool, scale: float, count: int
) -> None:
    W, B = random_weight(), orthonormal_rows(count)
    matrix = InMemory(W.T.contiguous() if d_model_is_columns else W.clone())
    sums = project(matrix, B, EditStrength(scale, "columns"), d_model_is_columns)
    edited = matrix.values.T if d_model_is_columns else matrix.values
    plain = W - scale * B.T @ B @ W
    assert torch.allclose(edited.norm(dim=0), W.norm(dim=0), rtol=1e-12)
    assert torch.allclose(edited, plain * (W.norm(dim=0) / plain.norm(dim=0)), atol=1e-12)
    assert sums.along_after == pytest.approx(
        float((B @ edited).square().sum()), rel=1e-9, abs=1e-20
    )
    if scale == 1:
        assert sums.along_after < 1e-20


def test_a_row_along_the_direction_alone_becomes_zero() -> None:
    B = orthonormal_rows(1)
    matrix = InMemory(torch.cat([3 * B, random_weight().T[:2]]))
    project(matrix, B, EditStrength(keep_norms="rows"), True)
    assert float(matrix.values[0].norm()) < 1e-12


@pytest.mark.usefixtures("blocks")
def test_rows_that_are_not_asked_for_stay() -> None:
    B = orthonormal_rows(1)
    stored = random_weight().T.clone()
    matrix = InMemory(stored.clone())
    halves = [project(matrix, B, EditStrength(), True, rows) for rows in ((0, 4), (4, 7))]
    assert torch.equal(matrix.values[7:], stored[7:])
    assert torch.allclose(matrix.values[:7], stored[:7] - stored[:7] @ B.T @ B, atol=1e-12)
    assert (halves[0] + halves[1]).energy == pytest.approx(float(stored[:7].square().sum()))


@pytest.mark.parametrize("d_model_is_columns", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(value: float, d_model_is_columns: bool) -> None:
    W = random_weight()
    W[3, 4] = value
    matrix = InMemory(W.T.clone() if d_model_is_columns else W)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        project(matrix, orthonormal_rows(1), EditStrength(), d_model_is_columns)


def test_a_stop_before_the_first_block_changes_nothing() -> None:
    W = random_weight()
    for d_model_is_columns in (False, True):
        matrix = InMemory(W.T.clone() if d_model_is_columns else W.clone())
        before = matrix.values.clone()
        sums = project(
            matrix, orthonormal_rows(1), EditStrength(), d_model_is_columns, stopped=lambda: True
        )
        assert sums == DirectionEnergy()
        assert torch.equal(matrix.values, before)
