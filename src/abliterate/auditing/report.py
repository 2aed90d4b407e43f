"""audit: was a checkpoint abliterated, and along what? All evidence, and one verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from abliterate.auditing.compare import Comparison, compare
from abliterate.auditing.components import CheckpointWriters, open_checkpoint
from abliterate.auditing.edit_record import DeclaredEdit, read_declared_edit
from abliterate.auditing.edit_signature import Strength, biases_included, name_style, strengths
from abliterate.auditing.readers import open_readers
from abliterate.auditing.reference_free import CLAIM, CPU, Blind, look, look_at_readers
from abliterate.auditing.tensor_diff import TensorDiff
from abliterate.auditing.untied_output_head import HeadEvidence, head_evidence
from abliterate.auditing.verdict import Decision, Looked, control_of, decide, sentence_of
from abliterate.direction import Direction
from abliterate.models.loading import Checkpoint
from abliterate.storage.artifacts import versions

_FULL = 0.9  # a removed share that counts as all of it


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The verdict on a checkpoint and what it rests on.

    Attributes:
        verdict: ``clean``, ``edited`` or ``undecided``.
        evidence: what decided: ``base``, ``declared``, ``output head``, ``writers``, ``readers``
            or empty.
        reason: why undecided, else empty.
        direction: float64 unit ``[d_model]``, one of several, or None.
        subspace: all of several directions, float64 ``[k, d_model]`` with orthonormal rows; None if
            there is one, or each layer has its own.
        strength: how much of the direction each unit lost; empty if not edited.
        style: which known edit it looks like, or None.
        removed: median share that the carrying units lost, or None; with a base it is signed, and
            negative where the direction was amplified.
        embeddings: whether the embeddings carry it; None if there are none or it cannot be told.
        biases: the same of the biases.
        blind: what the writers alone tell.
        readers: what the readers alone tell.
        claim: what the checkpoint says of itself.
        head: what the output head tells.
        comparison: the difference from the base, if one was given.
        warnings: claims that the weights do not bear out, and the like.
        sentence: why, in one sentence.
        model: name and hashes of the checkpoint.
    """

    verdict: str
    evidence: str
    reason: str
    direction: Tensor | None = field(repr=False)
    subspace: Tensor | None = field(repr=False)
    strength: tuple[Strength, ...]
    style: str | None
    removed: float | None
    embeddings: bool | None
    biases: bool | None
    blind: Blind
    readers: Blind
    claim: DeclaredEdit
    head: HeadEvidence | None
    comparison: Comparison | None
    warnings: tuple[str, ...]
    sentence: str
    model: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """All of it but the direction's values, for JSON."""
        return {
            "verdict": self.verdict,
            "why": self.sentence,
            "evidence": self.evidence,
            "reason": self.reason,
            "model": dict(self.model),
            "removed": self.removed,
            "full": None if self.removed is None else self.removed >= _FULL,
            "style": self.style,
            "embeddings": self.embeddings,
            "biases": self.biases,
            "warnings": list(self.warnings),
            "writers": _blind_document(self.blind),
            "readers": _blind_document(self.readers),
            "units": [asdict(one) for one in self.strength],
            "head": None if self.head is None else self.head.document(),
            "declared": {
                "card": self.claim.card,
                "record": self.claim.record,
                "confirmed": self.claim.confirmed,
                "tensors_checked": self.claim.checked,
                "mismatches": list(self.claim.mismatches),
                "limits": list(self.claim.limits),
            },
            "base": None if self.comparison is None else comparison_document(self.comparison),
            "versions": versions(),
        }


def _blind_document(blind: Blind) -> dict[str, Any]:
    """What writers or readers alone tell, for JSON."""
    return {
        "verdict": blind.verdict,
        "reason": blind.reason,
        "p_value": blind.p_value,
        "calibrated_down_to": CLAIM,
        "claimed_below": CLAIM,
        "group": blind.group,
        "directions": blind.count,
        "behind_gains": blind.gains,
        "detectable_scale": blind.detectable,
        "other_side_energy": blind.other_side,
        "compared": blind.pools,
        "set_aside": [asdict(one) for one in blind.set_aside],
        "groups": {
            name: {
                "directions": gap.count,
                "ratio": gap.ratio,
                "distance": gap.distance,
                "agreement": gap.agreement,
                "shared": gap.shared,
                "p_gap": gap.p_gap,
            }
            for name, gap in blind.gaps.items()
        },
    }


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    return {
        "projected": [t.name for t in comparison.projected],
        "beyond": [t.name for t in comparison.beyond],
        "missing": list(comparison.missing),
        "added": list(comparison.added),
        "form": None if comparison.form is None else comparison.form.document(),
        "summary": summarize(comparison),
        "tensors": [asdict(t) for t in comparison.tensors],
    }


