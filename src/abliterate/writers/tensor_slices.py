"""Which boxes of which tensors on disk a traced parameter is made of.

Conversions stack, concatenate, cut and permute whole axes, so a parameter is a grid of boxes, each
a box of one tensor on disk. The grid lines are found by following one line of elements along each
axis; then every box is checked at all its corners and the whole at random elements, so a
conversion that is not a grid is refused rather than misread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from abliterate.writers.provenance import Traced, unravel

Ranges = tuple[tuple[int, int], ...]

_PROBES = 64


class RegionError(Exception):
    """A parameter is not a grid of boxes with d_model as one whole axis of each."""


@dataclass(frozen=True)
class Region:
    """A box of a parameter and the box of the tensor on disk that holds it.

    Attributes:
        source: number of the tensor on disk.
        part: index ranges in the parameter.
        region: index ranges in the tensor on disk.
        axes: the axis on disk of each axis of the parameter; None where the box is one element
            wide and there may be no such axis.
    """

    source: int
    part: Ranges
    region: Ranges
    axes: tuple[int | None, ...]


def regions(traced: Traced, axis: int, shapes: Sequence[tuple[int, ...]]) -> list[Region]:
    """The boxes that ``traced`` is made of, each of which spans ``axis`` whole and in order."""
    if traced.whole is not None and traced.numel():  # as most are
        part = tuple((0, size) for size in traced.shape)
        axes = tuple(None if size == 1 else i for i, size in enumerate(traced.shape))
        return [Region(traced.whole, part, part, axes)]
    lines = [_breaks(traced, i, shapes) for i in range(traced.ndim)]
    if len(lines[axis]) > 2:
        raise RegionError("its d_model axis is cut or permuted on disk")
    boxes = _boxes(traced, lines, shapes)
    _probe(traced, boxes, lines, shapes)
    return _merged(boxes, axis, shapes)


def _locate(
    traced: Traced, index: Tensor, shapes: Sequence[tuple[int, ...]]
) -> list[tuple[int, tuple[int, ...]]]:
    """The source and the index in it of each element at ``index``, shaped [ndim, n]."""
    numbers, offsets = traced.at(index)
    located: list[tuple[int, tuple[int, ...]]] = [(0, ())] * len(numbers)
    for number in set(numbers.tolist()):
        chosen = (numbers == number).nonzero().flatten()
        places = unravel(offsets[chosen], shapes[number]).T.tolist()
        for column, place in zip(chosen.tolist(), places, strict=True):
            located[column] = (number, tuple(place))
    return located


def _breaks(traced: Traced, axis: int, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Where along ``axis`` the elements stop being successive ones of one tensor on disk."""
    size = traced.shape[axis]
    index = torch.zeros((traced.ndim, size), dtype=torch.long)
    index[axis] = torch.arange(size)
    numbers, offsets = traced.at(index)
    same = numbers[1:] == numbers[:-1]
    steps = offsets[1:] - offsets[:-1]
    new = (same[1:] != same[:-1]) | (steps[1:] != steps[:-1])
    runs = [1, *((new.nonzero().flatten() + 2).tolist()), size]
    # Successive along one axis of the source: the offset grows by that axis's stride each time.
    starts = [0]
    stride: int | None = None
    for first, behind in pairwise(runs if size > 1 else ()):
        together, step = bool(same[first - 1]), int(steps[first - 1])
        for i in range(first, behind):
            if together and (
                stride == step or (stride is None and _is_stride(step, numbers, i, shapes))
            ):
                stride = step
                break  # so does the rest of the run
            starts.append(i)
            stride = None
    return [*starts, size]


def _is_stride(step: int, numbers: Tensor, i: int, shapes: Sequence[tuple[int, ...]]) -> bool:
    shape, stride = shapes[int(numbers[i])], 1
    for size in reversed(shape):
        if step == stride:
            return True
        stride *= size
    return False


