"""orthogonalize: bake the ablation into a checkpoint's weights (paper, section 2.4, equation 5).

Every matrix that writes to the residual stream gets ``W <- W - r r^T W``; all other bytes are
copied. The result appears complete under its name or not at all; until then it grows in
``OUT.partial``, from where the same command goes on after a kill.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.checkpoints.quantized_formats import (
    Quantized,
    check_method,
    find_quantized,
    read_config,
)
from abliterate.checkpoints.shards import INDEX, FileStamp
from abliterate.console import log, progress_bar
from abliterate.direction import Direction
from abliterate.distributed.rank_group import RankGroup, join_ranks
from abliterate.editing.auxiliary_files import (
    AuxiliaryFiles,
    check_space,
    check_target,
    check_unchanged,
    copy_auxiliary_files,
    find_auxiliary_files,
)
from abliterate.editing.baked_addition import plan_addition
from abliterate.editing.edit_plan import EditPlan, TensorEdit, make_plan
from abliterate.editing.edited_tensor import EditedTensor
from abliterate.editing.file_names import CARD, RECORD
from abliterate.editing.lora import check_targets, write_adapter
from abliterate.editing.low_disk import Step, plan_steps, write_from_hub
from abliterate.editing.matrix_orthogonalization import DirectionEnergy, EditStrength
from abliterate.editing.model_card import write_model_card
from abliterate.editing.options import (
    EditOptions,
    apply_options,
    promise,
    tied_matrices_agree,
)
from abliterate.editing.own_checkpoint import file_list
from abliterate.editing.shard_layout import ShardLayout, TensorChanges, lay_out, new_index
from abliterate.editing.shard_tasks import EditContext
from abliterate.editing.shard_writer import usable_cores, write_shards
from abliterate.editing.tensor_changes import plan_changes, resolve_edits, untie_document
from abliterate.editing.workspace import (
    Workspace,
    check_absent,
    hold_workspace,
    is_begun,
    is_published,
    join_workspace,
    open_workspace,
)
from abliterate.errors import (
    CheckpointError,
    DiskSpaceError,
    FetchError,
    InterruptedWorkError,
    RankError,
    UsageError,
)
from abliterate.models.loading import Checkpoint, find_checkpoint, pick_device
from abliterate.storage.artifacts import hash_json, hash_text, read_json, versions, write_json
from abliterate.writers.tensor_slices import Ranges

CONFIG = "config.json"


@dataclass(frozen=True)
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
    added: tuple[EditedTensor, ...]


@dataclass(frozen=True)
class _Job:
    """All that is known before the first byte is written.

    Attributes:
        source: the checkpoint.
        direction: what to remove.
        options: as the user gave them.
        plan: of the whole edit, before the options.
        edits: what the options leave of it, or the addition.
        untied: names of the tensors that keep the original matrix of an embedding that is untied.
        layouts: the shards to write, by name.
        work: the edits and how to compute them.
        documents: JSON files that change, by name.
        carried: files that come along.
        stamps: how every file of the source stood.
    """

    source: Checkpoint
    direction: Direction
    options: EditOptions
    plan: EditPlan
    edits: Sequence[TensorEdit]
    added: Sequence[EditedTensor]
    untied: tuple[str, ...]
    layouts: Mapping[str, ShardLayout]
    work: EditContext
    documents: Mapping[str, Any]
    carried: AuxiliaryFiles
    stamps: Mapping[Path, FileStamp]

    def inputs(self) -> str:
        """A hash of all that the result depends on."""
        edits = [
            [e.name, e.axis, e.kind, e.layer, e.region, hash_text(repr(e.basis.tolist()))]
            for e in self.edits
        ]
        return hash_json(
            {
                "source": [self.source.name, str(self.source.folder.resolve())],
                "files": {str(path): asdict(stamp) for path, stamp in self.stamps.items()},
                "headers": {
                    name: hash_text(str(layout.header), str(layout.tensors))
                    for name, layout in self.layouts.items()
                },
                "direction": [self.direction.summary(), self.direction.vector.tolist()],
                "edits": edits,
                "options": self.options.summary(),
                "documents": self.documents,
                "versions": versions(),
            }
        )


def orthogonalize(
    model: Checkpoint | str,
    direction: Direction | Tensor,
    out: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    options: EditOptions | None = None,
    allow_leak: float | None = None,
    low_disk: bool = False,
) -> list[EditedTensor]:
    """Write a copy of ``model`` that cannot write along ``direction``.

    Killed or stopped at any moment, the same call goes on where the last one ended.

    Args:
        model: the source checkpoint, a folder or a hub id; read block by block.
        direction: what to remove.
        out: the folder to make; until it is complete it grows in ``<out>.partial``.
        overwrite: replace ``out`` if it exists.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        options: which tensors to edit, how much, and with what; None for the paper's edit.
        allow_leak: accept an architecture that no edit makes exact, if no more than this share of
            the stream remains along the direction.
        low_disk: fetch the shards of a hub id one by one and drop each once it is edited.

    Returns:
        What was edited, in the order of the plan.

    Raises:
        CheckpointError: the source cannot be edited, or the disk fails or is full.
        DiskSpaceError: the disk has too little room.
        FetchError: the hub does not give a shard.
        InputError: the direction does not fit, or another process is writing ``out``.
        InterruptedWorkError: Ctrl-C.
        UsageError: ``out`` exists, is not ours to replace or lies inside the source, or the options
            contradict the model.
    """
    out, options = Path(out), options or EditOptions()
    if isinstance(model, str):
        model = find_checkpoint(model, leave_shards=low_disk)
    if isinstance(direction, Tensor):
        direction = Direction(direction)
    if model.remote is not None:
        _check_low_disk(options)
    ranks, source = join_ranks(), model
    with ExitStack() as held:  # by the first rank, for all
        ranks.run_on_main(lambda: _claim(held, source.folder, out, overwrite))
        job = _prepare(source, direction, options, trust_remote_code, allow_leak)
        workspace = _open(job, out, overwrite, ranks)
        return _finish_or_keep(job, workspace, overwrite, ranks)


def _claim(held: ExitStack, source: Path, out: Path, overwrite: bool) -> None:
    """Take ``out`` for this process, if it can be made or gone on with.

    Raises:
        CheckpointError: what lies in its place is not ours.
        InputError: another process is at it.
        UsageError: it is there already, or overlaps the source.
    """
    check_target(source, out)
    if not is_begun(out):
        check_absent(out, overwrite)
    try:
        held.enter_context(hold_workspace(out))
    except OSError as error:
        raise CheckpointError(_cannot(out, error)) from None
    if not is_begun(out):  # another process may have made it just now
        check_absent(out, overwrite)


def _cannot(out: Path, error: OSError) -> str:
    return f"{error.filename or out} cannot be written: {error.strerror or error}"


def _finish_or_keep(
    job: _Job, workspace: Workspace, overwrite: bool, ranks: RankGroup
) -> list[EditedTensor]:
    """Carry it out; what is finished when something goes wrong is kept, and the error says so."""
    try:
        return _carry_out(job, workspace, overwrite, ranks)
    except KeyboardInterrupt:
        raise InterruptedWorkError(f"interrupted; {_kept(workspace)}") from None
    except OSError as error:
        what = error.strerror or str(error)
        where = workspace.out if error.filename is None else error.filename
        raise CheckpointError(f"{where}: {what}; {_kept(workspace)}") from None
    except DiskSpaceError as error:
        if not workspace.finished:
            workspace.discard()
            raise
        raise DiskSpaceError(f"{error}; {_kept(workspace)}") from None
    except FetchError as error:
        raise FetchError(f"{error}; {_kept(workspace)}") from None
    except RankError:
        raise
    except CheckpointError:  # of the source: going on would end the same way
        if ranks.is_main:
            workspace.discard()
        raise
    finally:
        workspace.close()


def _check_low_disk(options: EditOptions) -> None:
    if options.as_lora:
        raise UsageError("--low-disk writes a checkpoint: not with --as-lora")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--low-disk fetches one shard at a time: run it in one process")


def _open(job: _Job, out: Path, overwrite: bool, ranks: RankGroup) -> Workspace:
    """Begin the work or take it up; only one of a team does, the others join it."""
    opened: list[Workspace] = []

    def begin() -> tuple[dict[str, dict[int, DirectionEnergy]], bool]:
        inputs = job.inputs()
        if not is_published(out, inputs):
            check_absent(out, overwrite)
        try:
            opened.append(open_workspace(out, inputs))
        except OSError as error:
            raise CheckpointError(_cannot(out, error)) from None
        return opened[0].finished, opened[0].published

    finished, published = ranks.run_on_main(begin)
    return opened[0] if opened else join_workspace(out, ranks.rank, finished, published)


def _kept(workspace: Workspace) -> str:
    done = len(workspace.finished)
    return (
        f"{done} finished shard{'' if done == 1 else 's'} kept in {workspace.folder}: run the same "
        "command again to go on from there"
    )


def _prepare(
    source: Checkpoint,
    direction: Direction,
    options: EditOptions,
    trust_remote_code: bool,
    allow_leak: float | None,
) -> _Job:
    own = [source.folder / name for name in (CONFIG, INDEX)]
    stamps = {path: FileStamp.of(path.stat()) for path in own if path.is_file()}
    device = pick_device(options.device)
    planned = plan_edit(source, direction, options, trust_remote_code, allow_leak)
    full, plan, quantized, changes = planned.full, planned.plan, planned.quantized, planned.changes
    documents: dict[str, Any] = {} if planned.config is None else {CONFIG: planned.config}
    index = new_index(plan.shards, changes)
    if index is not None:
        documents[INDEX] = index
    shards = plan.shards.shards
    layouts = {name: lay_out(shard, changes) for name, shard in shards.items()}
    carried = find_auxiliary_files(source.folder, shards, (RECORD, CARD, *documents))
    if options.as_lora:
        if full.tied and options.tied_embeddings == "share":
            raise UsageError("--as-lora leaves the output head alone: not --tied-embeddings share")
        check_targets(plan.edits, plan.shards)
        layouts, documents, carried = {}, {}, AuxiliaryFiles({}, ())
        plan = replace(plan, copies={})
    if source.remote is None:  # else the commit says it all
        stamps |= {shard.path: shard.stamp for shard in shards.values()}
    stamps |= {source.folder / path: stamp for path, stamp in carried.files.items()}
    recipe = EditStrength(options.scale, options.norm_preserve)
    jobs = options.jobs or usable_cores()
    work = EditContext(plan.edits, recipe, quantized, device, jobs)
    edited = {edit.name for edit in plan.edits}
    untied = tuple(sorted(held if new in edited else new for new, held in plan.copies.items()))
    return _Job(
        source, direction, options, full, plan.edits, planned.added, untied, layouts, work,
        documents, carried, stamps,
    )  # fmt: skip


def plan_edit(
    source: Checkpoint,
    direction: Direction,
    options: EditOptions,
    trust_remote_code: bool = False,
    allow_leak: float | None = None,
) -> PlannedEdit:
    """All that an edit with these options changes; raises as :func:`orthogonalize` does."""
    config = read_config(source.folder)
    check_method(source.folder, config)
    full = make_plan(source, direction.vector, trust_remote_code, allow_leak)
    quantized = find_quantized(full.shards, config)
    full = replace(full, edits=resolve_edits(full.edits, full.shards, quantized))
    plan = apply_options(full, options)
    added: tuple[EditedTensor, ...] = ()
    if options.add is not None:
        addition = plan_addition(full, direction, options.add, config)
        entry = (addition.name, "mlp", addition.layer, 0, addition.before, addition.after)
        plan, added = replace(full, edits=(), copies={}), (EditedTensor(*entry),)
        changes, new_config = addition.changes, addition.config
        if not tied_matrices_agree(full):
            new_config = untie_document(new_config or config, full)
            new_config = None if new_config == config else new_config
    else:
        changes, new_config = plan_changes(plan, quantized, options.quantized, config)
    return PlannedEdit(full, plan, quantized, changes, new_config, added)


def _carry_out(
    job: _Job, workspace: Workspace, overwrite: bool, ranks: RankGroup
) -> list[EditedTensor]:
    if not workspace.published:
        failure: BaseException | None = None
        try:
            _write(job, workspace, ranks)
        except BaseException as error:
            failure = error
            raise
        finally:
            ranks.raise_if_any_failed(failure)
        if ranks.is_main:
            workspace.gather()
            _complete(job, workspace, overwrite)
    elif ranks.is_main:
        workspace.discard()
    ranks.broadcast(None)  # the others wait until OUT has its name
    ranks.leave()
    return _recorded(workspace.out)


def _write(job: _Job, workspace: Workspace, ranks: RankGroup) -> None:
    """This process's share of the shards."""
    unfinished = [layout for name, layout in job.layouts.items() if name not in workspace.finished]
    remote, steps, more = job.source.remote, list[Step](), 0
    if remote is not None:
        cached = [name for name in job.plan.shards.shards if remote.cached(name) is not None]
        steps, more = plan_steps(unfinished, job.work, remote.sizes, cached)
    if ranks.is_main:
        _check_space(job, workspace, more)
    if workspace.finished:
        log.info("going on from %d finished shards", len(workspace.finished))
    todo = ranks.split(unfinished)
    work = replace(job.work, jobs=max(1, job.work.jobs // ranks.on_this_machine))
    with progress_bar("orthogonalize", sum(layout.size for layout in todo), unit="B") as bar:
        if remote is not None:
            shards = job.plan.shards.shards
            write_from_hub(steps, work, workspace, remote, shards, bar.update)
        else:
            write_shards(todo, work, workspace.current, workspace.finish, bar.update)


def _complete(job: _Job, workspace: Workspace, overwrite: bool) -> None:
    """All that is not in the shards, and the name."""
    if job.carried.left_behind:
        left = ", ".join(job.carried.left_behind)
        log.warning("weights in other files and adapters are left behind: %s", left)
    copy_auxiliary_files(job.source.folder, job.carried, workspace.files)
    for name, document in job.documents.items():
        write_json(workspace.files / name, document)
    if job.options.as_lora:
        shards, scale = job.plan.shards, job.options.scale
        sums = write_adapter(workspace.files, job.edits, shards, scale, job.source.name)
        edited = [_measured(edit, part) for edit, part in zip(job.edits, sums, strict=True)]
    else:
        edited = _edited(job, workspace)
    promised = promise(job.plan, job.edits, job.options)
    record = {
        "source": job.source.identity(),
        "direction": job.direction.summary(),
        "vector": _unit_list(job.direction.vector),
        "options": job.options.summary(),
        "promise": promised,
        "untied": list(job.untied),
        "untouched": list(job.plan.untouched),
        "leak_of_plan": job.plan.leak,
        "tensors": [asdict(tensor) for tensor in edited],
        "files": file_list(workspace.files, RECORD, CARD),
        "versions": versions(),
    }
    write_json(workspace.files / RECORD, record)
    write_model_card(
        workspace.files / CARD,
        job.source,
        job.direction,
        edited,
        promised["limits"],
        job.options.as_lora,
        job.options.add,
    )
    check_unchanged(job.stamps)
    workspace.publish(overwrite)


def _unit_list(vector: Tensor) -> list[float]:
    """The unit direction, so that the record can be checked against the weights by itself."""
    wide = vector.detach().cpu().double()
    return [float(value) for value in wide / wide.norm()]


def _check_space(job: _Job, workspace: Workspace, more: int) -> None:
    """All that OUT will hold, and more for a while; record and card are known to within this."""
    report = (64 << 10) + 1024 * len(job.edits) + 32 * job.direction.vector.numel()
    sizes = [layout.size for layout in job.layouts.values()]
    sizes += [stamp.size for stamp in job.carried.files.values()]
    sizes += [len(json.dumps(document, indent=2)) for document in job.documents.values()]
    there = [workspace.files / name for name in workspace.finished]
    there += [path for path in workspace.fetched.glob("*.safetensors") if path.is_file()]
    present = sum(path.stat().st_blocks * 512 for path in there)
    check_space(workspace.out, [*sizes, report, more], present)


def _edited(job: _Job, workspace: Workspace) -> list[EditedTensor]:
    sums: dict[int, DirectionEnergy] = {}
    for of_shard in workspace.finished.values():
        sums |= of_shard
    return [
        *job.added,
        *(_measured(e, sums.get(i, DirectionEnergy())) for i, e in enumerate(job.edits)),
    ]


def _measured(edit: TensorEdit, sums: DirectionEnergy) -> EditedTensor:
    energy = sums.energy or 1.0
    before, after = math.sqrt(sums.along_before / energy), math.sqrt(sums.along_after / energy)
    return EditedTensor(edit.name, edit.kind, edit.layer, edit.axis, before, after, edit.region)


def _recorded(out: Path) -> list[EditedTensor]:
    record = read_json(out / RECORD, "orthogonalize")
    return [
        EditedTensor(**{**entry, "region": _box(entry.get("region"))})
        for entry in record["tensors"]
    ]


def _box(region: Any) -> Ranges | None:
    return None if region is None else tuple((first, behind) for first, behind in region)
