"""Is the change of one matrix a projection, along directions of its own or along given ones?

``W' = W - s u u^T W`` changes ``W`` along ``u`` in proportion to what it had there: the change has
rank 1 and its right vector is ``u^T W``. A merged LoRA has the rank without the proportion, decay
(``W' = 0.98 W``) the proportion in every direction and so no rank of its own. With ``k`` directions
``U`` the rows ``U^T (W' - W)`` are a linear map of the rows ``U^T W``.

Matrices lie as ``[d_model, columns]``: writers as they are, readers transposed, so that the ``u``
of a reader is the direction that it no longer reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from abliterate.auditing.grams import FIT, WHOLE, Grams, Projection, few_channels

#: Left vectors of each difference that are looked at: the most directions that are told apart.
TOP = 8
#: Changed columns that each direction takes; fewer fit whatever was done.
COLUMNS = 16
_ROWS = 0.5  # of the channels that have to change at all: else rows were replaced or pruned
_SHARE = 0.9  # of the change's energy
_MOST = 0.6  # the same where rows or columns were rescaled after the projection
#: Squared cosine of a tensor's left vector with a direction that is the same.
SAME = 0.9
# What rescaled rows leave unexplained of what the plain projection does; what is not looked at.
_EXPLAINED, _EXACT, _ROUNDS = 0.1, 1e-6, 6
_TRIED = 64  # columns on which that is tried first
# Of the first vectors: how many more are found beside them, and from how many times those on the
# cheaper way is taken; powers of the change, and the relative error at which one counts as known.
_ASIDE, _WIDE, _POWERS, _FOUND = 16, 8, 4, 1e-9
# Of an approximation of lower rank: columns that are compared with each other, the energy of their
# products over that of random ones, and the share of all directions that are no longer few.
_BESIDE, _ORTHOGONAL, _MANY = 8, 0.01, 0.125


def left_vectors(delta: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first left singular vectors ``[d_model, at most count]``, and shares of the energy.

    Shares fall; those of ``count`` vectors are there at least, if there are as many.
    """
    narrow = min(delta.shape)
    if narrow > _WIDE * (count + _ASIDE):
        left, shares = _first_vectors(delta, count)
    elif delta.shape[0] <= delta.shape[1]:
        values, vectors = torch.linalg.eigh(delta @ delta.T)
        left = vectors.flip(1)[:, :count]
        shares = values.flip(0).clamp(min=0)
        shares = shares / shares.sum()
    else:
        values, vectors = torch.linalg.eigh(delta.T @ delta)
        left = delta @ vectors.flip(1)[:, :count]
        shares = values.flip(0).clamp(min=0)
        shares = shares / shares.sum()
    held = int((shares[: left.shape[1]] > 1e-12 * shares[0]).sum())
    left = left[:, : max(1, held)]
    return left / left.norm(dim=0), shares


def _first_vectors(delta: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same for less than half of the work.

    What stands far above the rest is found by a few powers in float64 and taken out, so that
    rounding is small beside what is left; the first vectors of that are found in float32. In the
    span of both (and some more, which take up what is mixed among neighbours) the singular values
    are those of the change, but for the square of what the vectors are off by.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(delta), count, generator=generator, dtype=delta.dtype)
    for _ in range(_POWERS):
        block = torch.linalg.qr(delta @ (block.T @ delta).T)[0]  # delta.T @ block takes far longer
    rows = block.T @ delta
    values, turn = torch.linalg.eigh(rows @ rows.T)
    values, turn = values.flip(0), turn.flip(1)
    off = (delta @ (rows.T @ turn) - block @ turn * values).norm(dim=0)
    block = block @ turn
    known = int((off <= _FOUND * values).cumprod(0).sum())
    apart = block[:, :known]
    rest = (delta - apart @ (apart.T @ delta)).float()
    gram = rest @ rest.T if len(rest) <= rest.shape[1] else rest.T @ rest
    beside = torch.linalg.eigh(gram)[1][:, -(count + _ASIDE) :].flip(1)
    if len(rest) > rest.shape[1]:
        beside = rest @ beside
    basis = torch.linalg.qr(torch.cat([apart, beside.double()], dim=1))[0]
    inside = basis.T @ delta
    values, turn = torch.linalg.eigh(inside @ inside.T)
    left = basis @ turn.flip(1)[:, :count]
    return left, values.flip(0).clamp(min=0)[:count] / delta.square().sum()


