"""The edit plan: which tensors on disk to project, along which axis, against which directions.

Made from the configuration and the shards' headers alone; the editor carries it out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from abliterate.checkpoints.config_sizes import Held, check_sizes
from abliterate.checkpoints.hub import read_remote_shards
from abliterate.checkpoints.quantized_formats import dense_shapes, find_quantized, read_config
from abliterate.checkpoints.shards import INDEX, ShardSet, read_index, read_shards, weight_files
from abliterate.console import log
from abliterate.editing.config_contradiction import map_matching
from abliterate.errors import CheckpointError, PlanError, UnsupportedArchitectureError
from abliterate.inference.interventions import unit_direction
from abliterate.models.loading import (
    Checkpoint,
    empty_model,
    load_config,
    load_weights,
    require_safetensors,
    text_config,
)
from abliterate.writers import (
    Proof,
    Writer,
    WriterPlan,
    plan_for,
    proof_of,
    prove_in_place,
    stream_width,
)
from abliterate.writers.discovery import DiscoveryError, orthonormal, writer_direction
from abliterate.writers.disk_tensors import DiskMap, DiskTensor, disk_map
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
    """

    name: str
    axis: int
    basis: Tensor
    kind: str
    layer: int | None
    region: Ranges | None = None
    stored_as: str | None = None

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


def make_plan(
    checkpoint: Checkpoint,
    direction: Tensor,
    trust_remote_code: bool = False,
    allow_leak: float | None = None,
) -> EditPlan:
    """Find every writer's tensors on disk, after proving the writers complete.

    Args:
        checkpoint: the source.
        direction: ``[d_model]``, of any length but zero.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        allow_leak: accept an architecture that no edit makes exact, if what remains of a random
            direction on a shrunken copy is at most this.

    Raises:
        CheckpointError: the checkpoint is damaged, or a writer has no tensor of its shape.
        InputError: the direction does not fit.
        UnsupportedArchitectureError: the writers cannot be found or made exact.
    """
    found = locate_writers(checkpoint, trust_remote_code)
    _require_exact(found.config, found.proof, allow_leak)
    plan, model, disk, shapes = found.plan, found.model, found.disk, found.shapes
    unit = unit_direction(direction, stream_width(model, plan))
    axes = {writer.parameter: writer.axis for writer in plan.writers}

    edits, heads, tied, lone = [], [], set[str](), dict[str, str]()
    for tensor in disk.tensors:
        if tensor.parameter not in axes:
            continue
        of_it = [w for w in plan.writers if w.parameter == tensor.parameter]
        basis = orthonormal([writer_direction(w, unit, found.gains) for w in of_it])
        edit = TensorEdit(
            tensor.name, tensor.axis, basis, of_it[0].kind, of_it[0].layer, tensor.region
        )
        if found.is_second(tensor):
            heads.append(edit)
            continue
        if tensor.loads_as == found.head:  # the matrix of both, under the head's name alone
            if tensor.region is not None or tensor.part is not None:
                raise PlanError(f"tensor '{tensor.name}' holds only a part of the tied embedding")
            edit = replace(edit, name=tensor.parameter, stored_as=tensor.name)
            lone[tensor.parameter] = tensor.name
        if tensor.parameter == found.embedding:
            tied.add(edit.name)
        edits.append(edit)
    missing = axes.keys() - {t.parameter for t in disk.tensors}
    if missing:
        raise PlanError(f"no tensor on disk is planned for the writer {min(missing)}")
    order = {name: index for index, name in enumerate(shapes)}
    edits.sort(key=lambda edit: order[edit.source])
    copies = _copies(model, axes, shapes, lone) if found.head else {}
    return EditPlan(
        found.shards,
        tuple(edits),
        copies,
        disk.untouched,
        found.proof.leak,
        found.proof.exact,
        frozenset(tied),
        tuple(heads),
        config=found.config,
    )


