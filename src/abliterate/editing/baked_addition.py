"""--add: the direction's addition baked into the weights, as a bias of the writer before its layer.

As in the paper's code: what the last matrix of block ``l - 1``'s MLP writes gets ``coeff * r``
added, at every token, which is what ``add`` does to the input of block ``l``. Where a constant lies
between that matrix and the stream, the bias is divided by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoints.safetensors_header import DTYPES, TensorEntry
from abliterate.direction import Direction
from abliterate.editing.addition_scale import addition_scale
from abliterate.editing.edit_plan import EditPlan, TensorEdit
from abliterate.editing.shard_layout import NewTensor, TensorChanges
from abliterate.errors import CheckpointError, InputError, UsageError
from abliterate.inference.interventions import unit_direction
from abliterate.models.model_classes import empty_model
from abliterate.storage.write_buffers import as_bytes


@dataclass(frozen=True, kw_only=True)
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
    changes: TensorChanges
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
    weight = _last_writer(plan, layer, direction, str(config.get("model_type")))
    entry = plan.shards.tensors[weight.name]
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{entry.name}' is stored as {entry.dtype}: --add needs floats"
        )
    name = weight.name.removesuffix("weight") + "bias"
    old = plan.shards.tensors.get(name)
    if old is None and (
        config.get("mlp_bias") is not False or not name.endswith(".mlp.down_proj.bias")
    ):
        raise CheckpointError(
            f"a '{config.get('model_type')}' model has no bias at '{name}' that could hold the "
            "addition: use the add intervention at run time"
        )
    scale = addition_scale(plan.config, layer, new_bias=old is None)
    vector = coeff / scale * direction.vector.double()
    if old is not None:
        before = plan.shards.values(name).double()
        bias = _stored(before + vector, DTYPES[old.dtype], coeff)
        return Addition(
            name=name,
            layer=layer,
            before=_share(before, direction.vector),
            after=_share(bias, direction.vector),
            changes=TensorChanges(replaced={name: (name, _constant(old.dtype, bias))}),
            config=None,
        )
    bias = _stored(vector, DTYPES[entry.dtype], coeff)
    return Addition(
        name=name,
        layer=layer,
        before=0.0,
        after=_share(bias, direction.vector),
        changes=TensorChanges(added=_new_biases(plan, entry, name, bias, config)),
        config={**config, "mlp_bias": True},
    )


def _new_biases(
    plan: EditPlan, entry: TensorEntry, name: str, bias: Tensor, config: Mapping[str, Any]
) -> dict[str, dict[str, NewTensor]]:
    """``bias`` and, as the configuration has one switch for all biases of all MLPs, zeros.

    Args:
        plan: of the ablation.
        entry: the matrix that ``bias`` belongs to.
        name: of the bias.
        bias: its values.
        config: of the source.

    Returns:
        By shard and name.
    """
    added: dict[str, dict[str, NewTensor]] = {}
    for other, shape in _switched_on(plan.config).items():
        tensor = plan.shards.tensors.get(other.removesuffix("bias") + "weight")
        if tensor is None:
            raise CheckpointError(
                f"a '{config.get('model_type')}' model with a bias for --add needs '{other}' too, "
                "for which the files have no place: use the add intervention at run time"
            )
        content = bias if other == name else torch.zeros(shape, dtype=bias.dtype)
        of_shard = added.setdefault(tensor.file.name, {})
        of_shard[other] = _constant(_same_dtype(tensor, entry), content)
    return added


def _switched_on(config: Any) -> dict[str, tuple[int, ...]]:
    """The parameters that a model has only with ``mlp_bias``, and their shapes."""
    with_biases = deepcopy(config)
    with_biases.get_text_config(decoder=True).mlp_bias = True
    before = empty_model(config).state_dict()
    after = empty_model(with_biases).state_dict()
    return {name: tuple(t.shape) for name, t in after.items() if name not in before}


def _last_writer(plan: EditPlan, layer: int, direction: Direction, kind: str) -> TensorEdit:
    """The matrix of the block's MLP, whose output reaches the stream as it is."""
    writers = [
        edit
        for edit in plan.edits
        if edit.layer == layer and edit.kind == "mlp" and edit.name.endswith(".weight")
    ]
    if len(writers) != 1 or writers[0].region is not None:
        raise CheckpointError(
            f"layer {layer} of a '{kind}' model has no single matrix that could get the bias of "
            "--add: use the add intervention at run time"
        )
    unit = unit_direction(direction.vector, writers[0].basis.shape[1])
    if writers[0].basis.shape[0] != 1 or not torch.allclose(writers[0].basis[0], unit):
        raise CheckpointError(
            f"'{writers[0].name}' of a '{kind}' model reaches the stream through a norm, which "
            "would scale the bias of --add: use the add intervention at run time"
        )
    return writers[0]


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
    upcast, unit = bias.double(), direction.double() / direction.double().norm()
    return float((upcast @ unit).abs() / upcast.norm().clamp(min=1e-300))
