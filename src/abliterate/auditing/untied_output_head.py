"""An output head that was untied from an edited embedding still holds the original matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abliterate.auditing.components import CheckpointWriters, read_tensor
from abliterate.auditing.projections import left_vectors
from abliterate.editing.edit_plan import TensorEdit
from abliterate.writers.parameter_names import module_name

_SAMPLE = 2048


@dataclass(frozen=True)
class HeadEvidence:
    """Embedding against output head, row by row.

    Attributes:
        projection: the embedding is the head less a share of one direction: no training unties
            two matrices like that.
        scale: that share.
        fit: squared cosine between what the embedding lacks along it and what the head has.
        rank_one: share of the difference's energy that lies along it.
        direction: float64 unit ``[d_model]``.
    """

    projection: bool
    scale: float
    fit: float
    rank_one: float
    direction: Tensor = field(repr=False)

    def document(self) -> dict[str, Any]:
        """For JSON, without the direction's values."""
        return {
            "projection": self.projection,
            "scale": self.scale,
            "fit": self.fit,
            "rank_one": self.rank_one,
        }


def head_evidence(reading: CheckpointWriters) -> HeadEvidence | None:
    """Compare the token embedding with an output head of the same shape.

    Returns:
        None where they are tied, equal or unrelated, so that nothing follows.
    """
    located, shards = reading.located, reading.located.shards
    model = located.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight.shape != embedding.weight.shape:
        return None
    if located.head is not None and not located.holds_both:
        return None
    tables = [p for u in reading.units if u.kind == "embedding" for p in u.parts]
    name = f"{module_name(model, head)}.weight"
    if len(tables) != 1 or any(tables[0].ways) or name not in shards.tensors:
        return None
    table = tables[0].edit
    if shards.tensors[table.name].shape != shards.tensors[name].shape or table.axis != 1:
        return None
    if {table.name, name} & reading.quantized.keys():
        return None
    edit = TensorEdit(name, 1, torch.zeros(0, 0), "other", None)
    mine = read_tensor(shards, {}, table, _SAMPLE, 0)
    original = read_tensor(shards, {}, edit, _SAMPLE, 0)
    delta = mine - original
    energy, whole = float(delta.square().sum()), float(original.square().sum())
    if energy == 0 or whole == 0 or energy > 0.5 * whole:
        return None
    vectors, shares = left_vectors(delta, 1)
    vector = vectors[:, 0]
    lost, had = vector @ delta, vector @ original
    both, had_energy = float(lost @ had), float(had.square().sum())
    fit = both**2 / (float(lost.square().sum()) * had_energy)
    evidence = HeadEvidence(
        float(shares[0]) > 0.9 and fit > 0.99 and both < 0,
        -both / had_energy,
        fit,
        float(shares[0]),
        vector,
    )
    return evidence if evidence.projection else None