@dataclass(frozen=True)
class Located:
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
        own = (t for t in self.disk.tensors if t.parameter == self.embedding)
        return tensor.loads_as == self.head and any(t.loads_as != self.head for t in own)

    @property
    def holds_both(self) -> bool:
        """Whether a tied embedding and its output head are both stored."""
        return any(self.is_second(tensor) for tensor in self.disk.tensors)


def locate_writers(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Located:
    """Find every writer's tensors on disk from config and headers; only gains are read.

    Raises:
        CheckpointError: the checkpoint is damaged, or a writer has no tensor of its shape.
        UnsupportedArchitectureError: the writers cannot be found.
    """
    config = load_config(checkpoint, trust_remote_code)
    require_safetensors(checkpoint)
    shards, shapes, config = _read_plain(checkpoint, config)
    model = empty_model(config, trust_remote_code, shards)
    proof = _prove(checkpoint, config, trust_remote_code)
    plan = plan_for(model, proof.plan, proof.decoder)
    axes = _writer_axes(model, plan)
    gains = {g.parameter: g.axis for w in plan.writers for g in w.gains if g.parameter}
    disk = map_matching(checkpoint.folder, model, gains | axes, shapes)
    values = {name: _read_parameter(name, disk, shards) for name in gains}
    head = _tied_head(model)
    embedding = None if head is None else _aliases(model)[head]
    return Located(shards, shapes, config, model, proof, plan, disk, values, head, embedding)


def _writer_axes(model: PreTrainedModel, plan: WriterPlan) -> dict[str, int]:
    """The output axis of each writer.

    Raises:
        PlanError: a writer is empty.
    """
    for writer in plan.writers:
        if model.get_parameter(writer.parameter).numel() == 0:
            raise PlanError(f"the writer {writer.parameter} is empty: config.json is damaged")
    return {writer.parameter: writer.axis for writer in plan.writers}


def _read_plain(
    checkpoint: Checkpoint, config: Any
) -> tuple[ShardSet, dict[str, tuple[int, ...]], Any]:
    """The shards, and names, shapes and configuration as they are when nothing is quantized."""
    if checkpoint.remote is None:
        shards = read_shards(checkpoint.folder)
    else:
        shards = read_remote_shards(checkpoint.folder, checkpoint.remote)
        check_sizes(checkpoint.folder, text_config(config), Held.of(shards))
    quantized = find_quantized(shards, read_config(checkpoint.folder))
    plain = _unquantized(config) if quantized else config
    return shards, dense_shapes(shards, quantized), plain


def _unquantized(config: Any) -> Any:
    """The configuration of the plain model that a quantized checkpoint stands for."""
    plain = deepcopy(config)
    for section in (plain, plain.get_text_config(decoder=True)):
        if hasattr(section, "quantization_config"):
            del section.quantization_config
    return plain


def _prove(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> Proof:
    try:
        return proof_of(config)
    except UnsupportedArchitectureError as error:
        if checkpoint.remote is not None:
            raise UnsupportedArchitectureError(
                f"{error}; only a proof on its own weights is left, which --low-disk does not have"
            ) from None
        # Costs the memory of the whole model, in float32; but nothing is edited unproven.
        log.warning("%s; proving on the checkpoint's own weights instead", error)
        model = load_weights(checkpoint, "cpu", "float32", trust_remote_code)
    try:
        return prove_in_place(model)
    except DiscoveryError as error:
        raise UnsupportedArchitectureError(f"{checkpoint.name}: {error}") from None


def _require_exact(config: Any, proof: Proof, allow_leak: float | None) -> None:
    if proof.exact:
        return
    if allow_leak is None or not proof.leak <= allow_leak:
        raise UnsupportedArchitectureError(
            f"architecture '{config.model_type}' cannot be made exact: {proof.reason}; a leak of "
            f"{proof.leak:.1e} would remain (--allow-leak accepts one)"
        )
    log.warning("not exact: %s; a leak of about %.1e remains", proof.reason, proof.leak)


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


def _tied_head(model: PreTrainedModel) -> str | None:
    """The state-dict name of an output head that shares the embedding's matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    name: str = next(name for name, module in model.named_modules() if module is head)
    return f"{name}.weight"


def _copies(
    model: PreTrainedModel,
    writers: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    lone: Mapping[str, str],
) -> dict[str, str]:
    """Tensors to write out under a second name once embedding and output head are untied.

    The head needs a matrix of its own, or the embedding where only the head is stored (``lone``).
    So do layers that the library shares through the same switch (Zamba's shared transformer):
    untied, it would fill all but one with random numbers.
    """
    untied = empty_model(untie_config(deepcopy(model.config)))
    before, after = _aliases(model), _aliases(untied)
    wanted = {
        name: before[name]
        for name in after
        if after[name] == name and before[name] != name and after[before[name]] != name
    }
    disk = disk_map(model, dict.fromkeys(set(wanted.values()), 0), shapes)
    stored: dict[str, dict[str, str]] = {}
    for tensor in disk.tensors:
        stored.setdefault(tensor.parameter, {})[tensor.loads_as] = tensor.name
    head = _tied_head(model)
    copies = dict(lone)
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


def untie_config(config: Any) -> Any:
    """Set ``tie_word_embeddings`` to false in a configuration and its text part; returns it."""
    for section in (config, config.get_text_config(decoder=True)):
        section.tie_word_embeddings = False
    return config


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    """For each name of a parameter, the first name of the same parameter."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every}


def tied_tensors(checkpoint: Checkpoint, shards: ShardSet) -> list[tuple[str, str]]:
    """Embedding and output head on disk that the configuration takes for one matrix."""
    config = load_config(checkpoint)
    quantized = find_quantized(shards, read_config(checkpoint.folder))
    model = empty_model(_unquantized(config) if quantized else config)
    head = _tied_head(model)
    if head is None:
        return []
    embedding = _aliases(model)[head]
    found = disk_map(model, {embedding: 0}, dense_shapes(shards, quantized)).tensors
    return [
        (mine.name, other.name)
        for mine in found
        for other in found
        if mine.loads_as != head and other.loads_as == head
    ]


def describe_writers(checkpoint: Checkpoint, trust_remote_code: bool = False) -> dict[str, Any]:
    """Every writer with its tensors on disk, as the command ``writers`` prints it.

    Works from ``config.json`` and the index alone; where the shards lie there too, their headers
    count. Without an index the tensors are those that transformers would save.

    Raises:
        PlanError: a writer has no tensor on disk.
        UnsupportedArchitectureError: the writers cannot be found.
    """
    config = load_config(checkpoint, trust_remote_code)
    has_weights = bool(weight_files(checkpoint.folder))
    if has_weights:
        shards, shapes, config = _read_plain(checkpoint, config)
        model = empty_model(config, trust_remote_code, shards)
    else:
        model = empty_model(config, trust_remote_code)
        shapes = _expected_shapes(checkpoint, model)
    proof = _prove(checkpoint, config, trust_remote_code) if has_weights else proof_of(config)
    plan = plan_for(model, proof.plan, proof.decoder)
    axes = _writer_axes(model, plan)
    disk = map_matching(checkpoint.folder, model, axes, shapes, has_weights)
    head = _tied_head(model)
    tensors: dict[str, list[str]] = {name: [] for name in axes}
    for tensor in disk.tensors:
        own = (t for t in disk.tensors if t.parameter == tensor.parameter)
        if tensor.loads_as != head or all(t.loads_as == head for t in own):
            tensors[tensor.parameter].append(tensor.name)
    return {
        "model_type": config.model_type,
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
        "untouched": list(disk.untouched),
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
            at = "[" + ",".join(":" if i is None else str(i) for i in gain.index) + "]"
            name = gain.parameter + (at if gain.index else "")
            text = f"{f'({gain.offset:g} + {name})' if gain.offset else name} * {text}"
        if gain.centred:
            text = f"centred({text})"
    return text if writer.part is None else f"({text})[{writer.part[0]}:{writer.part[1]}]"
