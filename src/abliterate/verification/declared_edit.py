"""What an edited checkpoint has to hold, tensor by tensor and file by file.

Its record ``abliterate.json`` names the options; what they make of the source is planned as the
editor plans it. A checkpoint without a record is taken for the paper's edit of every writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abliterate.checkpoints.config_sizes import CONFIG
from abliterate.checkpoints.quantized_formats import Quantized, find_quantized, read_config
from abliterate.checkpoints.safetensors_header import TensorEntry
from abliterate.checkpoints.shards import ShardSet, same_bytes
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet, recorded_set
from abliterate.editing.auxiliary_files import find_auxiliary_files
from abliterate.editing.edit_plan import EditPlan, TensorEdit
from abliterate.editing.file_names import CARD, RECORD
from abliterate.editing.options import EditOptions, promise
from abliterate.editing.planning import PlannedEdit, plan_edit
from abliterate.editing.recorded_options import recorded_options
from abliterate.editing.tied_embeddings import tied_tensors
from abliterate.editing.weights_beside import weights_beside
from abliterate.errors import CheckpointError, InputError, UsageError
from abliterate.models.loading import Checkpoint, load_config
from abliterate.storage.artifacts import read_record
from abliterate.storage.json_text import parse_json

_INDEX = "model.safetensors.index.json"
# Of a download or of version control, and what no loader reads.
_HARMLESS = {"", ".md", ".txt", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf", ".webp"}
_READ_AS_TEXT = {"merges.txt", "vocab.txt"}
# What the library writes anew whenever it saves a checkpoint.
_BOOKKEEPING = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures",
                "tie_word_embeddings", "use_cache", "quantization_config"}  # fmt: skip


@dataclass(frozen=True)
class ExpectedTensor:
    """What a tensor of the edited checkpoint comes from.

    Attributes:
        name: in the edited checkpoint.
        dtype: the format's name of its dtype.
        shape: its shape.
        origin: the source's tensor that it is made from, or None for constants.
        stored: how that is stored in blocks with scales, or None.
        edits: of it, by the axes of ``origin``; none where it keeps its values.
        dense: it becomes a plain tensor.
        content: its bytes, where they are constant.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: TensorEntry | None
    stored: Quantized | None = None
    edits: tuple[TensorEdit, ...] = ()
    dense: bool = False
    content: bytes | None = None


@dataclass(frozen=True)
class DeclaredEdit:
    """An edit by its record.

    Attributes:
        options: how it departs from the paper's edit.
        recorded: there is a record that says so.
        planned: what it changes.
        tensors: all that the edited checkpoint has to hold, by name.
        limits: why it is less than the paper's edit.
        conflicts: where the record contradicts what it is checked against.
        notes: what cannot be checked, and what was taken for granted instead.
    """

    options: EditOptions
    recorded: bool
    planned: PlannedEdit
    tensors: Mapping[str, ExpectedTensor]
    limits: tuple[str, ...]
    conflicts: tuple[str, ...]
    notes: tuple[str, ...]


def declared_edit(
    edited: Checkpoint,
    shards: ShardSet,
    source: Checkpoint,
    direction: Direction | DirectionSet,
    trust_remote_code: bool = False,
) -> DeclaredEdit:
    """What ``edited`` has to hold if it is what it says of itself.

    Args:
        edited: the edited checkpoint.
        shards: its shards.
        source: what it was made from.
        direction: along which.
        trust_remote_code: the architecture's code lies in the source, and may run.

    Raises:
        CheckpointError: the source is damaged, or the record's options do not fit it.
        InputError: the record is damaged, or the direction does not fit.
        UnsupportedArchitectureError: the writers cannot be found.
        UsageError: the set was made by other options than the recorded one.
    """
    record = edited.folder / RECORD
    conflicts, notes = list[str](), list[str]()
    recorded = record.is_file()
    if recorded:
        options, conflicts = _read_record(record, direction)
    else:
        options = _guess(shards, source)
    try:
        planned = plan_edit(source, direction, options, trust_remote_code, float("inf"))
        if not recorded and planned.plan.copies.keys() - shards.tensors.keys():
            options = replace(options, tied_embeddings="share")  # no head of its own was added
            planned = plan_edit(source, direction, options, trust_remote_code, float("inf"))
    except UsageError as error:
        raise CheckpointError(f"{record} does not fit {source.name}: {error}") from None
    if not recorded:
        notes.append(
            f"{edited.name} holds no {RECORD}: it was compared with the plain edit of every writer "
            f"(tied embeddings: {options.tied_embeddings}, quantized tensors: "
            f"{options.quantized or 'none'}); files that a loader writes anew were compared by "
            "what they say, and missing or further files were not held against it"
        )
    notes += plan_notes(planned.full)
    less = promise(planned.full, planned.plan.edits, options)["limits"]
    tensors = _expected(planned)
    return DeclaredEdit(
        options, recorded, planned, tensors, tuple(less), tuple(conflicts), tuple(notes)
    )


