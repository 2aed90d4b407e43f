"""The units of work that make an edited shard: ranges to copy, and blocks of matrices to edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from abliterate.checkpoints.disk_matrix import (
    DiskMatrix,
    MatrixSlice,
    PlainDiskMatrix,
    matrix_slices,
)
from abliterate.checkpoints.quantized_formats import Quantized, open_quantized
from abliterate.checkpoints.shards import DTYPES, TensorEntry
from abliterate.editing.edit_plan import TensorEdit
from abliterate.editing.matrix_orthogonalization import DirectionEnergy, EditStrength, project
from abliterate.editing.shard_layout import ShardLayout, TensorOffsets
from abliterate.errors import CheckpointError
from abliterate.storage.file_io import SourceFile, TargetFile, copy_range
from abliterate.storage.write_buffers import RUN_BYTES

_COPY_BYTES = 32 << 20
_EDIT_BYTES = RUN_BYTES


@dataclass(frozen=True)
class EditContext:
    """How to carry out the edits.

    Attributes:
        edits: all of the plan, in order.
        recipe: how much to remove.
        quantized: tensors stored in blocks with scales, by the name of their values.
        device: where to compute.
        jobs: cores to use.
        places: where source files lie that are not where their entries say.
        in_place: the shard to write is at its target already, as it is in the source.
    """

    edits: Sequence[TensorEdit]
    recipe: EditStrength
    quantized: Mapping[str, Quantized]
    device: torch.device
    jobs: int
    places: Mapping[Path, Path] = field(default_factory=dict)
    in_place: bool = False


@dataclass(frozen=True)
class ShardTask:
    """A piece of work on its own.

    Attributes:
        start: byte of the output where it begins.
        size: bytes that it deals with, for the progress bar.
        run: does it; returns the number of the edit and its share of that edit's sums. It may end
            early once the event is set.
    """

    start: int
    size: int
    run: Callable[[Event], tuple[int, DirectionEnergy] | None]


class Files:
    """Source files, each opened once and closed with the stack."""

    def __init__(self, stack: ExitStack, places: Mapping[Path, Path]) -> None:
        self._stack, self._places = stack, places
        self._open: dict[Path, SourceFile] = {}

    def open(self, path: Path) -> SourceFile:
        if path not in self._open:
            self._open[path] = SourceFile(self._places.get(path, path))
            self._stack.callback(self._open[path].close)
        return self._open[path]


def tasks_of(
    layout: ShardLayout, work: EditContext, files: Files, target: TargetFile, cloned: bool
) -> Iterator[list[ShardTask]]:
    """The units of a shard, in lists of which each must be done before the next.

    Args:
        layout: what to write.
        work: the edits.
        files: the source.
        target: the file to write.
        cloned: the target is a copy of the source's shard already.
    """
    edits: dict[str, list[tuple[int, TensorEdit]]] = {}
    for index, edit in enumerate(work.edits):
        edits.setdefault(edit.name, []).append((index, edit))
    places = {placed.name: placed for placed in layout.tensors}
    # Scales come with their values, unless only a box of those is edited.
    computed = {
        q.scales.name
        for name, q in work.quantized.items()
        if name in edits and all(edit.region is None for _, edit in edits[name])
    }
    whole: list[ShardTask] = []
    boxes: list[ShardTask] = []
    ranges: list[_Range] = []
    if layout.header is not None:
        target.write(memoryview(layout.header), 0)
    else:
        ranges.append(_Range(layout.shard.path, 0, 0, layout.shard.data_start))
    for placed in layout.tensors:
        own = edits.get(placed.replaces or placed.name, [])
        boxed = any(edit.region is not None for _, edit in own)
        if placed.content is not None:
            target.write(memoryview(placed.content), placed.start)
        elif placed.origin is None:
            whole += _dense_units(placed, own, work, files, target)
        elif own and not boxed and placed.replaces is None:
            if not cloned:
                target.reserve(placed.start, placed.size)
            whole += _edit_units(placed, own, places, work, files, target)
        else:
            origin = placed.origin
            if placed.name not in computed:
                ranges.append(_Range(origin.file, origin.start, placed.start, placed.size))
            if boxed:
                boxes += _edit_units(placed, own, places, work, files, target)
    if not cloned:
        whole += _copy_units(ranges, files, target)
    yield sorted(whole, key=lambda unit: unit.start)
    if boxes:
        yield boxes


@dataclass(frozen=True)
class _Range:
    path: Path
    start: int
    to: int
    size: int


def _copy_units(ranges: Sequence[_Range], files: Files, target: TargetFile) -> Iterator[ShardTask]:
    merged: list[_Range] = []
    for part in ranges:
        last = merged[-1] if merged else None
        if last is not None and (last.path, last.start + last.size, last.to + last.size) == (
            part.path,
            part.start,
            part.to,
        ):
            merged[-1] = _Range(last.path, last.start, last.to, last.size + part.size)
        else:
            merged.append(part)
    for part in merged:
        for begin in range(0, part.size, _COPY_BYTES):
            size = min(_COPY_BYTES, part.size - begin)
            yield _copy_unit(
                files.open(part.path), part.start + begin, target, part.to + begin, size
            )


def _copy_unit(source: SourceFile, start: int, target: TargetFile, to: int, size: int) -> ShardTask:
    def run(stop: Event) -> None:
        source.expect(start, size)
        copy_range(source, start, target, to, size)
        target.begin_writeback(to, size)

    return ShardTask(to, size, run)


def _edit_units(
    placed: TensorOffsets,
    edits: Sequence[tuple[int, TensorEdit]],
    places: Mapping[str, TensorOffsets],
    work: EditContext,
    files: Files,
    target: TargetFile,
) -> Iterator[ShardTask]:
    """Edits of a tensor that keeps its format."""
    entry = placed.origin
    assert entry is not None
    stored = work.quantized.get(entry.name)
    for index, edit in edits:
        shape = entry.shape if stored is None else stored.shape
        for strip in matrix_slices(shape, edit.axis, edit.region):
            if stored is None:
                source, dtype = files.open(entry.file), _dtype(entry)
                grid: DiskMatrix = PlainDiskMatrix(
                    source,
                    entry.start,
                    target,
                    placed.start,
                    dtype,
                    strip,
                    work.device,
                    past_cache=edit.region is None,
                )
            else:
                scales = places[stored.scales.name].start
                grid = open_quantized(
                    stored, strip, files.open, target, placed.start, scales, work.device
                )
            piece = _Piece(grid, strip, placed, entry, math.prod(shape))
            yield from piece.units(index, edit.basis, work.recipe, target)


def _dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{entry.name}' is stored as {entry.dtype}, which cannot be edited: obtain the "
            "checkpoint in bfloat16, float16 or float32"
        )
    return DTYPES[entry.dtype]


def _dense_units(
    placed: TensorOffsets,
    edits: Sequence[tuple[int, TensorEdit]],
    work: EditContext,
    files: Files,
    target: TargetFile,
) -> Iterator[ShardTask]:
    """A quantized tensor that becomes a plain one, with its edits if it has any."""
    assert placed.replaces is not None
    stored = work.quantized[placed.replaces]
    index, edit = edits[0] if edits else (-1, None)
    axis = len(stored.shape) - 2 if edit is None else edit.axis
    nothing = torch.zeros(0, stored.shape[axis], dtype=torch.float64)
    for strip in matrix_slices(stored.shape, axis):
        grid = open_quantized(stored, strip, files.open, target, placed.start, None, work.device)
        piece = _Piece(grid, strip, placed, stored.values, math.prod(stored.shape))
        yield from piece.units(index, nothing if edit is None else edit.basis, work.recipe, target)


@dataclass(frozen=True)
class _Piece:
    """A matrix of a tensor, about to be cut into units."""

    grid: DiskMatrix
    strip: MatrixSlice
    placed: TensorOffsets
    entry: TensorEntry
    elements: int

    def units(
        self, index: int, basis: Tensor, recipe: EditStrength, target: TargetFile
    ) -> Iterator[ShardTask]:
        """Blocks of rows where rows stand alone, else the matrix."""
        step = self.grid.rows
        if self.strip.d_model_is_columns and self.grid.splits:
            row_bytes = self.placed.size * self.strip.columns // self.elements
            step = max(1, _EDIT_BYTES // max(1, row_bytes))
        for first in range(0, self.grid.rows, step):
            rows = (first, min(first + step, self.grid.rows))
            yield self._unit(rows, index, basis, recipe, target)

    def _unit(
        self,
        rows: tuple[int, int],
        index: int,
        basis: Tensor,
        recipe: EditStrength,
        target: TargetFile,
    ) -> ShardTask:
        start, end = (self._byte(row) for row in rows)

        def run(stop: Event) -> tuple[int, DirectionEnergy] | None:
            grid = self.grid.part()
            try:
                sums = project(
                    grid, basis, recipe, self.strip.d_model_is_columns, rows, stop.is_set
                )
            except CheckpointError as error:
                where = f"tensor '{self.entry.name}' in {self.entry.file}"
                raise CheckpointError(f"{where} {error}") from None
            if not stop.is_set():
                grid.close()
                target.begin_writeback(start, end - start)
            return None if index < 0 else (index, sums)

        return ShardTask(start, end - start, run)

    def _byte(self, row: int) -> int:
        """Where a row begins in the target, if the tensor is a plain one."""
        element = self.strip.offset + row * self.strip.stride
        return self.placed.start + self.placed.size * element // self.elements
