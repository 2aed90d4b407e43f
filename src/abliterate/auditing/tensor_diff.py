"""What differs in one tensor of two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from abliterate.auditing.checkpoint_pairs import Place
from abliterate.auditing.grams import Projection


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of both.

    Attributes:
        name: on disk.
        state: ``unchanged``, ``recast`` (another dtype, the same values), ``rank 1``,
            ``low rank``, ``truncated`` (an approximation of lower rank of the first), ``dense`` or
            ``reshaped``.
        kind: what it writes for, or None if it does not write to the stream.
        layer: decoder block, or None.
        side: ``writer`` or ``bias`` (of the stream), ``reader`` (of d_model inputs) or ``other``.
        component: its kind, or the name of its module.
        change: ``|B - A| / |A|``.
        first: share of the difference's energy in its first direction.
        cosine: of its left vector with the shared direction (as it is at this tensor), or None.
        scale: the ``s`` of ``W - s u u^T W`` that fits best, negative where it was amplified, along
            the shared direction or else its own; None if neither was measured, or that of a bias
            cannot be told.
        fit: squared cosine between what changed along it and what the original had, or None.
        directions: how many it lost; 0 if it is no projection.
        projected: it lost directions, and that in proportion to what it had.
        rescaled: ``rows`` or ``columns``: each was then made as long as it was, or the like.
    """

    name: str
    state: str
    kind: str | None = None
    layer: int | None = None
    side: str = "other"
    component: str = ""
    change: float = 0.0
    first: float = 0.0
    cosine: float | None = None
    scale: float | None = None
    fit: float | None = None
    directions: int = 0
    projected: bool = False
    rescaled: str | None = None


@dataclass(frozen=True)
class TensorSummary:
    """A tensor's difference, before it is known what it shares with others.

    Attributes:
        diff: as far as it stands.
        place: where it meets the stream.
        vectors: float32 ``[d_model, few]``, the first left vectors of a matrix's difference.
        shares: of its energy.
        own: the projection that it shows by itself, or None.
        readable: it could be tested.
        columns: that changed, of those that were looked at; 0 where rows alone were replaced.
    """

    diff: TensorDiff
    place: Place
    vectors: Tensor | None = field(default=None, repr=False)
    shares: Tensor | None = field(default=None, repr=False)
    own: Projection | None = None
    readable: bool = True
    columns: int = 0
