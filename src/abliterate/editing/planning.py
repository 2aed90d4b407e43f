"""From a checkpoint, a direction and options to all that the edit changes, before it is made.

Read from configuration and headers alone. ``orthogonalize`` carries it out, and ``verify`` plans it
again to know what an edited checkpoint has to hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.checkpoints.quantized_formats import (
    Quantized,
    check_method,
    find_quantized,
    read_config,
)
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.editing.baked_addition import plan_addition
from abliterate.editing.edit_plan import EditPlan, make_plan
from abliterate.editing.edited_tensor import EditedTensor
from abliterate.editing.options import (
    EditOptions,
    apply_options,
    parse_components,
    tied_matrices_agree,
)
from abliterate.editing.shard_layout import TensorChanges
from abliterate.editing.tensor_changes import plan_changes, resolve_edits, untie_document
from abliterate.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PlannedEdit:
    """What an edit changes.

    Attributes:
        full: every writer's edit, by tensors on disk, before the options.
        plan: what the options leave of it.
        quantized: the source's tensors stored in blocks with scales.
        changes: tensors that are added, replaced or removed.
        config: the new ``config.json``, or None if it stays.
        added: the bias of ``--add``.
    """

    full: EditPlan
    plan: EditPlan
    quantized: Mapping[str, Quantized]
    changes: TensorChanges
    config: dict[str, Any] | None
    added: tuple[EditedTensor, ...] = ()


def plan_edit(
    source: Checkpoint,
    direction: Direction | DirectionSet,
    options: EditOptions,
    trust_remote_code: bool = False,
    allow_leak: float | None = None,
) -> PlannedEdit:
    """All that an edit with these options changes.

    Args:
        source: the checkpoint.
        direction: what to remove, or to add.
        options: which tensors to edit, how much, and with what.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        allow_leak: as :func:`abliterate.editing.orthogonalize.orthogonalize` has it.

    Raises:
        CheckpointError: the source cannot be edited.
        InputError: the direction does not fit.
        UsageError: the options contradict the model.
    """
    config = read_config(source.folder)
    check_method(source.folder, config)
    if options.add is not None and isinstance(direction, DirectionSet):
        raise UsageError(
            "--add needs one direction, and a set holds one for each layer: give one direction, or "
            "leave --add out"
        )
    along = direction if isinstance(direction, DirectionSet) else direction.vector
    full = make_plan(source, along, trust_remote_code, allow_leak)
    quantized = find_quantized(full.shards, config)
    full = replace(full, edits=resolve_edits(full.edits, full.shards, quantized))
    if options.add is not None and isinstance(direction, Direction):
        return _plan_added(full, quantized, direction, options.add, config)
    plan = apply_options(full, options)
    changes, new_config = plan_changes(plan, quantized, options.quantized, config)
    return PlannedEdit(
        full=full, plan=plan, quantized=quantized, changes=changes, config=new_config
    )


def check_effect(edit: PlannedEdit, options: EditOptions) -> None:
    """Refuse options that do nothing to the model that was planned for.

    Raises:
        UsageError: there is one.
    """
    if options.quantized is not None and not any(e.name in edit.quantized for e in edit.plan.edits):
        what = "no tensor that is edited" if edit.quantized else "none of its tensors"
        raise UsageError(
            f"--{options.quantized} has no effect: {what} is stored as FP8, INT8 or MXFP4: leave "
            "it out"
        )
    full = edit.full
    if options.tied_embeddings != "untie":
        kinds = parse_components(options.components)
        outside = options.layers is not None and kinds is None
        if not full.tied:
            why = "no embedding of this model is its output head too"
        elif outside or (kinds is not None and not kinds & {"embedding", "position"}):
            why = "--layers or --components leave the embedding as it is"
        else:
            why = ""
        if why:
            raise UsageError(
                f"--tied-embeddings {options.tied_embeddings} has no effect: {why}: leave it out"
            )
    _check_components(full, options)


def _check_components(full: EditPlan, options: EditOptions) -> None:
    """Refuse a component that the model has not, beside others that it has."""
    there = {edit.kind for edit in full.edits}
    for name in () if options.components is None else options.components.split(","):
        if not there & (parse_components(name) or frozenset()):
            raise UsageError(
                f"--components {name.strip()} has no effect: this model writes to the stream by "
                f"{', '.join(sorted(there))} alone: leave it out"
            )


def _plan_added(
    full: EditPlan,
    quantized: Mapping[str, Quantized],
    direction: Direction,
    coeff: float,
    config: Mapping[str, Any],
) -> PlannedEdit:
    """The bias of ``--add``: nothing is removed."""
    addition = plan_addition(full, direction, coeff, config)
    new_config = addition.config
    if not tied_matrices_agree(full):
        new_config = untie_document(new_config or config, full)
        new_config = None if new_config == config else new_config
    bias = EditedTensor(
        name=addition.name,
        kind="mlp",
        layer=addition.layer,
        axis=0,
        before=addition.before,
        after=addition.after,
    )
    return PlannedEdit(
        full=full,
        plan=replace(full, edits=(), copies={}),
        quantized=quantized,
        changes=addition.changes,
        config=new_config,
        added=(bias,),
    )
