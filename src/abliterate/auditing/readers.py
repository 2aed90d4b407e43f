"""What reads the residual stream, and whether a direction is read or written by anything at all.

A reader's matrix lies as ``[d_model, columns]`` like a writer's, a column for each of its outputs:
its left null direction is one that it does not read. Readers are taken as they are stored, without
the gain of the norm before them, because that is how tools edit them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.auditing.components import (
    AuditedComponent,
    CheckpointWriters,
    Part,
    read_columns,
    read_tensor,
)
from abliterate.checkpoints.safetensors_header import DTYPES
from abliterate.editing.edit_plan import TensorEdit

_SAMPLE = 256
_MAX_MATRICES = 64
_SUFFIX = " readers"


def open_readers(reading: CheckpointWriters) -> CheckpointWriters:
    """The same checkpoint with what reads the stream in each block as its units, and no biases."""
    kinds = {_module(reading, p.edit.name): u.kind for u in reading.units for p in u.parts}
    grouped: dict[tuple[str, int], list[Part]] = {}
    for edit in _readers(reading, stacks=True):
        module = _module(reading, edit.name)
        if module is not None:
            layer, name = module
            kind = f"{kinds.get(module, name)}{_SUFFIX}"
            part = Part(replace(edit, kind=kind, layer=layer), ((),), False, None)
            grouped.setdefault((kind, layer), []).append(part)
    order = sorted(grouped, key=lambda key: (key[1], key[0]))
    units = tuple(
        AuditedComponent(kind, layer, tuple(grouped[kind, layer])) for kind, layer in order
    )
    return replace(reading, units=units, biases=())


def _module(reading: CheckpointWriters, name: str) -> tuple[int, str] | None:
    """Block and module in it that a tensor belongs to."""
    for layer, block in enumerate(reading.located.plan.blocks):
        stem = f".{'.'.join(block.split('.')[-2:])}."
        _, found, rest = f".{name}".partition(stem)
        if found:
            return layer, rest.split(".")[0]
    return None


def _readers(reading: CheckpointWriters, stacks: bool) -> Iterator[TensorEdit]:
    """Every matrix that is no writer and has an input axis of length d_model.

    Args:
        reading: the checkpoint.
        stacks: of experts, too.
    """
    width, tensors = reading.d_model, reading.located.shards.tensors
    writers = {part.edit.name for unit in reading.units for part in unit.parts}
    writers |= {part.edit.name for part in reading.biases}
    scales = {stored.scales.name for stored in reading.quantized.values()}
    transposed = any(  # Conv1D keeps its outputs in the last axis
        part.edit.axis == 1 and unit.layer is not None
        for unit in reading.units
        for part in unit.parts
        if len(tensors[part.edit.name].shape) == 2
    )
    nothing = torch.zeros(0, width, dtype=torch.float64)
    for name, entry in tensors.items():
        stored = reading.quantized.get(name)
        if (stored is None and entry.dtype not in DTYPES) or name in writers or name in scales:
            continue
        shape = entry.shape if stored is None else stored.shape
        if len(shape) not in ((2, 3) if stacks else (2,)) or min(shape[-2:]) < 2:
            continue
        axes = (0 if transposed else 1, 1) if len(shape) == 2 else (2, 1)
        axis = next((axis for axis in axes if shape[axis] == width), None)
        if axis is not None:
            yield TensorEdit(name, axis, nothing, "reader", None)


def reading_energy(reading: CheckpointWriters, directions: Tensor) -> tuple[Tensor, Tensor]:
    """How strongly the matrices that read the stream read directions; 1 is typical.

    Every other matrix on disk with an input axis of length d_model counts, without the gains of
    norms before it.

    Args:
        reading: the checkpoint.
        directions: orthonormal, ``[d_model, k]``.

    Returns:
        The median over matrices of the energy along each over the mean energy of all directions,
        ``[k]`` (NaN if there are no matrices), rising, and the directions, turned among themselves
        so that the first is read least.
    """
    edits = list(_readers(reading, stacks=False))
    edits = edits[:: max(1, len(edits) // _MAX_MATRICES)][:_MAX_MATRICES]
    shards, stored = reading.located.shards, reading.quantized
    return _energies((read_tensor(shards, stored, e, _SAMPLE, 0) for e in edits), directions)


def writing_energy(writers: CheckpointWriters, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The same of what writes to the stream, behind the gains of norms."""
    units: Sequence[AuditedComponent] = writers.units
    units = units[:: max(1, len(units) // _MAX_MATRICES)][:_MAX_MATRICES]
    return _energies((read_columns(writers, u, _SAMPLE, 0) for u in units), directions)


def _energies(matrices: Iterator[Tensor], directions: Tensor) -> tuple[Tensor, Tensor]:
    grams = []
    for columns in matrices:
        total = float(columns.square().sum())
        if total > 0:
            along = directions.T @ columns
            grams.append(along @ along.T * len(directions) / total)
    if not grams:
        return directions.new_full((directions.shape[1],), torch.nan), directions
    stacked = torch.stack(grams)
    turn = torch.linalg.eigh(stacked.mean(dim=0))[1]
    each = torch.einsum("ki,nkl,li->ni", turn, stacked, turn)
    return each.median(dim=0).values, directions @ turn
