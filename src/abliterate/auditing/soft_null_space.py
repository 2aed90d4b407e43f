"""How empty each direction of a writer is, and the upper edge of such matrices' spectra.

The emptiness of a writer with gram ``G`` is ``K = t (G + t)^-1``: 1 along a direction that it does
not write, near 0 along one that it writes strongly. The shift ``t`` is the energy at which a
direction begins to count as empty; it is chosen so that the mean emptiness is always the same.

Up to ``WIDE`` channels everything is dense, and in float64 unless float32 is shown to be enough.
Above, grams are float32, whose rounding lies well below that of weights stored in 16 bits; the
shift is found with random probes, so that a matrix costs some Cholesky factors and one inverse; and
only the uppermost eigenvectors are found.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Widths above this are computed by the cheaper ways.
WIDE = 1024
#: Up to here a gram costs next to nothing, in float64 too.
_NARROW = 256
#: Mean emptiness of the directions that a writer writes at all.
SHARE = 0.2
_NOTHING = 1e-9  # eigenvalues below this share of the largest are those of directions not written
_PROBES, _TRIALS, _NEAR = 16, 12, 0.01
# Shifts below these multiples of the mean eigenvalue want float64: the factor, and the gram too.
# (At 2048 channels K is then off by 6e-4 at 4e-3 with both in float32, and by 6e-3 at 2e-4 with the
# gram alone in it.)
_FINE_FACTOR, FINE_GRAM = 1e-3, 1e-4
# Float32 is enough for a dense gram, whose eigenvalues it rounds by some 1e-7 of the largest, where
# all of them exceed the first share of that (so that none is taken for unwritten, or the other way
# round) and the shift the second: K is off by less than the rounding over the shift. (At 512 and
# 576 channels, in norm: by 2e-7 to 6e-7 at shifts from 2e-2 on, by 2e-6 at 5e-3.)
_WRITTEN, _FLAT = 1e-5, 2e-3
_BLOCK, _MAX_VECTORS, _CHECK = 12, 1440, 4
_BESIDE = 16  # eigenvectors beside the wanted ones, which take up what is mixed among neighbours
_CONVERGED = 0.1  # largest residual, in units of the spread that gaps are compared with


def is_wide(width: int) -> bool:
    """Whether this many channels are computed by the cheaper ways."""
    return width > WIDE


def precision(width: int) -> torch.dtype:
    """The dtype that grams of this width are made in."""
    return torch.float32 if is_wide(width) or width > _NARROW else torch.float64


def storage(width: int) -> torch.dtype:
    """The dtype that emptiness is kept in: its entries lie in -1 ... 1."""
    return torch.float16 if is_wide(width) else torch.float32


def emptiness(gram: Tensor, unwritten: int, guess: float) -> tuple[Tensor | None, float]:
    """``t (G + t)^-1``, symmetric, with eigenvalues in 0 ... 1.

    Args:
        gram: ``[d, d]``, positive semidefinite; only its lower triangle is read, and its diagonal
            is changed.
        unwritten: directions that are known to have no energy at all, where that is not measured.
        guess: of the shift, as a multiple of the mean eigenvalue; where to begin if it is wide.

    Returns:
        The emptiness (None where a dense spectrum is too steep for a gram in float32), and the
        shift as a multiple of the mean eigenvalue.
    """
    mean = float(gram.diagonal().mean())
    if mean == 0:  # it says nothing of any direction
        return SHARE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), guess
    if not is_wide(len(gram)):
        values = torch.linalg.eigvalsh(gram).double()
        coarse, largest = gram.dtype == torch.float32, float(values[-1])
        shift = _exact_shift(values)
        if coarse and (float(values[0]) < _WRITTEN * largest or shift < _FLAT * largest):
            return None, shift / mean
        gram.diagonal().add_(shift)
        factor = torch.linalg.cholesky(gram)
    else:
        factor, shift = _probed_shift(gram, min(unwritten, len(gram) - 1), guess * mean, mean)
    return torch.cholesky_inverse(factor).mul_(shift), shift / mean


def _exact_shift(values: Tensor) -> float:
    """Newton's method on the logit of the mean emptiness, which is nearly linear in ``log t``.

    A step that leaves the bounds known so far halves them.
    """
    present = values[values > _NOTHING * values[-1]]
    low, high = float(present[0].log()) - 7, float(present[-1].log()) + 7
    at = math.log(SHARE * float(present.mean()))
    for _ in range(60):
        empty = 1 / (1 + present / math.exp(at))
        share = float(empty.mean())
        low, high = (at, high) if share < SHARE else (low, at)
        slope = share - float(empty.square().mean())
        new = (low + high) / 2
        if slope > 0:
            step = math.log(SHARE / (1 - SHARE)) - math.log(share / (1 - share))
            newton = at + step * share * (1 - share) / slope
            new = newton if low <= newton <= high else new
        if abs(new - at) < 1e-13 * max(1.0, abs(at)):
            return math.exp(new)
        at = new
    return math.exp(at)


def _probed_shift(gram: Tensor, unwritten: int, shift: float, mean: float) -> tuple[Tensor, float]:
    """Newton's method on the logit of the mean emptiness; the factor of ``G + t`` and ``t``."""
    width = len(gram)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (width, _PROBES), generator=generator).to(gram) * 2 - 1
    diagonal = gram.diagonal().clone()
    # Below this rounding decides. Writers of low rank leave so much unwritten that they get here.
    least = mean * (_NOTHING if gram.dtype == torch.float64 else FINE_GRAM / 10)
    shift, trial = max(shift, least), 0
    while True:
        fine = gram.double() if shift < _FINE_FACTOR * mean else gram
        fine.diagonal().copy_(diagonal.to(fine) + shift)
        factor, failed = torch.linalg.cholesky_ex(fine)
        if int(failed):  # rounding left the gram indefinite
            least = shift = 4 * shift  # and no smaller one is tried again
            continue
        trial += 1
        solved = torch.cholesky_solve(probes.to(fine), factor) * shift
        share = float((probes.to(fine) * solved).sum()) / _PROBES - unwritten
        share = min(max(share / (width - unwritten), 1e-6), 1 - 1e-6)
        if abs(share - SHARE) < _NEAR or trial == _TRIALS:
            break
        # The share grows with log t at the mean of K (1 - K) over the directions that are written.
        squared = float(solved.square().sum()) / _PROBES - unwritten
        slope = share - squared / (width - unwritten)
        slope = max(slope / (share * (1 - share)), 0.1)
        step = (math.log(SHARE / (1 - SHARE)) - math.log(share / (1 - share))) / slope
        wanted = max(least, shift * math.exp(max(-5.0, min(5.0, step))))
        if wanted == shift:
            break
        shift = wanted
    return factor, shift