def _read_record(path: Path, direction: Direction | DirectionSet) -> tuple[EditOptions, list[str]]:
    record = read_record(path, "orthogonalize")
    options = recorded_options(record, path)
    vector, conflicts = record.get("vector"), list[str]()
    held = recorded_set(record, path)
    if isinstance(direction, DirectionSet) or held is not None:
        if conflicts := _other_set(direction, held):
            _check_asked(path, direction, held)
        return options, conflicts
    if isinstance(vector, list) and all(isinstance(v, int | float) for v in vector):
        mine = direction.vector.double()
        theirs = torch.tensor(vector, dtype=torch.float64)
        if theirs.shape != mine.shape:
            conflicts.append(f"{RECORD} records a direction of another size")
        elif not abs(cosine := float(theirs @ mine / theirs.norm() / mine.norm())) > 1 - 1e-9:
            conflicts.append(
                f"{RECORD} records another direction than the one given (cosine {cosine:z.3f})"
            )
    return options, conflicts


def _check_asked(
    path: Path, direction: Direction | DirectionSet, recorded: DirectionSet | None
) -> None:
    """Refuse a set that was made by other options than the recorded one.

    Raises:
        UsageError: it was.
    """
    if not isinstance(direction, DirectionSet):
        return
    for name in ("position", "interpolate"):
        asked, made = getattr(direction, name), recorded and getattr(recorded, name)
        if asked is None or asked == made:
            continue
        mend = f"give --{name}={made}" if made is not None else "leave it out"
        how = f"--{name}={made}" if made is not None else f"no --{name}"
        raise UsageError(f"--{name}={asked}: {path} records an edit made with {how}: {mend}")


def _other_set(direction: Direction | DirectionSet, recorded: DirectionSet | None) -> list[str]:
    """In what the set that was given is not the recorded one."""
    if not isinstance(direction, DirectionSet):
        return [f"{RECORD} records a direction for each layer, and one for all was given"]
    if recorded is None:
        return [f"{RECORD} records one direction for all layers, and a set was given"]
    try:
        mine = direction.units(*recorded.vectors.shape)
        theirs = recorded.units(*recorded.vectors.shape)
    except InputError as error:
        return [f"{RECORD} records another direction set than the one given: {error}"]
    cosines = (mine * theirs).sum(dim=1)
    both = mine.any(dim=1) & theirs.any(dim=1)
    alike = (both & (cosines.abs() > 1 - 1e-9)) | ~(mine.any(dim=1) | theirs.any(dim=1))
    names = ["the embeddings", *(f"layer {layer}" for layer in range(len(mine) - 1))]
    return [
        f"{RECORD} records another direction for {names[row]} than the one given (cosine "
        f"{float(cosines[row]):z.3f})"
        for row in (~alike).nonzero()[:, 0].tolist()
    ]


def plan_notes(plan: EditPlan) -> list[str]:
    """What holds of the edit however it was made."""
    notes = []
    if plan.directions is not None:
        notes.append(
            "each writer was held against its own layer's direction; the stream as a whole is not "
            "promised to be free of any"
        )
    if plan.undirected:
        notes.append(
            f"{len(plan.undirected)} writers of layers without a direction were not looked at, "
            f"such as {plan.undirected[0]}"
        )
    if plan.post_norm:
        notes.append(
            "what layers write passes a norm before it is added (post-norm): nothing is written "
            "along the direction, but the logits are not those of ablation's hooks, since the "
            "norm's scale changes with what enters it (--source with --forward measures how far "
            "they are apart)"
        )
    return notes


def _guess(shards: ShardSet, source: Checkpoint) -> EditOptions:
    """Of an edit without a record: quantized again if anything still is."""
    config = read_config(source.folder)
    if not isinstance(config.get("quantization_config"), Mapping):
        return EditOptions()
    kept = find_quantized(shards, config)
    return EditOptions(quantized="requantize" if kept else "dequantize")


