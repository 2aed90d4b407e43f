"""--add: the direction's addition baked into the weights, as a bias of the writer before its layer.

As in the paper's code: what the last matrix of block ``l - 1``'s MLP writes gets ``coeff * r``
added, at every token, which is what ``add`` does to the input of block ``l``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoints.shards import DTYPES, TensorEntry
from abliterate.direction import Direction
from abliterate.editing.edit_plan import EditPlan, TensorEdit
from abliterate.editing.shard_layout import Changes, NewTensor
from abliterate.errors import CheckpointError, InputError, UsageError
from abliterate.inference.interventions import unit_direction
from abliterate.storage.write_buffers import as_bytes


@dataclass(frozen=True)
class Addition:
    """A bias that is changed or made.

    Attributes:
        name: of the bias.
        layer: its block.
        before: ``|r^T b| / |b|``, 0 where there was none.
        after: the same of the new one.
        changes: the tensors.
        config: the new configuration, or None if it stays.
    """

    name: str
    layer: int
    before: float
    after: float
    changes: Changes
    config: dict[str, Any] | None


def plan_addition(
    plan: EditPlan, direction: Direction, coeff: float, config: Mapping[str, Any]
) -> Addition:
    """The biases that add ``coeff * direction`` to the input of its source layer.

    Args:
        plan: of the ablation, which knows the writers.
        direction: with its source layer.
        coeff: +1 induces refusal with a refusal direction.
        config: of the source.

    Raises:
        CheckpointError: the architecture has no place for that bias.
        InputError: the direction does not say its layer, or comes from the first.
        UsageError: the coefficient is too large for the checkpoint's dtype.
    """
    if direction.layer is None:
        raise InputError("the direction does not record its layer, which --add needs: use one that "
                         "`abliterate select` wrote")  # fmt: skip
    if direction.layer < 1:
        raise InputError("--add needs a block before the direction's layer, which is the first")
    layer = direction.layer - 1
    weight = _last_writer(plan, layer, direction)
    entry = plan.shards.tensors[weight.name]
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{entry.name}' is stored as {entry.dtype}: --add needs floats"
        )
    name = weight.name.removesuffix("weight") + "bias"
    vector = coeff * direction.vector.double()
    old = plan.shards.tensors.get(name)
    if old is not None:
        before = plan.shards.values(name).double()
        bias = _stored(before + vector, DTYPES[old.dtype], coeff)
        change = {name: (name, _constant(old.dtype, bias))}
        shares = _share(before, direction.vector), _share(bias, direction.vector)
        return Addition(name, layer, *shares, Changes(replaced=change), None)
    if config.get("mlp_bias") is not False or not name.endswith(".mlp.down_proj.bias"):
        raise CheckpointError(
            f"a '{config.get('model_type')}' model has no bias at '{name}' that could hold the "
            "addition: use the add intervention at run time"
        )
    added: dict[str, dict[str, NewTensor]] = {}
    bias = _stored(vector, DTYPES[entry.dtype], coeff)
    for tensor in plan.shards.tensors.values():
        # The configuration has one switch for all biases of all MLPs: the others are zero.
        if tensor.name.endswith((".mlp.gate_proj.weight", ".mlp.up_proj.weight")) or (
            tensor.name.endswith(".mlp.down_proj.weight")
        ):
            other = tensor.name.removesuffix("weight") + "bias"
            content = bias if other == name else torch.zeros(tensor.shape[0], dtype=bias.dtype)
            of_shard = added.setdefault(tensor.file.name, {})
            of_shard[other] = _constant(_same_dtype(tensor, entry), content)
    share = _share(bias, direction.vector)
    fresh = {**config, "mlp_bias": True}
    return Addition(name, layer, 0.0, share, Changes(added=added), fresh)


def _last_writer(plan: EditPlan, layer: int, direction: Direction) -> TensorEdit:
    """The matrix of the block's MLP, whose output reaches the stream as it is."""
    found = [
        edit
        for edit in plan.edits
        if edit.layer == layer and edit.kind == "mlp" and edit.name.endswith(".weight")
    ]
    if len(found) != 1 or found[0].region is not None:
        raise CheckpointError(
            f"layer {layer} has no single matrix that could get the bias of --add"
        )
    unit = unit_direction(direction.vector, found[0].basis.shape[1])
    if found[0].basis.shape[0] != 1 or not torch.allclose(found[0].basis[0], unit):
        raise CheckpointError(
            f"'{found[0].name}' reaches the stream through a norm, which would scale the bias of "
            "--add: use the add intervention at run time"
        )
    return found[0]


def _same_dtype(tensor: TensorEntry, entry: TensorEntry) -> str:
    if tensor.dtype != entry.dtype:
        raise CheckpointError(
            f"'{tensor.name}' and '{entry.name}' differ in dtype: --add cannot tell the biases'"
        )
    return entry.dtype


def _stored(bias: Tensor, dtype: torch.dtype, coeff: float) -> Tensor:
    """``bias`` in the checkpoint's dtype, if that can hold it."""
    stored = bias.to(dtype)
    if not bool(stored.isfinite().all()):
        raise UsageError(f"--add {coeff:g} times the direction is too large for {dtype}")
    return stored


def _constant(dtype: str, values: Tensor) -> NewTensor:
    return NewTensor(dtype, tuple(values.shape), content=bytes(as_bytes(values.contiguous())))


def _share(bias: Tensor, direction: Tensor) -> float:
    wide, unit = bias.double(), direction.double() / direction.double().norm()
    return float((wide @ unit).abs() / wide.norm().clamp(min=1e-300))
