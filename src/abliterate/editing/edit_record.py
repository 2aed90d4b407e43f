"""``abliterate.json``: what was edited, and with what, in the edited checkpoint itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.direction_set import DirectionSet
from abliterate.editing.edit_plan import TensorEdit
from abliterate.editing.edited_tensor import EditedTensor
from abliterate.editing.file_names import CARD, RECORD
from abliterate.editing.matrix_orthogonalization import DirectionEnergy
from abliterate.editing.options import promise
from abliterate.editing.output_plan import OutputPlan
from abliterate.editing.own_checkpoint import file_list
from abliterate.storage.artifacts import read_json, versions
from abliterate.writers.tensor_slices import Ranges


def edited_tensors(plan: OutputPlan, energies: Mapping[int, DirectionEnergy]) -> list[EditedTensor]:
    """What the record says of each tensor.

    Args:
        plan: of the output.
        energies: what each edit measured, by its number.
    """
    measured = [
        _measured(edit, energies.get(index, DirectionEnergy()))
        for index, edit in enumerate(plan.edit.plan.edits)
    ]
    return [*plan.edit.added, *measured]


def _measured(edit: TensorEdit, energy: DirectionEnergy) -> EditedTensor:
    whole = energy.energy or 1.0
    return EditedTensor(
        name=edit.name,
        kind=edit.kind,
        layer=edit.layer,
        axis=edit.axis,
        before=math.sqrt(energy.along_before / whole),
        after=math.sqrt(energy.along_after / whole),
        region=edit.region,
    )


def edit_record(plan: OutputPlan, edited: Sequence[EditedTensor], files: Path) -> dict[str, Any]:
    """The record of an edit.

    Args:
        plan: of the output.
        edited: its tensors.
        files: the folder that holds all other files of the output.
    """
    full = plan.edit.full
    return {
        "source": plan.source.identity(),
        "direction": (full.directions or plan.direction).summary(),
        **_values(plan),
        "options": plan.options.summary(),
        "promise": promise(full, plan.edit.plan.edits, plan.options),
        "untied": plan.untied,
        "untouched": list(full.untouched),
        "leak_of_plan": full.leak,
        "tensors": [asdict(tensor) for tensor in edited],
        "beside": {
            "kept": [path.as_posix() for path in plan.beside.kept],
            "left_behind": {path.as_posix(): why for path, why in plan.beside.left.items()},
        },
        "files": file_list(files, RECORD, CARD),
        "versions": versions(),
    }


def _values(plan: OutputPlan) -> dict[str, Any]:
    """The direction, or that of each layer."""
    if isinstance(plan.direction, DirectionSet):
        fitted = plan.edit.full.directions
        assert fitted is not None
        return fitted.document()
    vector = plan.direction.vector
    # As it was given, to the last bit: the edit can be repeated from its record.
    return {"vector": _unit_list(vector), "unnormalised": vector.double().tolist()}


def _unit_list(vector: Tensor) -> list[float]:
    """The unit direction, so that the record can be checked against the weights by itself."""
    upcast = vector.detach().cpu().double()
    return [float(value) for value in upcast / upcast.norm()]


def recorded_tensors(out: Path) -> list[EditedTensor]:
    """The tensors that the record in an edited checkpoint lists."""
    record = read_json(out / RECORD, "orthogonalize")
    return [
        EditedTensor(**{**entry, "region": _box(entry.get("region"))})
        for entry in record["tensors"]
    ]


def _box(region: Any) -> Ranges | None:
    return None if region is None else tuple((first, behind) for first, behind in region)
