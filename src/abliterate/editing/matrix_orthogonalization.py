"""The edit ``W <- W - s B^T B W`` of one matrix on disk, in blocks of rows.

``B`` ``[k, d_model]`` has orthonormal rows and ``s`` is the scale, 1 for the paper's edit. No
matrix is ever held whole: memory is a block and ``k`` vectors, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.checkpoints.disk_matrix import Grid
from abliterate.errors import CheckpointError

# A block stays in a core's cache through the handful of passes over it.
_BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Recipe:
    """How much to remove.

    Attributes:
        scale: 1 removes all that lies along the directions, 0.5 half of it.
        keep_norms: give every row of the matrix on disk its old norm again.
    """

    scale: float = 1.0
    keep_norms: bool = False


@dataclass(frozen=True)
class Sums:
    """Squared norms of a matrix: all of it, and along the directions before and after."""

    energy: float = 0.0
    along: float = 0.0
    left: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.energy + other.energy, self.along + other.along, self.left + other.left)


def project(
    grid: Grid,
    basis: Tensor,
    recipe: Recipe,
    across: bool,
    rows: tuple[int, int] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Sums:
    """Edit a matrix and write the result.

    Args:
        grid: the matrix.
        basis: ``[k, d_model]``, orthonormal rows.
        recipe: how much to remove.
        across: d_model is the grid's columns, else its rows.
        rows: the rows to edit where ``across``, or None for all.
        stopped: asked before each block; True ends the edit where it is.

    Raises:
        CheckpointError: the matrix holds NaN or infinity, or the result does not fit its dtype.
    """
    edit = _along_columns if across else _along_rows
    return edit(grid, basis, recipe, rows or (0, grid.rows), stopped)


def _along_columns(
    grid: Grid,
    basis: Tensor,
    recipe: Recipe,
    rows: tuple[int, int],
    stopped: Callable[[], bool],
) -> Sums:
    """d_model is the columns: every row stands alone."""
    energy, along, left = 0.0, list[Tensor](), list[Tensor]()
    for first, last in _blocks(grid, *rows):
        if stopped():
            break
        block = grid.load(first, last)
        basis = basis.to(block)
        energy += _energy(block)
        weight = block @ basis.T
        norms = _row_norms(block) if recipe.keep_norms else None
        _subtract(block, weight, basis, recipe.scale)
        if norms is not None:
            _restore(block, norms)
        along.append(weight)
        left.append(grid.store(first, block) @ basis.T)
    return Sums(energy, _square(torch.cat(along)), _left(torch.cat(left))) if along else Sums()


def _along_rows(
    grid: Grid,
    basis: Tensor,
    recipe: Recipe,
    rows: tuple[int, int],
    stopped: Callable[[], bool],
) -> Sums:
    """d_model is the rows: sum over all of them, then subtract."""
    energy, weight = 0.0, None
    for first, last in _blocks(grid, *rows):
        if stopped():
            return Sums()
        block = grid.load(first, last)
        basis = basis.to(block)
        part = basis[:, first:last] @ block
        weight = part if weight is None else weight.add_(part)
        energy += _energy(block)
    if weight is None:
        return Sums()
    remaining = torch.zeros_like(weight)
    for first, last in _blocks(grid, *rows):
        if stopped():
            break
        block = grid.load(first, last)
        norms = _row_norms(block) if recipe.keep_norms else None
        part = basis[:, first:last]
        _subtract(block, part.T, weight, recipe.scale)
        if norms is not None:
            _restore(block, norms)
        remaining += part @ grid.store(first, block)
    return Sums(energy, _square(weight), _left(remaining))


def apply_in_blocks(grid: Grid, basis: Tensor, across: bool) -> tuple[Tensor, float]:
    """What lies along the directions, ``[k, columns]`` or where ``across`` ``[k, rows]``.

    Args:
        grid: the matrix; it is only read.
        basis: ``[k, d_model]``.
        across: d_model is the grid's columns, else its rows.

    Returns:
        The coefficients in the grid's wide dtype, and the matrix's squared norm.

    Raises:
        CheckpointError: the matrix holds NaN or infinity.
    """
    energy, parts = 0.0, []
    for first, last in _blocks(grid, 0, grid.rows):
        block = grid.load(first, last)
        basis = basis.to(block)
        energy += _energy(block)
        if across:
            parts.append(basis @ block.T)
        elif parts:
            parts[0] += basis[:, first:last] @ block
        else:
            parts.append(basis[:, first:last] @ block)
    return torch.cat(parts, dim=1), energy


def _blocks(grid: Grid, first: int, last: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_ELEMENTS // grid.columns)
    step = max(grid.row_step, step - step % grid.row_step)
    for row in range(first, last, step):
        yield row, min(row + step, last)


def _subtract(block: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``block -= scale * left @ right`` for ``[n, k]`` and ``[k, m]``."""
    if right.shape[0] == 1:
        block.addr_(left[:, 0], right[0], alpha=-scale)
    else:
        block.addmm_(left, right, alpha=-scale)


def _row_norms(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    return norms


def _restore(block: Tensor, norms: Tensor) -> None:
    now = _row_norms(block)
    # A row that lay along the direction alone has nothing left that could carry its norm.
    block.mul_(torch.where(now > 1e-6 * norms, norms / now, torch.ones_like(now)))


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
    return float(values.to(torch.float64).square_().sum())


def _left(values: Tensor) -> float:
    left = _square(values)
    if not math.isfinite(left):
        raise CheckpointError("has values that no longer fit its dtype once it is edited")
    return left
