"""Editing and judging weights: in memory, and as checkpoints on disk."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, overload

from torch import Tensor

from abliterate.api.inputs import DirectionLike, as_checkpoint, as_direction, as_vector
from abliterate.api.language_model import LanguageModel, ModelLike, as_model
from abliterate.api.tables import to_frame, to_html
from abliterate.auditing import compare as comparing
from abliterate.auditing import report as judging
from abliterate.auditing.compare import Comparison
from abliterate.checkpoints.checkpoint import Checkpoint, find_checkpoint
from abliterate.direction import Direction
from abliterate.editing import orthogonalize as editing
from abliterate.editing.edited_tensor import EditedTensor
from abliterate.editing.file_names import RECORD
from abliterate.editing.in_memory import InMemoryEdit, orthogonalize_in_memory
from abliterate.editing.options import EditOptions
from abliterate.editing.writer_table import describe_loaded, describe_writers
from abliterate.errors import NeedsWeightsError
from abliterate.models.loading import pick_device
from abliterate.precision import linear_algebra_device
from abliterate.storage.artifacts import finite, read_record
from abliterate.verification import checks
from abliterate.verification.edit_check import WriterCheck


@dataclass(frozen=True, repr=False)
class OrthogonalizedModel:
    """A model whose weights were edited in memory.

    Within ``with`` the edit holds; at its end it is undone.

    Attributes:
        model: the model, edited.
        direction: what its weights cannot write along.
        tensors: every edited parameter, with its share along the direction before and after.
        leak: largest ``|h . r| / ||h||`` over block boundaries and tokens, after the edit.
        leak_before: the same before it.
        proven: the writers are proven complete on a small random copy of the architecture; else
            ``leak`` alone shows it, on the model itself.
    """

    model: LanguageModel
    direction: Direction
    tensors: tuple[EditedTensor, ...]
    leak: float
    leak_before: float
    proven: bool
    _undo: Callable[[], None]

    def restore(self) -> None:
        """Put every weight back, bit for bit; once they are back nothing happens."""
        self._undo()

    def to_dict(self) -> dict[str, Any]:
        """All of it but the model."""
        return {
            "direction": self.direction.summary(),
            "leak": self.leak,
            "leak_before": self.leak_before,
            "proven": self.proven,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    def to_pandas(self) -> Any:
        """A row for each edited parameter."""
        return to_frame([asdict(tensor) for tensor in self.tensors])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return (
            f"OrthogonalizedModel({len(self.tensors)} parameters, leak {self.leak_before:.2g} -> "
            f"{self.leak:.1e})"
        )

    def _repr_html_(self) -> str:
        caption = f"leak {self.leak_before:.2g} before, {self.leak:.1e} after"
        return to_html(caption, [_tensor_row(tensor) for tensor in self.tensors])


def _tensor_row(tensor: EditedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "kind": tensor.kind,
        "layer": tensor.layer,
        "share_before": tensor.before,
        "share_after": tensor.after,
    }


def orthogonalize_(
    model: ModelLike, direction: DirectionLike, *, allow_leak: float | None = None
) -> OrthogonalizedModel:
    """Weight orthogonalization in memory: ``W <- W - r r^T W`` for every writer, in place.

    A tied output head keeps the original matrix: it reads the stream. The originals are kept in
    main memory until the result is dropped.

    Args:
        model: a model in memory, in a float dtype.
        direction: a direction or its vector ``[d_model]``.
        allow_leak: accept an architecture that no edit makes exact, if no more than this share of
            the stream remains along the direction.

    Returns:
        What was edited; ``.restore()`` undoes it.

    Raises:
        InputError: the direction does not fit.
        PlanError: more than rounding is left; nothing is changed then.
        UnsupportedArchitectureError: the writers cannot be found or made exact.
        UsageError: the model is streamed or quantised.

    Source:
        Section 2.4, equation 5.

    Examples:
        >>> edited = ab.orthogonalize_(lm, d)
        >>> edited.leak < 1e-5 < edited.leak_before
        True
        >>> edited.restore()
    """
    lm = as_model(model)
    with lm.engine.in_memory("orthogonalize_") as weights:
        edit: InMemoryEdit = orthogonalize_in_memory(weights, as_vector(direction), allow_leak)
    return OrthogonalizedModel(
        lm,
        as_direction(direction),
        edit.tensors,
        edit.leak,
        edit.leak_before,
        edit.proof is not None and edit.proof.exact,
        edit.restore,
    )


@dataclass(frozen=True, repr=False)
class EditedCheckpoint(Sequence[EditedTensor]):
    """A checkpoint that :func:`orthogonalize` wrote; a sequence of its edited tensors.

    Attributes:
        path: its folder.
        tensors: what was edited, in the order of the plan.
    """

    path: Path
    tensors: tuple[EditedTensor, ...]

    @overload
    def __getitem__(self, index: int) -> EditedTensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EditedTensor]: ...
    def __getitem__(self, index: int | slice) -> EditedTensor | Sequence[EditedTensor]:
        return self.tensors[index]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[EditedTensor]:
        return iter(self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """The record of the edit, as ``abliterate.json`` holds it."""
        return read_record(self.path / RECORD, "orthogonalize")

    def to_pandas(self) -> Any:
        """A row for each edited tensor."""
        return to_frame([asdict(tensor) for tensor in self.tensors])

    def __repr__(self) -> str:
        return f"EditedCheckpoint({str(self.path)!r}, {len(self.tensors)} tensors)"

    def _repr_html_(self) -> str:
        rows = [_tensor_row(tensor) for tensor in self.tensors]
        return to_html(f"{self.path}: {len(rows)} edited tensors", rows)


def orthogonalize(
    model: Checkpoint | str | Path,
    direction: DirectionLike,
    out: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    options: EditOptions | None = None,
    allow_leak: float | None = None,
    low_disk: bool = False,
) -> EditedCheckpoint:
    """Write a copy of a checkpoint that cannot write along a direction.

    Works on the files in constant memory. Killed or stopped at any moment, the same call goes on
    where the last one ended.

    Args:
        model: the source, a folder or a hub id.
        direction: a direction, its vector ``[d_model]``, or a file or run folder.
        out: the folder to make; until it is complete it grows in ``<out>.partial``.
        overwrite: replace ``out`` if it exists.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        options: which tensors to edit, how much, and with what; None for the paper's edit.
        allow_leak: accept an architecture that no edit makes exact, if no more than this share of
            the stream remains along the direction.
        low_disk: fetch the shards of a hub id one by one and drop each once it is edited.

    Returns:
        The checkpoint and its edited tensors.

    Raises:
        CheckpointError: the source cannot be edited, or the disk fails or is full.
        InputError: the direction does not fit, or another process is writing ``out``.
        UsageError: ``out`` exists, is not ours to replace or lies inside the source, or the
            options contradict the model.

    Source:
        Section 2.4, equation 5.

    Examples:
        >>> edit = ab.orthogonalize(M, d, tmp / "out")
        >>> max(tensor.after for tensor in edit) < 0.01
        True
    """
    source: Checkpoint | str = model if isinstance(model, Checkpoint) else str(model)
    tensors = editing.orthogonalize(
        source,
        as_direction(direction),
        out,
        overwrite,
        trust_remote_code,
        options,
        allow_leak,
        low_disk,
    )
    return EditedCheckpoint(Path(out), tuple(tensors))


@dataclass(frozen=True, repr=False)
class Verification:
    """The verdict on an edited checkpoint.

    Attributes:
        passed: every check that was made holds.
        writers: every writer, with its share along the direction and what rounding explains.
        changed: other tensors that are not the source's, bit for bit.
        missing: tensors that the edit leaves and that are gone.
        added: tensors that the edit does not add.
        limits: why the edit, by its own record, is less than the paper's.
        files: what is wrong with the files beside the weights, a sentence each.
        notes: what could not be checked.
    """

    passed: bool
    writers: tuple[WriterCheck, ...]
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    limits: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def to_pandas(self) -> Any:
        """A row for each writer."""
        return to_frame([asdict(writer) for writer in self.writers])

    def __repr__(self) -> str:
        dirty = sum(writer.fails for writer in self.writers)
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"Verification({verdict}: {len(self.writers) - dirty} of {len(self.writers)} writers)"
        )

    def _repr_html_(self) -> str:
        rows = [asdict(w) for w in sorted(self.writers, key=lambda w: (not w.fails, -w.residual))]
        return to_html(repr(self), rows)


def verify(
    edited: Checkpoint | str | Path,
    source: Checkpoint | str | Path | None = None,
    direction: DirectionLike | None = None,
    *,
    trust_remote_code: bool = False,
) -> Verification:
    """Prove from its files that a checkpoint cannot write along a direction.

    Args:
        edited: the checkpoint, a folder or a hub id.
        source: what it was made from: every edited tensor must be the source's less the direction,
            by the checkpoint's own record, and all else the source's bytes.
        direction: a direction, its vector ``[d_model]``, or a file or run folder; None for the one
            that the checkpoint's record holds.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.

    Returns:
        The verdict, which is true if every check holds.

    Raises:
        CheckpointError: a checkpoint is damaged.
        InputError: the direction does not fit, or there is none.
        UnsupportedArchitectureError: the writers cannot be found.

    Source:
        Section 2.4, equation 5.

    Examples:
        >>> ab.verify(tmp / "out", source=M, direction=d).passed
        True
    """
    checkpoint = as_checkpoint(edited)
    along = as_direction(checkpoint.folder / RECORD if direction is None else direction)
    base = None if source is None else as_checkpoint(source)
    found = checks.verify(checkpoint, along, base, trust_remote_code)
    return Verification(
        found.passed,
        found.writers,
        found.changed,
        found.missing,
        found.added,
        found.limits,
        found.files,
        found.notes,
    )


@dataclass(frozen=True, repr=False)
class Audit:
    """Whether a checkpoint was abliterated, and along what.

    Attributes:
        verdict: ``clean``, ``edited`` or ``undecided``.
        why: in one sentence.
        direction: float64 unit ``[d_model]`` that was removed, or None.
        removed: share of it that is gone (1: all); None if not edited.
        warnings: claims that the weights do not bear out, and the like.
        units: what each writer lost.
        document: all evidence, as ``abliterate audit --json`` prints it.
    """

    verdict: str
    why: str
    direction: Tensor | None
    removed: float | None
    warnings: tuple[str, ...]
    units: tuple[dict[str, Any], ...]
    document: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All evidence but the direction's values."""
        return dict(self.document)

    def to_pandas(self) -> Any:
        """A row for each unit of writers; empty if not edited."""
        return to_frame(self.units)

    def __repr__(self) -> str:
        return f"Audit({self.verdict}: {self.why})"

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(self.verdict)}</b>: {html.escape(self.why)}"


