"""verify: is an edited checkpoint clean, complete and otherwise its source? From the files alone.

A writer passes if what it still has along its own direction is no more than storing it in its dtype
leaves. Rounding moves each element by at most half a unit in the last place, so the share left of a
matrix ``W`` along ``u`` is a sum of independent errors of size ``eps/2 * |u_i W_ij|``: its
Frobenius norm stays below ``3/2 * eps * sqrt(sum u_i^2 W_ij^2)``. A writer that was skipped is
hundreds of times above that bound in bfloat16, and a hundred thousand times in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abliterate.checkpoints.quantized_formats import Quantized, find_quantized, read_config
from abliterate.checkpoints.safetensors_header import DTYPES, TensorEntry
from abliterate.checkpoints.shards import ShardSet, read_shards, same_bytes
from abliterate.console import progress
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.editing.edit_plan import TensorEdit, make_plan
from abliterate.editing.file_names import RECORD
from abliterate.editing.matrix_orthogonalization import EditStrength
from abliterate.editing.options import tied_matrices_agree
from abliterate.editing.shard_tasks import Files
from abliterate.editing.tensor_changes import resolve_edits
from abliterate.errors import CheckpointError
from abliterate.inference.in_memory import engine_of
from abliterate.models.loading import Checkpoint, LoadedModel
from abliterate.storage.artifacts import read_record
from abliterate.verification.declared_edit import (
    ExpectedTensor,
    check_files,
    declared_edit,
    plan_notes,
    tied_sentence,
)
from abliterate.verification.edit_check import WriterCheck, check_writer
from abliterate.verification.hook_distance import HookDistance
from abliterate.verification.stored_values import (
    Box,
    StoredValues,
    Transposed,
    cut,
    open_values,
    raw_box,
)

# The promise on the residual stream itself, by the dtype that the weights are stored in.
LEAK_BOUNDS = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-3, "BF16": 1e-3}
_COMPARED = 8 << 20  # elements of a tensor in parts


@dataclass(frozen=True)
class Verification:
    """The verdict on an edited checkpoint.

    Attributes:
        writers: every writer.
        changed: tensors other than edited ones that are not the source's, bit for bit, or have
            another dtype or shape than the edit gives them.
        missing: tensors that the edit leaves and that are gone.
        added: tensors that the edit does not add to the source's.
        leak: largest ``|h . r| / ||h||`` on prompts, or None if it was not measured.
        leak_bound: what it may be at most.
        limits: why the edit, by its own record, is less than the paper's (``--scale``, ...).
        files: what is wrong with the files beside the weights, a sentence each.
        notes: what could not be checked, and what the edit is not.
        by_layer: each writer was held against its own layer's direction.
        distance: of the logits of the edit and of ablation's hooks, or None if it was not measured.
    """

    writers: tuple[WriterCheck, ...]
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    leak: float | None = None
    leak_bound: float | None = None
    limits: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    by_layer: bool = False
    distance: HookDistance | None = None

    @property
    def passed(self) -> bool:
        """Whether every check that was made holds.

        Compared with its source a checkpoint passes if it is the edit that its record declares;
        ``limits`` says in what that is less than the paper's. Without a source every writer has to
        be clean, whatever a record says.
        """
        streams = self.leak is None or self.leak_bound is None or self.leak <= self.leak_bound
        same = not (self.changed or self.missing or self.added or self.files)
        return streams and same and not any(writer.fails for writer in self.writers)


def verify(
    edited: Checkpoint,
    direction: Direction | DirectionSet,
    source: Checkpoint | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Check an edited checkpoint from its files, in constant memory.

    Args:
        edited: the checkpoint.
        direction: what it should not be able to write along; of a set, no block along its own.
        source: what it was made from: every edited tensor must be the source's less the direction,
            by the options that the checkpoint's record names, and all else the source's bytes.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.

    Raises:
        CheckpointError: a checkpoint is damaged.
        InputError: the direction does not fit, or the record is damaged.
        UnsupportedArchitectureError: the writers cannot be found.
    """
    if source is not None:
        return _against_source(edited, direction, source, trust_remote_code)
    # What remains on an architecture that cannot be made exact is for the stream to show.
    plan = make_plan(edited, _along(direction), trust_remote_code, allow_leak=math.inf)
    quantized = find_quantized(plan.shards, read_config(edited.folder))
    edits = resolve_edits(plan.edits, plan.shards, quantized)
    with ExitStack() as stack:
        files = Files(stack, {})
        checks = tuple(
            check_writer(edit, _values(edit.source, plan.shards, quantized, files))
            for edit in progress(edits, "verify: writers", total=len(edits))
        )
    for check, edit in zip(checks, edits, strict=True):
        if check.problem:
            entry = plan.shards.tensors[edit.source]
            raise CheckpointError(f"tensor '{entry.name}' in {entry.file} {check.problem}")
    wrong = [
        tied_sentence(edit.source, head.name)
        for edit in plan.edits
        for head in plan.heads
        if edit.name in plan.tied and not tied_matrices_agree(plan)
    ]
    return Verification(
        checks,
        limits=_declared_limits(edited),
        files=tuple(wrong),
        notes=tuple(plan_notes(plan)),
        by_layer=plan.directions is not None,
    )


def _along(direction: Direction | DirectionSet) -> Tensor | DirectionSet:
    return direction if isinstance(direction, DirectionSet) else direction.vector


def _values(
    name: str, shards: ShardSet, quantized: Mapping[str, Quantized], files: Files
) -> StoredValues:
    return open_values(shards.tensors[name], quantized.get(name), files)


