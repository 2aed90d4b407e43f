"""What writes to the residual stream, read from the files as matrices of output columns.

A *unit* is all that one component of one block writes: the attention of block 3, the experts of
block 5, the embedding. Its matrix ``A`` ``[d_model, columns]`` holds what the stream receives:
behind a norm ``A = diag(g) C W`` (the gain, and the centring where the norm subtracts the mean), so
that the left null direction of every edited unit is the stream direction itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from abliterate.checkpoints.disk_matrix import (
    DiskMatrix,
    MatrixSlice,
    PlainDiskMatrix,
    matrix_slices,
)
from abliterate.checkpoints.quantized_formats import Quantized, find_quantized, read_config
from abliterate.checkpoints.quantized_matrices import open_quantized
from abliterate.checkpoints.safetensors_header import DTYPES, TensorEntry
from abliterate.checkpoints.shards import ShardSet
from abliterate.editing.edit_plan import TensorEdit
from abliterate.editing.located_writers import LocatedWriters, locate_writers
from abliterate.editing.shard_tasks import Files
from abliterate.editing.tensor_changes import resolve_edits
from abliterate.errors import CheckpointError
from abliterate.models.loading import Checkpoint
from abliterate.writers import Gain, stream_width

_RUNS = 8  # neighbouring columns are read together: so many runs, spread over the matrix
_MAX_SLICES = 16  # of a stack of experts
_AT_ONCE = 4096  # columns, where all are read
_AT_ONCE_ELEMENTS = 1 << 20  # of whole rows of which some columns are wanted


@dataclass(frozen=True)
class Part:
    """A tensor on disk (or a box of it) that writes to the stream.

    Attributes:
        edit: where it lies; its basis is empty.
        ways: the gains that its product passes, one tuple for each way to the stream.
        bias: it is added as it is.
        channels: the channels that it writes, or None for all.
    """

    edit: TensorEdit
    ways: tuple[tuple[Gain, ...], ...]
    bias: bool
    channels: tuple[int, int] | None


@dataclass(frozen=True)
class AuditedComponent:
    """All matrices of one kind in one block.

    Attributes:
        kind: ``embedding``, ``attention``, ``mlp``, ``expert``, ...
        layer: decoder block, or None.
        parts: its matrices.
    """

    kind: str
    layer: int | None
    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


@dataclass(frozen=True)
class CheckpointWriters:
    """A checkpoint whose writers are known.

    Attributes:
        checkpoint: the folder.
        located: writers and shards.
        quantized: tensors stored in blocks with scales.
        units: all matrices.
        biases: all vectors.
        d_model: width of the stream.
    """

    checkpoint: Checkpoint
    located: LocatedWriters
    quantized: Mapping[str, Quantized]
    units: tuple[AuditedComponent, ...]
    biases: tuple[Part, ...]
    d_model: int

    @property
    def has_gains(self) -> bool:
        """Whether a gain or a centring stands between a writer and the stream."""
        return any(any(part.ways) for unit in self.units for part in unit.parts)


def open_checkpoint(checkpoint: Checkpoint) -> CheckpointWriters:
    """Find the writers from config and headers; runs no code of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged or stored in a format that cannot be read.
        UnsupportedArchitectureError: the writers cannot be found.
    """
    located = locate_writers(checkpoint)
    quantized = find_quantized(located.shards, read_config(checkpoint.folder))
    width = stream_width(located.model, located.plan)
    nothing = torch.zeros(0, width, dtype=torch.float64)
    parts: list[Part] = []
    for tensor in located.disk.tensors:
        ways = [w for w in located.plan.writers if w.parameter == tensor.parameter]
        if not ways or located.is_second(tensor):
            continue
        first = ways[0]
        edit = TensorEdit(tensor.name, tensor.axis, nothing, first.kind, first.layer, tensor.region)
        edit = resolve_edits([edit], located.shards, quantized)[0]
        gains = tuple(dict.fromkeys(w.gains for w in ways))
        parts.append(Part(edit, gains, first.bias, first.part))
    grouped: dict[tuple[str, int | None], list[Part]] = {}
    for part in parts:
        if not part.bias:
            grouped.setdefault((part.edit.kind, part.edit.layer), []).append(part)
    order = sorted(grouped, key=lambda key: (-1 if key[1] is None else key[1], key[0]))
    units = tuple(
        AuditedComponent(kind, layer, tuple(grouped[kind, layer])) for kind, layer in order
    )
    biases = tuple(part for part in parts if part.bias)
    return CheckpointWriters(checkpoint, located, quantized, units, biases, width)


def read_columns(
    reading: CheckpointWriters,
    unit: AuditedComponent,
    max_columns: int,
    seed: int,
    gains: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The unit's columns, or a fixed sample of them.

    Args:
        reading: the checkpoint.
        unit: which.
        most: about how many columns at most.
        seed: of the sample.
        gains: as the stream receives them; False for the matrices as they are stored.
        dtype: of the result.

    Returns:
        ``[d_model, columns]``.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or is stored in an unknown format.
    """
    share = max(1, max_columns // len(unit.parts))
    columns = [
        passed
        for part in unit.parts
        for passed in _stream_columns(reading, part, share, seed, gains, dtype)
    ]
    return _joined(columns)


def _joined(columns: Sequence[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), dim=1)


def read_bias(reading: CheckpointWriters, part: Part) -> Tensor:
    """A bias as the stream receives it, float64 ``[d_model, vectors]``."""
    return torch.cat(list(_stream_columns(reading, part, 1 << 12, 0, True)), dim=1)


def _stream_columns(
    reading: CheckpointWriters,
    part: Part,
    max_columns: int,
    seed: int,
    gains: bool,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Tensor]:
    raw = read_tensor(
        reading.located.shards, reading.quantized, part.edit, max_columns, seed, dtype
    )
    if part.channels is not None:
        whole = raw.new_zeros(reading.d_model, raw.shape[1])
        whole[slice(*part.channels)] = raw
        raw = whole
    if not gains:
        yield raw
        return
    for way in part.ways:
        yield _pass(raw, way, reading.located.gains)


def _pass(columns: Tensor, way: Sequence[Gain], values: Mapping[str, Tensor]) -> Tensor:
    """What the stream receives of columns ``[d_model, m]``."""
    for gain in way:
        if gain.centred:
            columns = columns - columns.mean(dim=0)
        if gain.parameter is not None:
            factors = gain.factors(values[gain.parameter].double()).unsqueeze(1)
            columns = factors.to(columns.dtype) * columns
    return columns


def read_tensor(
    shards: ShardSet,
    quantized: Mapping[str, Quantized],
    edit: TensorEdit,
    max_columns: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A tensor as ``[d_model, columns]``; a sample of its columns if it is large.

    The sample depends on the seed and the tensor's shape alone, so that two checkpoints of one
    architecture are sampled at the same places.
    """
    entry, stored = shards.tensors[edit.name], quantized.get(edit.name)
    shape = entry.shape if stored is None else stored.shape
    if not shape or 0 in shape:
        raise CheckpointError(f"tensor '{edit.name}' in {entry.file} is empty")
    pieces = list(matrix_slices(shape, edit.axis, edit.region))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pieces), generator=generator)[:_MAX_SLICES].sort().values
    share = max(1, max_columns // len(chosen))
    with ExitStack() as stack:
        files = Files(stack, {})
        blocks = [
            _load(entry, stored, piece, _runs(_count(piece), share, generator), files, dtype)
            for piece in (pieces[index] for index in chosen.tolist())
        ]
    return _finite(entry, _joined(blocks))


def every_column(
    shards: ShardSet, quantized: Mapping[str, Quantized], edit: TensorEdit
) -> Iterator[Tensor]:
    """All of a tensor as float64 ``[d_model, columns]``, some thousand columns at a time.

    Only what is stored in blocks with scales across its columns comes in one piece.
    """
    entry, stored = shards.tensors[edit.name], quantized.get(edit.name)
    shape = entry.shape if stored is None else stored.shape
    with ExitStack() as stack:
        files = Files(stack, {})
        for piece in matrix_slices(shape, edit.axis, edit.region):
            count = _count(piece)
            size = _AT_ONCE if stored is None or piece.d_model_is_columns else count
            for begin in range(0, count, size):
                run = (begin, min(begin + size, count))
                yield _finite(entry, _load(entry, stored, piece, [run], files, torch.float64))


def _finite(entry: TensorEntry, columns: Tensor) -> Tensor:
    if not all(math.isfinite(float(bound)) for bound in columns.aminmax()):
        raise CheckpointError(f"tensor '{entry.name}' in {entry.file} holds NaN or infinity")
    return columns


def _count(matrix_slice: MatrixSlice) -> int:
    return matrix_slice.rows if matrix_slice.d_model_is_columns else matrix_slice.columns


def _load(
    entry: TensorEntry,
    stored: Quantized | None,
    matrix_slice: MatrixSlice,
    runs: Sequence[tuple[int, int]],
    files: Files,
    dtype: torch.dtype,
) -> Tensor:
    """Runs of neighbouring columns (of neighbouring rows, where rows lie along the stream)."""
    matrix = _open_matrix(entry, stored, matrix_slice, files)
    step, lies_along = matrix.row_step, matrix_slice.d_model_is_columns
    d_model = matrix.columns if lies_along else matrix.rows
    out = torch.empty(d_model, sum(last - first for first, last in runs), dtype=dtype)
    places = list(accumulate((last - first for first, last in runs), initial=0))
    if lies_along:
        for (first, last), begin in zip(runs, places, strict=False):
            low, high = first // step * step, min(-(-last // step) * step, matrix.rows)
            block = matrix.load(low, high)[first - low : last - low]
            out[:, begin : begin + last - first] = block.T
        return out
    # Whole rows, and the columns from them: that reads little more, and far less often.
    step = max(step, _AT_ONCE_ELEMENTS // matrix.columns // step * step)
    for row in range(0, matrix.rows, step):
        block = matrix.load(row, min(row + step, matrix.rows))
        for (first, last), begin in zip(runs, places, strict=False):
            out[row : row + len(block), begin : begin + last - first] = block[:, first:last]
    return out


def _runs(count: int, max_count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    if count <= max_count:
        return [(0, count)]
    number = min(_RUNS, max_count)
    room, length = count // number, max_count // number
    return [
        (begin, begin + length)
        for index in range(number)
        for begin in [
            index * room + int(torch.randint(0, room - length + 1, (1,), generator=generator))
        ]
    ]


def _open_matrix(
    entry: TensorEntry, stored: Quantized | None, matrix_slice: MatrixSlice, files: Files
) -> DiskMatrix:
    device = torch.device("cpu")
    if stored is not None:
        return open_quantized(stored, matrix_slice, open_source=files.open, device=device)
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{entry.name}' is stored as {entry.dtype}, which cannot be read as floats: "
            "audit the checkpoint in bfloat16, float16 or float32 that it was made from"
        )
    return PlainDiskMatrix(
        source=files.open(entry.file),
        start=entry.start,
        target=None,
        to=0,
        dtype=DTYPES[entry.dtype],
        matrix_slice=matrix_slice,
        device=device,
    )
