"""Tensors on disk as numbers, a box at a time, and how far their format rounds.

A reader of its own, not the editor's, whose mistakes a check by the same reader would miss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from abliterate.checkpoints.quantized_formats import Quantized
from abliterate.checkpoints.safetensors_header import BITS, DTYPES, TensorEntry
from abliterate.editing.shard_tasks import Files
from abliterate.errors import CheckpointError
from abliterate.storage.write_buffers import as_bytes

Box = tuple[tuple[int, int], ...]

_FP8_MAX, _INT8_MAX, _FP4_GROUP = 448.0, 127.0, 32
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTE_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# No right scale is more than this times what its largest number needs: one is rounded up to a power
# of two, the number to the format's next.
_LOOSE = 2.2
_AT_ONCE = 1 << 22  # elements read at a time, to see how large they are
# What float32 arithmetic on float32 matrices may leave, relative to the same norm.
_FLOOR = 1e-5


class StoredValues(Protocol):
    """A tensor on disk.

    Attributes:
        shape: of the numbers.
        steps: along each axis, boxes begin at multiples of this.
        exponent: of the arithmetic's unit round-off when an editor computes on it.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def steps(self) -> tuple[int, ...]: ...

    @property
    def exponent(self) -> int: ...

    def read(self, box: Box) -> Tensor:
        """The numbers of a box."""

    def strays(self, expected: Tensor, stored: Tensor, noise: Tensor, box: Box) -> Tensor:
        """Where ``stored`` is not ``expected`` rounded to the format; both float64, of one box.

        ``noise`` is what the arithmetic before the rounding may have left.
        """

    def spread(self, values: Tensor, box: Box) -> Tensor:
        """A third of what rounding may add to a sum of independent terms, per term."""


@dataclass(frozen=True)
class PlainValues:
    """Floats."""

    entry: TensorEntry
    files: Files

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def steps(self) -> tuple[int, ...]:
        return (1,) * len(self.shape)

    @property
    def exponent(self) -> int:
        return -24 if BITS[self.entry.dtype] == 16 else -53

    def read(self, box: Box) -> Tensor:
        return _read(self.entry, self.files, box, DTYPES[self.entry.dtype])

    def strays(self, expected: Tensor, stored: Tensor, noise: Tensor, box: Box) -> Tensor:
        format = torch.finfo(DTYPES[self.entry.dtype])
        allowed = expected.abs().add_(noise).mul_(format.eps / 2).add_(noise)
        allowed.add_(format.tiny * format.eps / 2)
        return ~((stored - expected).abs_() <= allowed)

    def spread(self, values: Tensor, box: Box) -> Tensor:
        return values.abs() * max(torch.finfo(DTYPES[self.entry.dtype]).eps / 2, _FLOOR / 3)