def audit(
    checkpoint: Checkpoint | str | Path,
    base: Checkpoint | str | Path | None = None,
    direction: DirectionLike | None = None,
    *,
    device: str = "cpu",
) -> Audit:
    """Tell from its files whether a checkpoint was abliterated, and along what.

    Args:
        checkpoint: a folder or a hub id; nothing of it is executed.
        base: what it is said to be made from; then tensors are compared.
        direction: the direction that its record is said to mean.
        device: where to compute.

    Returns:
        The verdict and all evidence.

    Raises:
        CheckpointError: a checkpoint is damaged or in a format that cannot be read.
        InputError: the record or the direction cannot be used.
        UnsupportedArchitectureError: the writers cannot be found.

    Source:
        Looks for the trace of equation 5 (section 2.4).

    Examples:
        >>> ab.audit(tmp / "out", base=M).verdict
        'edited'
    """
    place = linear_algebra_device(pick_device(device))
    known = None if direction is None else as_direction(direction)
    other = None if base is None else as_checkpoint(base)
    found = judging.audit(as_checkpoint(checkpoint), other, known, place)
    document: dict[str, Any] = finite(found.document())
    return Audit(
        found.verdict,
        found.sentence,
        found.direction,
        found.removed,
        found.warnings,
        tuple(document["units"]),
        document,
    )


