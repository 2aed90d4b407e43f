"""Several checkpoints made from one base: who edited alike, and how strongly in which layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from abliterate.auditing.compare import Comparison, compare
from abliterate.auditing.edit_form import EditForm
from abliterate.models.loading import Checkpoint

#: Mean cosine of directions above which edits are of one kind.
ALIKE = 0.95
_HELD = 0.99  # of the energy of an edit's directions: the subspace that they span


def compare_variants(
    base: Checkpoint, variants: Sequence[tuple[str, Checkpoint]]
) -> dict[str, Any]:
    """Compare each variant with the base, and the edits with each other; for JSON.

    ``cosines[a][b]`` is the mean over the layers that both edited of ``|cos|`` between their
    directions there; ``shared[a][b]`` the share of the energy of a's directions that lies in the
    subspace that b's span, all layers together; null where one has no edit or no layer in common.
    Of several directions at once the first counts. ``alike`` lists groups of variants whose
    cosines with each other's first member are at least ``ALIKE`` and whose scales are of one sign.

    Args:
        base: what all are made from.
        variants: a name and a checkpoint each.

    Raises:
        CheckpointError: one is damaged, or has no tensor in common with the base.
        UnsupportedArchitectureError: the writers of the base cannot be found.
    """
    found = [(name, compare(base, checkpoint)) for name, checkpoint in variants]
    forms = [comparison.form for _, comparison in found]
    cosines = [[_cosine(one, other) for other in forms] for one in forms]
    return {
        "base": base.name,
        "variants": [_variant(name, comparison) for name, comparison in found],
        "cosines": cosines,
        "shared": [[_shared(one, other) for other in forms] for one in forms],
        "alike": [
            [found[index][0] for index in group] for group in _groups(cosines, forms)
        ],
    }  # fmt: skip


def _variant(name: str, comparison: Comparison) -> dict[str, Any]:
    form = comparison.form
    return {
        "name": name,
        "projected": len(comparison.projected),
        "beyond": len(comparison.beyond),
        "missing": len(comparison.missing),
        "added": len(comparison.added),
        "form": None if form is None else form.document(),
    }


def _rows(form: EditForm) -> Tensor:
    """Directions of the layers, and the embedding's last: ``[n_layers + 1, d_model]``."""
    outside = torch.zeros_like(form.shared) if form.outside is None else form.outside
    return torch.cat([form.directions, outside.unsqueeze(0)])


def _cosine(one: EditForm | None, other: EditForm | None) -> float | None:
    if one is None or other is None:
        return None
    a, b = _rows(one), _rows(other)
    both = a.any(dim=1) & b.any(dim=1)
    if not bool(both.any()):
        return None
    return round(float((a * b).sum(dim=1)[both].abs().mean()), 9)


def _shared(one: EditForm | None, other: EditForm | None) -> float | None:
    if one is None or other is None:
        return None
    rows = _rows(one)
    _, values, right = torch.linalg.svd(_rows(other), full_matrices=False)
    energy = values.square()
    count = int((energy.cumsum(0) < _HELD * energy.sum()).sum()) + 1
    return round(float((rows @ right[:count].T).square().sum() / rows.square().sum()), 9)


def _groups(
    cosines: Sequence[Sequence[float | None]], forms: Sequence[EditForm | None]
) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, form in enumerate(forms):
        if form is None or math.isnan(form.scale):
            continue
        for group in groups:
            first = forms[group[0]]
            assert first is not None
            near = (cosines[group[0]][index] or 0.0) >= ALIKE
            if near and first.side == form.side and first.scale * form.scale > 0:
                group.append(index)
                break
        else:
            groups.append([index])
    return [group for group in groups if len(group) > 1]