@dataclass(frozen=True)
class ScaledValues:
    """float8_e4m3fn or int8, with a scale for each tensor, row, group or block."""

    stored: Quantized
    files: Files
    exponent: int = -24

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def steps(self) -> tuple[int, ...]:
        """Scales of whole rows, or of all, are held; boxes need not be whole blocks of those."""
        return (1, 1) if self._whole_rows else self.stored.block

    @property
    def _whole_rows(self) -> bool:
        return self.stored.block[1] == self.shape[1]

    @property
    def _max_code(self) -> float:
        return _FP8_MAX if self.stored.scheme == "fp8" else _INT8_MAX

    def read(self, box: Box) -> Tensor:
        values = self._codes(box)
        return values.mul_(self._spread_out(self._stored_scales(box), box))

    def _codes(self, box: Box) -> Tensor:
        entry = self.stored.values
        if self.stored.scheme == "fp8":
            return _read(entry, self.files, box, torch.float8_e4m3fn).float()
        if entry.dtype == "I8":
            return _read(entry, self.files, box, torch.int8).float()
        rows, (first, behind) = box  # four to a word, counted from -128
        words = raw_box(entry, self.files, (rows, (first // 4, -(-behind // 4)))).flatten(1)
        skip = first % 4
        return words[:, skip : skip + behind - first].float() - 128

    def _stored_scales(self, box: Box) -> Tensor:
        """``[blocks of rows, blocks of columns]`` of a box."""
        entry, kind = self.stored.scales, _BYTE_TYPES[self.stored.scales.dtype]
        if len(entry.shape) < 2:
            whole = tuple((0, n) for n in entry.shape)
            return _read(entry, self.files, whole, kind).float().reshape(1, 1)
        of_scales = tuple(
            (a // n, -(-b // n)) for (a, b), n in zip(box, self.stored.block, strict=True)
        )
        return _read(entry, self.files, of_scales, kind).float()

    def _spread_out(self, scales: Tensor, box: Box) -> Tensor:
        """Each scale over its block's part of the box, from the box's start."""
        wide = scales
        for axis, ((a, b), n) in enumerate(zip(box, self.stored.block, strict=True)):
            first = a // n * n
            wide = wide.repeat_interleave(n, axis) if wide.shape[axis] > 1 else wide
            if wide.shape[axis] > 1:
                wide = wide.narrow(axis, a - first, b - a)
        return wide

    def strays(self, expected: Tensor, stored: Tensor, noise: Tensor, box: Box) -> Tensor:
        allowed = self._half_step(expected, box).add_(noise)
        return ~((stored - expected).abs_() <= allowed)

    def _half_step(self, values: Tensor, box: Box) -> Tensor:
        """FP8 has three bits behind the leading one, and below 2^-6 of the scale fixed steps of
        2^-9; INT8 has steps of the scale."""
        scales = self._spread_out(self._right_scales(values, box).double(), box)
        if self.stored.scheme == "int8":
            return (scales * (0.5 * (1 + 2**-7))).expand_as(values).clone()
        return values.abs().mul_(2.0**-4 * (1 + 2**-7)).add_(scales, alpha=2.0**-10)

    def _right_scales(self, values: Tensor, box: Box) -> Tensor:
        """The scales that numbers like these need, or hardly larger ones.

        Where a scale serves whole rows, of which a box holds a part, it is the stored one, if that
        is right for the largest number that it serves.
        """
        if self._whole_rows:
            first, behind = (
                (a // n, -(-b // n)) for (a, b), n in zip(box, self.stored.block, strict=True)
            )
            return self._held_scales[slice(*first), slice(*behind)]
        rows, columns = self.stored.block
        pad = (0, -values.shape[1] % columns, 0, -values.shape[0] % rows)
        tiles = torch.nn.functional.pad(values.abs(), pad)
        tiles = tiles.view(tiles.shape[0] // rows, rows, tiles.shape[1] // columns, columns)
        # As the scale may be rounded: up to a power of two, or in bfloat16.
        scales = tiles.amax((1, 3)) / self._max_code
        return scales.mul_(2 if self.stored.power_of_two else 1 + 2**-7).clamp_(min=2.0**-100)

    @cached_property
    def _held_scales(self) -> Tensor:
        """Stored scales of whole rows, no larger than their largest numbers allow."""
        whole = tuple((0, n) for n in self.shape)
        scales, step = self._stored_scales(whole), self.stored.block[0]
        largest = torch.zeros_like(scales)
        for box in cut(whole, None, (1, 1), _AT_ONCE):
            of_rows = self._codes(box).abs().amax(1, keepdim=True)
            first, behind = box[0][0] // step, -(-box[0][1] // step)
            pad = (0, 0, box[0][0] - first * step, behind * step - box[0][1])
            of_blocks = torch.nn.functional.pad(of_rows, pad).view(behind - first, step).amax(1)
            part = largest[first:behind]
            torch.maximum(part, of_blocks.unsqueeze(1), out=part)
        # A code that reaches less far than half of what the format has needs no such scale.
        return torch.minimum(scales, scales * largest * (_LOOSE / self._max_code))

    def spread(self, values: Tensor, box: Box) -> Tensor:
        return self._half_step(values, box)


@dataclass(frozen=True)
class Fp4Values:
    """float4_e2m1, two to a byte (the first in the low half), a power of two for each 32."""

    stored: Quantized
    files: Files
    exponent: int = -24

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def steps(self) -> tuple[int, ...]:
        return (1, 1, _FP4_GROUP)

    def read(self, box: Box) -> Tensor:
        groups = (box[2][0] // _FP4_GROUP, box[2][1] // _FP4_GROUP)
        codes = _read(
            self.stored.values, self.files, (*box[:2], groups, (0, _FP4_GROUP // 2)), torch.uint8
        )
        scales = _read(self.stored.scales, self.files, (*box[:2], groups), torch.uint8)
        table = torch.tensor([*_FP4, *(-value for value in _FP4)])
        values = table[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()]
        return torch.ldexp(values, scales.int().sub_(127).unsqueeze(-1)).flatten(-2)

    def strays(self, expected: Tensor, stored: Tensor, noise: Tensor, box: Box) -> Tensor:
        """Groups that are further from what is expected than the format's best two scales are."""
        groups = _groups(expected)
        largest = groups.abs().amax(-1, keepdim=True)
        low = torch.frexp(largest).exponent.sub_(3).clamp_(-127, 126)
        best = torch.minimum(self._error(groups, low), self._error(groups, low + 1))
        distance = _groups((stored - expected).square_()).sum(-1)
        blurred = _groups(noise.square()).sum(-1)
        allowed = (best.sqrt() * (1 + 1e-3) + blurred.sqrt()).square_()
        wrong: Tensor = ~(distance <= allowed + 1e-12 * largest.squeeze(-1).square())
        return wrong.repeat_interleave(_FP4_GROUP, -1)

    @staticmethod
    def _error(groups: Tensor, exponent: Tensor) -> Tensor:
        size = torch.ldexp(groups.abs(), -exponent)
        grid = torch.tensor(_FP4, dtype=size.dtype)
        middles = (grid[1:] + grid[:-1]) / 2
        lost = torch.ldexp(size - grid[torch.bucketize(size, middles)], exponent)
        error: Tensor = lost.square_().sum(-1)
        return error

    def spread(self, values: Tensor, box: Box) -> Tensor:
        """By the widths of the steps between neighbouring numbers of a group."""
        groups = _groups(values)
        largest = groups.abs().amax(-1, keepdim=True)
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 3)
        steps = torch.where(groups.abs() < 4 * unit, 0.25 * unit, 0.6 * unit)
        spread: Tensor = (steps * (largest > 0)).flatten(-2)
        return spread


def _groups(values: Tensor) -> Tensor:
    """``[..., groups, 32]``."""
    return values.reshape(*values.shape[:-1], -1, _FP4_GROUP)


@dataclass(frozen=True)
class Transposed:
    """The same with its last two axes exchanged."""

    values: StoredValues

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.values.shape
        return (*lead, columns, rows)

    @property
    def steps(self) -> tuple[int, ...]:
        *lead, rows, columns = self.values.steps
        return (*lead, columns, rows)

    @property
    def exponent(self) -> int:
        return self.values.exponent

    def read(self, box: Box) -> Tensor:
        return self.values.read((*box[:-2], box[-1], box[-2])).mT

    def strays(self, expected: Tensor, stored: Tensor, noise: Tensor, box: Box) -> Tensor:
        swapped = (*box[:-2], box[-1], box[-2])
        return self.values.strays(expected.mT, stored.mT, noise.mT, swapped).mT

    def spread(self, values: Tensor, box: Box) -> Tensor:
        return self.values.spread(values.mT, (*box[:-2], box[-1], box[-2])).mT


def open_values(entry: TensorEntry, stored: Quantized | None, files: Files) -> StoredValues:
    """A tensor as numbers.

    Raises:
        CheckpointError: it is stored in a format that is not known as numbers.
    """
    if stored is not None:
        return Fp4Values(stored, files) if stored.scheme == "mxfp4" else ScaledValues(stored, files)
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{entry.name}' in {entry.file} is stored as {entry.dtype}, not as floats"
        )
    return PlainValues(entry, files)


def cut(box: Box, axis: int | None, steps: Sequence[int], most: int) -> Iterator[Box]:
    """A box in smaller ones of about ``most`` elements, each whole along ``axis``."""
    sizes = [behind - first for first, behind in box]
    if math.prod(sizes) <= most:
        yield box
        return
    index = next((i for i, n in enumerate(sizes) if i != axis and n > steps[i]), None)
    if index is None:
        yield box
        return
    first, behind = box[index]
    rest = math.prod(sizes) // sizes[index]
    count = max(steps[index], most // rest // steps[index] * steps[index])
    for begin in range(first, behind, count):
        part = (begin, min(begin + count, behind))
        yield from cut((*box[:index], part, *box[index + 1 :]), axis, steps, most)


def raw_box(entry: TensorEntry, files: Files, box: Box) -> Tensor:
    """The bytes of a box of a tensor whose elements are whole bytes, ``[..., item size]``."""
    size = BITS[entry.dtype] // 8
    lengths = [behind - first for first, behind in box]
    content = torch.empty(*lengths, size, dtype=torch.uint8)
    if content.numel() == 0:
        return content
    view, file = as_bytes(content), files.open(entry.file)
    # Axes behind the last partial one lie together.
    partial = [i for i, n in enumerate(lengths) if n != entry.shape[i]]
    last = max(partial, default=0)
    strides = [size * math.prod(entry.shape[i + 1 :]) for i in range(len(lengths))]
    run = (lengths[last] * strides[last]) if lengths else size
    begin = entry.start + sum(box[i][0] * strides[i] for i in range(len(box)))
    starts = (
        sum(index * strides[i] for i, index in enumerate(at))
        for at in itertools.product(*(range(n) for n in lengths[:last]))
    )
    for number, start in enumerate(starts):
        file.read_into(view[number * run : (number + 1) * run], begin + start)
    return content


def _read(entry: TensorEntry, files: Files, box: Box, dtype: torch.dtype) -> Tensor:
    return raw_box(entry, files, box).view(dtype).squeeze(-1)
