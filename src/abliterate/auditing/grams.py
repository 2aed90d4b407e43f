"""What matrices had and lost along given vectors, and along which of these they were projected.

Inner products are enough to tell that of many matrices at once: none of them is kept. Matrices lie
as in :mod:`abliterate.auditing.projections`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Of what changed along the directions, explained by what was there.
FIT = 0.9
WHOLE = 0.99  # of the change's energy: all but rounding
_FEW, _FEW_SHARE = 4, 0.9  # channels that are no direction, and what they hold of one
_EVEN = 0.2  # of the largest scale: the least of directions that were lost together
_ALONE = 0.95  # fit where other changes hide the rank, and no other tensor vouches for it
_DOMINANT = 0.25  # of a matrix's energy: more lies along what dominates it
_EACH = 0.8  # squared cosine of each of several directions with what it should be
# Along the direction this many times the share that the rest lost: more than decay.
_APART = 3.0
#: Smallest share that counts where other changes hide the rank.
CLEAR = 0.2
# Of a left vector: the least that lies beside a direction. Of what changed along that: the least
# that changed along others which are told apart from it (more than a tilted direction leaves).
_BESIDE, _STRONG = 0.3, 0.5


@dataclass(frozen=True)
class Projection:
    """How one matrix lost directions of its own.

    Attributes:
        basis: float64 ``[d_model, k]``, orthonormal.
        scale: the mean ``s`` of ``W - s U U^T W``; negative where it was amplified.
        fit: share of what changed along them that is proportional to what was there.
        whole: nothing else changed, but for rounding and rescaling.
        rescaled: ``rows`` or ``columns``, where those were multiplied by factors of their own
            after the projection (to keep their norms, usually); else None.
    """

    basis: Tensor = field(repr=False)
    scale: float
    fit: float
    whole: bool
    rescaled: str | None = None


@dataclass(frozen=True)
class Grams:
    """What a matrix had and lost along given vectors, as inner products: no matrix is kept.

    Attributes:
        had: ``B^T W W^T B`` of the vectors ``B`` ``[d_model, n]``.
        both: ``B^T D W^T B`` of the change ``D``.
        lost: ``B^T D D^T B``.
        inner: ``B^T B``.
        energy: ``|W|^2``.
        cross: ``<D, W>``.
        changed: ``|D|^2``.
    """

    had: Tensor
    both: Tensor
    lost: Tensor
    inner: Tensor
    energy: float
    cross: float
    changed: float

    @classmethod
    def of(cls, before: Tensor, delta: Tensor, vectors: Tensor) -> Grams:
        """Of the columns that changed, ``[d_model, m]``."""
        had, lost = vectors.T @ before, vectors.T @ delta
        return cls(
            had @ had.T,
            lost @ had.T,
            lost @ lost.T,
            vectors.T @ vectors,
            float(before.square().sum()),
            float((before * delta).sum()),
            float(delta.square().sum()),
        )

    def along(self, inside: Tensor) -> tuple[float, float]:
        """Signed scale and fit along ``B c`` for ``c`` ``[n]``; (0, 0) where nothing was there."""
        had, both = float(inside @ self.had @ inside), float(inside @ self.both @ inside)
        lost = float(inside @ self.lost @ inside)
        if had <= 0 or lost <= 0:
            return 0.0, 0.0
        return -both / had, both**2 / (had * lost)

    def share(self, inside: Tensor) -> float:
        """Share of the change's energy along ``B c``."""
        return (
            float(inside @ self.lost @ inside) / self.changed / float(inside @ self.inner @ inside)
        )

    def beyond_decay(self, scale: float, inside: Tensor) -> bool:
        """Whether the rest lost far less than ``scale`` of itself.

        Args:
            scale: of the directions.
            inside: their coordinates ``c``, ``[n]`` or ``[n, k]``, of orthogonal ``B c``.
        """
        columns = inside.reshape(len(self.had), -1)
        lengths = (columns * (self.inner @ columns)).sum(dim=0)
        had = float(((columns * (self.had @ columns)).sum(dim=0) / lengths).sum())
        both = float(((columns * (self.both @ columns)).sum(dim=0) / lengths).sum())
        rest = self.energy - had
        if rest <= 1e-6 * self.energy:  # nothing else is there: decay looks the same
            return False
        return abs(scale) >= _APART * abs((self.cross - both) / rest)

    def only_grown(self, fit: float, inside: Tensor) -> bool:
        """Whether a matrix changed along what dominates it, and only nearly in proportion.

        Training does this: the rows of tokens that are never seen move together, say. A projection
        leaves the proportion exact whatever is trained on top, as that is little along it.

        Args:
            fit: of the change along ``B c``.
            inside: ``c``, ``[n]`` or ``[n, k]``, of orthogonal ``B c``.
        """
        columns = inside.reshape(len(self.had), -1)
        lengths = (columns * (self.inner @ columns)).sum(dim=0)
        held = float(((columns * (self.had @ columns)).sum(dim=0) / lengths).sum())
        return fit < WHOLE and held > _DOMINANT * self.energy

    def shows_alone(self, fit: float, inside: Tensor) -> bool:
        """Whether one matrix is enough, where other changes hide the rank."""
        return fit >= _ALONE and not self.only_grown(fit, inside)

    def response(self) -> Tensor:
        """The map that takes ``B^T W`` to ``B^T D`` best, ``-s c c^T`` for a projection ``[n, n]``.

        What else changed has nothing to do with ``W`` and averages out.
        """
        damped = self.had + 1e-9 * self.had.trace() / len(self.had) * torch.eye(
            len(self.had), dtype=self.had.dtype
        )
        found: Tensor = torch.linalg.solve(damped, self.both.T).T
        return found

    def span(self, count: int, left: Tensor) -> Projection | None:
        """Projected along the first ``count`` vectors together, which hold all of the change."""
        first = slice(0, count)
        cut = Grams(
            self.had[first, first], self.both[first, first], self.lost[first, first],
            self.inner[first, first], self.energy, self.cross, self.changed,
        )  # fmt: skip
        if float(cut.had.trace()) <= 0:
            return None
        response = cut.response()
        explained = (response @ cut.both.T).diagonal()
        each = explained / cut.lost.diagonal()
        fit = float(explained.sum() / cut.lost.trace())
        scale = -float(response.diagonal().mean())
        whole = torch.eye(count, dtype=left.dtype)
        if fit < FIT or float(each.min()) < _EACH or few_channels(left[:, first]):
            return None
        if not cut.beyond_decay(scale, whole):
            return None
        each = torch.linalg.eigvalsh(_symmetric(response))
        least, most = each.abs().min(), each.abs().max()
        if bool((each.sign() != each[0].sign()).any()) or float(least) < _EVEN * float(most):
            return None  # one took something away, another gave: no projection of all
        return Projection(left[:, first], scale, fit, whole=True)

    def hidden(self, left: Tensor) -> Projection | None:
        """Projected along some combination of the vectors, among other changes."""
        if float(self.had.trace()) <= 0:
            return None
        vectors = torch.linalg.eigh(-_symmetric(self.response()))[1]
        kept = []
        for inside in (*vectors.T, *torch.eye(len(vectors), dtype=vectors.dtype)):
            scale, fit = self.along(inside)
            clear = abs(scale) >= CLEAR and self.beyond_decay(scale, inside)
            clear = clear and self.shows_alone(fit, inside)
            if clear and not few_channels((left @ inside).unsqueeze(1)):
                kept.append((inside, scale, fit))
        if not kept:
            return None
        inside, scale, fit = max(kept, key=lambda one: self.share(one[0]))
        return Projection((left @ inside).unsqueeze(1), scale, fit, whole=False)


