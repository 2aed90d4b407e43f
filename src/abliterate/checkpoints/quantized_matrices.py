"""Matrices of quantized tensors, decoded and encoded again in blocks of rows.

FP8 and INT8 have a scale for each tensor, row, group of a row or (usually 128 x 128) block, MXFP4
one for each 32 numbers of a row; all are read and written as ``disk_matrix`` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from abliterate.checkpoints.disk_matrix import DiskMatrix, MatrixSlice
from abliterate.checkpoints.quantized_formats import (
    FP4_GROUP,
    PER_WORD,
    SCALE_TYPES,
    Quantized,
)
from abliterate.errors import CheckpointError
from abliterate.storage.file_io import SourceFile, TargetFile
from abliterate.storage.write_buffers import as_bytes

_FP8, _FP8_MAX, _INT8_MAX = torch.float8_e4m3fn, 448.0, 127.0
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def open_quantized(
    stored: Quantized,
    matrix_slice: MatrixSlice,
    *,
    open_source: Callable[[Path], SourceFile],
    device: torch.device,
    target: TargetFile | None = None,
    to: int = 0,
    scales_to: int | None = None,
) -> DiskMatrix:
    """One matrix of a quantized tensor.

    Args:
        stored: the tensor.
        matrix_slice: which of its matrices; whole rows.
        open_source: opens a source file.
        device: where to compute.
        target: the file to write, or None to read only.
        to: where the tensor's values, or its plain form, start there.
        scales_to: where its scales start, or None to write it as bfloat16.

    Raises:
        CheckpointError: only part of the matrix is to be edited.
    """
    rows, step = matrix_slice.rows, stored.block[0]
    merged = stored.scheme == "mxfp4" and scales_to is None and rows != stored.shape[1]
    first, between = divmod(matrix_slice.offset, matrix_slice.columns)
    last = first + rows
    shared = first % step or (last % step and last != stored.shape[-2])
    if matrix_slice.columns != matrix_slice.stride or between or merged or shared:
        raise CheckpointError(f"tensor '{stored.values.name}' cannot be edited in part")
    kind = _Fp4Matrix if stored.scheme == "mxfp4" else _ScaledMatrix
    return kind(
        stored=stored,
        matrix_slice=matrix_slice,
        open_source=open_source,
        device=device,
        target=target,
        to=to,
        scales_to=scales_to,
    )


@dataclass
class _BlockMatrix:
    """What all formats share: scales are held whole, values come and go in blocks of rows.

    Attributes:
        stored: the tensor.
        matrix_slice: which of its matrices.
        open_source: opens a source file.
        target: the file to write, or None if the matrix is only read.
        to: where the tensor's values, or its plain form, start there.
        scales_to: where its scales start, or None to write it as bfloat16.
        device: where to compute.
        splits: several threads cannot share one.
    """

    stored: Quantized
    matrix_slice: MatrixSlice
    open_source: Callable[[Path], SourceFile]
    target: TargetFile | None
    to: int
    scales_to: int | None
    device: torch.device
    splits: bool = False
    _scales: Tensor | None = None
    _new_scales: Tensor | None = None
    _plain: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.matrix_slice.rows

    @property
    def columns(self) -> int:
        return self.matrix_slice.columns

    @property
    def row_step(self) -> int:
        return self.stored.row_step

    @property
    def _first_row(self) -> int:
        """The matrix's first row among those of the tensor."""
        return self.matrix_slice.offset // self.matrix_slice.columns

    def part(self) -> DiskMatrix:
        return self  # it is edited in one

    def measuring(self) -> DiskMatrix | None:
        return None

    def load(self, first: int, last: int) -> Tensor:
        values = self._read_values(first, last)
        return self._decode(values.to(self.device), self._scale_rows(first, last))

    def store(self, first: int, block: Tensor) -> Tensor:
        row = self._first_row + first
        if self.scales_to is None:
            return self._store_plain(first, block)
        values, scales = self._encode(block)
        content = as_bytes(values.cpu())
        self._write(content, self.to + row * len(content) // max(1, len(block)))
        step = self.stored.block[0]
        if self._new_scales is None:
            self._new_scales = torch.empty_like(self._all_scales())
        self._new_scales[first // step : first // step + len(scales)] = scales
        return self._decode(values, scales)

    def _write(self, content: memoryview, offset: int) -> None:
        assert self.target is not None
        self.target.write(content, offset)

    def _store_plain(self, first: int, block: Tensor) -> Tensor:
        plain = block.to(torch.bfloat16).cpu()
        begin = self.to + (self._first_row + first) * self.columns * 2
        self._write(as_bytes(plain), begin)
        return block.copy_(plain)

    def close(self) -> None:
        if self._new_scales is not None and self.scales_to is not None:
            content = as_bytes(self._new_scales.cpu())
            step = self.stored.block[0]
            begin = self._first_row // step * (len(content) // len(self._new_scales))
            self._write(content, self.scales_to + begin)

    def _all_scales(self) -> Tensor:
        """Scales ``[blocks of rows, blocks of columns]`` as they are stored."""
        if self._scales is None:
            entry, step = self.stored.scales, self.stored.block[0]
            count = -(-self.rows // step)
            width = self.stored.grid[1]
            raw = torch.empty(count, width, dtype=self._scale_type())
            view = as_bytes(raw)
            begin = entry.start + self._first_row // step * (len(view) // max(1, count))
            self.open_source(entry.file).read_into(view, begin)
            self._scales = raw.to(self.device)
        return self._scales

    def _scale_rows(self, first: int, last: int) -> Tensor:
        step = self.stored.block[0]
        return self._all_scales()[first // step : -(-last // step)]

    def _read_values(self, first: int, last: int) -> Tensor:
        entry = self.stored.values
        width = (entry.end - entry.start) // (self._stored_rows() or 1)
        raw = torch.empty(last - first, width, dtype=torch.uint8)
        begin = entry.start + (self._first_row + first) * width
        self.open_source(entry.file).read_into(as_bytes(raw), begin)
        return raw

    def _stored_rows(self) -> int:
        rows = 1
        for size in self.stored.shape[:-1]:
            rows *= size
        return rows

    def _scale_type(self) -> torch.dtype:
        raise NotImplementedError

    def _decode(self, values: Tensor, scales: Tensor) -> Tensor:
        raise NotImplementedError

    def _encode(self, block: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass
class _ScaledMatrix(_BlockMatrix):
    """float8_e4m3fn or int8, each number times the scale of its tensor, row, group or block.

    Attributes:
        largest: of the numbers to store, by magnitude, where all share one scale; measured first.
    """

    largest: float | None = field(default=None, repr=False)

    @property
    def max_code(self) -> float:
        return _FP8_MAX if self.stored.scheme == "fp8" else _INT8_MAX

    def measuring(self) -> DiskMatrix | None:
        return (
            _Measuring(self) if self.stored.has_one_scale and self.scales_to is not None else None
        )

    def _scale_type(self) -> torch.dtype:
        return SCALE_TYPES[self.stored.scales.dtype]

    def _decode(self, values: Tensor, scales: Tensor) -> Tensor:
        if self.stored.scheme == "fp8":
            numbers = values.view(_FP8).to(torch.float32)
        elif self.stored.is_packed:  # unsigned, in words of four
            numbers = values[:, : self.columns].to(torch.float32).sub_(128)
        else:
            numbers = values.view(torch.int8).to(torch.float32)
        return numbers.mul_(self._spread(scales, numbers))

    def _spread(self, scales: Tensor, block: Tensor) -> Tensor:
        """Scales ``[rows or 1, columns or 1]`` that go with a block."""
        rows, columns = self.stored.block
        spread = scales.to(torch.float32)
        if len(spread) > 1 and rows > 1:
            spread = spread.repeat_interleave(rows, 0)[: len(block)]
        if spread.shape[1] > 1 and columns > 1:
            spread = spread.repeat_interleave(columns, 1)[:, : block.shape[1]]
        return spread

    def _encode(self, block: Tensor) -> tuple[Tensor, Tensor]:
        scales = self._new_scales_of(block)
        # A scale rounded down (bfloat16) would push the largest value past the format's.
        numbers = (block / self._spread(scales, block)).clamp_(-self.max_code, self.max_code)
        if self.stored.scheme == "fp8":
            return numbers.to(_FP8).view(torch.uint8), scales
        codes = numbers.round_().to(torch.int8)
        if not self.stored.is_packed:
            return codes.view(torch.uint8), scales
        unsigned = codes.to(torch.int16).add_(128).to(torch.uint8)
        return torch.nn.functional.pad(unsigned, (0, -self.columns % PER_WORD)), scales

    def _new_scales_of(self, block: Tensor) -> Tensor:
        rows, columns = self.stored.block
        if self.stored.has_one_scale:
            assert self.largest is not None, "the largest number is measured first"
            largest = block.new_full((1, 1), self.largest)
        else:
            pad = (0, -block.shape[1] % columns, 0, -block.shape[0] % rows)
            padded = torch.nn.functional.pad(block.abs(), pad)
            tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
            largest = tiles.amax((1, 3))
        scales = largest.div_(self.max_code).clamp_(min=2.0**-100)
        if self.stored.power_of_two:
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
        if self._scale_type() == torch.float16:  # never down to nothing
            scales = scales.add_(2.0**-25).clamp_(min=2.0**-24)
        return scales.to(self._scale_type())


@dataclass
class _Measuring:
    """A first look at what will be stored under one scale: nothing is written.

    Attributes:
        matrix: which learns how large its numbers get.
        splits: as the matrix has it.
    """

    matrix: _ScaledMatrix
    splits: bool = False

    @property
    def rows(self) -> int:
        return self.matrix.rows

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def columns(self) -> int:
        return self.matrix.columns

    @property
    def row_step(self) -> int:
        return self.matrix.row_step

    def load(self, first: int, last: int) -> Tensor:
        return self.matrix.load(first, last)

    def store(self, first: int, block: Tensor) -> Tensor:
        largest = float(block.abs().max()) if block.numel() else 0.0
        self.matrix.largest = max(self.matrix.largest or 0.0, largest)
        return block

    def part(self) -> DiskMatrix:
        return self

    def measuring(self) -> DiskMatrix | None:
        return None

    def close(self) -> None:
        """Nothing to write."""


class _Fp4Matrix(_BlockMatrix):
    """float4_e2m1, two to a byte (the first in the low half), with a power of two for each 32."""

    def _scale_type(self) -> torch.dtype:
        return torch.uint8

    def _store_plain(self, first: int, block: Tensor) -> Tensor:
        """Transposed, as the model has it: held until the matrix is whole."""
        if self._plain is None:
            self._plain = torch.empty(self.columns, self.rows, dtype=torch.bfloat16)
        part = self._plain[:, first : first + len(block)]
        part.copy_(block.T)
        return block.copy_(part.T)

    def close(self) -> None:
        super().close()
        if self._plain is not None:
            begin = self.to + self._first_row * self.columns * 2
            self._write(as_bytes(self._plain), begin)
            self._plain = None

    def _decode(self, values: Tensor, scales: Tensor) -> Tensor:
        table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)])
        halves = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
        numbers = table.to(self.device)[halves.int()]
        groups = numbers.view(len(values), -1, FP4_GROUP)
        return torch.ldexp(groups, scales.int().sub_(127).unsqueeze(-1)).flatten(1)

    def _encode(self, block: Tensor) -> tuple[Tensor, Tensor]:
        groups = block.view(len(block), -1, FP4_GROUP)
        largest = groups.abs().amax(-1, keepdim=True)
        # The largest value falls in [4, 8) while 6 is the format's largest: of this exponent and
        # the next, take the one that loses less.
        low = torch.frexp(largest).exponent.sub_(3).clamp_(-127, 126)
        low = torch.where(largest > 0, low, torch.full_like(low, -127))
        codes, errors = zip(*(self._round(groups, low + more) for more in (0, 1)), strict=True)
        better = errors[1] < errors[0]
        chosen = torch.where(better, codes[1], codes[0]).flatten(1)
        packed = chosen[:, ::2] | chosen[:, 1::2] << 4
        return packed, (low + better + 127).to(torch.uint8).squeeze(-1)

    def _round(self, groups: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
        scaled = torch.ldexp(groups, -exponent)
        middles = torch.tensor(_FP4_MIDDLES, device=self.device)
        index = torch.bucketize(scaled.abs(), middles)
        nearest = torch.tensor(_FP4_VALUES, device=self.device)[index]
        error = torch.ldexp(nearest - scaled.abs(), exponent).square().sum(-1, keepdim=True)
        return (index + 8 * (scaled < 0)).to(torch.uint8), error
