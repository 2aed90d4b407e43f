"""Tensors on disk as matrices that are read and written in blocks of rows.

An edit along any axis of a tensor of any rank, or of a box in it, comes down to matrices whose rows
or columns are d_model long; what a block of rows looks like in memory is always a wide float
matrix, whatever it is stored as.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from abliterate.precision import has_float64
from abliterate.storage.file_io import SourceFile, TargetFile
from abliterate.storage.write_buffers import Outgoing, as_bytes, scratch

# Columns of a matrix that is edited along its rows; wider ones are cut into strips.
_MAX_COLUMNS = 1 << 18
_AHEAD = 8 << 20  # how far the system reads ahead of a block


@dataclass(frozen=True)
class MatrixSlice:
    """A matrix within a tensor, counted in elements.

    Attributes:
        offset: its first element.
        rows: how many rows.
        columns: how many columns.
        stride: elements from one row to the next.
        d_model_is_columns: d_model is the columns (each row stands alone), else the rows.
    """

    offset: int
    rows: int
    columns: int
    stride: int
    d_model_is_columns: bool


def matrix_slices(
    shape: Sequence[int], axis: int, region: Sequence[tuple[int, int]] | None = None
) -> Iterator[MatrixSlice]:
    """The matrices of which a tensor, or a box in it, consists.

    Args:
        shape: of the tensor.
        axis: its d_model axis.
        region: first and behind-last index along each axis, or None for all; whole along ``axis``.
    """
    box = list(region) if region is not None else [(0, size) for size in shape]
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    trail = steps[axis]
    # Axes behind the last partial one on each side merge into runs of neighbouring elements.
    if trail == 1:
        outer, (offset, rows) = _runs(shape[:axis], box[:axis], shape[axis])
        for start in outer:
            yield MatrixSlice(start + offset, rows, shape[axis], shape[axis], True)
        return
    lead, (first, count) = _runs(shape[:axis], box[:axis], shape[axis] * trail)
    inner, (column_offset, width) = _runs(shape[axis + 1 :], box[axis + 1 :], 1)
    matrix = shape[axis] * trail
    for start, index, shift in itertools.product(lead, range(count), inner):
        base = start + first + index * matrix + shift + column_offset
        for column in range(0, width, _MAX_COLUMNS):
            yield MatrixSlice(
                base + column, shape[axis], min(_MAX_COLUMNS, width - column), trail, False
            )


def _runs(
    shape: Sequence[int], box: Sequence[tuple[int, int]], unit: int
) -> tuple[list[int], tuple[int, int]]:
    """A box as equal runs of neighbouring units.

    Args:
        shape: of the array of units.
        box: the part of it.
        unit: elements in a unit.

    Returns:
        The element offset of each group, and within it that of the run and its length in units.
    """
    last = max((i for i, size in enumerate(shape) if box[i] != (0, size)), default=-1)
    if last < 0:
        return [0], (0, math.prod(shape))
    steps = [math.prod(shape[i + 1 :]) * unit for i in range(len(shape))]
    groups = [
        sum(index * step for index, step in zip(chosen, steps, strict=False))
        for chosen in itertools.product(*(range(*ends) for ends in box[:last]))
    ]
    first, behind = box[last]
    return groups, (first * steps[last], (behind - first) * (steps[last] // unit))


class DiskMatrix(Protocol):
    """A matrix on disk."""

    @property
    def device(self) -> torch.device:
        """Where blocks are computed."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def row_step(self) -> int:
        """Blocks start at multiples of this row."""

    @property
    def splits(self) -> bool:
        """Whether several threads may each edit a block of its rows."""

    def load(self, first: int, last: int) -> Tensor:
        """Rows ``[last - first, columns]`` as wide floats, the caller's to change.

        Its memory may serve for the next block that the same thread loads.
        """

    def store(self, first: int, block: Tensor) -> Tensor:
        """Write a block that starts at row ``first``; returns it as it was rounded."""

    def part(self) -> DiskMatrix:
        """The same for a thread that edits a block of its rows; to be closed after the last."""

    def measuring(self) -> DiskMatrix | None:
        """The same, to be edited once before without a byte written, where how a number is stored
        depends on all the others; None where it does not."""

    def close(self) -> None:
        """Write what has not been written yet."""


