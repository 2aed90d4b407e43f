"""Eigenproblems of the audit: exact in float64 where they are small, cheaper where they are not.

Above ``WIDE`` channels grams are kept in float32, whose rounding lies well below that of weights
stored in 16 bits, and only the lowest eigenvectors are found where no more is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Widths above this are computed by the cheaper ways.
WIDE = 2048
_STEPS = 400  # of Lanczos
_CHECK = 25
# A float32 eigendecomposition is off by about this share of the largest eigenvalue.
_ROUNDING = 1e-6


def precision(width: int) -> torch.dtype:
    """The dtype that grams of this width are kept in."""
    return torch.float32 if width > WIDE else torch.float64


def eigh(gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; small ones exact to ``floor`` times the median eigenvalue."""
    values, vectors = torch.linalg.eigh(gram)
    if gram.dtype == torch.float32 and float(values[-1]) * _ROUNDING > 0.5 * floor * float(
        values.median()
    ):
        values, vectors = torch.linalg.eigh(gram.double())
        return values.float(), vectors.float()
    return values, vectors


def lower_edge(matrix: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues, rising, and the lowest eigenvector; both on the CPU in float64.

    Eigenvalues always come from a dense solver, so that multiple ones are seen as such.
    """
    if len(matrix) <= WIDE:
        values, vectors = torch.linalg.eigh(matrix)
        return values.cpu(), vectors[:, 0].cpu()
    return torch.linalg.eigvalsh(matrix).double().cpu(), lowest_vector(matrix, seed)


def lowest_vector(matrix: Tensor, seed: int) -> Tensor:
    """The eigenvector of the lowest eigenvalue, on the CPU in float64, ``[d]``.

    Args:
        matrix: symmetric, ``[d, d]``.
        seed: of the start of the Lanczos iteration, where the matrix is wide.
    """
    width = len(matrix)
    if width <= WIDE:
        return _unit(torch.linalg.eigh(matrix)[1][:, 0])
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, generator=generator).to(matrix)
    basis = torch.zeros(_STEPS + 1, width, dtype=matrix.dtype, device=matrix.device)
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(_STEPS):
        new = matrix @ basis[step]
        diagonal.append(float(new @ basis[step]))
        for _ in range(2):  # full reorthogonalisation, twice
            known = basis[: step + 1]
            new = new - known.T @ (known @ new)
        beside.append(float(new.norm()))
        last = step == _STEPS - 1 or beside[-1] < 1e-6
        if (step + 1) % _CHECK == 0 or last:
            small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            off = torch.tensor(beside[:-1], dtype=torch.float64)
            small += torch.diag(off, 1) + torch.diag(off, -1)
            values, vectors = torch.linalg.eigh(small)
            residual = beside[-1] * abs(float(vectors[-1, 0]))
            if last or residual < 1e-3 * float(values[1] - values[0]):
                break
        basis[step + 1] = new / beside[-1]
    return _unit(vectors[:, 0].to(basis) @ basis[: len(diagonal)])


def _unit(vector: Tensor) -> Tensor:
    wide = vector.double().cpu()
    out: Tensor = wide / wide.norm()
    return out


def emptiest(gram: Tensor, start: Tensor) -> Tensor:
    """The lowest eigenvector of a positive semidefinite matrix, near a start if it is wide.

    Args:
        gram: ``[d, d]``.
        start: unit, float64 ``[d]`` on the CPU; inverse iteration begins there.
    """
    if len(gram) <= WIDE:
        return _unit(torch.linalg.eigh(gram)[1][:, 0])
    exact = gram.double()
    exact.diagonal().add_(1e-7 * exact.diagonal().mean())
    factor = torch.linalg.cholesky(exact)
    current = start.to(exact).unsqueeze(1)
    for _ in range(8):
        current = torch.cholesky_solve(current, factor)
        current = current / current.norm()
    return _unit(current[:, 0])
