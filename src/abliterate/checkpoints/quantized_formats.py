"""Weights stored as small numbers with a scale per block: FP8 (DeepSeek, Qwen) and MXFP4 (gpt-oss).

Other quantized formats fit their numbers to the weights in ways that an edit would undo; for those
there is an error that says how to obtain a plain checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from abliterate.checkpoints.disk_matrix import DiskMatrix, MatrixSlice
from abliterate.checkpoints.shards import ShardSet, TensorEntry
from abliterate.errors import CheckpointError
from abliterate.storage.file_io import SourceFile, TargetFile
from abliterate.storage.json_text import parse_json
from abliterate.storage.write_buffers import as_bytes

_FP8, _FP8_MAX = torch.float8_e4m3fn, 448.0
_SCALE_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_FP4_GROUP = 32  # elements per scale, in 16 bytes
_KEPT = {"fp8", "mxfp4"}
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}


@dataclass(frozen=True)
class Quantized:
    """A tensor stored in blocks with scales.

    Attributes:
        scheme: how its numbers are stored.
        values: the numbers.
        scales: the scales.
        shape: of the matrix, or stack of matrices, that they stand for.
        block: rows and columns that share a scale.
        power_of_two: its scales are powers of two.
    """

    scheme: Literal["fp8", "mxfp4"]
    values: TensorEntry
    scales: TensorEntry
    shape: tuple[int, ...]
    block: tuple[int, int]
    power_of_two: bool = False

    @property
    def dense(self) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the plain tensor; MXFP4 experts are stored transposed."""
        if self.scheme == "fp8":
            return self.values.name, self.shape
        experts, rows, columns = self.shape
        return self.values.name.removesuffix("_blocks"), (experts, columns, rows)


