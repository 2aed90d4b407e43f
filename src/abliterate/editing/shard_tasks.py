"""The tasks that make an edited shard: ranges to copy, and blocks of matrices to edit."""

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
from abliterate.checkpoints.quantized_formats import Quantized
from abliterate.checkpoints.quantized_matrices import open_quantized
from abliterate.checkpoints.safetensors_header import DTYPES, TensorEntry
from abliterate.editing.edit_plan import TensorEdit
from abliterate.editing.matrix_orthogonalization import (
    DirectionEnergy,
    EditStrength,
    naming_tensor,
    project,
)
from abliterate.editing.shard_layout import ShardLayout, TensorOffsets
from abliterate.errors import CheckpointError
from abliterate.storage.file_io import SourceFile, TargetFile, copy_range
from abliterate.storage.write_buffers import RUN_BYTES

_COPY_BYTES = 32 << 20
_EDIT_BYTES = RUN_BYTES
_NO_EDIT = -1  # the number of no edit: a tensor that only changes its format


@dataclass(frozen=True)
class EditContext:
    """How to carry out the edits.

    Attributes:
        edits: all of the plan, in order.
        strength: how much to remove.
        quantized: tensors stored in blocks with scales, by the name of their values.
        device: where to compute.
        num_cores: how many to use.
        places: where source files lie that are not where their entries say.
        in_place: the shard to write is at its target already, as it is in the source.
    """

    edits: Sequence[TensorEdit]
    strength: EditStrength
    quantized: Mapping[str, Quantized]
    device: torch.device
    num_cores: int
    places: Mapping[Path, Path] = field(default_factory=dict)
    in_place: bool = False


