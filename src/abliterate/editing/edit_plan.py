"""The edit plan: which tensors on disk to project, along which axis, against which directions.

Made from the configuration and the shards' headers alone; the editor carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from abliterate.checkpoints.shards import ShardSet
from abliterate.console import log
from abliterate.direction_set import DirectionSet
from abliterate.editing.located_writers import locate_writers
from abliterate.editing.tied_embeddings import untied_copies
from abliterate.errors import PlanError, UnsupportedArchitectureError
from abliterate.inference.interventions import unit_direction
from abliterate.inference.layer_directions import LayerUnits, layer_units
from abliterate.models.loading import Checkpoint
from abliterate.writers import Proof, Writer, is_post_norm, stream_width
from abliterate.writers.discovery import orthonormal, writer_direction
from abliterate.writers.disk_tensors import DiskTensor
from abliterate.writers.tensor_slices import Ranges


@dataclass(frozen=True)
class TensorEdit:
    """Project ``basis`` out of a tensor (or a box of it) along one axis.

    Attributes:
        name: the tensor on disk.
        axis: its axis of length d_model, the output axis.
        basis: float64 ``[k, d_model]``, orthonormal rows: the direction, or (behind a norm's gain
            or a convolution) what it becomes there.
        kind: what the tensor belongs to (``embedding``, ``attention``, ``mlp``, ...).
        layer: decoder block, or None.
        region: the box to edit, or None for the whole tensor; whole along ``axis``.
        stored_as: the source's tensor that it is made from, where that has another name: a tied
            embedding of which the source holds the output head alone.
        weight: what the edit's scale is multiplied by here.
    """

    name: str
    axis: int
    basis: Tensor
    kind: str
    layer: int | None
    region: Ranges | None = None
    stored_as: str | None = None
    weight: float = 1.0

    @property
    def source(self) -> str:
        """The source's tensor that it is made from."""
        return self.stored_as or self.name


