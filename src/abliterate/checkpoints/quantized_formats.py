"""Weights stored as small numbers with scales: FP8 and INT8 (one per tensor, row, group or block),
MXFP4 (gpt-oss).

Other quantized formats fit their numbers to the weights in ways that an edit would undo; for those
there is an error that says how to obtain a plain checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from abliterate.checkpoints.compressed_tensors import (
    METHOD,
    packs_eight_bits,
    scale_blocks,
    unsupported_scheme,
)
from abliterate.checkpoints.safetensors_header import TensorEntry
from abliterate.checkpoints.shards import ShardSet
from abliterate.errors import CheckpointError
from abliterate.storage.json_text import parse_json

SCALE_TYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
}
FP4_GROUP = 32  # elements per scale, in 16 bytes
PER_WORD = 4  # eight-bit integers in a packed word of 32 bits
_KEPT = {"fp8", "fbgemm_fp8", "mxfp4", METHOD}
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}
_SCALES = ("_scale_inv", "_scale")  # behind the name of the weight
_PACKED = ".weight_packed"
_INTEGERS = {"I64": torch.int64, "I32": torch.int32}
# Beside a weight and its scales; they have no meaning once it is a plain tensor.
_COMPANIONS = ("input_scale", "activation_scale", "input_zero_point", "weight_shape")
# With these a number is not its value times a scale alone.
_OFFSETS = ("weight_zero_point", "weight_g_idx")


@dataclass(frozen=True)
class Quantized:
    """A tensor stored as small numbers with scales.

    Attributes:
        scheme: how its numbers are stored.
        values: the numbers.
        scales: the scales.
        shape: of the matrix, or stack of matrices, that they stand for.
        block: rows and columns that share a scale.
        power_of_two: its scales are powers of two.
        companions: of its module: scales of activations, the shape of what is packed.
    """

    scheme: Literal["fp8", "int8", "mxfp4"]
    values: TensorEntry
    scales: TensorEntry
    shape: tuple[int, ...]
    block: tuple[int, int]
    power_of_two: bool = False
    companions: tuple[TensorEntry, ...] = ()

    @property
    def dense(self) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the plain tensor; MXFP4 experts are stored transposed."""
        if self.is_packed:
            return f"{self.values.name.removesuffix(_PACKED)}.weight", self.shape
        if self.scheme != "mxfp4":
            return self.values.name, self.shape
        experts, rows, columns = self.shape
        return self.values.name.removesuffix("_blocks"), (experts, columns, rows)

    @property
    def is_packed(self) -> bool:
        """Whether its integers lie in words of 32 bits, each row up to a whole word."""
        return self.scheme == "int8" and self.values.dtype == "I32"

    @property
    def has_one_scale(self) -> bool:
        """Whether all of its numbers share one scale, which depends on the largest of them."""
        return self.scheme != "mxfp4" and self.block == self.shape

    @property
    def row_step(self) -> int:
        """Blocks of rows begin at multiples of this."""
        return 1 if self.has_one_scale else self.block[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the scales of a matrix."""
        rows, columns = self.block
        return -(-self.shape[-2] // rows), -(-self.shape[-1] // columns)


def plain_config(config: Any) -> Any:
    """The configuration of the plain model that a quantized checkpoint stands for.

    Args:
        config: as transformers reads it; it stays as it is.
    """
    plain = deepcopy(config)
    for section in (plain, plain.get_text_config(decoder=True)):
        if hasattr(section, "quantization_config"):
            del section.quantization_config
    return plain


def check_method(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse checkpoints whose weights cannot be edited as they are stored.

    Raises:
        CheckpointError: they are GPTQ, AWQ, bitsandbytes, GGUF or of another quantization, or of a
            scheme of compressed-tensors other than eight bits with scales.
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
    named = None if method in _KEPT else _METHODS.get(method, method)
    if method == METHOD:
        named = unsupported_scheme(settings)
    if named is not None:
        raise CheckpointError(
            f"{folder} is quantized with {named}, which cannot be edited: "
            "edit the checkpoint in bfloat16 or float16 that it was made from (see base_model in "
            "its card) and quantize the result"
        )


def dense_shapes(
    shards: ShardSet, quantized: Mapping[str, Quantized]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors as they would be if nothing were quantized."""
    hidden = {entry.name for q in quantized.values() for entry in (q.values, *beside(q))}
    plain = {name: e.shape for name, e in shards.tensors.items() if name not in hidden}
    return plain | dict(stored.dense for stored in quantized.values())


def beside(stored: Quantized) -> tuple[TensorEntry, ...]:
    """The tensors that go where the numbers go: scales, and what else the module needs of them."""
    return (stored.scales, *stored.companions)


def find_quantized(shards: ShardSet, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Every tensor stored as small numbers with scales, by the name of its values.

    Raises:
        CheckpointError: values and scales do not fit together, or are more than a product.
    """
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, Mapping) else {}
    blocks = [*_weight_blocks(settings), *scale_blocks(settings)]
    packed = settings.get("quant_method") == METHOD and packs_eight_bits(settings)
    power_of_two = settings.get("scale_fmt") == "ue8m0"
    quantized = {}
    for name, entry in shards.tensors.items():
        if name.endswith("_blocks") and (other := f"{name[:-7]}_scales") in shards.tensors:
            quantized[name] = _mxfp4(entry, shards.tensors[other])
            continue
        is_packed = packed and name.endswith(_PACKED) and entry.dtype == "I32"
        if entry.dtype not in ("F8_E4M3", "I8") and not is_packed:
            continue
        stem = f"{name.removesuffix(_PACKED)}.weight" if is_packed else name
        scales = next((s for end in _SCALES if (s := stem + end) in shards.tensors), None)
        if scales is not None:
            quantized[name] = _scaled(entry, shards.tensors[scales], shards, blocks, power_of_two)
    return quantized


def _weight_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Blocks of the FP8 that DeepSeek and Qwen publish."""
    if "weight_block_size" not in settings and settings.get("quant_method") not in (None, "fp8"):
        return []
    block = settings.get("weight_block_size") or (128, 128)
    if isinstance(block, list | tuple) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            return [(rows, columns)]
    return []


def _scaled(
    values: TensorEntry,
    scales: TensorEntry,
    shards: ShardSet,
    blocks: Sequence[tuple[int, int]],
    power_of_two: bool,
) -> Quantized:
    module = values.name.rpartition(".")[0]
    for end in _OFFSETS:
        if f"{module}.{end}" in shards.tensors:
            raise CheckpointError(
                f"tensor '{values.name}' in {values.file} is stored with '{end}', which an edit "
                "cannot keep: edit the checkpoint in bfloat16 or float16 that it was made from"
            )
    names = [f"{module}.{end}" for end in _COMPANIONS]
    companions = tuple(shards.tensors[name] for name in names if name in shards.tensors)
    shape = values.shape
    if values.dtype == "I32" and len(shape) == 2:
        shape = (shape[0], _packed_columns(values, f"{module}.weight_shape", shards))
    if len(shape) != 2 or 0 in shape or scales.dtype not in SCALE_TYPES:
        raise CheckpointError(_misfit(values, scales))
    possible = [*blocks, (1, shape[1])]
    fits = [b for b in possible if scales.shape == (-(-shape[0] // b[0]), -(-shape[1] // b[1]))]
    if scales.shape in ((), (1,)):
        fits = [shape]
    if not fits:
        raise CheckpointError(_misfit(values, scales))
    # DeepSeek V3.1 keeps powers of two in float32 scales.
    whole = scales.dtype == "F8_E8M0" or power_of_two
    scheme: Literal["fp8", "int8"] = "fp8" if values.dtype == "F8_E4M3" else "int8"
    return Quantized(scheme, values, scales, shape, fits[0], whole, companions)


def _packed_columns(values: TensorEntry, name: str, shards: ShardSet) -> int:
    """Columns of a packed matrix: its width in words is known, how full the last one is not."""
    columns = values.shape[1] * PER_WORD
    entry = shards.tensors.get(name)
    if entry is None or entry.dtype not in _INTEGERS or not entry.file.is_file():
        return columns  # rows end with their words in nearly every model; shapes are checked later
    said = torch.frombuffer(bytearray(shards.read(entry)), dtype=_INTEGERS[entry.dtype]).tolist()
    if len(said) != 2 or said[0] != values.shape[0] or -(-said[1] // PER_WORD) != values.shape[1]:
        raise CheckpointError(
            f"tensor '{name}' in {entry.file} says {said}, but '{values.name}' holds "
            f"{list(values.shape)} words of {PER_WORD} numbers: the checkpoint is damaged"
        )
    return int(said[1])


def _mxfp4(values: TensorEntry, scales: TensorEntry) -> Quantized:
    if (
        (values.dtype, scales.dtype) != ("U8", "U8")
        or len(values.shape) != 4
        or values.shape[3] != FP4_GROUP // 2
        or values.shape[:3] != scales.shape
    ):
        raise CheckpointError(_misfit(values, scales))
    experts, rows, groups = scales.shape
    shape = (experts, rows, groups * FP4_GROUP)
    return Quantized("mxfp4", values, scales, shape, (1, FP4_GROUP), True)


def _misfit(values: TensorEntry, scales: TensorEntry) -> str:
    return (
        f"tensor '{values.name}' in {values.file} ({values.dtype} {list(values.shape)}) and its "
        f"scales ({scales.dtype} {list(scales.shape)}) do not fit together: the checkpoint is "
        "damaged or of an unknown format"
    )


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