def _declared_limits(edited: Checkpoint) -> tuple[str, ...]:
    """What the checkpoint's own record says it does not promise; it changes no verdict."""
    record = edited.folder / RECORD
    if not record.is_file():
        return ()
    promise = read_record(record, "orthogonalize").get("promise")
    limits = promise.get("limits") if isinstance(promise, dict) else None
    return tuple(map(str, limits)) if isinstance(limits, list) else ()


def _against_source(
    edited: Checkpoint,
    direction: Direction | DirectionSet,
    source: Checkpoint,
    trust_remote_code: bool,
) -> Verification:
    shards = read_shards(edited.folder)
    declared = declared_edit(edited, shards, source, direction, trust_remote_code)
    quantized = find_quantized(shards, read_config(edited.folder))
    recipe = EditStrength(declared.options.scale, declared.options.keep_norms)
    checks, changed = list[WriterCheck](), list[str]()
    present = [t for name, t in declared.tensors.items() if name in shards.tensors]
    with ExitStack() as stack:
        files = Files(stack, {})
        for expected in progress(present, "verify: tensors", total=len(present)):
            mine = shards.tensors[expected.name]
            if (mine.dtype, mine.shape) != (expected.dtype, expected.shape):
                changed.append(expected.name)
            elif expected.edits or expected.dense:
                held = _values(expected.name, shards, quantized, files)
                for check in _computed(expected, held, files, recipe):
                    if expected.edits:
                        checks.append(check)
                    elif check.problem:
                        changed.append(expected.name)
                boxes = [edit.region for edit in expected.edits if edit.region is not None]
                if boxes and not _same_outside(expected, mine, boxes, files):
                    changed.append(expected.name)
            elif expected.content is not None:
                if not _same_constant(mine, expected.content, files):
                    changed.append(expected.name)
            elif expected.origin is not None and not same_bytes(expected.origin, mine):
                changed.append(expected.name)
    scales = {q.scales.name for q in declared.planned.quantized.values()}
    scales &= {q.scales.name for q in quantized.values()}
    return Verification(
        tuple(checks),
        tuple(sorted(changed)),
        tuple(sorted(declared.tensors.keys() - shards.tensors.keys())),
        tuple(sorted(shards.tensors.keys() - declared.tensors.keys() - scales)),
        limits=declared.limits,
        files=(*declared.conflicts, *check_files(edited, source, declared, shards)),
        notes=declared.notes,
        by_layer=declared.planned.full.directions is not None,
    )


def _computed(
    expected: ExpectedTensor, edited: StoredValues, files: Files, recipe: EditStrength
) -> Iterator[WriterCheck]:
    """Each edit of a tensor, or the one of none that makes it a plain tensor."""
    assert expected.origin is not None
    source = open_values(expected.origin, expected.stored, files)
    if expected.dense and expected.stored is not None and expected.stored.scheme == "mxfp4":
        edited = Transposed(edited)  # the model has these experts the other way round
    axis = max(0, len(source.shape) - 2)
    nothing = TensorEdit(
        expected.name, axis, torch.zeros(0, source.shape[axis]).double(), "other", None
    )
    for edit in expected.edits or (nothing,):
        own = recipe.times(edit.weight)
        yield replace(check_writer(edit, edited, source, own), name=expected.name)


def _same_outside(
    expected: ExpectedTensor, mine: TensorEntry, boxes: Sequence[Box], files: Files
) -> bool:
    """Whether a tensor of which boxes are edited has the source's bytes everywhere else."""
    assert expected.origin is not None
    whole = tuple((0, size) for size in mine.shape)
    for part in cut(whole, None, (1,) * len(whole), _COMPARED):
        left, right = (raw_box(entry, files, part) for entry in (mine, expected.origin))
        for box in boxes:
            inner = tuple(
                slice(max(0, a - start), max(0, b - start))
                for (a, b), (start, _) in zip(box, part, strict=False)
            )
            left[inner] = right[inner]
        if not torch.equal(left, right):
            return False
    return True


def _same_constant(mine: TensorEntry, content: bytes, files: Files) -> bool:
    """Whether a bias is what was computed, to the last place."""
    whole = tuple((0, size) for size in mine.shape)
    kind = DTYPES[mine.dtype]
    stored = raw_box(mine, files, whole).view(kind).double().reshape(-1)
    expected = torch.frombuffer(bytearray(content), dtype=kind).double()
    allowed = expected.abs() * torch.finfo(kind).eps + torch.finfo(kind).tiny
    return bool(((stored - expected).abs() <= allowed).all())


def measure_leak(
    loaded: LoadedModel, direction: Direction | DirectionSet, prompts: Sequence[Sequence[int]]
) -> float:
    """Largest ``|h[l, t] . r| / ||h[l, t]||`` over block boundaries, prompts and tokens.

    Args:
        loaded: the edited model, best in float32.
        direction: what the stream should be orthogonal to; of a set, what each layer adds to it to
            that layer's own.
        prompts: token ids.

    Raises:
        CheckpointError: the embedding has no row for a token.
    """
    return engine_of(loaded).leak(_along(direction), prompts)


def leak_bound(plan_shards: ShardSet) -> float:
    """The promise for a checkpoint stored in these dtypes: 1e-5 in float32, 1e-3 in half."""
    used = {entry.dtype for entry in plan_shards.tensors.values()}
    return max((LEAK_BOUNDS[dtype] for dtype in used if dtype in LEAK_BOUNDS), default=1e-5)
