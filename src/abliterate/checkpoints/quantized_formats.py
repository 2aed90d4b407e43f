"""Weights stored as small numbers with a scale per block: FP8 (DeepSeek, Qwen) and MXFP4 (gpt-oss).

Other quantized formats fit their numbers to the weights in ways that an edit would undo; for those
there is an error that says how to obtain a plain checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from abliterate.checkpoints.safetensors_header import TensorEntry
from abliterate.checkpoints.shards import ShardSet
from abliterate.errors import CheckpointError
from abliterate.storage.json_text import parse_json

SCALE_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}
FP4_GROUP = 32  # elements per scale, in 16 bytes
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
    quantized = {}
    for name, entry in shards.tensors.items():
        if entry.dtype == "F8_E4M3" and f"{name}_scale_inv" in shards.tensors:
            scales = shards.tensors[f"{name}_scale_inv"]
            quantized[name] = _fp8(entry, scales, settings)
        elif name.endswith("_blocks") and (other := f"{name[:-7]}_scales") in shards.tensors:
            quantized[name] = _mxfp4(entry, shards.tensors[other])
    return quantized


def _fp8(values: TensorEntry, scales: TensorEntry, settings: Mapping[str, Any]) -> Quantized:
    block = settings.get("weight_block_size") or (128, 128)
    good = len(values.shape) == 2 and scales.dtype in SCALE_TYPES
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
