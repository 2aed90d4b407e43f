"""Weight orthogonalization ``W <- W - s B^T B W`` of one matrix on disk (paper, equation 5).

``B`` ``[k, d_model]`` has orthonormal rows (``r^T`` for one direction) and ``s`` is the scale, 1
for the paper's edit. It goes block by block: memory is a block and ``k`` vectors, whatever the
matrix. One stored with d_model as its rows has blocks ``W[first:last, :]``; one stored with d_model
as its columns is the transpose, with blocks ``W^T[first:last, :]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abliterate.checkpoints.disk_matrix import DiskMatrix
from abliterate.checkpoints.safetensors_header import TensorEntry
from abliterate.errors import CheckpointError
from abliterate.precision import widened

# A block stays in a core's cache through the handful of passes over it. On an accelerator every
# block is a dozen launches and a few waits, whatever its size.
_BLOCK_ELEMENTS = 1 << 19
_BLOCK_ELEMENTS_ACCELERATOR = 1 << 23


Norms = Literal["rows", "columns"]


@dataclass(frozen=True)
class EditStrength:
    """How much to remove.

    Attributes:
        scale: 1 removes all that lies along the directions, 0.5 half of it.
        keep_norms: ``rows`` gives every row of the matrix on disk its old norm again, ``columns``
            every vector along d_model: what one input writes to the stream. Scaling those leaves
            nothing along the directions; scaling rows of a matrix whose rows are d_model does.
    """

    scale: float = 1.0
    keep_norms: Norms | None = None

    def times(self, weight: float) -> EditStrength:
        """The same with the scale multiplied."""
        return EditStrength(self.scale * weight, self.keep_norms)


@dataclass(frozen=True)
class DirectionEnergy:
    """Squared norms: of a matrix, ``|W|^2``, and of what it has along the directions, ``|B W|^2``.

    Attributes:
        energy: ``|W|^2`` before the edit.
        along_before: ``|B W|^2``.
        along_after: ``|B W'|^2`` of what was stored, rounding included.
    """

    energy: float = 0.0
    along_before: float = 0.0
    along_after: float = 0.0

    def __add__(self, other: DirectionEnergy) -> DirectionEnergy:
        return DirectionEnergy(
            self.energy + other.energy,
            self.along_before + other.along_before,
            self.along_after + other.along_after,
        )


def project(
    matrix: DiskMatrix,
    basis: Tensor,
    strength: EditStrength,
    d_model_is_columns: bool,
    rows: tuple[int, int] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> DirectionEnergy:
    """Edit a matrix and write the result.

    Args:
        matrix: the matrix.
        basis: ``[k, d_model]``, orthonormal rows.
        strength: how much to remove.
        d_model_is_columns: else d_model is its rows.
        rows: the rows to edit where ``d_model_is_columns``, or None for all.
        stopped: asked before each block; True ends the edit where it is.

    Raises:
        CheckpointError: the matrix holds NaN or infinity, or the result does not fit its dtype.
    """
    edit = _along_columns if d_model_is_columns else _along_rows
    return edit(matrix, basis, strength, rows or (0, matrix.rows), stopped)


def _along_columns(
    matrix: DiskMatrix,
    basis: Tensor,
    strength: EditStrength,
    rows: tuple[int, int],
    stopped: Callable[[], bool],
) -> DirectionEnergy:
    """d_model is the columns: every stored row stands alone, ``W^T -= s (W^T B^T) B``."""
    energy, before, after = 0.0, list[Tensor](), list[Tensor]()
    for first, last in _blocks(matrix, *rows):
        if stopped():
            break
        W_block = matrix.load(first, last)  # [n, d_model]
        basis = basis.to(W_block)  # [k, d_model]
        energy += _energy(W_block)
        coefficients = W_block @ basis.T  # [n, k]
        norms = None if strength.keep_norms is None else _row_norms(W_block)  # both are rows here
        _subtract_product(W_block, coefficients, basis, strength.scale)
        if norms is not None:
            _restore_row_norms(W_block, norms)
        before.append(coefficients)
        after.append(matrix.store(first, W_block) @ basis.T)
    if not before:
        return DirectionEnergy()
    return DirectionEnergy(energy, _square(torch.cat(before)), _stored_square(torch.cat(after)))


def _along_rows(
    matrix: DiskMatrix,
    basis: Tensor,
    strength: EditStrength,
    rows: tuple[int, int],
    stopped: Callable[[], bool],
) -> DirectionEnergy:
    """d_model is the rows: ``B W`` is a sum over all of them, subtracted in a second pass."""
    energy, coefficients = 0.0, None
    for first, last in _blocks(matrix, *rows):
        if stopped():
            return DirectionEnergy()
        W_block = matrix.load(first, last)  # [n, columns]
        basis = basis.to(W_block)  # [k, d_model]
        partial_sum = basis[:, first:last] @ W_block  # [k, columns]
        coefficients = partial_sum if coefficients is None else coefficients.add_(partial_sum)
        energy += _energy(W_block)
    if coefficients is None:
        return DirectionEnergy()
    after = torch.zeros_like(coefficients)
    growth = None
    if strength.keep_norms == "columns":
        growth = _column_growth(matrix, basis, coefficients, strength.scale, rows)
    for first, last in _blocks(matrix, *rows):
        if stopped():
            break
        W_block = matrix.load(first, last)
        norms = _row_norms(W_block) if strength.keep_norms == "rows" else None
        basis_rows = basis[:, first:last]  # [k, n]
        _subtract_product(W_block, basis_rows.T, coefficients, strength.scale)
        if norms is not None:
            _restore_row_norms(W_block, norms)
        if growth is not None:
            W_block.mul_(growth)
        after += basis_rows @ matrix.store(first, W_block)
    return DirectionEnergy(energy, _square(coefficients), _stored_square(after))


def _column_growth(
    matrix: DiskMatrix, basis: Tensor, coefficients: Tensor, scale: float, rows: tuple[int, int]
) -> Tensor:
    """By how much each column grows to have its norm again, ``[1, columns]``; a pass of its own."""
    before = torch.zeros(1, coefficients.shape[1], dtype=coefficients.dtype).to(coefficients)
    now = torch.zeros_like(before)
    for first, last in _blocks(matrix, *rows):
        W_block = matrix.load(first, last)
        before += W_block.square().sum(0, keepdim=True)
        _subtract_product(W_block, basis[:, first:last].T, coefficients, scale)
        now += W_block.square().sum(0, keepdim=True)
    return _growth(before.sqrt(), now.sqrt())


def orthogonalize_matrix(
    matrix: DiskMatrix, basis: Tensor, d_model_is_columns: bool
) -> tuple[Tensor, float]:
    """What lies along the directions: ``[k, columns]``, or ``[k, rows]`` of a transposed matrix.

    Args:
        matrix: the matrix; it is only read.
        basis: ``[k, d_model]``.
        d_model_is_columns: else d_model is its rows.

    Returns:
        The coefficients in the dtype that the matrix is computed in, and the matrix's squared norm.

    Raises:
        CheckpointError: the matrix holds NaN or infinity.
    """
    energy, parts = 0.0, []
    for first, last in _blocks(matrix, 0, matrix.rows):
        W_block = matrix.load(first, last)
        basis = basis.to(W_block)
        energy += _energy(W_block)
        if d_model_is_columns:
            parts.append(basis @ W_block.T)  # [k, n]
        elif parts:
            parts[0] += basis[:, first:last] @ W_block  # [k, columns]
        else:
            parts.append(basis[:, first:last] @ W_block)
    return torch.cat(parts, dim=1), energy


@contextmanager
def naming_tensor(entry: TensorEntry) -> Iterator[None]:
    """What is wrong with a matrix, as an error that names the tensor and its file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"tensor '{entry.name}' in {entry.file} {error}") from None