@dataclass(frozen=True, repr=False)
class Diff:
    """Two checkpoints of one architecture, tensor by tensor.

    Attributes:
        comparison: every tensor, and what the projections have in common.
    """

    comparison: Comparison

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that differ."""
        return tuple(t.name for t in self.comparison.tensors if t.state != "unchanged")

    @property
    def direction(self) -> Tensor | None:
        """Float64 unit ``[d_model]`` that the changed tensors lost; or None."""
        return self.comparison.direction

    def to_dict(self) -> dict[str, Any]:
        """All of it but the direction's values."""
        found: dict[str, Any] = finite(judging.comparison_document(self.comparison))
        return found

    def to_pandas(self) -> Any:
        """A row for each tensor."""
        return to_frame([asdict(tensor) for tensor in self.comparison.tensors])

    def __repr__(self) -> str:
        return f"Diff({len(self.changed)} of {len(self.comparison.tensors)} tensors differ)"

    def _repr_html_(self) -> str:
        rows = [
            {"name": t.name, "difference": t.state, "size": t.change, "scale": t.scale}
            for t in self.comparison.tensors
            if t.state != "unchanged"
        ]
        return to_html(repr(self), rows)


def diff(a: Checkpoint | str | Path, b: Checkpoint | str | Path) -> Diff:
    """Compare two checkpoints tensor by tensor: unchanged, rank 1, low rank or dense.

    Args:
        a: a folder or a hub id.
        b: another of its architecture.

    Returns:
        What differs, and what the differences have in common.

    Raises:
        CheckpointError: one is damaged, or they have no tensor in common.
        UnsupportedArchitectureError: the writers of ``a`` cannot be found.

    Source:
        Looks for the trace of equation 5 (section 2.4).

    Examples:
        >>> len(ab.diff(M, tmp / "out").changed)
        17
    """
    return Diff(comparing.compare(as_checkpoint(a), as_checkpoint(b)))