@dataclass(frozen=True)
class EditPlan:
    """What an edit will do.

    Attributes:
        shards: the source's shards.
        edits: every projection; a tensor may occur again with another region.
        copies: tensors to add, by name, and the tensor whose bytes each takes: the output head of a
            tied embedding keeps the unedited ones, and an embedding that the source stores as its
            output head alone is edited in its copy. If there are any, the configuration is untied.
        tied: names of the edits of an embedding that is the output head too.
        heads: of the tensors that hold a tied output head beside its embedding's own: the edits
            that ``share`` makes of them as well.
        untied: the configuration has to say that embedding and head are not tied, though nothing
            is added: the files hold both, and they differ.
        config: the configuration of the plain model, as the library reads it.
        directions: the set that the edit goes along, as it fits the model; None for one direction.
        n_layers: decoder blocks of the model.
        undirected: tensors on disk that write to the stream in layers for which the set holds no
            direction: they stay as they are.
        post_norm: what layers write passes a norm before it is added to the stream, so that the
            logits of the edited model are not those of ablation's hooks.
        untouched: tensors on disk that the language model does not load (vision towers, multi-token
            prediction heads).
        leak: largest ``|h . r| / ||h||`` that the same edit leaves on a shrunken random copy.
        exact: that leak is rounding.
    """

    shards: ShardSet
    edits: tuple[TensorEdit, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()
    leak: float = 0.0
    exact: bool = True
    tied: frozenset[str] = frozenset()
    heads: tuple[TensorEdit, ...] = ()
    untied: bool = False
    config: Any = None
    directions: DirectionSet | None = None
    n_layers: int = 0
    undirected: tuple[str, ...] = ()
    post_norm: bool = False


def make_plan(
    checkpoint: Checkpoint,
    direction: Tensor | DirectionSet,
    trust_remote_code: bool = False,
    allow_leak: float | None = None,
) -> EditPlan:
    """Find every writer's tensors on disk, after proving the writers complete.

    Args:
        checkpoint: the source.
        direction: ``[d_model]``, of any length but zero; or one for each block, of which each
            writer takes its own block's.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        allow_leak: accept an architecture that no edit makes exact, if what remains of a random
            direction on a shrunken copy is at most this.

    Raises:
        CheckpointError: the checkpoint is damaged, or a writer has no tensor of its shape.
        InputError: the direction does not fit.
        UnsupportedArchitectureError: the writers cannot be found or made exact.
    """
    located = locate_writers(checkpoint, trust_remote_code)
    require_exact(located.config, located.proof, allow_leak)
    n_layers, width = len(located.plan.blocks), stream_width(located.model, located.plan)
    units: Tensor | LayerUnits
    if isinstance(direction, DirectionSet):
        direction = direction.fit(n_layers, width)
        units = layer_units(located.model, located.plan, direction)
    else:
        units = unit_direction(direction, width)
    writers: dict[str, list[Writer]] = {}
    for writer in located.plan.writers:
        writers.setdefault(writer.parameter, []).append(writer)
    edits, heads, tied, head_only = [], [], set[str](), dict[str, str]()
    undirected = list[str]()
    for tensor in located.disk.tensors:
        if tensor.parameter not in writers:
            continue
        unit = units if isinstance(units, Tensor) else units.of_module(tensor.parameter)
        if unit is None:
            undirected.append(tensor.name)
            continue
        edit = _tensor_edit(tensor, writers[tensor.parameter], unit, located.gains)
        if located.is_second(tensor):
            heads.append(edit)
            continue
        if tensor.loads_as == located.head:  # the matrix of both, under the head's name alone
            if tensor.region is not None or tensor.part is not None:
                raise PlanError(f"tensor '{tensor.name}' holds only a part of the tied embedding")
            edit = replace(edit, name=tensor.parameter, stored_as=tensor.name)
            head_only[tensor.parameter] = tensor.name
        if tensor.parameter == located.embedding:
            tied.add(edit.name)
        edits.append(edit)
    missing = writers.keys() - {tensor.parameter for tensor in located.disk.tensors}
    if missing:
        raise PlanError(f"no tensor on disk is planned for the writer {min(missing)}")
    order = {name: index for index, name in enumerate(located.shapes)}
    edits.sort(key=lambda edit: order[edit.source])
    copies: dict[str, str] = {}
    if located.head is not None:
        copies = untied_copies(located.model, writers, located.shapes, head_only)
    return EditPlan(
        shards=located.shards,
        edits=tuple(edits),
        copies=copies,
        untouched=located.disk.untouched,
        leak=located.proof.leak,
        exact=located.proof.exact,
        tied=frozenset(tied),
        heads=tuple(heads),
        config=located.config,
        directions=direction if isinstance(direction, DirectionSet) else None,
        n_layers=n_layers,
        undirected=tuple(undirected),
        post_norm=is_post_norm(located.model, located.plan),
    )


def _tensor_edit(
    tensor: DiskTensor, writers: Sequence[Writer], unit: Tensor, gains: dict[str, Tensor]
) -> TensorEdit:
    """The edit of a tensor on disk that holds the parameter of these writers."""
    return TensorEdit(
        name=tensor.name,
        axis=tensor.axis,
        basis=orthonormal([writer_direction(writer, unit, gains) for writer in writers]),
        kind=writers[0].kind,
        layer=writers[0].layer,
        region=tensor.region,
    )


def require_exact(config: Any, proof: Proof, allow_leak: float | None) -> None:
    """Refuse writers that no constant edit makes exact, unless so much of a leak is accepted.

    Raises:
        UnsupportedArchitectureError: they are none, or more than that would remain.
    """
    if proof.exact:
        return
    if allow_leak is None or not proof.leak <= allow_leak:
        raise UnsupportedArchitectureError(
            f"architecture '{config.model_type}' cannot be made exact: {proof.reason}; a leak of "
            f"{proof.leak:.1e} would remain (--allow-leak accepts one)"
        )
    log.warning("not exact: %s; a leak of about %.1e remains", proof.reason, proof.leak)
