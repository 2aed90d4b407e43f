"""orthogonalize: bake the ablation into a checkpoint's weights (paper, section 2.4, equation 5).

Every matrix that writes to the residual stream gets ``W <- W - r r^T W``; all other bytes are
copied. The result appears complete under its name or not at all; until then it grows in
``OUT.partial``, from where the same command goes on after a kill.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from abliterate.checkpoints.checkpoint import Checkpoint, find_checkpoint
from abliterate.console import log, progress_bar
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.distributed.rank_group import RankGroup, join_ranks
from abliterate.editing.auxiliary_files import (
    check_space,
    check_target,
    check_unchanged,
    copy_auxiliary_files,
)
from abliterate.editing.edit_record import edit_record, edited_tensors, recorded_tensors
from abliterate.editing.edited_tensor import EditedTensor
from abliterate.editing.file_names import CARD, RECORD
from abliterate.editing.lora import write_adapter
from abliterate.editing.low_disk import Step, plan_steps, write_from_hub
from abliterate.editing.matrix_orthogonalization import DirectionEnergy
from abliterate.editing.model_card import write_model_card
from abliterate.editing.options import EditOptions
from abliterate.editing.output_plan import OutputPlan, plan_output
from abliterate.editing.shard_writer import write_shards
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
from abliterate.storage.artifacts import write_json
from abliterate.storage.system_calls import bytes_on_disk

# Of the record and the card: a table entry for each edit, digits of two vectors, and the text.
_ENTRY_BYTES, _NUMBER_BYTES, _TEXT_BYTES = 1024, 64, 64 << 10


def orthogonalize(
    model: Checkpoint | str,
    direction: Direction | DirectionSet | Tensor,
    out: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    options: EditOptions | None = None,
    allow_leak: float | None = None,
    low_disk: bool = False,
    repeated: bool = False,
) -> list[EditedTensor]:
    """Write a copy of ``model`` that cannot write along ``direction``.

    Killed or stopped at any moment, the same call goes on where the last one ended.

    Args:
        model: the source checkpoint, a folder or a hub id; read block by block.
        direction: what to remove: one direction, or one for each block (a set, or a tensor
            ``[n_layers, d_model]``).
        out: the folder to make; until it is complete it grows in ``<out>.partial``.
        overwrite: replace ``out`` if it exists.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        options: which tensors to edit, how much, and with what; None for the paper's edit.
        allow_leak: accept an architecture that no edit makes exact, if no more than this share of
            the stream remains along the direction.
        low_disk: fetch the shards of a hub id one by one and drop each once it is edited.
        repeated: the options are a record's, and may hold some that do nothing.

    Returns:
        What was edited, in the order of the plan.

    Raises:
        CheckpointError: the source cannot be edited, or the disk fails or is full.
        DiskSpaceError: the disk has too little room.
        FetchError: the hub does not give a shard.
        InputError: the direction does not fit, or another process is writing ``out``.
        InterruptedWorkError: Ctrl-C.
        UsageError: ``out`` exists, is not ours to replace or lies inside a checkpoint, or the
            options contradict the model, or one has no effect on it.
    """
    out, options = Path(out), options or EditOptions()
    if isinstance(model, str):
        model = find_checkpoint(model, leave_shards=low_disk, need="copy")
    if isinstance(direction, Tensor):
        direction = DirectionSet(direction) if direction.ndim == 2 else Direction(direction)
    if model.remote is not None:
        _check_low_disk(options)
    ranks, source = join_ranks(), model
    with ExitStack() as held:  # by the first rank, for all
        ranks.run_on_main(lambda: _claim(held, source.folder, out, overwrite))
        plan = plan_output(source, direction, options, trust_remote_code, allow_leak, repeated)
        workspace = _open(plan, out, overwrite, ranks)
        with _keeping_what_is_finished(workspace, ranks):
            write_checkpoint(plan, workspace, ranks)
            publish(plan, workspace, overwrite, ranks)
            return recorded_tensors(out)


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


@contextmanager
def _keeping_what_is_finished(workspace: Workspace, ranks: RankGroup) -> Iterator[None]:
    """When something goes wrong within, finished shards are kept, and the error says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedWorkError(f"interrupted; {_kept(workspace)}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        path = workspace.out if error.filename is None else error.filename
        raise CheckpointError(f"{path}: {reason}; {_kept(workspace)}") from None
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


def _kept(workspace: Workspace) -> str:
    done = len(workspace.finished)
    return (
        f"{done} finished shard{'' if done == 1 else 's'} kept in {workspace.folder}: run the same "
        "command again to go on from there"
    )


def _check_low_disk(options: EditOptions) -> None:
    if options.as_lora:
        raise UsageError("--low-disk writes a checkpoint: not with --as-lora")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--low-disk fetches one shard at a time: run it in one process")


def _open(plan: OutputPlan, out: Path, overwrite: bool, ranks: RankGroup) -> Workspace:
    """Begin the work or take it up; only one of the ranks does, the others join it."""
    opened: list[Workspace] = []

    def begin() -> tuple[dict[str, dict[int, DirectionEnergy]], bool]:
        inputs = plan.inputs()
        if not is_published(out, inputs):
            check_absent(out, overwrite)
        try:
            opened.append(open_workspace(out, inputs))
        except OSError as error:
            raise CheckpointError(_cannot(out, error)) from None
        return opened[0].finished, opened[0].published

    finished, published = ranks.run_on_main(begin)
    return opened[0] if opened else join_workspace(out, ranks.rank, finished, published)


def write_checkpoint(plan: OutputPlan, workspace: Workspace, ranks: RankGroup) -> None:
    """This process's share of the shards, unless OUT has its name already.

    Raises:
        CheckpointError: the source cannot be edited.
        DiskSpaceError: the disk has too little room.
        FetchError: the hub does not give a shard.
        OSError: a file cannot be read or written.
        RankError: another process failed.
    """
    if workspace.published:
        return
    failure: BaseException | None = None
    try:
        _write_unfinished(plan, workspace, ranks)
    except BaseException as error:
        failure = error
        raise
    finally:
        ranks.raise_if_any_failed(failure)


def _write_unfinished(plan: OutputPlan, workspace: Workspace, ranks: RankGroup) -> None:
    unfinished = [layout for name, layout in plan.layouts.items() if name not in workspace.finished]
    remote, shards = plan.source.remote, plan.edit.plan.shards.shards
    steps, extra_bytes = list[Step](), 0
    if remote is not None:
        cached = [name for name in shards if remote.cached(name) is not None]
        steps, extra_bytes = plan_steps(unfinished, plan.context, remote.sizes, cached)
    if ranks.is_main:
        _check_space(plan, workspace, extra_bytes)
    if workspace.finished:
        log.info("going on from %d finished shards", len(workspace.finished))
    mine = ranks.split(unfinished)
    num_cores = max(1, plan.context.num_cores // ranks.on_this_machine)
    context = replace(plan.context, num_cores=num_cores)
    with progress_bar("orthogonalize", sum(layout.size for layout in mine), unit="B") as bar:
        if remote is not None:
            write_from_hub(steps, context, workspace, remote, shards, bar.update)
        else:
            write_shards(mine, context, workspace.current, workspace.finish, bar.update)


def _check_space(plan: OutputPlan, workspace: Workspace, extra_bytes: int) -> None:
    """All that OUT will hold, and ``extra_bytes`` for a while."""
    report = (
        _TEXT_BYTES
        + _ENTRY_BYTES * len(plan.edit.plan.edits)
        + _NUMBER_BYTES * _numbers(plan.direction)
    )
    there = [workspace.files / name for name in workspace.finished]
    there += [path for path in workspace.fetched.glob("*.safetensors") if path.is_file()]
    present = sum(bytes_on_disk(path) for path in there)
    check_space(workspace.out, [*plan.sizes, report, extra_bytes], present)


def _numbers(direction: Direction | DirectionSet) -> int:
    """How many the record holds."""
    held = direction.vectors if isinstance(direction, DirectionSet) else direction.vector
    return held.numel()


def publish(plan: OutputPlan, workspace: Workspace, overwrite: bool, ranks: RankGroup) -> None:
    """Complete the folder and give it its name; returns when it has it, on every rank.

    Raises:
        CheckpointError: the source changed meanwhile.
        OSError: a file cannot be written.
        RankError: another process failed.
        UsageError: a folder of that name came meanwhile, or something came into the old one.
    """
    if ranks.is_main and workspace.published:
        workspace.discard()
    elif ranks.is_main:
        workspace.gather()
        _write_other_files(plan, workspace)
        check_unchanged(plan.stamps)
        workspace.publish(overwrite)
    ranks.broadcast(None)  # the others wait until OUT has its name
    ranks.leave()


def _write_other_files(plan: OutputPlan, workspace: Workspace) -> None:
    """All that is not in the shards: auxiliary files, an adapter, record and card."""
    if plan.auxiliary.left_behind:
        why = {str(path): f" ({reason})" for path, reason in plan.beside.left.items()}
        names = ", ".join(f"{name}{why.get(name, '')}" for name in plan.auxiliary.left_behind)
        log.warning("weights in other files and adapters are left behind: %s", names)
    if plan.beside.kept:
        names = ", ".join(map(str, plan.beside.kept))
        log.warning(
            "kept as they are, since none of their tensors writes to the edited stream: %s "
            "(--leave-behind NAME leaves one out)",
            names,
        )
    copy_auxiliary_files(plan.source.folder, plan.auxiliary, workspace.files)
    for name, document in plan.documents.items():
        write_json(workspace.files / name, document)
    energies = _adapter(plan, workspace) if plan.options.as_lora else workspace.energies
    edited = edited_tensors(plan, energies)
    record = edit_record(plan, edited, workspace.files)
    write_json(workspace.files / RECORD, record)
    write_model_card(
        workspace.files / CARD,
        plan.source,
        plan.direction,
        edited,
        limits=record["promise"]["limits"],
        adapter=plan.options.as_lora,
        added=plan.options.add,
        directions=plan.edit.full.directions,
    )


def _adapter(plan: OutputPlan, workspace: Workspace) -> dict[int, DirectionEnergy]:
    """Write the adapter; what each edit measured, by its number."""
    edit = plan.edit.plan
    source = plan.source
    energies = write_adapter(
        workspace.files, edit.edits, edit.shards, plan.options.scale, source.name, source.revision
    )
    return dict(enumerate(energies))