def pooled_directions(members: list[Grams]) -> Tensor:
    """Coordinates ``[n, n]`` in which several matrices may have been projected, best first.

    Each matrix's vectors are the same ones as they are there (behind its gains, say), so that its
    response is ``-s c c^T`` in their coordinates, whatever else changed.
    """
    size = len(members[0].had)
    had, both = (
        torch.zeros(size, size, dtype=torch.float64),
        torch.zeros(size, size, dtype=torch.float64),
    )
    for one in members:
        whole = float(one.had.trace())
        if whole > 0:
            mean = float(one.inner.trace()) / size
            had += one.had / whole
            both += torch.linalg.lstsq(one.inner, one.both).solution * mean / whole
    damped = had + 1e-9 * had.trace() / size * torch.eye(size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(_symmetric(torch.linalg.solve(damped, both.T).T))
    order = values.abs().argsort(descending=True)
    return torch.index_select(vectors, 1, order)


def scale_beside(before: Tensor, delta: Tensor, direction: Tensor, left: Tensor) -> float:
    """The scale along a direction where a merged LoRA, say, changed a few others more.

    What that adds along the direction, ``(u . r) v``, has nothing to do with what was there, but of
    few columns it seems to. Its right vectors ``v`` show in the other directions, so they are
    explained together.

    Args:
        before: float64 ``[d_model, m]``.
        delta: its change.
        direction: ``r``, ``[d_model]``, not zero.
        left: first left vectors of the change, ``[d_model, n]``.
    """
    unit = direction / direction.norm()
    had, lost = unit @ before, unit @ delta
    sides, values, _ = torch.linalg.svd(left - torch.outer(unit, unit @ left), full_matrices=False)
    _, strengths, right = torch.linalg.svd(
        sides[:, values > _BESIDE].T @ delta, full_matrices=False
    )
    strong = right[strengths > _STRONG * lost.norm()]
    causes = torch.cat([had.unsqueeze(0), strong * had.norm()])
    return -float(torch.linalg.lstsq(causes.T, lost.unsqueeze(1)).solution[0, 0])


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def few_channels(basis: Tensor) -> bool:
    """Whether ``[d_model, k]`` lies along single channels: those were rescaled or pruned."""
    energy = basis.square().sum(dim=1)
    largest = energy.sort(descending=True).values
    return float(largest[:_FEW].sum()) > _FEW_SHARE * float(energy.sum())
