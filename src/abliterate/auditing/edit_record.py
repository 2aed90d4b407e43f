"""What a checkpoint says of itself: its record ``abliterate.json`` and its model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.auditing.components import Part, Reading, every_column
from abliterate.direction import Direction
from abliterate.editing.orthogonalize import CARD, RECORD
from abliterate.errors import InputError
from abliterate.models.loading import Checkpoint
from abliterate.storage.artifacts import read_json
from abliterate.writers.discovery import orthonormal, writer_direction
from abliterate.writers.plan import Writer

_TAGS = ("abliterated", "refusal-removed", "uncensored", "abliteration")
# The share left along the direction may differ from the recorded one by summation order alone.
_RELATIVE, _ABSOLUTE = 0.02, 1e-6


@dataclass(frozen=True)
class Claim:
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
    checked: int
    confirmed: bool | None
    mismatches: tuple[str, ...]
    direction: Tensor | None
    limits: tuple[str, ...] = ()


def read_claim(reading: Reading, given: Direction | None, base: Checkpoint | None) -> Claim:
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
        return Claim(card, False, 0, None, (), None)
    record = read_json(folder / RECORD, "orthogonalize")
    try:
        tensors = [(str(t["name"]), float(t["before"]), float(t["after"]), t["region"])
                   for t in record["tensors"]]  # fmt: skip
        kept_norms = bool((record.get("options") or {}).get("norm_preserve"))
        is_adapter = bool((record.get("options") or {}).get("as_lora"))
        declared = record["direction"]["sha256"]
        limits = tuple(map(str, (record.get("promise") or {}).get("limits", ())))
        vector = record.get("vector")
        added = (record.get("options") or {}).get("add")
        source = record["source"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / RECORD} is no record of an edit: remove it") from None
    wrong = []
    if given is not None and declared is not None and given.sha256 != declared:
        wrong.append("the record names another direction file than the one given")
    if base is not None and "files" in source and base.revision is None:
        mine = base.identity()["files"]
        other = sorted(k for k, v in source["files"].items() if mine.get(k) != v)
        if other:
            wrong.append(f"the record names another source: {other[0]} of the base differs")
    unit = _unit(given, vector, reading.d_model)
    if unit is None or added is not None:
        reason = "adds the direction" if added is not None else "holds no direction"
        wrong.append(f"the record {reason}: its tensors cannot be measured")
        return Claim(card, True, 0, None, tuple(wrong), None, limits)
    if is_adapter:  # laid beside the weights, which it leaves as they are
        return Claim(card, True, 0, None, tuple(wrong), unit, limits)
    parts: dict[tuple[str, str], list[Part]] = {}
    for part in (*(p for u in reading.units for p in u.parts), *reading.biases):
        parts.setdefault((part.edit.name, str(_box(part.edit.region))), []).append(part)
    checked = 0
    for name, before, after, region in tensors:
        own = parts.get((name, str(_box(region))))
        if own is None:
            wrong.append(f"tensor '{name}' of the record is no writer of this checkpoint")
            continue
        left = share_along(reading, own[0], unit)
        if not kept_norms:  # the record is relative to the norm before the edit
            left *= math.sqrt(max(0.0, 1 - before**2 + after**2))
        checked += 1
        if not math.isclose(left, after, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
            wrong.append(
                f"tensor '{name}' keeps {left:.2e} of its norm along the direction, the record "
                f"says {after:.2e}"
            )
    if not any(after < 0.95 * before for _, before, after, _ in tensors):
        wrong.append("the record declares no tensor that lost the direction")
    return Claim(card, True, checked, not wrong, tuple(wrong), unit, limits)


def share_along(reading: Reading, part: Part, direction: Tensor) -> float:
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
        vector = torch.tensor(recorded, dtype=torch.float64)
    else:
        return None
    if vector.shape != (width,) or not bool(torch.isfinite(vector).all()) or not vector.norm() > 0:
        raise InputError(f"the direction has shape {list(vector.shape)}, the model needs [{width}]")
    unit: Tensor = vector / vector.norm()
    return unit


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