@dataclass
class PlainDiskMatrix:
    """A matrix of plain floats.

    Attributes:
        source: file to read from.
        start: byte of the tensor's first element in it.
        target: the file to write, or None if the matrix is only read.
        to: byte of the tensor's first element there.
        dtype: what it is stored as.
        matrix_slice: which matrix of the tensor.
        device: where to compute.
        past_cache: nothing else is written where the matrix lies, so that long runs of it need not
            pass through the page cache.
        outgoing: gathers what a part of it writes.
    """

    source: SourceFile
    start: int
    target: TargetFile | None
    to: int
    dtype: torch.dtype
    matrix_slice: MatrixSlice
    device: torch.device
    row_step: int = 1
    splits: bool = True
    past_cache: bool = True
    outgoing: Outgoing | None = None

    @property
    def rows(self) -> int:
        return self.matrix_slice.rows

    @property
    def columns(self) -> int:
        return self.matrix_slice.columns

    def load(self, first: int, last: int) -> Tensor:
        size, matrix_slice = self.dtype.itemsize, self.matrix_slice
        raw = scratch.tensor("raw", (last - first, matrix_slice.columns), self.dtype)
        view = as_bytes(raw)
        stride = matrix_slice.stride * size
        begin = self.start + matrix_slice.offset * size + first * stride
        self.source.expect(begin + _AHEAD, (last - first) * stride)
        for offset, length, row in self._pieces(last - first):
            self.source.read_into(
                view[offset : offset + length], begin + row * matrix_slice.stride * size
            )
        # Half precision is computed in float32, float32 itself in float64: on the host where the
        # device has none, as the edit of a float32 checkpoint is to be exact to its last digit.
        upcast = torch.float32 if size == 2 else torch.float64
        if self.device.type != "cpu" and (size == 2 or has_float64(self.device)):
            return raw.to(self.device).to(upcast)  # one by one: the narrow bytes travel
        return scratch.tensor("wide", raw.shape, upcast).copy_(raw)

    def store(self, first: int, block: Tensor) -> Tensor:
        size, matrix_slice = self.dtype.itemsize, self.matrix_slice
        assert self.target is not None
        stride = matrix_slice.stride * size
        begin = self.to + matrix_slice.offset * size + first * stride
        if self.outgoing is not None:
            raw = self.outgoing.room(begin, block.shape, self.dtype)
        else:
            raw = scratch.tensor("raw", block.shape, self.dtype)
        rounded = raw if block.device.type == "cpu" else block.to(self.dtype)
        raw.copy_(block if rounded is raw else rounded)
        if self.outgoing is None:
            view = as_bytes(raw)
            for offset, length, row in self._pieces(len(block)):
                self.target.write(
                    view[offset : offset + length], begin + row * matrix_slice.stride * size
                )
        return block.copy_(rounded)

    def _pieces(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Byte in the block, length and row of each run of neighbouring bytes."""
        width = self.matrix_slice.columns * self.dtype.itemsize
        if self.matrix_slice.stride == self.matrix_slice.columns:
            yield 0, rows * width, 0
        else:
            for row in range(rows):
                yield row * width, width, row

    def part(self) -> PlainDiskMatrix:
        together = self.matrix_slice.stride == self.matrix_slice.columns and self.past_cache
        if self.target is None or not together:
            return self
        return replace(self, outgoing=Outgoing(self.target))

    def measuring(self) -> DiskMatrix | None:
        return None

    def close(self) -> None:
        if self.outgoing is not None:
            self.outgoing.flush()
