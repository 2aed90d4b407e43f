"""Two checkpoints of one architecture, tensor by tensor: unchanged, rank 1, low rank or dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.auditing.components import CheckpointWriters, Part, open_checkpoint, read_tensor
from abliterate.checkpoints.quantized_formats import Quantized, find_quantized, read_config
from abliterate.checkpoints.safetensors_header import DTYPES
from abliterate.checkpoints.shards import ShardSet, read_shards, same_bytes
from abliterate.console import progress
from abliterate.editing.edit_plan import TensorEdit
from abliterate.errors import CheckpointError
from abliterate.models.loading import Checkpoint
from abliterate.writers.discovery import writer_direction
from abliterate.writers.plan import Writer

_SAMPLE = 512  # columns of each difference
_LOW_RANK = 8
_EPS = {"F64": 1e-15, "F32": 1.2e-7, "F16": 9.8e-4, "BF16": 7.8e-3, "F8_E4M3": 0.125}
#: Least squared cosine of a tensor's left vector with the shared one, and of its right one.
_SAME = 0.9


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of both.

    Attributes:
        name: on disk.
        state: ``unchanged``, ``recast`` (another dtype, the same values), ``rank 1``,
            ``low rank``, ``dense`` or ``reshaped``.
        kind: what it writes for, or None if it does not write to the stream.
        layer: decoder block, or None.
        change: ``|B - A| / |A|``.
        first: share of the difference's energy in its first direction.
        cosine: of its left vector with the shared direction (as it is at this tensor), or None.
        scale: the ``s`` of ``W - s u u^T W`` that fits best along it, or None.
        fit: squared cosine between what changed along it and what the original had, or None.
    """

    name: str
    state: str
    kind: str | None = None
    layer: int | None = None
    change: float = 0.0
    first: float = 0.0
    cosine: float | None = None
    scale: float | None = None
    fit: float | None = None

    @property
    def projected(self) -> bool:
        """It lost the shared direction, and that in proportion to what it had."""
        return (self.cosine or 0.0) ** 2 >= _SAME and (self.fit or 0.0) >= _SAME


