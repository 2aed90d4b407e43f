"""verify: is an edited checkpoint clean, complete and otherwise its source? From the files alone.

A writer passes if what it still has along its own direction is no more than storing it in its dtype
leaves. Rounding moves each element by at most half a unit in the last place, so the share left of a
matrix ``W`` along ``u`` is a sum of independent errors of size ``eps/2 * |u_i W_ij|``: its
Frobenius norm stays below ``3/2 * eps * sqrt(sum u_i^2 W_ij^2)``. A writer that was skipped is
hundreds of times above that bound in bfloat16, and a hundred thousand times in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from abliterate.checkpoints.shards import DTYPES, ShardSet, TensorEntry, read_shards, same_bytes
from abliterate.console import progress
from abliterate.direction import Direction
from abliterate.editing.edit_plan import EditPlan, TensorEdit, make_plan
from abliterate.editing.orthogonalize import RECORD
from abliterate.errors import CheckpointError
from abliterate.models.loading import Checkpoint, Loaded, require_token
from abliterate.storage.artifacts import read_json
from abliterate.writers import find_writers
from abliterate.writers.residual_stream import leak

# What float32 arithmetic on float32 matrices may leave, relative to the same norm.
_FLOOR = 1e-5
# The promise on the residual stream itself, by the dtype that the weights are stored in.
LEAK_BOUNDS = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-3, "BF16": 1e-3}
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class WriterCheck:
    """One writer (or a part of one tensor) against its direction.

    Attributes:
        name: the tensor on disk.
        residual: ``|u^T W|_F / |W|_F``.
        bound: the largest value that rounding explains.
        clean: the residual is within the bound.
    """

    name: str
    residual: float
    bound: float
    clean: bool


@dataclass(frozen=True)
class Verification:
    """The verdict on an edited checkpoint.

    Attributes:
        writers: every writer.
        changed: tensors other than writers whose bytes differ from the source's.
        missing: tensors of the source that are gone.
        added: tensors that the source does not have, other than an untied copy with its bytes.
        leak: largest ``|h . r| / ||h||`` on prompts, or None if it was not measured.
        leak_bound: what it may be at most.
        limits: why the edit, by its own record, is less than the paper's (``--scale``, ...).
    """

    writers: tuple[WriterCheck, ...]
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    leak: float | None = None
    leak_bound: float | None = None
    limits: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check that was made holds."""
        streams = self.leak is None or self.leak_bound is None or self.leak <= self.leak_bound
        same = not (self.changed or self.missing or self.added)
        return streams and same and all(writer.clean for writer in self.writers)