def changed_columns(delta: Tensor) -> int:
    """Columns of ``[d_model, m]`` that changed; 0 where few channels did: those were replaced."""
    changed = delta != 0
    if float(changed.any(dim=1).double().mean()) < _ROWS:
        return 0
    return int(changed.any(dim=0).sum())


def rescaled_alone(before: Tensor, delta: Tensor, first: float) -> bool:
    """Whether channels or columns took factors of their own and nothing else changed.

    Gains folded into matrices and scales moved from one to the next do this. Along a few channels
    together it looks like a projection with a scale of its own each.

    Args:
        before: ``[d_model, m]``.
        delta: its change, not zero.
        first: share of that in its first direction.
    """
    if first >= WHOLE:
        return False
    energy = float(delta.square().sum())
    return _left_by_factors(before, delta) <= (1 - WHOLE) * energy


def _left_by_factors(before: Tensor, delta: Tensor) -> float:
    """Energy of the change that factors of rows alone, or of columns alone, leave unexplained."""
    left = float(delta.square().sum())
    explained = [
        float(((before * delta).sum(dim=axis).square() / energy.clamp(min=1e-300)).sum())
        for axis in (0, 1)
        for energy in (before.square().sum(dim=axis),)
    ]
    return max(0.0, left - max(explained))


def is_truncation(before: Tensor, delta: Tensor, shares: Tensor) -> bool:
    """Whether a matrix was replaced by an approximation of lower rank: it lost many directions.

    ``D = -P W`` with a projector ``P``, so that the change is orthogonal to what is left in every
    pair of columns, as after an edit of scale 1; but an edit takes out few directions. Of other
    changes such products are as large as those of random vectors.

    Args:
        before: float64 ``[d_model, m]``.
        delta: its change, not zero.
        shares: of its energy, falling.
    """
    if float(shares[:TOP].sum()) >= WHOLE:
        return False
    size = delta.shape[1] // _BESIDE * _BESIDE
    if size == 0:
        return False
    # Of neighbouring columns alone: of a stack those of one expert, which was truncated by itself.
    lost, kept = (
        m[:, :size].reshape(len(m), -1, _BESIDE).movedim(1, 0) for m in (delta, before + delta)
    )
    products = (lost.mT @ kept).square().sum(dim=(1, 2))
    chance = lost.square().sum(dim=(1, 2)) * kept.square().sum(dim=(1, 2)) / len(delta)
    if float(products.sum()) > _ORTHOGONAL * float(chance.sum()):
        return False
    narrow = delta if len(delta) <= delta.shape[1] else delta.T
    values = torch.linalg.eigvalsh(narrow @ narrow.T).flip(0).clamp(min=0)
    count = 1 + int((values.cumsum(0) < WHOLE * values.sum()).sum())
    return count > max(TOP + 2, _MANY * len(values))


def own_projection(
    before: Tensor, delta: Tensor, left: Tensor, shares: Tensor, rounding: float
) -> Projection | None:
    """Whether a matrix was projected along directions of its own.

    Args:
        before: float64 ``[d_model, m]``.
        delta: its change, not zero.
        left: the first left vectors of that.
        shares: of its energy, falling.
        rounding: energy of the change that rounding may account for.
    """
    columns = changed_columns(delta)
    if columns == 0:
        return None
    energy = float(delta.square().sum())
    if columns < delta.shape[1]:
        held = (delta != 0).any(dim=0)
        before, delta = before[:, held], delta[:, held]
    seen = Grams.of(before, delta, left)
    room = columns // COLUMNS
    signal = 1 - min(rounding / energy, 0.5)
    if room and float(shares[0]) >= _MOST * signal and (one := seen.span(1, left)) is not None:
        one = _rescaled(before, delta, one, rounding)
        if one.rescaled is not None:  # what else changed is no direction
            return one
    if room and float(shares[0]) < WHOLE * signal:
        factors = _mostly_rescaled(before, delta, left[:, :1], rounding)
        if factors is not None:
            return factors
    for wanted in (WHOLE, _SHARE):
        for count in range(1, min(left.shape[1], room) + 1):
            if float(shares[:count].sum()) >= wanted * signal:
                if (found := seen.span(count, left)) is not None:
                    inside = torch.eye(left.shape[1], dtype=left.dtype)[:, :count]
                    if seen.only_grown(found.fit, inside):
                        return None
                    return _sharpened(before, delta, found)
                break
    return seen.hidden(left) if room >= left.shape[1] else None