@dataclass(frozen=True)
class Comparison:
    """All tensors of two checkpoints.

    Attributes:
        tensors: in the order of A.
        missing: names that only A has.
        added: names that only B has.
        direction: float64 unit ``[d_model]`` that the changed writers lost, or None.
        gains: it is the stream's, behind the gains of norms; False: the matrices' own.
    """

    tensors: tuple[TensorDiff, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    direction: Tensor | None = field(default=None, repr=False)
    gains: bool = True

    @property
    def projected(self) -> tuple[TensorDiff, ...]:
        return tuple(t for t in self.tensors if t.projected)

    @property
    def beyond(self) -> tuple[TensorDiff, ...]:
        """What differs otherwise than by the projection."""
        same = ("unchanged", "recast")
        return tuple(t for t in self.tensors if t.state not in same and not t.projected)


def compare(a: Checkpoint, b: Checkpoint) -> Comparison:
    """Compare two checkpoints from their files, in blocks and samples of fixed places.

    Raises:
        CheckpointError: one is damaged or of an unknown format, or they have no tensor in common.
        UnsupportedArchitectureError: the writers of A cannot be found.
    """
    reading = open_checkpoint(a)
    left = reading.located.shards
    right = read_shards(b.folder)
    other = find_quantized(right, read_config(b.folder))
    hidden = {q.scales.name for q in (*reading.quantized.values(), *other.values())}
    common = [name for name in left.tensors if name in right.tensors and name not in hidden]
    if not common:
        raise CheckpointError(f"{a.folder} and {b.folder} have no tensor in common")
    parts: dict[str, Part] = {}
    for part in (*(p for u in reading.units for p in u.parts), *reading.biases):
        parts.setdefault(part.edit.name, part)
    pairs = _Pairs(reading, left, right, other)
    first = {
        name: pairs.summarize(name, parts.get(name))
        for name in progress(common, "diff: tensors", total=len(common))
    }
    direction, gains = _shared(reading, parts, first)
    tensors = tuple(
        _finish(pairs, summary, parts.get(name), direction, gains)
        for name, summary in first.items()
    )
    if not any(t.projected for t in tensors):
        direction = None
        tensors = tuple(_finish(pairs, f, parts.get(n), None, gains) for n, f in first.items())
    return Comparison(
        tensors=tensors,
        missing=tuple(sorted(left.tensors.keys() - right.tensors.keys() - hidden)),
        added=tuple(sorted(right.tensors.keys() - left.tensors.keys() - hidden)),
        direction=direction,
        gains=gains,
    )


@dataclass(frozen=True)
class _DiffSummary:
    """A difference's summary, before the shared direction is known."""

    diff: TensorDiff
    vector: Tensor | None = None  # [d_model], first left vector
    readable: bool = False


@dataclass(frozen=True)
class _Pairs:
    reading: CheckpointWriters
    left: ShardSet
    right: ShardSet
    other: Mapping[str, Quantized]

    def summarize(self, name: str, part: Part | None) -> _DiffSummary:
        one, two = self.left.tensors[name], self.right.tensors[name]
        kind = part.edit.kind if part else None
        layer = part.edit.layer if part else None
        if same_bytes(one, two) and self._same_scales(name):
            return _DiffSummary(TensorDiff(name, "unchanged", kind, layer))
        if one.shape != two.shape:
            return _DiffSummary(TensorDiff(name, "reshaped", kind, layer))
        readable = all(
            e.dtype in DTYPES or name in q
            for e, q in ((one, self.reading.quantized), (two, self.other))
        )
        if not readable or not one.shape or 0 in one.shape:
            return _DiffSummary(TensorDiff(name, "dense", kind, layer))
        edit = part.edit if part else TensorEdit(name, 0, torch.zeros(0, 0), "other", None)
        before, delta = self.sample(edit)
        energy, whole = float(delta.square().sum()), float(before.square().sum())
        change = (energy / whole) ** 0.5 if whole > 0 else float("inf")
        if energy == 0:
            # The sample is the same; where bytes of one dtype differ, what differs lies outside it.
            state = "recast" if one.dtype != two.dtype else "dense"
            return _DiffSummary(TensorDiff(name, state, kind, layer))
        vector, shares = left_vector(delta)
        rounding = 4 * whole * max(_EPS.get(e.dtype, 0.5) for e in (one, two)) ** 2 / 12
        allowed = 0.01 * energy + rounding
        rest = (1 - shares.cumsum(0)) * energy
        state = "dense"
        if float(rest[0]) <= allowed and energy > 2 * rounding:
            state = "rank 1"
        elif float(rest[min(_LOW_RANK, len(rest)) - 1]) <= allowed and energy > 2 * rounding:
            state = "low rank"
        diff = TensorDiff(name, state, kind, layer, change, float(shares[0]))
        # Vectors are rank 1 whatever was done to them, and say nothing on their own.
        is_matrix = part is not None and not part.bias
        return _DiffSummary(diff, vector if is_matrix else None, readable=True)

    def sample(self, edit: TensorEdit) -> tuple[Tensor, Tensor]:
        """A tensor of the first and its difference, ``[d_model, m]``, always the same columns."""
        before = read_tensor(self.left, self.reading.quantized, edit, _SAMPLE, 0)
        return before, read_tensor(self.right, self.other, edit, _SAMPLE, 0) - before

    def _same_scales(self, name: str) -> bool:
        one, two = self.reading.quantized.get(name), self.other.get(name)
        if one is None or two is None:
            return one is two
        return same_bytes(one.scales, two.scales)


def left_vector(delta: Tensor) -> tuple[Tensor, Tensor]:
    """The first left singular vector, and every direction's share of the energy, falling."""
    if delta.shape[0] <= delta.shape[1]:
        values, vectors = torch.linalg.eigh(delta @ delta.T)
        vector = vectors[:, -1]
    else:
        values, vectors = torch.linalg.eigh(delta.T @ delta)
        vector = delta @ vectors[:, -1]
    shares = values.flip(0).clamp(min=0)
    return vector / vector.norm(), shares / shares.sum()


def _writer(part: Part) -> Writer:
    edit = part.edit
    return Writer(edit.name, edit.axis, "other", edit.layer, part.bias, part.ways[0], part.channels)


def _direction_at(reading: CheckpointWriters, part: Part, direction: Tensor, gains: bool) -> Tensor:
    """The stream direction as it is at a tensor."""
    if gains:
        return writer_direction(_writer(part), direction, reading.located.gains)
    cut = direction if part.channels is None else direction[slice(*part.channels)]
    unit: Tensor = cut / cut.norm()
    return unit


def _stream_direction(reading: CheckpointWriters, part: Part, vector: Tensor) -> Tensor | None:
    """The stream direction that a tensor's left vector comes from, as far as it can be told."""
    if part.channels is not None or len(part.ways) > 1:
        return None
    for gain in part.ways[0]:
        if gain.parameter is None:
            continue
        factors = gain.factors(reading.located.gains[gain.parameter].double())
        tiny = factors.abs() < 1e-3 * factors.abs().max()
        vector = torch.where(tiny, torch.zeros_like(vector), vector / factors)
    unit: Tensor = vector / vector.norm()
    return unit


def _shared(
    reading: CheckpointWriters, parts: Mapping[str, Part], summaries: Mapping[str, _DiffSummary]
) -> tuple[Tensor | None, bool]:
    """The direction that most left vectors agree on, behind the gains or without them."""
    best: tuple[float, Tensor | None, bool] = (0.0, None, True)
    for gains in (True, False) if reading.has_gains else (True,):
        vectors = []
        for name, summary in summaries.items():
            if summary.vector is not None:
                back = (
                    _stream_direction(reading, parts[name], summary.vector)
                    if gains
                    else summary.vector
                )
                if back is not None and len(back) == reading.d_model:
                    vectors.append((back, summary.diff.first, any(parts[name].ways[0])))
        if not vectors:
            continue
        # Plain tensors tell the direction best: gains are divided by.
        columns = torch.stack([v * f * (0.1 if gains and g else 1.0) for v, f, g in vectors], 1)
        direction, _ = left_vector(columns)
        hits = [
            float(_direction_at(reading, parts[n], direction, gains) @ summary.vector) ** 2
            for n, summary in summaries.items()
            if summary.vector is not None
        ]
        score = sum(hit for hit in hits if hit >= _SAME)
        if score > best[0]:
            best = score, direction * _sign(direction), gains
    return best[1], best[2]


def _sign(vector: Tensor) -> float:
    """A direction and its negative are one: the largest entry is positive."""
    return 1.0 if float(vector[vector.abs().argmax()]) > 0 else -1.0


def _finish(
    pairs: _Pairs, summary: _DiffSummary, part: Part | None, direction: Tensor | None, gains: bool
) -> TensorDiff:
    diff = summary.diff
    if direction is None or part is None or not summary.readable:
        return diff
    here = _direction_at(pairs.reading, part, direction, gains)
    before, delta = pairs.sample(part.edit)  # read again: all of them would not fit in memory
    lost, had = here @ delta, here @ before
    vector = summary.vector if summary.vector is not None else left_vector(delta)[0]
    both = float(lost @ had)
    lost_energy, had_energy = float(lost.square().sum()), float(had.square().sum())
    energies = lost_energy * had_energy
    return TensorDiff(
        diff.name, diff.state, diff.kind, diff.layer, diff.change, diff.first,
        cosine=abs(float(here @ vector)),
        scale=-both / had_energy if had_energy > 0 else None,
        fit=both**2 / energies if energies > 0 and both < 0 else 0.0,
    )  # fmt: skip