def _expected(planned: PlannedEdit) -> dict[str, ExpectedTensor]:
    plan, changes, quantized = planned.plan, planned.changes, planned.quantized
    edits: dict[str, tuple[TensorEdit, ...]] = {}
    for edit in plan.edits:
        edits[edit.name] = (*edits.get(edit.name, ()), edit)
    found: dict[str, ExpectedTensor] = {}
    for name, entry in plan.shards.tensors.items():
        own = edits.get(name, ())
        if name in changes.removed:
            continue
        if name in changes.replaced:
            new, tensor = changes.replaced[name]
            dense = tensor.content is None
            found[new] = ExpectedTensor(
                new, tensor.dtype, tensor.shape, entry if dense else None,
                quantized.get(name) if dense else None, own, dense, tensor.content,
            )  # fmt: skip
        else:
            found[name] = ExpectedTensor(
                name, entry.dtype, entry.shape, entry, quantized.get(name) if own else None, own
            )
    for tensors in changes.added.values():
        for name, tensor in tensors.items():
            found[name] = ExpectedTensor(
                name, tensor.dtype, tensor.shape, tensor.origin, None,
                edits.get(name, ()), False, tensor.content,
            )  # fmt: skip
    for name, stored in quantized.items():
        # New scales come with new values; they count where the values are decoded.
        own = edits.get(name, ())
        if name in found and own and all(edit.region is None for edit in own):
            found.pop(stored.scales.name, None)
    return found


def check_files(
    edited: Checkpoint, source: Checkpoint, declared: DeclaredEdit, shards: ShardSet
) -> list[str]:
    """What is wrong with the files beside the weights, a sentence each."""
    full = declared.planned.full
    config = declared.planned.config or read_config(source.folder)
    wrong = [] if not declared.recorded else _config_differs(edited.folder, config)
    if not declared.recorded:
        wrong = _loaded_config_differs(edited, source)
        conflict = tied_conflict(edited, shards)
        wrong += [conflict] if conflict else []
    kept = weights_beside(source.folder, full, declared.options.leave_behind).kept
    mine = find_auxiliary_files(edited.folder, shards.shards, (RECORD, CARD, CONFIG, _INDEX), kept)
    names = full.shards.shards
    theirs = find_auxiliary_files(source.folder, names, (RECORD, CARD, CONFIG, _INDEX), kept)
    same = _same_file if declared.recorded else _same_content
    for path in sorted(theirs.files):
        if path not in mine.files:
            if declared.recorded:
                wrong.append(f"{path} is missing")
        elif not same(edited.folder / path, source.folder / path):
            wrong.append(f"{path} is not the source's")
    if declared.recorded:
        extra = {str(path) for path in mine.files.keys() - theirs.files.keys() if _matters(path)}
        wrong += [f"{name} is not of the source" for name in sorted(extra | {*mine.left_behind})]
    return wrong


def _matters(path: Path) -> bool:
    return path.suffix.lower() not in _HARMLESS or path.name in _READ_AS_TEXT


def _config_differs(folder: Path, expected: Mapping[str, Any]) -> list[str]:
    mine = read_config(folder)
    return [
        f"{CONFIG} says {_said(mine, key)}, not {_said(expected, key)}"
        for key in sorted(mine.keys() | expected.keys())
        if mine.get(key, ...) != expected.get(key, ...)
    ]


def _said(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return f"nothing of {key}"
    text = json.dumps(config[key])
    return f"{key}: {text if len(text) <= 80 else text[:77] + '...'}"


def _loaded_config_differs(edited: Checkpoint, source: Checkpoint) -> list[str]:
    """Of an edit without a record: as the library reads them, but for what it keeps books on."""
    one, other = (_plain(load_config(checkpoint).to_dict()) for checkpoint in (edited, source))
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    return [f"{CONFIG} differs from the source's in {', '.join(keys)}"] if keys else []


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in _BOOKKEEPING}
    return value


def _same_file(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        while chunk := left.read(1 << 20):
            if chunk != right.read(1 << 20):
                return False
    return True


def _same_content(one: Path, other: Path) -> bool:
    """The same bytes, or JSON that says the same."""
    if _same_file(one, other):
        return True
    try:
        left, right = (parse_json(path.read_text(encoding="utf-8")) for path in (one, other))
    except (ValueError, OSError, RecursionError):
        return False
    return bool(left == right)


def tied_conflict(edited: Checkpoint, shards: ShardSet) -> str | None:
    """Where the configuration ties an output head to an embedding, and the files hold two."""
    for embedding, head in tied_tensors(edited, shards):
        if not same_bytes(shards.tensors[embedding], shards.tensors[head]):
            return tied_sentence(embedding, head)
    return None


def tied_sentence(embedding: str, head: str) -> str:
    """What is wrong, and how to mend it."""
    return (
        f"{CONFIG} ties '{head}' to '{embedding}', but the two differ: some loaders would use the "
        "edited embedding as output head; set tie_word_embeddings to false"
    )