def upper_edge(
    matrix: Tensor, count: int, seed: int, precise: float = 0.05, kept: int = 1
) -> tuple[Tensor, Tensor]:
    """The uppermost eigenvalues, falling, and the first eigenvectors; on the CPU in float64.

    Args:
        matrix: symmetric, ``[d, d]``.
        count: of eigenvalues, at least; 1 if only the eigenvector is wanted.
        seed: of the start, where the matrix is wide.
        precise: largest error of the first eigenvector, about, if one stands apart.
        kept: eigenvectors that are returned.

    Returns:
        The eigenvalues, and ``[d, kept]``.
    """
    if is_wide(len(matrix)):
        return _krylov(matrix, count, seed, precise, kept)
    span = max(count, kept) + _BESIDE
    if len(matrix) <= 4 * span:
        values, vectors = torch.linalg.eigh(matrix.double())
    else:
        values, vectors = _refined_edge(matrix, span)
    return values.flip(0).cpu(), _unit(vectors.flip(1)[:, :kept])


def _refined_edge(matrix: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """The uppermost ``span`` eigenvalues, rising, and their vectors, for little more than half.

    Vectors found in float32 are off by rounding over the distance to what is not among them; in
    their span the eigenvalues are those of the matrix but for the square of that.
    """
    rough = torch.linalg.eigh(matrix.float())[1][:, -span:]
    basis = torch.linalg.qr(rough.double())[0]
    values, inside = torch.linalg.eigh(basis.T @ (matrix.double() @ basis))
    return values, basis @ inside


def _krylov(
    matrix: Tensor, count: int, seed: int, precise: float, kept: int
) -> tuple[Tensor, Tensor]:
    """Block Lanczos with full reorthogonalisation; eigenvalues less multiple than a block are seen.

    Ritz values lie below the eigenvalues; it ends when the residuals are small beside their spread.
    """
    width = len(matrix)
    max_blocks = min(_MAX_VECTORS, width) // _BLOCK
    generator = torch.Generator().manual_seed(seed)
    block = torch.linalg.qr(torch.randn(width, _BLOCK, generator=generator).to(matrix))[0]
    basis = block.new_zeros(width, max_blocks * _BLOCK)
    small = torch.zeros(max_blocks * _BLOCK, max_blocks * _BLOCK, dtype=torch.float64)
    for step in range(max_blocks):
        known = slice(0, (step + 1) * _BLOCK)
        present = slice(step * _BLOCK, (step + 1) * _BLOCK)
        basis[:, present] = block
        new = matrix @ block
        inside = basis[:, known].T @ new
        small[known, present] = inside.double().cpu()
        small[present, known] = small[known, present].T
        new -= basis[:, known] @ inside
        new -= basis[:, known] @ (basis[:, known].T @ new)
        block, rest = torch.linalg.qr(new)
        block -= basis[:, known] @ (basis[:, known].T @ block)
        block = torch.linalg.qr(block)[0]
        last = step == max_blocks - 1 or float(rest.norm()) < 1e-6
        if last or (step + 1) % _CHECK == 0:
            values, vectors = torch.linalg.eigh(small[known, known])
            values, vectors = values.flip(0), vectors.flip(1)
            residuals = (rest.double().cpu() @ vectors[present, :count]).norm(dim=0)
            least = 0.02 * float(values[0] - values[_BLOCK - 1])
            apart = max(float(values[0] - values[1]), least)
            first = float(residuals[0]) < precise * apart
            spread = max(float(values[1] - values[count - 1]), least) if count > 1 else 1.0
            if last or (first and float(residuals[1:].sum()) < _CONVERGED * spread):
                break
    return values[:count], _unit(basis[:, known] @ vectors[:, :kept].to(basis))


def _unit(vectors: Tensor) -> Tensor:
    upcast = vectors.double().cpu()
    out: Tensor = upcast / upcast.norm(dim=0)
    return out