def _boxes(
    traced: Traced, lines: Sequence[list[int]], shapes: Sequence[tuple[int, ...]]
) -> list[Region]:
    """The boxes of the grid, located on disk by their corners."""
    parts = [tuple(part) for part in product(*(list(pairwise(line)) for line in lines))]
    ends = [list(product(*((lo, hi - 1) for lo, hi in part))) for part in parts]
    index = torch.tensor([corner for corners in ends for corner in corners], dtype=torch.long).T
    located = _locate(traced, index, shapes)
    boxes, per = [], 2**traced.ndim
    for i, part in enumerate(parts):
        boxes.append(_box(part, ends[i], located[i * per : (i + 1) * per]))
    return boxes


def _box(
    part: Ranges,
    corners: Sequence[tuple[int, ...]],
    located: Sequence[tuple[int, tuple[int, ...]]],
) -> Region:
    """The box on disk with these corners, which must be ``part`` with its axes renamed."""
    source, low = located[0]
    axes: list[int | None] = []
    region = [(x, x + 1) for x in low]
    for i, (lo, hi) in enumerate(part):
        if hi - lo == 1:
            axes.append(None)
            continue
        # corners[0] is all low; this one differs from it in axis i alone.
        far = located[2 ** (len(part) - 1 - i)][1]
        moved = [j for j, (a, b) in enumerate(zip(low, far, strict=True)) if a != b]
        if len(moved) != 1 or far[moved[0]] - low[moved[0]] != hi - 1 - lo or moved[0] in axes:
            raise RegionError("its axes are mixed on disk")
        axes.append(moved[0])
        region[moved[0]] = (low[moved[0]], far[moved[0]] + 1)
    box = Region(source, part, tuple(region), tuple(axes))
    if any(where != _place(box, corner) for corner, where in zip(corners, located, strict=True)):
        raise RegionError("it is not made of boxes of tensors on disk")
    return box


def _place(box: Region, index: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Where on disk ``box`` has the parameter's element ``index``."""
    place = [lo for lo, _ in box.region]
    for i, (lo, _), axis in zip(index, box.part, box.axes, strict=True):
        if axis is not None:
            place[axis] += i - lo
    return box.source, tuple(place)


def _probe(
    traced: Traced,
    boxes: Sequence[Region],
    lines: Sequence[list[int]],
    shapes: Sequence[tuple[int, ...]],
) -> None:
    """Compares the boxes with random elements of the parameter."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randint(n, (_PROBES,), generator=generator) for n in traced.shape])
    number = torch.zeros(_PROBES, dtype=torch.long)
    for line, row in zip(lines, index, strict=True):
        column = torch.searchsorted(torch.tensor(line), row, right=True) - 1
        number = number * (len(line) - 1) + column
    located = _locate(traced, index, shapes)
    for box, origin, element in zip(number.tolist(), located, index.T.tolist(), strict=True):
        if _place(boxes[box], element) != origin:
            raise RegionError("it is not made of boxes of tensors on disk")


def _merged(boxes: list[Region], axis: int, shapes: Sequence[tuple[int, ...]]) -> list[Region]:
    """The boxes, as one for each tensor on disk that its boxes fill side by side."""
    by_source: dict[int, list[Region]] = {}
    for box in boxes:
        by_source.setdefault(box.source, []).append(box)
    merged: list[Region] = []
    for source, group in by_source.items():
        filled = sum(_size(box.region) for box in group) == _size([(0, n) for n in shapes[source]])
        if len(group) == 1 or not filled or len({box.axes[axis] for box in group}) > 1:
            merged += group
            continue
        spans = zip(*(box.part for box in group), strict=True)
        part = tuple((min(lo for lo, _ in s), max(hi for _, hi in s)) for s in spans)
        whole = tuple((0, n) for n in shapes[source])
        if _size(part) != _size(whole):  # others lie between its boxes
            merged += group
            continue
        merged.append(Region(source, part, whole, group[0].axes))
    return merged


def _size(ranges: Sequence[tuple[int, int]]) -> int:
    size = 1
    for lo, hi in ranges:
        size *= hi - lo
    return size
