"""Every writer of a checkpoint, proven complete, and where its tensors lie on disk.

From configuration and headers; the edit plan, the audit and the table of writers start here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from abliterate.checkpoints.config_sizes import Held, check_sizes
from abliterate.checkpoints.hub import read_remote_shards
from abliterate.checkpoints.quantized_formats import (
    dense_shapes,
    find_quantized,
    plain_config,
    read_config,
)
from abliterate.checkpoints.shards import ShardSet, read_shards
from abliterate.console import log
from abliterate.editing.config_contradiction import map_matching
from abliterate.editing.tied_embeddings import tied_head
from abliterate.errors import (
    CheckpointError,
    NeedsWeightsError,
    PlanError,
    UnsupportedArchitectureError,
)
from abliterate.models.loading import Checkpoint, load_config, load_weights, require_safetensors
from abliterate.models.model_classes import empty_model, text_config
from abliterate.writers import Proof, WriterPlan, plan_for, proof_of, prove_in_place
from abliterate.writers.discovery import DiscoveryError
from abliterate.writers.disk_tensors import DiskMap, DiskTensor
from abliterate.writers.parameter_names import parameter_aliases


@dataclass(frozen=True, kw_only=True)
class LocatedWriters:
    """Every writer of a checkpoint and where its tensors lie.

    Attributes:
        shards: the checkpoint's shards.
        shapes: names and shapes on disk, as they would be if nothing were quantized.
        config: the configuration of the plain model.
        model: the model without its weights.
        proof: of the writers.
        plan: the writers, by the model's own parameter names.
        disk: where writers and gains lie.
        gains: values of the gains between writers and stream, float64, by parameter.
        head: state-dict name of an output head that shares the embedding's matrix, or None.
        embedding: the parameter that it shares, or None.
    """

    shards: ShardSet
    shapes: Mapping[str, tuple[int, ...]]
    config: Any
    model: PreTrainedModel
    proof: Proof
    plan: WriterPlan
    disk: DiskMap
    gains: dict[str, Tensor]
    head: str | None
    embedding: str | None = None

    def is_second(self, tensor: DiskTensor) -> bool:
        """Whether it is a tied output head that is stored beside the embedding's own matrix.

        The configuration says that they are one; where the files hold two, the head is no writer.
        """
        stored = (t for t in self.disk.tensors if t.parameter == self.embedding)
        return tensor.loads_as == self.head and any(t.loads_as != self.head for t in stored)

    @property
    def holds_both(self) -> bool:
        """Whether a tied embedding and its output head are both stored."""
        return any(self.is_second(tensor) for tensor in self.disk.tensors)


def locate_writers(checkpoint: Checkpoint, trust_remote_code: bool = False) -> LocatedWriters:
    """Find every writer's tensors on disk from config and headers; only gains are read.

    Raises:
        CheckpointError: the checkpoint is damaged, or a writer has no tensor of its shape.
        UnsupportedArchitectureError: the writers cannot be found.
    """
    config = load_config(checkpoint, trust_remote_code)
    require_safetensors(checkpoint)
    shards, shapes, config = read_plain(checkpoint, config)
    model = empty_model(config, trust_remote_code, shards)
    proof = prove_writers(checkpoint, config, trust_remote_code)
    plan = plan_for(model, proof.plan, proof.decoder)
    axes = writer_axes(model, plan)
    gains = {g.parameter: g.axis for w in plan.writers for g in w.gains if g.parameter}
    disk = map_matching(checkpoint.folder, model, gains | axes, shapes)
    values = {name: _read_parameter(name, disk, shards) for name in gains}
    head = tied_head(model)
    embedding = None if head is None else parameter_aliases(model)[head]
    return LocatedWriters(
        shards=shards,
        shapes=shapes,
        config=config,
        model=model,
        proof=proof,
        plan=plan,
        disk=disk,
        gains=values,
        head=head,
        embedding=embedding,
    )


def writer_axes(model: PreTrainedModel, plan: WriterPlan) -> dict[str, int]:
    """The output axis of each writer.

    Raises:
        PlanError: a writer is empty.
    """
    for writer in plan.writers:
        if model.get_parameter(writer.parameter).numel() == 0:
            raise PlanError(f"the writer {writer.parameter} is empty: config.json is damaged")
    return {writer.parameter: writer.axis for writer in plan.writers}


def read_plain(
    checkpoint: Checkpoint, config: Any
) -> tuple[ShardSet, dict[str, tuple[int, ...]], Any]:
    """The shards, and names, shapes and configuration as they are when nothing is quantized."""
    if checkpoint.remote is None:
        shards = read_shards(checkpoint.folder)
    else:
        shards = read_remote_shards(checkpoint.folder, checkpoint.remote)
        check_sizes(checkpoint.folder, text_config(config), Held.of(shards))
    quantized = find_quantized(shards, read_config(checkpoint.folder))
    plain = plain_config(config) if quantized else config
    return shards, dense_shapes(shards, quantized), plain


def prove_writers(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> Proof:
    """The proof that the writers are complete: on a random copy, else on the weights themselves.

    Raises:
        NeedsWeightsError: that is left, and they are still on the hub.
        UnsupportedArchitectureError: they cannot be found.
    """
    try:
        return proof_of(config)
    except UnsupportedArchitectureError as error:
        if checkpoint.remote is not None:
            raise NeedsWeightsError(
                f"{error}; only a proof on its own weights is left, which --low-disk does not have"
            ) from None
        # Costs the memory of the whole model, in float32; but nothing is edited unproven.
        log.warning("%s; proving on the checkpoint's own weights instead", error)
        model = load_weights(checkpoint, "cpu", "float32", trust_remote_code)
    try:
        return prove_in_place(model)
    except DiscoveryError as error:
        raise UnsupportedArchitectureError(f"{checkpoint.name}: {error}") from None


def _read_parameter(name: str, disk: DiskMap, shards: ShardSet) -> Tensor:
    """A gain's values, from the one tensor on disk that holds it.

    Raises:
        CheckpointError: they are not finite.
        PlanError: there is no such tensor.
    """
    held = [tensor for tensor in disk.tensors if tensor.parameter == name]
    if len(held) != 1 or held[0].part is not None or held[0].region is not None:
        raise PlanError(f"the gain {name} is not one whole tensor on disk")
    values = shards.values(held[0].name).double()
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"the gain '{name}' holds NaN or infinity")
    return values
