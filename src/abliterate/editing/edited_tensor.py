"""What the record of an edit says of one tensor."""

from __future__ import annotations

from dataclasses import dataclass

from abliterate.writers.tensor_slices import Ranges


@dataclass(frozen=True)
class EditedTensor:
    """One tensor that was edited.

    Attributes:
        name: on disk.
        kind: what it belongs to (``embedding``, ``attention``, ``mlp``, ...).
        layer: decoder block, or None.
        axis: its d_model axis.
        before: ``|r^T W|_F / |W|_F`` of the matrix before the edit.
        after: ``|r^T E|_F / |W|_F`` of what was stored, ``E``, rounding included: relative to the
            norm before the edit, so that the two can be compared. Of its own norm, which is smaller
            unless norms are kept, it is what ``verify`` gives.
        region: the box that was edited, or None for the whole tensor.
    """

    name: str
    kind: str
    layer: int | None
    axis: int
    before: float
    after: float
    region: Ranges | None = None
