"""What a checkpoint says of itself: its record ``abliterate.json`` and its model card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.auditing.components import CheckpointWriters, Part, every_column
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet, recorded_set
from abliterate.editing.file_names import CARD, RECORD
from abliterate.errors import InputError
from abliterate.models.loading import Checkpoint
from abliterate.storage.artifacts import read_record
from abliterate.writers.discovery import orthonormal, writer_direction
from abliterate.writers.plan import Writer

_TAGS = ("abliterated", "refusal-removed", "uncensored", "abliteration")
# The share left along the direction may differ from the recorded one by summation order alone.
_RELATIVE, _ABSOLUTE = 0.02, 1e-6
_MAX_SHARE = 1e100  # whose square is a number still


@dataclass(frozen=True, kw_only=True)
class DeclaredEdit:
    """What a checkpoint declares, and whether its weights bear it out.

    Attributes:
        card: the model card says that refusals were removed.
        record: ``abliterate.json`` is there.
        checked: tensors whose share along the declared direction was measured.
        confirmed: the record holds exactly; None where it cannot be checked.
        mismatches: what does not, a sentence each.
        direction: the declared direction, unit, or None if it is not recorded.
        limits: what the record itself says the edit is not.
    """

    card: bool
    record: bool
    checked: int = 0
    confirmed: bool | None = None
    mismatches: tuple[str, ...] = ()
    direction: Tensor | None = None
    limits: tuple[str, ...] = ()


def read_declared_edit(
    reading: CheckpointWriters, given: Direction | None, base: Checkpoint | None
) -> DeclaredEdit:
    """Check a checkpoint's own record against its weights, tensor by tensor, whole.

    Args:
        reading: the checkpoint.
        given: the direction that the record is said to mean, or None for the recorded one.
        base: the source that the record is said to mean, or None.

    Raises:
        InputError: the record is no record of an edit.
    """
    folder = reading.checkpoint.folder
    card = _card_claims(reading.checkpoint)
    if not (folder / RECORD).is_file():
        return DeclaredEdit(card=card, record=False)
    record = _read_record(folder / RECORD)
    mismatches = _other_inputs(record, given, base)
    unit = _unit(given, record.vector, reading.d_model)
    along = _by_layer(unit, record if given is None else None, reading.d_model)
    if along is None or record.adds:
        reason = "adds the direction" if record.adds else "holds no direction"
        mismatches.append(f"the record {reason}: its tensors cannot be measured")
        unit = along = None
    if along is None or record.is_adapter:  # an adapter beside the weights leaves them as they are
        return DeclaredEdit(
            card=card,
            record=True,
            mismatches=tuple(mismatches),
            direction=unit,
            limits=record.limits,
        )
    checked, differing = _check_tensors(reading, record, along)
    mismatches += differing
    if not any(tensor.after < 0.95 * tensor.before for tensor in record.tensors):
        mismatches.append("the record declares no tensor that lost the direction")
    return DeclaredEdit(
        card=card,
        record=True,
        checked=checked,
        confirmed=not mismatches,
        mismatches=tuple(mismatches),
        direction=unit,
        limits=record.limits,
    )


@dataclass(frozen=True)
class _RecordedTensor:
    """``|r^T W| / |W|`` of a tensor, or of the box ``region`` of it, before and after the edit.

    ``r`` is the direction of its layer, where the edit had one for each.
    """

    name: str
    before: float
    after: float
    region: Any
    layer: int | None


@dataclass(frozen=True)
class _Record:
    """What ``abliterate.json`` says, as far as it can be held against the weights."""

    tensors: tuple[_RecordedTensor, ...]
    keeps_norms: bool
    adds: bool
    is_adapter: bool
    direction_sha256: str | None
    vector: Any
    directions: DirectionSet | None
    source_files: Mapping[str, Any]
    limits: tuple[str, ...]


def _read_record(path: Path) -> _Record:
    document = read_record(path, "orthogonalize")
    try:
        options = document.get("options") or {}
        return _Record(
            tensors=tuple(
                _RecordedTensor(
                    str(t["name"]),
                    _share(t["before"]),
                    _share(t["after"]),
                    _box(t["region"]),
                    None if t.get("layer") is None else int(t["layer"]),
                )
                for t in document["tensors"]
            ),
            keeps_norms=bool(options.get("norm_preserve")),
            adds=options.get("add") is not None,
            is_adapter=bool(options.get("as_lora")),
            direction_sha256=document["direction"]["sha256"],
            vector=document.get("vector"),
            directions=recorded_set(document, path),
            source_files=dict(document["source"].get("files") or {}),
            limits=tuple(map(str, (document.get("promise") or {}).get("limits", ()))),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise InputError(f"{path} is no record of an edit: remove it") from None


def _other_inputs(record: _Record, given: Direction | None, base: Checkpoint | None) -> list[str]:
    """Where the record means another direction or source than those at hand."""
    conflicts = []
    if given is not None and record.direction_sha256 not in (None, given.sha256):
        conflicts.append("the record names another direction file than the one given")
    if base is not None and record.source_files and base.revision is None:
        mine = base.identity()["files"]
        other = sorted(k for k, v in record.source_files.items() if mine.get(k) != v)
        if other:
            conflicts.append(f"the record names another source: {other[0]} of the base differs")
    return conflicts


def _check_tensors(
    reading: CheckpointWriters, record: _Record, along: Callable[[int | None], Tensor | None]
) -> tuple[int, list[str]]:
    """How many recorded tensors were measured, and a sentence for each that is not as recorded."""
    parts: dict[tuple[str, str], list[Part]] = {}
    for part in (*(p for u in reading.units for p in u.parts), *reading.biases):
        parts.setdefault((part.edit.name, str(_box(part.edit.region))), []).append(part)
    checked, conflicts = 0, []
    for tensor in record.tensors:
        stored = parts.get((tensor.name, str(tensor.region)))
        if stored is None:
            conflicts.append(
                f"tensor '{tensor.name}' of the record is no writer of this checkpoint"
            )
            continue
        unit = along(tensor.layer)
        if unit is None:
            conflicts.append(f"the record has no direction for the layer of '{tensor.name}'")
            continue
        share = share_along(reading, stored[0], unit)
        if not record.keeps_norms:  # the record is relative to the norm before the edit
            share *= math.sqrt(max(0.0, 1 - tensor.before**2 + tensor.after**2))
        checked += 1
        if not math.isclose(share, tensor.after, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
            conflicts.append(
                f"tensor '{tensor.name}' keeps {share:.2e} of its norm along the direction, the "
                f"record says {tensor.after:.2e}"
            )
    return checked, conflicts


def share_along(reading: CheckpointWriters, part: Part, direction: Tensor) -> float:
    """``|u^T W| / |W|`` of a whole tensor, ``u`` the stream direction as it is there."""
    edit = part.edit
    ways = [Writer(edit.name, edit.axis, "other", None, part.bias, way, part.channels)
            for way in part.ways]  # fmt: skip
    basis = orthonormal([writer_direction(w, direction, reading.located.gains) for w in ways])
    along = energy = 0.0
    for columns in every_column(reading.located.shards, reading.quantized, edit):
        energy += float(columns.square().sum())
        along += float((basis @ columns).square().sum())
    return math.sqrt(along / energy) if energy > 0 else 0.0


def _unit(given: Direction | None, recorded: Any, width: int) -> Tensor | None:
    if given is not None:
        vector = given.vector.double()
    elif isinstance(recorded, list) and all(isinstance(v, int | float) for v in recorded):
        try:
            vector = torch.tensor(recorded, dtype=torch.float64)
        except (OverflowError, RuntimeError):  # an integer of any size
            return None
    else:
        return None
    if vector.shape != (width,) or not bool(torch.isfinite(vector).all()) or not vector.norm() > 0:
        raise InputError(f"the direction has shape {list(vector.shape)}, the model needs [{width}]")
    unit: Tensor = vector / vector.norm()
    return unit


def _by_layer(
    unit: Tensor | None, record: _Record | None, width: int
) -> Callable[[int | None], Tensor | None] | None:
    """The unit direction of each layer; None where nothing says which it is."""
    if unit is not None:
        return lambda layer: unit
    held = None if record is None else record.directions
    if held is None:
        return None
    if held.width != width or not bool(held.vectors.isfinite().all()):
        raise InputError(
            f"the record's directions have shape {list(held.vectors.shape)}, the model needs "
            f"numbers of width {width}"
        )

    def of_layer(layer: int | None) -> Tensor | None:
        if layer is not None and not 0 <= layer < len(held.vectors):
            return None
        vector = held.at(layer)
        return None if vector is None else vector / vector.norm()

    return of_layer


def _share(value: Any) -> float:
    """A share of a tensor's norm, as a record has it; an edit of a large scale leaves many."""
    share = float(value)
    if not 0 <= share <= _MAX_SHARE:
        raise ValueError("no share")
    return share


def _box(region: Any) -> Any:
    return None if region is None else [[int(a), int(b)] for a, b in region]


def _card_claims(checkpoint: Checkpoint) -> bool:
    from huggingface_hub import ModelCard

    try:
        data: Mapping[str, Any] = ModelCard.load(
            checkpoint.folder / CARD, ignore_metadata_errors=True
        ).data.to_dict()
    except Exception:  # a card is free text, and may be missing
        return False
    tags = data.get("tags")
    return isinstance(tags, list) and any(str(tag).lower() in _TAGS for tag in tags)
