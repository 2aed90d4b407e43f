"""--as-lora: the same edit as a PEFT adapter, which holds its rank-1 updates exactly.

``W - s r r^T W`` is ``W + B A`` with ``B = -s r`` and ``A = r^T W``, so an adapter of the
direction's rank is the whole edit; the base checkpoint stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoints.disk_matrix import PlainDiskMatrix, matrix_slices
from abliterate.checkpoints.safetensors_header import DTYPES
from abliterate.checkpoints.shards import ShardSet
from abliterate.editing.edit_plan import TensorEdit
from abliterate.editing.matrix_orthogonalization import (
    DirectionEnergy,
    naming_tensor,
    orthogonalize_matrix,
)
from abliterate.errors import CheckpointError
from abliterate.storage.artifacts import write_json, write_tensors
from abliterate.storage.file_io import SourceFile

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def check_targets(edits: Sequence[TensorEdit], shards: ShardSet) -> None:
    """Refuse what an adapter cannot hold.

    Raises:
        CheckpointError: a writer is no weight of a Linear or Embedding.
    """
    for edit in edits:
        entry = shards.tensors[edit.source]
        linear = edit.axis == 0 or edit.kind == "embedding"
        if (
            not edit.name.endswith(".weight")
            or len(entry.shape) != 2
            or edit.region is not None
            or entry.dtype not in DTYPES
            or not linear
        ):
            raise CheckpointError(
                f"'{edit.name}' ({entry.dtype}, {list(entry.shape)}) is no Linear or Embedding "
                "weight that a PEFT adapter can target: write a full checkpoint, without --as-lora"
            )


def write_adapter(
    folder: Path,
    edits: Sequence[TensorEdit],
    shards: ShardSet,
    scale: float,
    base: str,
    revision: str | None = None,
) -> list[DirectionEnergy]:
    """Write the adapter's two files; returns what each tensor had along its directions.

    Args:
        folder: where to.
        edits: those that :func:`check_targets` accepts.
        shards: the base checkpoint.
        scale: share of the direction to remove.
        base: its name.
        revision: its commit on the hub, or None for a folder.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or the edit makes it overflow.
    """
    tensors: dict[str, Tensor] = {}
    sums = []
    for edit in edits:
        down, part = _coefficients(edit, shards)
        module = f"base_model.model.{edit.name.removesuffix('.weight')}"
        up = (-scale * edit.weight * edit.basis.T).to(torch.float32)
        # What is added to the weights is their product, no entry of which is larger than this.
        largest = up.abs().double().amax(0) @ down.abs().double().amax(1)
        if not bool(largest < torch.finfo(torch.float32).max):
            raise CheckpointError(
                f"tensor '{edit.name}' has values that no longer fit float32 once it is edited"
            )
        if edit.kind == "embedding":
            tensors[f"{module}.lora_embedding_A"] = down
            tensors[f"{module}.lora_embedding_B"] = up
        else:
            tensors[f"{module}.lora_A.weight"] = down
            tensors[f"{module}.lora_B.weight"] = up
        sums.append(part)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, _config(edits, base, revision))
    return sums


def _config(edits: Sequence[TensorEdit], base: str, revision: str | None) -> Mapping[str, Any]:
    ranks = {edit.name.removesuffix(".weight"): len(edit.basis) for edit in edits}
    common = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,  # alpha / r scales the update: by one
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
    }


def _coefficients(edit: TensorEdit, shards: ShardSet) -> tuple[Tensor, DirectionEnergy]:
    """``B W`` ``[k, columns]`` (for an embedding ``B W^T``) in float32."""
    entry = shards.tensors[edit.source]
    source = SourceFile(entry.file)
    try:
        parts, total = [], DirectionEnergy()
        for matrix_slice in matrix_slices(entry.shape, edit.axis):
            matrix = PlainDiskMatrix(
                source=source,
                start=entry.start,
                target=None,
                to=0,
                dtype=DTYPES[entry.dtype],
                matrix_slice=matrix_slice,
                device=torch.device("cpu"),
            )
            with naming_tensor(entry):
                weight, energy = orthogonalize_matrix(
                    matrix, edit.basis, matrix_slice.d_model_is_columns
                )
            parts.append(weight)
            total += DirectionEnergy(energy, float(weight.double().square().sum()), 0.0)
        return torch.cat(parts, dim=1).to(torch.float32), total
    finally:
        source.close()