def audit(
    checkpoint: Checkpoint,
    base: Checkpoint | None = None,
    direction: Direction | None = None,
    device: torch.device = CPU,
) -> Audit:
    """Judge a checkpoint from its files: nothing is executed, only tensors and JSON are read.

    Args:
        checkpoint: what to judge.
        base: what it is said to be made from; the difference then decides.
        direction: the direction that its record is said to mean.
        device: where the writers' grams are made and inverted; the rest is on the CPU.

    Raises:
        CheckpointError: a checkpoint is damaged or in a format that cannot be read.
        InputError: the record or the direction cannot be used.
        UnsupportedArchitectureError: the writers cannot be found.
    """
    reading = open_checkpoint(checkpoint)
    claim = read_declared_edit(reading, direction, base)
    comparison = None if base is None else compare(base, checkpoint)
    head = head_evidence(reading)
    looked = look(reading, device), look_at_readers(reading, device)
    control = control_of(looked, comparison, base, device)
    found = decide(looked, claim, head, comparison, control)
    extent = _Extent()
    if found.verdict == "edited" and found.directions is not None:
        extent = _extent(reading, found, comparison, head)
    return Audit(
        verdict=found.verdict,
        evidence=found.evidence,
        reason=found.reason,
        direction=None if found.directions is None else found.directions[:, 0],
        subspace=_subspace(found, comparison),
        strength=extent.strength,
        style=extent.style,
        removed=extent.removed,
        embeddings=extent.embeddings,
        biases=extent.biases,
        blind=looked[0],
        readers=looked[1],
        claim=claim,
        head=head,
        comparison=comparison,
        warnings=_warnings(found.verdict, claim, comparison, looked),
        sentence=sentence_of(found, looked, comparison),
        model=checkpoint.identity(),
    )


def _subspace(found: Decision, comparison: Comparison | None) -> Tensor | None:
    """All of several directions, ``[k, d_model]``."""
    if comparison is not None and comparison.form is not None:
        return comparison.form.subspace
    directions = found.directions
    return None if directions is None or directions.shape[1] < 2 else directions.T.contiguous()


@dataclass(frozen=True, kw_only=True)
class _Extent:
    """How far an edit reaches; the attributes are those of :class:`Audit`."""

    strength: tuple[Strength, ...] = ()
    style: str | None = None
    removed: float | None = None
    embeddings: bool | None = None
    biases: bool | None = None


def _extent(
    reading: CheckpointWriters,
    found: Decision,
    comparison: Comparison | None,
    head: HeadEvidence | None,
) -> _Extent:
    """Which units lost the directions, and how much of them."""
    assert found.directions is not None
    side = "writers"
    if found.evidence == "readers":
        reading, side = open_readers(reading), "readers"
    units = strengths(reading, found.directions, found.gains, comparison)
    if found.evidence == "output head" and head is not None:
        # Too little is gone for the other writers to show it; of the embedding it is exact.
        units = tuple(
            replace(u, removed=head.scale, carries=True)
            if u.kind == "embedding"
            else replace(u, carries=False)
            for u in units
        )
        style: str | None = "the embedding, perhaps other writers too"
    else:
        first = found.directions[:, 0]
        style = name_style(reading, units, first, found.gains, comparison, side)
    removed = [u.removed for u in units if u.carries]
    if comparison is not None and comparison.form is not None:
        removed = [comparison.form.scale]
    embeddings = [u.carries for u in units if u.kind == "embedding"]
    return _Extent(
        strength=units,
        style=style,
        removed=float(torch.tensor(removed).median()) if removed else None,
        embeddings=all(embeddings) if embeddings else None,
        biases=biases_included(reading, found.directions[:, 0], comparison),
    )


def _warnings(
    verdict: str, claim: DeclaredEdit, comparison: Comparison | None, looked: Looked
) -> tuple[str, ...]:
    warnings = list(claim.mismatches)
    if claim.card and verdict == "clean":
        warnings.append(
            "the model card says that refusals were removed; the weights do not show it"
        )
    if claim.record and verdict == "clean":
        warnings.append("abliterate.json declares an edit that the weights do not show")
    if verdict == "edited" and not claim.card and not claim.record:
        warnings.append("nothing in the checkpoint declares this edit")
    if comparison is not None and verdict == "edited" and comparison.beyond:
        count = len(comparison.beyond)
        warnings.append(f"{count} tensor{'s differ' if count > 1 else ' differs'} beyond the edit")
    claimed = any(one.verdict == "edited" for one in looked)
    if comparison is not None and verdict == "clean" and claimed:
        warnings.append("the base itself carries the signature of an edit")
    return tuple(warnings)


def summarize(comparison: Comparison) -> list[dict[str, Any]]:
    """Tensors that differ, by component: how many, in which layers, and what they lost."""
    groups: dict[tuple[str, str], list[TensorDiff]] = {}
    for tensor in comparison.tensors:
        groups.setdefault((tensor.side, tensor.component), []).append(tensor)
    rows = []
    for (side, component), tensors in groups.items():
        for lost in (True, False):
            same = ("unchanged", "recast")
            chosen = [t for t in tensors if t.projected is lost and t.state not in same]
            if chosen:
                scales = [t.scale for t in chosen if lost and t.scale is not None]
                rows.append(
                    {
                        "component": component,
                        "side": side,
                        "projected": lost,
                        "tensors": len(chosen),
                        "of": len(tensors),
                        "layers": _ranges({t.layer for t in chosen if t.layer is not None}),
                        "scale": [min(scales), max(scales)] if scales else None,
                    }
                )
    return rows


def _ranges(layers: set[int]) -> str:
    """Layers as ``0-5, 8``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
