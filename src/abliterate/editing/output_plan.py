"""What OUT will hold, file by file, before its first byte is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.checkpoints.config_sizes import CONFIG
from abliterate.checkpoints.safetensors_header import FileStamp
from abliterate.checkpoints.shards import INDEX
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.editing.auxiliary_files import AuxiliaryFiles, find_auxiliary_files
from abliterate.editing.file_names import CARD, RECORD
from abliterate.editing.lora import check_targets
from abliterate.editing.matrix_orthogonalization import EditStrength
from abliterate.editing.options import EditOptions
from abliterate.editing.planning import PlannedEdit, check_effect, plan_edit
from abliterate.editing.shard_layout import ShardLayout, lay_out, new_index
from abliterate.editing.shard_tasks import EditContext
from abliterate.editing.shard_writer import usable_cores
from abliterate.editing.weights_beside import WeightsBeside, weights_beside
from abliterate.errors import UsageError
from abliterate.models.loading import pick_device
from abliterate.storage.artifacts import hash_json, hash_text, versions


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """The files of an edited checkpoint (or adapter), and what they are made from.

    Attributes:
        source: the checkpoint.
        direction: what to remove.
        options: as the user gave them.
        edit: what the edit changes.
        context: how to compute it.
        layouts: the shards to write, by name; none for an adapter.
        documents: JSON files that change, by name.
        auxiliary: files that come along as they are.
        beside: of them and of those left behind, the safetensors files.
        stamps: how every file of the source stood.
    """

    source: Checkpoint
    direction: Direction | DirectionSet
    options: EditOptions
    edit: PlannedEdit
    context: EditContext
    layouts: Mapping[str, ShardLayout]
    documents: Mapping[str, Any]
    auxiliary: AuxiliaryFiles
    beside: WeightsBeside
    stamps: Mapping[Path, FileStamp]

    @property
    def _values(self) -> Any:
        if isinstance(self.direction, DirectionSet):
            return self.direction.document()
        return self.direction.vector.tolist()

    @property
    def untied(self) -> list[str]:
        """The tensors that keep the original matrix of an embedding that is untied."""
        edited = {tensor.name for tensor in self.edit.plan.edits}
        copies = self.edit.plan.copies.items()
        return sorted(source if name in edited else name for name, source in copies)

    @property
    def sizes(self) -> Iterator[int]:
        """Bytes of each file, save the record and the card."""
        yield from (layout.size for layout in self.layouts.values())
        yield from (stamp.size for stamp in self.auxiliary.files.values())
        yield from (len(json.dumps(document, indent=2)) for document in self.documents.values())

    def inputs(self) -> str:
        """A hash of all that the result depends on."""
        edits = [
            [
                *(e.name, e.axis, e.kind, e.layer, e.region, hash_text(repr(e.basis.tolist()))),
                *([e.weight] if e.weight != 1 else []),
            ]
            for e in self.edit.plan.edits
        ]
        return hash_json(
            {
                "source": [self.source.name, str(self.source.folder.resolve())],
                "files": {str(path): asdict(stamp) for path, stamp in self.stamps.items()},
                "headers": {
                    name: hash_text(str(layout.header), str(layout.tensors))
                    for name, layout in self.layouts.items()
                },
                "direction": [self.direction.summary(), self._values],
                "edits": edits,
                "options": self.options.summary(),
                "documents": self.documents,
                "versions": versions(),
            }
        )


def _stamp_documents(source: Checkpoint) -> dict[Path, FileStamp]:
    """How configuration and index of the source stand; taken before they are read."""
    paths = (source.folder / name for name in (CONFIG, INDEX))
    return {path: FileStamp.of(path.stat()) for path in paths if path.is_file()}


def plan_output(
    source: Checkpoint,
    direction: Direction | DirectionSet,
    options: EditOptions,
    trust_remote_code: bool = False,
    allow_leak: float | None = None,
    repeated: bool = False,
) -> OutputPlan:
    """Plan the edit and every file of OUT, from configuration and headers alone.

    Args:
        source: the checkpoint.
        direction: what to remove.
        options: as the user gave them.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        allow_leak: as :func:`abliterate.editing.orthogonalize.orthogonalize` has it.
        repeated: the options are a record's, and may hold some that do nothing.

    Raises:
        CheckpointError: the source cannot be edited, an adapter cannot hold the edit, or a link
            leaves the source.
        InputError: the direction does not fit.
        UsageError: the options contradict the model, or one has no effect on it.
    """
    stamps, device = _stamp_documents(source), pick_device(options.device)
    edit = plan_edit(source, direction, options, trust_remote_code, allow_leak)
    if not repeated:
        check_effect(edit, options)
    plan, shards = edit.plan, edit.plan.shards
    documents: dict[str, Any] = {} if edit.config is None else {CONFIG: edit.config}
    index = new_index(shards, edit.changes)
    if index is not None:
        documents[INDEX] = index
    layouts = {name: lay_out(shard, edit.changes) for name, shard in shards.shards.items()}
    beside = weights_beside(source.folder, edit.full, options.leave_behind)
    replaced = (RECORD, CARD, *documents)
    auxiliary = find_auxiliary_files(source.folder, shards.shards, replaced, beside.kept)
    if options.as_lora:
        if edit.full.tied and options.tied_embeddings == "share":
            raise UsageError("--as-lora leaves the output head alone: not --tied-embeddings share")
        check_targets(plan.edits, shards)
        layouts, documents, auxiliary = {}, {}, AuxiliaryFiles({}, ())
        beside = WeightsBeside({}, {})
        edit = replace(edit, plan=replace(plan, copies={}))
    all_stamps = dict(stamps)
    if source.remote is None:  # else the commit says it all
        all_stamps |= {shard.path: shard.stamp for shard in shards.shards.values()}
    all_stamps |= {source.folder / path: stamp for path, stamp in auxiliary.files.items()}
    context = EditContext(
        edits=plan.edits,
        strength=EditStrength(options.scale, options.keep_norms),
        quantized=edit.quantized,
        device=device,
        num_cores=options.jobs or usable_cores(),
    )
    return OutputPlan(
        source=source,
        direction=direction,
        options=options,
        edit=edit,
        context=context,
        layouts=layouts,
        documents=documents,
        auxiliary=auxiliary,
        beside=beside,
        stamps=all_stamps,
    )
