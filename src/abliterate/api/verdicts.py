"""Judging checkpoints on disk by their files: verify, audit, diff."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.api.inputs import (
    DirectionLike,
    PromptsLike,
    as_checkpoint,
    as_direction,
    as_prompts,
    as_token_names,
)
from abliterate.auditing import compare as comparing
from abliterate.auditing import report as judging
from abliterate.auditing.activation_evidence import KINDS, gather
from abliterate.auditing.compare import Comparison
from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.editing.file_names import RECORD
from abliterate.errors import UsageError
from abliterate.models.loading import pick_device
from abliterate.precision import linear_algebra_device
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.sampling import load_prompts
from abliterate.result_tables import to_frame, to_html, to_json
from abliterate.storage.artifacts import finite
from abliterate.verification import checks
from abliterate.verification.edit_check import WriterCheck

_N_PROMPTS = 32  # of each kind that audit runs


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
        return to_json(asdict(self))

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
        subspace: all of several directions, float64 ``[k, d_model]`` with orthonormal rows; None if
            there is one, or each layer has its own.
    """

    verdict: str
    why: str
    direction: Tensor | None
    removed: float | None
    warnings: tuple[str, ...]
    units: tuple[dict[str, Any], ...]
    document: dict[str, Any] = field(repr=False)
    subspace: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """All evidence but the direction's values."""
        return to_json(self.document)

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
    prompts: bool | tuple[PromptsLike, PromptsLike] = False,
    refusal_tokens: Sequence[str | int] = (),
    chat: ChatFormat | None = None,
) -> Audit:
    """Tell from its files whether a checkpoint was abliterated, and along what.

    Args:
        checkpoint: a folder or a hub id; none of its code is executed.
        base: what it is said to be made from; then tensors are compared.
        direction: the direction that its record is said to mean.
        device: where to compute.
        prompts: also run the model (and the base) on harmful and harmless prompts: those of a pair
            ``(harmful, harmless)``, or for True 32 bundled test prompts of each kind. What it does
            is the document's ``activations``; the verdict rests on the weights alone.
        refusal_tokens: with ``prompts``, token strings, ids or presets; empty: those that the base
            shows, or the checkpoint.
        chat: with ``prompts``, how they become conversations; None for the template as it is.

    Returns:
        The verdict and all evidence.

    Raises:
        CheckpointError: a checkpoint is damaged, in a format that cannot be read, or cannot be run.
        InputError: the record, the direction or the prompts cannot be used.
        UnsupportedArchitectureError: the writers cannot be found.
        UsageError: an option goes with ``prompts``, a token is none, or the model does not fit.

    Source:
        Looks for the trace of equation 5 (section 2.4).

    Examples:
        >>> ab.audit(tmp / "out", base=M).verdict
        'edited'
    """
    place = linear_algebra_device(pick_device(device))
    known = None if direction is None else as_direction(direction)
    other = None if base is None else as_checkpoint(base)
    target = as_checkpoint(checkpoint)
    # What cannot be run is refused before the weights are read.
    texts = _texts(prompts, bool(refusal_tokens) or chat is not None)
    seen = None
    if texts is not None:
        names, runs_on = as_token_names(refusal_tokens), str(pick_device(device))
        seen = gather(target, other, texts, names, runs_on, chat)
    found = judging.audit(target, other, known, place)
    document: dict[str, Any] = finite(found.document())
    document["activations"] = None
    if seen is not None:
        along = None if known is None else known.vector
        document["activations"] = finite(seen.document(along, found.direction))
    return Audit(
        found.verdict,
        found.sentence,
        found.direction,
        found.removed,
        found.warnings,
        tuple(document["units"]),
        document,
        found.subspace,
    )


def _texts(
    prompts: bool | tuple[PromptsLike, PromptsLike], others: bool
) -> dict[str, list[str]] | None:
    """The prompts of each kind that a model is to be run on; None for none."""
    if prompts is False:
        if others:
            raise UsageError("refusal_tokens and chat go with prompts: give both, or neither")
        return None
    if prompts is True:
        return {kind: [p.text for p in load_prompts(kind, "test", _N_PROMPTS)] for kind in KINDS}
    if not isinstance(prompts, tuple | list) or len(prompts) != len(KINDS):
        raise UsageError("prompts must be True, or a pair (harmful, harmless) of lists or sources")
    return {
        kind: [p.text for p in as_prompts(some, kind, "test")]
        for kind, some in zip(KINDS, prompts, strict=True)
    }


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
        return to_json(found)

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