def _sharpened(before: Tensor, delta: Tensor, found: Projection) -> Projection:
    """The same projection where a little else changed, which tilts the left vectors.

    ``D W^T U (U^T W W^T U)^-1`` is ``-s U`` again, but for the rest, which averages out.
    """
    basis = found.basis
    for _ in range(2):
        had = basis.T @ before
        gram = had @ had.T
        if float(torch.linalg.matrix_rank(gram, hermitian=True)) < len(gram):
            return found
        basis = torch.linalg.qr(torch.linalg.solve(gram, had @ delta.T).T)[0]
    had = basis.T @ before
    response = torch.linalg.solve(had @ had.T, had @ delta.T @ basis)
    near = float(torch.linalg.svdvals(basis.T @ found.basis)[-1]) ** 2 >= SAME
    scale = -float(response.diagonal().mean())
    return replace(found, basis=basis, scale=scale) if near else found


def _rescaled(before: Tensor, delta: Tensor, found: Projection, rounding: float) -> Projection:
    """The same projection, with the factors told apart that rows or columns took afterwards.

    ``W'_i = d_i (W_i - a_i h)`` with ``h = u^T W`` and ``a = s u`` is linear in each row, and
    ``W'_j = e_j (W_j - s h_j u)`` in each column.
    """
    unit = found.basis[:, 0]
    plain = float((delta + found.scale * torch.outer(unit, unit @ before)).square().sum())
    changed = float(delta.square().sum())
    if plain <= max(2 * rounding, _EXACT * changed):
        return found
    after, best = before + delta, found
    for axis in ("rows", "columns"):
        unit, scale = found.basis[:, 0], found.scale
        for _ in range(_ROUNDS):
            had = unit @ before
            if axis == "rows":
                kept, along = _regress(after, before, had.expand_as(before))
                lost = -along / _nonzero(kept)
                scale = float(lost.norm()) * sign_of_product(lost, unit)
                unit = lost / scale
            else:
                kept, along = _regress(after.T, before.T, unit.expand_as(before.T))
                lost = -along / _nonzero(kept)
                scale = float(lost @ had / (had @ had))
                turned = (after / _nonzero(kept) - before) @ had
                unit = turned / turned.norm() * sign_of_product(turned, unit)
        rest = before - scale * torch.outer(unit, unit @ before)
        new = kept.unsqueeze(1) * rest if axis == "rows" else rest * kept
        left = float((after - new).square().sum())
        if left < _EXPLAINED * plain:
            fit = 1 - left / changed
            best, plain = Projection(unit.unsqueeze(1), scale, fit, True, axis), left / _EXPLAINED
    return best


def _mostly_rescaled(
    before: Tensor, delta: Tensor, start: Tensor, rounding: float
) -> Projection | None:
    """A projection where the factors that rows or columns took then are most of the change.

    Norms that are kept along a direction that was written strongly do this: no left vector shows
    it, but the fit finds it from the first one. It has to explain all of the change, and factors
    alone far less. What else training does fails on a few columns already.
    """
    found = Projection(start, 0.0, 0.0, whole=False)
    step = before.shape[1] // _TRIED
    if step > 1:
        found = _rescaled(before[:, ::step], delta[:, ::step], found, rounding / step)
        if found.fit < FIT:
            return None
        found = Projection(found.basis, 0.0, 0.0, whole=False)
    found = _rescaled(before, delta, found, rounding)
    if found.rescaled is None or found.fit < WHOLE or few_channels(found.basis):
        return None
    left = (1 - found.fit) * float(delta.square().sum())
    return found if left < _EXPLAINED * _left_by_factors(before, delta) else None


def _regress(target: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients with which each row of two matrices gives that of a third best."""
    a, b, c = (one * one).sum(1), (one * two).sum(1), (two * two).sum(1)
    x, y = (target * one).sum(1), (target * two).sum(1)
    determinant = a * c - b * b
    usable = determinant > 1e-12 * a * c
    safe = torch.where(usable, determinant, torch.ones_like(determinant))
    first = torch.where(usable, (x * c - y * b) / safe, torch.ones_like(a))
    second = torch.where(usable, (y * a - x * b) / safe, torch.zeros_like(a))
    return first, second


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values.abs() < 1e-6, torch.ones_like(values), values)


def sign_of_product(one: Tensor, two: Tensor) -> float:
    """The sign of an inner product, 1 for zero."""
    return 1.0 if float(one @ two) >= 0 else -1.0


def sign_of(vector: Tensor) -> float:
    """A direction and its negative are one: the largest entry is positive."""
    return 1.0 if float(vector[vector.abs().argmax()]) > 0 else -1.0