def check_method(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse checkpoints whose weights cannot be edited as they are stored.

    Raises:
        CheckpointError: they are GPTQ, AWQ, bitsandbytes, GGUF or of another quantization.
    """
    if not any(folder.glob("*.safetensors")) and (files := sorted(folder.glob("*.gguf"))):
        raise CheckpointError(
            f"{folder} holds GGUF weights ({files[0].name}), which cannot be edited: edit the "
            "safetensors checkpoint that they were converted from, then convert that"
        )
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return
    method = str(settings.get("quant_method") or "an unnamed method")
    if method not in _KEPT:
        raise CheckpointError(
            f"{folder} is quantized with {_METHODS.get(method, method)}, which cannot be edited: "
            "edit the checkpoint in bfloat16 or float16 that it was made from (see base_model in "
            "its card) and quantize the result"
        )


def dense_shapes(
    shards: ShardSet, quantized: Mapping[str, Quantized]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors as they would be if nothing were quantized."""
    hidden = {q.values.name for q in quantized.values()} | {
        q.scales.name for q in quantized.values()
    }
    plain = {name: e.shape for name, e in shards.tensors.items() if name not in hidden}
    return plain | dict(stored.dense for stored in quantized.values())


def find_quantized(shards: ShardSet, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Every tensor stored in blocks with scales, by the name of its values.

    Raises:
        CheckpointError: values and scales do not fit together.
    """
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, Mapping) else {}
    found = {}
    for name, entry in shards.tensors.items():
        if entry.dtype == "F8_E4M3" and f"{name}_scale_inv" in shards.tensors:
            scales = shards.tensors[f"{name}_scale_inv"]
            found[name] = _fp8(entry, scales, settings)
        elif name.endswith("_blocks") and (other := f"{name[:-7]}_scales") in shards.tensors:
            found[name] = _mxfp4(entry, shards.tensors[other])
    return found


def _fp8(values: TensorEntry, scales: TensorEntry, settings: Mapping[str, Any]) -> Quantized:
    block = settings.get("weight_block_size") or (128, 128)
    good = len(values.shape) == 2 and scales.dtype in _SCALE_TYPES
    if good and isinstance(block, list | tuple) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            fits = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
            if scales.shape == fits:
                # DeepSeek V3.1 keeps powers of two in float32 scales.
                whole = scales.dtype == "F8_E8M0" or settings.get("scale_fmt") == "ue8m0"
                return Quantized("fp8", values, scales, values.shape, (rows, columns), whole)
    raise CheckpointError(_misfit(values, scales))


def _mxfp4(values: TensorEntry, scales: TensorEntry) -> Quantized:
    if (
        (values.dtype, scales.dtype) != ("U8", "U8")
        or len(values.shape) != 4
        or values.shape[3] != _FP4_GROUP // 2
        or values.shape[:3] != scales.shape
    ):
        raise CheckpointError(_misfit(values, scales))
    experts, rows, groups = scales.shape
    shape = (experts, rows, groups * _FP4_GROUP)
    return Quantized("mxfp4", values, scales, shape, (1, _FP4_GROUP), True)


def _misfit(values: TensorEntry, scales: TensorEntry) -> str:
    return (
        f"tensor '{values.name}' in {values.file} ({values.dtype} {list(values.shape)}) and its "
        f"scales ({scales.dtype} {list(scales.shape)}) do not fit together: the checkpoint is "
        "damaged or of an unknown format"
    )


def open_quantized(
    stored: Quantized,
    strip: MatrixSlice,
    source: Callable[[Path], SourceFile],
    target: TargetFile | None,
    to: int,
    scales_to: int | None,
    device: torch.device,
) -> DiskMatrix:
    """One matrix of a quantized tensor.

    Args:
        stored: the tensor.
        strip: which of its matrices; whole rows.
        source: opens a source file.
        target: the file to write, or None to read only.
        to: where the tensor's values, or its plain form, start there.
        scales_to: where its scales start, or None to write it as bfloat16.
        device: where to compute.

    Raises:
        CheckpointError: only part of the matrix is to be edited.
    """
    merged = stored.scheme == "mxfp4" and scales_to is None and strip.rows != stored.shape[1]
    if strip.columns != strip.stride or strip.offset % strip.columns or merged:
        raise CheckpointError(f"tensor '{stored.values.name}' cannot be edited in part")
    kind = _Fp8Grid if stored.scheme == "fp8" else _Fp4Grid
    return kind(stored, strip, source, target, to, scales_to, device)


class _BlockGrid:
    """What both formats share: scales are held whole, values come and go in blocks of rows."""

    splits = False

    def __init__(
        self,
        stored: Quantized,
        strip: MatrixSlice,
        source: Callable[[Path], SourceFile],
        target: TargetFile | None,
        to: int,
        scales_to: int | None,
        device: torch.device,
    ) -> None:
        self.rows, self.columns, self.row_step = strip.rows, strip.columns, stored.block[0]
        self._stored, self._source, self._target = stored, source, target
        self._to, self._scales_to, self._device = to, scales_to, device
        self._first_row = strip.offset // strip.columns
        self._scales: Tensor | None = None
        self._fresh: Tensor | None = None
        self._plain: Tensor | None = None

    def part(self) -> DiskMatrix:
        return self  # it is edited in one

    def load(self, first: int, last: int) -> Tensor:
        values = self._read_values(first, last)
        return self._decode(values.to(self._device), self._scale_rows(first, last))

    def store(self, first: int, block: Tensor) -> Tensor:
        row = self._first_row + first
        if self._scales_to is None:
            return self._store_plain(first, block)
        values, scales = self._encode(block)
        content = as_bytes(values.cpu())
        self._write(content, self._to + row * len(content) // max(1, len(block)))
        step = self._stored.block[0]
        if self._fresh is None:
            self._fresh = torch.empty_like(self._all_scales())
        self._fresh[first // step : first // step + len(scales)] = scales
        return self._decode(values, scales)

    def _write(self, content: memoryview, offset: int) -> None:
        assert self._target is not None
        self._target.write(content, offset)

    def _store_plain(self, first: int, block: Tensor) -> Tensor:
        plain = block.to(torch.bfloat16).cpu()
        begin = self._to + (self._first_row + first) * self.columns * 2
        self._write(as_bytes(plain), begin)
        return block.copy_(plain)

    def close(self) -> None:
        if self._fresh is not None and self._scales_to is not None:
            content = as_bytes(self._fresh.cpu())
            step = self._stored.block[0]
            begin = self._first_row // step * (len(content) // len(self._fresh))
            self._write(content, self._scales_to + begin)

    def _all_scales(self) -> Tensor:
        """Scales ``[blocks of rows, blocks of columns]`` as they are stored."""
        if self._scales is None:
            entry, step = self._stored.scales, self._stored.block[0]
            count = -(-self.rows // step)
            raw = torch.empty(count, entry.shape[-1], dtype=self._scale_type())
            view = as_bytes(raw)
            begin = entry.start + self._first_row // step * (len(view) // max(1, count))
            self._source(entry.file).read_into(view, begin)
            self._scales = raw.to(self._device)
        return self._scales

    def _scale_rows(self, first: int, last: int) -> Tensor:
        step = self._stored.block[0]
        return self._all_scales()[first // step : -(-last // step)]

    def _read_values(self, first: int, last: int) -> Tensor:
        entry = self._stored.values
        width = (entry.end - entry.start) // (self._stored_rows() or 1)
        raw = torch.empty(last - first, width, dtype=torch.uint8)
        begin = entry.start + (self._first_row + first) * width
        self._source(entry.file).read_into(as_bytes(raw), begin)
        return raw

    def _stored_rows(self) -> int:
        rows = 1
        for size in self._stored.shape[:-1]:
            rows *= size
        return rows

    def _scale_type(self) -> torch.dtype:
        raise NotImplementedError

    def _decode(self, values: Tensor, scales: Tensor) -> Tensor:
        raise NotImplementedError

    def _encode(self, block: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class _Fp8Grid(_BlockGrid):
    """float8_e4m3fn with a scale for each (usually 128 x 128) block."""

    def _scale_type(self) -> torch.dtype:
        return _SCALE_TYPES[self._stored.scales.dtype]

    def _decode(self, values: Tensor, scales: Tensor) -> Tensor:
        numbers = values.view(_FP8).to(torch.float32)
        return numbers.mul_(self._spread(scales, numbers))

    def _spread(self, scales: Tensor, block: Tensor) -> Tensor:
        rows, columns = self._stored.block
        wide = scales.to(torch.float32)
        wide = wide.repeat_interleave(rows, 0)[: len(block)]
        return wide.repeat_interleave(columns, 1)[:, : block.shape[1]]

    def _encode(self, block: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self._stored.block
        pad = (0, -block.shape[1] % columns, 0, -block.shape[0] % rows)
        padded = torch.nn.functional.pad(block.abs(), pad)
        tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        scales = tiles.amax((1, 3)).div_(_FP8_MAX).clamp_(min=2.0**-100)
        if self._stored.power_of_two:
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
        scales = scales.to(self._scale_type())
        numbers = block / self._spread(scales, block)
        # A scale rounded down (bfloat16) would push the largest value past the format's.
        return numbers.clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8).view(torch.uint8), scales


class _Fp4Grid(_BlockGrid):
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
            begin = self._to + self._first_row * self.columns * 2
            self._write(as_bytes(self._plain), begin)
            self._plain = None

    def _decode(self, values: Tensor, scales: Tensor) -> Tensor:
        table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)])
        halves = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
        numbers = table.to(self._device)[halves.int()]
        groups = numbers.view(len(values), -1, _FP4_GROUP)
        return torch.ldexp(groups, scales.int().sub_(127).unsqueeze(-1)).flatten(1)

    def _encode(self, block: Tensor) -> tuple[Tensor, Tensor]:
        groups = block.view(len(block), -1, _FP4_GROUP)
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
        middles = torch.tensor(_FP4_MIDDLES, device=self._device)
        index = torch.bucketize(scaled.abs(), middles)
        nearest = torch.tensor(_FP4_VALUES, device=self._device)[index]
        error = torch.ldexp(nearest - scaled.abs(), exponent).square().sum(-1, keepdim=True)
        return (index + 8 * (scaled < 0)).to(torch.uint8), error


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's ``config.json`` as it is.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / "config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: it is no JSON object")
    return config