@dataclass(frozen=True)
class ShardTask:
    """A piece of work on its own.

    Attributes:
        start: byte of the output where it begins.
        size: bytes that it deals with, for the progress bar.
        run: does it; returns the number of the edit and its share of that edit's energy. It may end
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
    layout: ShardLayout, context: EditContext, files: Files, target: TargetFile, cloned: bool
) -> Iterator[list[ShardTask]]:
    """The tasks of a shard, in lists of which each must be done before the next.

    Args:
        layout: what to write.
        context: the edits.
        files: the source.
        target: the file to write.
        cloned: the target is a copy of the source's shard already.
    """
    return _Shard(layout, context, files, target, cloned).tasks()


_NumberedEdit = tuple[int, TensorEdit]


@dataclass(frozen=True)
class _Range:
    path: Path
    start: int
    to: int
    size: int


@dataclass(frozen=True)
class _Shard:
    """A shard about to be cut into tasks; the attributes are those of :func:`tasks_of`."""

    layout: ShardLayout
    context: EditContext
    files: Files
    target: TargetFile
    cloned: bool

    def tasks(self) -> Iterator[list[ShardTask]]:
        edits, scales_of_edits = self._edits(), self._computed_scales()
        whole, boxes = list[ShardTask](), list[ShardTask]()
        ranges: list[_Range] = []
        if self.layout.header is not None:
            self.target.write(memoryview(self.layout.header), 0)
        else:
            ranges.append(_Range(self.layout.shard.path, 0, 0, self.layout.shard.data_start))
        for tensor in self.layout.tensors:
            tensor_edits = edits.get(tensor.replaces or tensor.name, [])
            in_boxes = any(edit.region is not None for _, edit in tensor_edits)
            if tensor.content is not None:
                self.target.write(memoryview(tensor.content), tensor.start)
            elif tensor.origin is None:
                whole += self._dequantize(tensor, tensor_edits)
            elif tensor_edits and not in_boxes and tensor.replaces is None:
                if not self.cloned:
                    self.target.reserve(tensor.start, tensor.size)
                whole += self._edit(tensor, tensor_edits)
            else:
                origin = tensor.origin
                if tensor.name not in scales_of_edits:
                    ranges.append(_Range(origin.file, origin.start, tensor.start, tensor.size))
                if in_boxes:
                    boxes += self._edit(tensor, tensor_edits)
        if not self.cloned:
            whole += self._copy(ranges)
        yield sorted(whole, key=lambda task: task.start)
        if boxes:
            yield boxes

    def _edits(self) -> dict[str, list[_NumberedEdit]]:
        """The edits with their numbers, by tensor."""
        edits: dict[str, list[_NumberedEdit]] = {}
        for index, edit in enumerate(self.context.edits):
            edits.setdefault(edit.name, []).append((index, edit))
        return edits

    def _computed_scales(self) -> set[str]:
        """Scales come with their edited values, unless only a box of those is edited."""
        in_boxes = {edit.name for edit in self.context.edits if edit.region is not None}
        edited = {edit.name for edit in self.context.edits} - in_boxes
        return {q.scales.name for name, q in self.context.quantized.items() if name in edited}

    def _copy(self, ranges: Sequence[_Range]) -> Iterator[ShardTask]:
        for part in _merged(ranges):
            source = self.files.open(part.path)
            for begin in range(0, part.size, _COPY_BYTES):
                size = min(_COPY_BYTES, part.size - begin)
                yield _copy_task(source, part.start + begin, self.target, part.to + begin, size)

    def _edit(self, tensor: TensorOffsets, edits: Sequence[_NumberedEdit]) -> Iterator[ShardTask]:
        """Edits of a tensor that keeps its format."""
        entry = tensor.origin
        assert entry is not None
        stored = self.context.quantized.get(entry.name)
        shape = entry.shape if stored is None else stored.shape
        scales = None if stored is None else self._start_of(stored.scales.name)
        for index, edit in edits:
            for matrix_slice in matrix_slices(shape, edit.axis, edit.region):
                if stored is None:
                    matrix: DiskMatrix = PlainDiskMatrix(
                        source=self.files.open(entry.file),
                        start=entry.start,
                        target=self.target,
                        to=tensor.start,
                        dtype=_dtype(entry),
                        matrix_slice=matrix_slice,
                        device=self.context.device,
                        past_cache=edit.region is None,
                    )
                else:
                    matrix = self._open_quantized(stored, matrix_slice, tensor, scales)
                yield from _MatrixEdit(
                    index=index,
                    basis=edit.basis,
                    strength=self.context.strength.times(edit.weight),
                    matrix=matrix,
                    matrix_slice=matrix_slice,
                    tensor=tensor,
                    entry=entry,
                    elements=math.prod(shape),
                    target=self.target,
                ).tasks()

    def _dequantize(
        self, tensor: TensorOffsets, edits: Sequence[_NumberedEdit]
    ) -> Iterator[ShardTask]:
        """A quantized tensor that becomes a plain one, with its edit if it has one."""
        assert tensor.replaces is not None
        stored = self.context.quantized[tensor.replaces]
        strength = self.context.strength
        if edits:
            index, axis, basis = edits[0][0], edits[0][1].axis, edits[0][1].basis
            strength = strength.times(edits[0][1].weight)
        else:
            index, axis = _NO_EDIT, len(stored.shape) - 2
            basis = torch.zeros(0, stored.shape[axis], dtype=torch.float64)
        for matrix_slice in matrix_slices(stored.shape, axis):
            matrix = self._open_quantized(stored, matrix_slice, tensor, None)
            yield from _MatrixEdit(
                index=index,
                basis=basis,
                strength=strength,
                matrix=matrix,
                matrix_slice=matrix_slice,
                tensor=tensor,
                entry=stored.values,
                elements=math.prod(stored.shape),
                target=self.target,
            ).tasks()

    def _open_quantized(
        self,
        stored: Quantized,
        matrix_slice: MatrixSlice,
        tensor: TensorOffsets,
        scales: int | None,
    ) -> DiskMatrix:
        return open_quantized(
            stored,
            matrix_slice,
            open_source=self.files.open,
            target=self.target,
            to=tensor.start,
            scales_to=scales,
            device=self.context.device,
        )

    def _start_of(self, name: str) -> int:
        return next(tensor.start for tensor in self.layout.tensors if tensor.name == name)


def _merged(ranges: Sequence[_Range]) -> list[_Range]:
    """Neighbours in both files become one."""
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
    return merged


def _copy_task(source: SourceFile, start: int, target: TargetFile, to: int, size: int) -> ShardTask:
    def run(stop: Event) -> None:
        source.expect(start, size)
        copy_range(source, start, target, to, size)
        target.begin_writeback(to, size)

    return ShardTask(to, size, run)


def _dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{entry.name}' is stored as {entry.dtype}, which cannot be edited: obtain the "
            "checkpoint in bfloat16, float16 or float32"
        )
    return DTYPES[entry.dtype]


@dataclass(frozen=True, kw_only=True)
class _MatrixEdit:
    """An edit of one matrix of a tensor, about to be cut into tasks.

    Attributes:
        index: the edit's number.
        basis: ``[k, d_model]``, what to remove.
        strength: how much of it.
        matrix: which is read and written.
        matrix_slice: where it lies in the tensor.
        tensor: in the edited shard.
        entry: the source's, for errors.
        elements: of the whole tensor.
        target: the file to write.
    """

    index: int
    basis: Tensor
    strength: EditStrength
    matrix: DiskMatrix
    matrix_slice: MatrixSlice
    tensor: TensorOffsets
    entry: TensorEntry
    elements: int
    target: TargetFile

    def tasks(self) -> Iterator[ShardTask]:
        """Blocks of rows where rows stand alone, else the matrix."""
        step = self.matrix.rows
        if self.matrix_slice.d_model_is_columns and self.matrix.splits:
            row_bytes = self.tensor.size * self.matrix_slice.columns // self.elements
            step = max(1, _EDIT_BYTES // max(1, row_bytes))
        for first in range(0, self.matrix.rows, step):
            yield self._task(first, min(first + step, self.matrix.rows))

    def _task(self, first: int, last: int) -> ShardTask:
        start, end = self._byte(first), self._byte(last)

        def run(stop: Event) -> tuple[int, DirectionEnergy] | None:
            matrix, d_model_is_columns = self.matrix.part(), self.matrix_slice.d_model_is_columns
            with naming_tensor(self.entry):
                for look in (matrix.measuring(), matrix):
                    if look is not None:
                        energy = project(
                            look,
                            self.basis,
                            self.strength,
                            d_model_is_columns,
                            rows=(first, last),
                            stopped=stop.is_set,
                        )
            if not stop.is_set():
                matrix.close()
                self.target.begin_writeback(start, end - start)
            return None if self.index == _NO_EDIT else (self.index, energy)

        return ShardTask(start, end - start, run)

    def _byte(self, row: int) -> int:
        """Where a row begins in the target, if the tensor is a plain one."""
        element = self.matrix_slice.offset + row * self.matrix_slice.stride
        return self.tensor.start + self.tensor.size * element // self.elements
