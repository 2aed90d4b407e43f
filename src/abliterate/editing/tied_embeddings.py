"""Embedding and output head that are one matrix: which tensors hold it, and how it is untied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from transformers import PreTrainedModel

from abliterate.checkpoints.quantized_formats import (
    dense_shapes,
    find_quantized,
    plain_config,
    read_config,
)
from abliterate.checkpoints.shards import ShardSet
from abliterate.errors import PlanError
from abliterate.models.loading import Checkpoint, load_config
from abliterate.models.model_classes import empty_model
from abliterate.writers.disk_tensors import disk_map
from abliterate.writers.parameter_names import module_name, parameter_aliases


def tied_head(model: PreTrainedModel) -> str | None:
    """The state-dict name of an output head that shares the embedding's matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return f"{module_name(model, head)}.weight"


def untie_config(config: Any) -> Any:
    """Set ``tie_word_embeddings`` to false in a configuration and its text part; returns it."""
    for section in (config, config.get_text_config(decoder=True)):
        section.tie_word_embeddings = False
    return config


def untied_copies(
    model: PreTrainedModel,
    writers: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    head_only: Mapping[str, str],
) -> dict[str, str]:
    """Tensors to write out under a second name once embedding and output head are untied.

    The head needs a matrix of its own, or the embedding where only the head is stored. So do layers
    that the library shares through the same switch (Zamba's shared transformer): untied, it would
    fill all but one with random numbers.

    Args:
        model: without its weights.
        writers: names of the parameters that write to the residual stream.
        shapes: names and shapes on disk, as they would be if nothing were quantized.
        head_only: the tensor on disk of an embedding of which only the head is stored.

    Returns:
        By the new name, the tensor whose bytes it takes.

    Raises:
        PlanError: the tensors on disk cannot be untied.
    """
    untied = empty_model(untie_config(deepcopy(model.config)))
    before, after = parameter_aliases(model), parameter_aliases(untied)
    wanted = {
        name: before[name]
        for name in after
        if after[name] == name and before[name] != name and after[before[name]] != name
    }
    disk = disk_map(model, dict.fromkeys(set(wanted.values()), 0), shapes)
    stored: dict[str, dict[str, str]] = {}
    for tensor in disk.tensors:
        stored.setdefault(tensor.parameter, {})[tensor.loads_as] = tensor.name
    head = tied_head(model)
    copies = dict(head_only)
    for name, shared in wanted.items():
        held = stored[shared]
        if name in held and (len(held) > 1 or name == head):
            continue  # it has its own copy already
        if name in held:
            raise PlanError(
                f"tensor '{held[name]}' is stored under its tied name only: save the checkpoint "
                "again with transformers first"
            )
        if shared in writers and name != head:
            raise PlanError(f"{shared} writes to the residual stream and is shared with {name}")
        copies[name] = next(iter(held.values()))
    final = {**shapes, **{name: shapes[source] for name, source in copies.items()}}
    disk_map(untied, dict.fromkeys(copies, 0), final)  # raises unless each loads under its name
    return copies


def tied_tensors(checkpoint: Checkpoint, shards: ShardSet) -> list[tuple[str, str]]:
    """Embedding and output head on disk that the configuration takes for one matrix."""
    config = load_config(checkpoint)
    quantized = find_quantized(shards, read_config(checkpoint.folder))
    model = empty_model(plain_config(config) if quantized else config)
    head = tied_head(model)
    if head is None:
        return []
    embedding = parameter_aliases(model)[head]
    tensors = disk_map(model, {embedding: 0}, dense_shapes(shards, quantized)).tensors
    return [
        (mine.name, other.name)
        for mine in tensors
        for other in tensors
        if mine.loads_as != head and other.loads_as == head
    ]
