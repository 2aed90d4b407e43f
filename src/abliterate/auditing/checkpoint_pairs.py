"""Two checkpoints of one architecture, read at the same places; where a tensor meets the stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.auditing.components import (
    CheckpointWriters,
    Part,
    every_column,
    open_checkpoint,
    read_tensor,
)
from abliterate.checkpoints.quantized_formats import (
    Quantized,
    beside,
    find_quantized,
    read_config,
)
from abliterate.checkpoints.shards import ShardSet, read_shards, same_bytes
from abliterate.editing.edit_plan import TensorEdit
from abliterate.models.loading import Checkpoint

_SAMPLE = 512  # columns of each difference
_SMALL_GAIN = 1e-3  # of the largest: what lies behind it cannot be told


@dataclass(frozen=True)
class Place:
    """A tensor, or how it is looked at.

    Attributes:
        edit: the tensor and its axis of length d_model.
        side: ``writer``, ``bias``, ``reader`` or ``other``.
        kind: what it writes for; None if it does not.
        layer: decoder block, or None.
        part: the writer, or None.
    """

    edit: TensorEdit
    side: str
    kind: str | None
    layer: int | None
    part: Part | None = None

    @property
    def has_gains(self) -> bool:
        """Whether a gain or a centring stands between it and the stream."""
        return self.part is not None and any(self.part.ways)

    @property
    def component(self) -> str:
        """What it is called: its kind, or the module's own name."""
        stem = self.edit.name.removesuffix(".weight")
        return self.kind or stem.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class CheckpointPair:
    """Two checkpoints.

    Attributes:
        reading: the first, whose writers are known.
        left: its shards.
        right: the other's.
        other: the other's tensors in blocks with scales.
        hidden: scales, which are no tensors of their own.
        parts: the writers, by tensor.
        common: tensors of both, in the order of the first.
        transposed: matrices keep their outputs in the last axis (Conv1D).
    """

    reading: CheckpointWriters
    left: ShardSet
    right: ShardSet
    other: Mapping[str, Quantized]
    hidden: frozenset[str]
    parts: Mapping[str, Part]
    common: tuple[str, ...]
    transposed: bool

    @property
    def quantized(self) -> Mapping[str, Quantized]:
        return self.reading.quantized

    @property
    def d_model(self) -> int:
        return self.reading.d_model

    @property
    def has_gains(self) -> bool:
        return self.reading.has_gains

    @property
    def n_layers(self) -> int:
        return len(self.reading.located.plan.blocks)

    def same_bytes(self, name: str) -> bool:
        """Whether both store a tensor as the same bytes."""
        one, two = self.quantized.get(name), self.other.get(name)
        if not same_bytes(self.left.tensors[name], self.right.tensors[name]):
            return False
        if one is None or two is None:
            return one is two
        return same_bytes(one.scales, two.scales)

    def places(self, name: str) -> list[Place]:
        """How a tensor meets the stream: as a writer, or along each axis that may read it."""
        part = self.parts.get(name)
        if part is not None:
            side = "bias" if part.bias else "writer"
            return [Place(part.edit, side, part.edit.kind, part.edit.layer, part)]
        stored = self.quantized.get(name)
        shape = self.left.tensors[name].shape if stored is None else stored.shape
        nothing = torch.zeros(0, 0)
        layer = self._layer(name)
        axes: list[int] = []
        if len(shape) >= 2:
            last = (len(shape) - 1, len(shape) - 2)
            axes = [axis for axis in last if shape[axis] == self.d_model]
            if self.transposed and len(shape) == 2:
                axes.reverse()
        if not axes or min(shape[-2:]) < 2:
            return [Place(TensorEdit(name, 0, nothing, "other", None), "other", None, layer)]
        return [
            Place(TensorEdit(name, axis, nothing, "other", None), "reader", None, layer)
            for axis in axes
        ]

    def _layer(self, name: str) -> int | None:
        for layer, block in enumerate(self.reading.located.plan.blocks):
            if f".{'.'.join(block.split('.')[-2:])}." in f".{name}":
                return layer
        return None

    def sample(self, edit: TensorEdit) -> tuple[Tensor, Tensor]:
        """A tensor of the first and its difference, ``[d_model, m]``, always the same columns.

        Where none of them differs, all are read, and those that do are taken.
        """
        before = read_tensor(self.left, self.quantized, edit, _SAMPLE, 0)
        delta = read_tensor(self.right, self.other, edit, _SAMPLE, 0) - before
        if bool(delta.any()):
            return before, delta
        found: list[tuple[Tensor, Tensor]] = []
        for one, two in self._all_columns(edit):
            differs = (two != one).any(dim=0)
            if bool(differs.any()):
                found.append((one[:, differs], (two - one)[:, differs]))
            if sum(d.shape[1] for _, d in found) >= _SAMPLE:
                break
        if not found:
            return before, delta
        return torch.cat([b for b, _ in found], 1), torch.cat([d for _, d in found], 1)

    def _all_columns(self, edit: TensorEdit) -> Iterator[tuple[Tensor, Tensor]]:
        if (edit.name in self.quantized) != (edit.name in self.other):
            return  # their blocks lie otherwise, and every value differs
        yield from zip(
            every_column(self.left, self.quantized, edit),
            every_column(self.right, self.other, edit),
            strict=True,
        )

    def at(self, place: Place, vectors: Tensor, gains: bool) -> Tensor:
        """Stream vectors ``[d_model, n]`` as they are at a tensor; linear, so of any length."""
        part = place.part
        if part is None:
            return vectors
        for gain in reversed(part.ways[0] if gains else ()):
            if gain.parameter is not None:
                values = self.reading.located.gains[gain.parameter].double()
                vectors = gain.factors(values).unsqueeze(1) * vectors
            if gain.centred:
                vectors = vectors - vectors.mean(dim=0)
        return vectors if part.channels is None else vectors[slice(*part.channels)]

    def back(self, place: Place, vectors: Tensor, gains: bool) -> Tensor | None:
        """The stream vectors that a tensor's ``[d_model, n]`` come from, as far as can be told."""
        part = place.part
        if part is None or not gains:
            return vectors
        if part.channels is not None or len(part.ways) > 1:
            return None
        for gain in part.ways[0]:
            if gain.parameter is None:
                continue
            factors = gain.factors(self.reading.located.gains[gain.parameter].double())
            tiny = factors.abs() < _SMALL_GAIN * factors.abs().max()
            divided = vectors / torch.where(tiny, torch.ones_like(factors), factors).unsqueeze(1)
            vectors = torch.where(tiny.unsqueeze(1), torch.zeros_like(vectors), divided)
        return vectors


def open_pair(a: Checkpoint, b: Checkpoint) -> CheckpointPair:
    """Open two checkpoints.

    Raises:
        CheckpointError: one is damaged or of an unknown format.
        UnsupportedArchitectureError: the writers of A cannot be found.
    """
    reading = open_checkpoint(a)
    left = reading.located.shards
    right = read_shards(b.folder)
    other = find_quantized(right, read_config(b.folder))
    stored = (*reading.quantized.values(), *other.values())
    hidden = {entry.name for q in stored for entry in beside(q)}
    parts: dict[str, Part] = {}
    for part in (*(p for u in reading.units for p in u.parts), *reading.biases):
        parts.setdefault(part.edit.name, part)
    transposed = any(
        part.edit.axis == 1 and unit.layer is not None
        for unit in reading.units
        for part in unit.parts
        if len(left.tensors[part.edit.name].shape) == 2
    )
    common = tuple(n for n in left.tensors if n in right.tensors and n not in hidden)
    return CheckpointPair(reading, left, right, other, frozenset(hidden), parts, common, transposed)