def verify(
    edited: Checkpoint,
    direction: Direction,
    source: Checkpoint | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Check an edited checkpoint from its files, streaming.

    Args:
        edited: the checkpoint.
        direction: what it should not be able to write along.
        source: what it was made from: every tensor that is no writer must have the same bytes.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.

    Raises:
        CheckpointError: a checkpoint is damaged.
        InputError: the direction does not fit.
        UnsupportedArchitectureError: the writers cannot be found.
    """
    # What remains on an architecture that cannot be made exact is for the stream to show.
    plan = make_plan(edited, direction.vector, trust_remote_code, allow_leak=math.inf)
    checks = tuple(
        _check_writer(plan.shards.tensors[edit.name], edit)
        for edit in progress(plan.edits, "verify: writers", total=len(plan.edits))
    )
    limits = _declared_limits(edited)
    if source is None:
        return Verification(checks, limits=limits)
    return Verification(checks, *_compare(plan, read_shards(source.folder)), limits=limits)


def _declared_limits(edited: Checkpoint) -> tuple[str, ...]:
    """What the checkpoint's own record says it does not promise; it changes no verdict."""
    record = edited.folder / RECORD
    if not record.is_file():
        return ()
    promise = read_json(record, "orthogonalize").get("promise")
    return tuple(map(str, promise["limits"])) if isinstance(promise, dict) else ()


def _check_writer(entry: TensorEntry, edit: TensorEdit) -> WriterCheck:
    basis, energy, along, explained = edit.basis, 0.0, 0.0, 0.0
    # Rows of the first axis add up where that is d_model; elsewhere every block stands alone.
    sums = torch.zeros(len(basis), math.prod(entry.shape[1:]), dtype=torch.float64)
    for first, block in _blocks(entry, edit):
        wide = block.double()
        energy += float(wide.square().sum())
        if edit.axis == 0:
            rows = wide.flatten(1) if wide.ndim > 1 else wide.unsqueeze(1)
            here = basis[:, first : first + len(rows)]
            sums[:, : rows.shape[1]] += here @ rows
            explained += float((here.square() @ rows.square()).sum())
        else:
            columns = wide.movedim(edit.axis, -1)
            along += float((columns @ basis.T).square().sum())
            explained += float((columns.square() @ basis.square().T).sum())
    along += float(sums.square().sum())
    if not math.isfinite(energy):
        raise CheckpointError(f"tensor '{entry.name}' in {entry.file} holds NaN or infinity")
    eps = torch.finfo(DTYPES[entry.dtype]).eps
    bound = max(1.5 * eps, _FLOOR) * math.sqrt(explained)
    norm = math.sqrt(energy) or 1.0
    return WriterCheck(entry.name, math.sqrt(along) / norm, bound / norm, math.sqrt(along) <= bound)


def _blocks(entry: TensorEntry, edit: TensorEdit) -> Iterator[tuple[int, Tensor]]:
    """Slices of the tensor (or of the edit's region) along its first axis, with their first row.

    Read by the safetensors library, not by the editor's own reader, whose mistakes this would miss.
    """
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"writer '{entry.name}' is stored as {entry.dtype}, not as floats")
    region = edit.region or tuple((0, size) for size in entry.shape)
    first, behind = region[0]
    inner = tuple(slice(*ranges) for ranges in region[1:])
    row_bytes = (entry.end - entry.start) // max(entry.shape[0], 1)
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    with safe_open(entry.file, "pt") as file:
        lazy = file.get_slice(entry.name)
        for row in range(first, behind, step):
            yield row - first, lazy[row : min(row + step, behind)][(slice(None), *inner)]


def _compare(
    plan: EditPlan, source: ShardSet
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    edited = plan.shards.tensors
    writers = {edit.name for edit in plan.edits}
    others = [name for name in source.tensors if name in edited and name not in writers]
    changed = [
        name
        for name in progress(others, "verify: other tensors", total=len(others))
        if not same_bytes(source.tensors[name], edited[name])
    ]
    shape_changed = [
        name
        for name in writers & source.tensors.keys()
        if (source.tensors[name].shape, source.tensors[name].dtype)
        != (edited[name].shape, edited[name].dtype)
    ]
    missing = sorted(source.tensors.keys() - edited.keys())
    copies = {
        name
        for name in edited.keys() - source.tensors.keys()
        if any(same_bytes(candidate, edited[name]) for candidate in source.tensors.values())
    }
    added = sorted(edited.keys() - source.tensors.keys() - copies)
    return tuple(sorted(changed + shape_changed)), tuple(missing), tuple(added)


def measure_leak(loaded: Loaded, direction: Direction, prompts: Sequence[Sequence[int]]) -> float:
    """Largest ``|h[l, t] . r| / ||h[l, t]||`` over block boundaries, prompts and tokens.

    Args:
        loaded: the edited model, best in float32.
        direction: what the stream should be orthogonal to.
        prompts: token ids.

    Raises:
        CheckpointError: the embedding has no row for a token.
    """
    if loaded.stream is not None:
        from abliterate.offload.streamed_interventions import leak_of

        return leak_of(loaded.stream, direction.vector, prompts)
    blocks = find_writers(loaded.model).blocks
    for ids in prompts:
        require_token(loaded.model, max(ids, default=0), "the prompts")
    device = loaded.model.get_input_embeddings().weight.device
    return max(
        leak(loaded.model, direction.vector, torch.tensor([ids], device=device), blocks)
        for ids in progress(prompts, "verify: prompts", total=len(prompts))
    )


def leak_bound(plan_shards: ShardSet) -> float:
    """The promise for a checkpoint stored in these dtypes: 1e-5 in float32, 1e-3 in half."""
    used = {entry.dtype for entry in plan_shards.tensors.values()}
    return max((LEAK_BOUNDS[dtype] for dtype in used if dtype in LEAK_BOUNDS), default=1e-5)
