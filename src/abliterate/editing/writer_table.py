"""The writers of a checkpoint as a table, which the command ``writers`` prints."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from abliterate.checkpoints.quantized_formats import plain_config
from abliterate.checkpoints.shards import INDEX, read_index, weight_files
from abliterate.editing.config_contradiction import map_matching
from abliterate.editing.located_writers import prove_writers, read_plain, writer_axes
from abliterate.editing.tied_embeddings import tied_head
from abliterate.models.loading import Checkpoint, load_config
from abliterate.models.model_classes import empty_model
from abliterate.writers import Proof, Writer, WriterPlan, plan_for, proof_of, stream_width


def describe_writers(checkpoint: Checkpoint, trust_remote_code: bool = False) -> dict[str, Any]:
    """Every writer with its tensors on disk, as the command ``writers`` prints it.

    Works from ``config.json`` and the index alone; where the shards lie there too, or on the hub,
    their headers count. Without an index the tensors are those that transformers would save.

    Raises:
        PlanError: a writer has no tensor on disk.
        UnsupportedArchitectureError: the writers cannot be found.
    """
    config = load_config(checkpoint, trust_remote_code)
    has_weights = checkpoint.remote is not None or bool(weight_files(checkpoint.folder))
    if has_weights:
        shards, shapes, config = read_plain(checkpoint, config)
        model = empty_model(config, trust_remote_code, shards)
    else:
        model = empty_model(config, trust_remote_code)
        shapes = _expected_shapes(checkpoint, model)
    proof = (
        prove_writers(checkpoint, config, trust_remote_code) if has_weights else proof_of(config)
    )
    plan = plan_for(model, proof.plan, proof.decoder)
    axes = writer_axes(model, plan)
    disk = map_matching(checkpoint.folder, model, axes, shapes, has_weights)
    head = tied_head(model)
    tensors: dict[str, list[str]] = {name: [] for name in axes}
    for tensor in disk.tensors:
        of_parameter = (t for t in disk.tensors if t.parameter == tensor.parameter)
        if tensor.loads_as != head or all(t.loads_as == head for t in of_parameter):
            tensors[tensor.parameter].append(tensor.name)
    return _table(model, plan, proof, tensors) | {"untouched": list(disk.untouched)}


def describe_loaded(model: PreTrainedModel) -> dict[str, Any]:
    """As :func:`describe_writers`, of a model in memory: without tensors on disk.

    Raises:
        UnsupportedArchitectureError: the writers cannot be found.
    """
    proof = proof_of(plain_config(model.config))
    plan = plan_for(model, proof.plan, proof.decoder)
    names: dict[str, list[str]] = {writer.parameter: [] for writer in plan.writers}
    return _table(model, plan, proof, names) | {"untouched": []}


def _table(
    model: PreTrainedModel, plan: WriterPlan, proof: Proof, tensors: dict[str, list[str]]
) -> dict[str, Any]:
    axes = writer_axes(model, plan)
    return {
        "model_type": model.config.model_type,
        "d_model": stream_width(model, plan),
        "exact": proof.exact,
        "reason": proof.reason,
        "leak": proof.leak,
        "writers": [
            {
                "parameter": name,
                "layer": of_it[0].layer,
                "kind": of_it[0].kind,
                "bias": of_it[0].bias,
                "shape": list(model.get_parameter(name).shape),
                "axis": axis,
                "direction": "; ".join(dict.fromkeys(map(_formula, of_it))),
                "tensors": tensors[name],
            }
            for name, axis in axes.items()
            if (of_it := [w for w in plan.writers if w.parameter == name])
        ],
    }


def _expected_shapes(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the library saves the model, less what the index (if any) lacks."""
    saved = revert_weight_conversion(model, dict(model.state_dict()))
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    index = checkpoint.folder / INDEX
    if not index.is_file():
        return shapes
    listed = read_index(index)["weight_map"]
    return {name: shape for name, shape in shapes.items() if name in listed}


def _formula(writer: Writer) -> str:
    """``r``, or what the gains between the writer and the stream make of it."""
    text = "r"
    for gain in reversed(writer.gains):
        if gain.parameter is not None:
            index = "[" + ",".join(":" if i is None else str(i) for i in gain.index) + "]"
            name = gain.parameter + (index if gain.index else "")
            text = f"{f'({gain.offset:g} + {name})' if gain.offset else name} * {text}"
        if gain.centred:
            text = f"centred({text})"
    return text if writer.part is None else f"({text})[{writer.part[0]}:{writer.part[1]}]"
