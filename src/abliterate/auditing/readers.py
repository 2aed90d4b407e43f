"""Whether a direction is read by anything: what nothing reads, training lets writers forget."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterate.auditing.components import CheckpointWriters, read_tensor
from abliterate.checkpoints.safetensors_header import DTYPES
from abliterate.editing.edit_plan import TensorEdit

_SAMPLE = 256
_MAX_MATRICES = 64


def reading_energy(reading: CheckpointWriters, direction: Tensor) -> float | None:
    """How strongly the matrices that read the stream read a direction; 1 is typical.

    Every other matrix on disk with an input axis of length d_model counts, without the gains of
    norms before it.

    Args:
        reading: the checkpoint.
        direction: unit, ``[d_model]``.

    Returns:
        The median over matrices of the energy along it over the mean energy of all directions, or
        None if there are none.
    """
    width, shards = reading.d_model, reading.located.shards
    writers = {part.edit.name for unit in reading.units for part in unit.parts}
    transposed = any(  # Conv1D keeps its outputs in the last axis
        part.edit.axis == 1 and unit.layer is not None
        for unit in reading.units
        for part in unit.parts
        if len(shards.tensors[part.edit.name].shape) == 2
    )
    axis = 0 if transposed else 1
    names = []
    for name, entry in shards.tensors.items():
        readable = entry.dtype in DTYPES or name in reading.quantized
        if readable and name not in writers and len(entry.shape) == 2:
            width_axis = entry.shape.index(width) if list(entry.shape).count(width) == 1 else axis
            if (
                entry.shape[width_axis] == width
                and width_axis in (axis, 1)
                and min(entry.shape) > 1
            ):
                names.append((name, width_axis))
    names = names[:: max(1, len(names) // _MAX_MATRICES)][:_MAX_MATRICES]
    nothing = torch.zeros(0, width, dtype=torch.float64)
    ratios = []
    for name, width_axis in names:
        edit = TensorEdit(name, width_axis, nothing, "other", None)
        columns = read_tensor(shards, reading.quantized, edit, _SAMPLE, 0)
        total = float(columns.square().sum())
        if total > 0:
            ratios.append(float((direction @ columns).square().sum()) * width / total)
    return float(torch.tensor(ratios).median()) if ratios else None