@dataclass(frozen=True, repr=False)
class WriterTable:
    """Every parameter that writes to the residual stream.

    Attributes:
        model_type: the architecture.
        d_model: width of the stream.
        exact: an edit of these leaves nothing along a direction.
        reason: why not, else empty.
        leak: what a proof on a shrunken random copy has left, as a share of the stream.
        writers: a row each: parameter, layer, kind, shape, axis, direction and tensors on disk.
        untouched: tensors on disk that are no part of the language model.
    """

    model_type: str
    d_model: int
    exact: bool
    reason: str
    leak: float
    writers: tuple[dict[str, Any], ...]
    untouched: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.writers)

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def to_pandas(self) -> Any:
        """A row for each writer."""
        return to_frame(self.writers)

    def __repr__(self) -> str:
        verdict = "exact" if self.exact else f"not exact: {self.reason}"
        return f"WriterTable({self.model_type}: {len(self)} writers, {verdict})"

    def _repr_html_(self) -> str:
        heads = ("layer", "kind", "parameter", "shape", "axis", "direction")
        return to_html(repr(self), [{key: row[key] for key in heads} for row in self.writers])


def writers(
    model: ModelLike | Checkpoint | str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> WriterTable:
    """What writes to the residual stream, with a proof that nothing is missing.

    Args:
        model: a folder or a hub id, of which configuration and headers alone are read; or a model.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.

    Returns:
        The writers and the proof.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        UnsupportedArchitectureError: the writers cannot be found.

    Source:
        Section 2.4: the matrices of equation 5.

    Examples:
        >>> table = ab.writers(M)
        >>> len(table), table.exact
        (17, True)
    """
    if isinstance(model, str | Path):
        checkpoint = find_checkpoint(str(model), revision, need="headers")
        try:
            document = describe_writers(checkpoint, trust_remote_code)
        except NeedsWeightsError:
            whole = find_checkpoint(str(model), revision)
            document = describe_writers(whole, trust_remote_code)
    elif isinstance(model, Checkpoint):
        document = describe_writers(model, trust_remote_code)
    else:
        document = describe_loaded(as_model(model).model)
    return WriterTable(
        document["model_type"],
        document["d_model"],
        document["exact"],
        document["reason"],
        document["leak"],
        tuple(document["writers"]),
        tuple(document["untouched"]),
    )