def _blocks(matrix: DiskMatrix, first: int, last: int) -> Iterator[tuple[int, int]]:
    on_cpu = matrix.device.type == "cpu"
    elements = _BLOCK_ELEMENTS if on_cpu else _BLOCK_ELEMENTS_ACCELERATOR
    step = max(1, elements // matrix.columns)
    step = max(matrix.row_step, step - step % matrix.row_step)
    for row in range(first, last, step):
        yield row, min(row + step, last)


def _subtract_product(block: Tensor, columns: Tensor, rows: Tensor, scale: float) -> None:
    """``block -= scale * columns @ rows`` for ``[n, k]`` and ``[k, m]``."""
    if rows.shape[0] == 1:
        block.addr_(columns[:, 0], rows[0], alpha=-scale)
    else:
        block.addmm_(columns, rows, alpha=-scale)


def _row_norms(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    return norms


def _restore_row_norms(block: Tensor, norms: Tensor) -> None:
    block.mul_(_growth(norms, _row_norms(block)))


def _growth(before: Tensor, now: Tensor) -> Tensor:
    # What lay along the direction alone has nothing left that could carry its norm.
    return torch.where(now > 1e-6 * before, before / now, torch.ones_like(now))


def _energy(block: Tensor) -> float:
    flat = block.reshape(-1)
    energy = float(torch.dot(flat, flat))
    if math.isfinite(energy):
        return energy
    # Either a value is not finite, or large ones overflow when squared.
    energy = _square(block)
    if not math.isfinite(energy):
        raise CheckpointError("holds NaN or infinity")
    return energy


def _square(values: Tensor) -> float:
    return float(widened(values).square().sum())


def _stored_square(coefficients: Tensor) -> float:
    square = _square(coefficients)
    if not math.isfinite(square):
        raise CheckpointError("has values that no longer fit its dtype once it is edited")
    return square
