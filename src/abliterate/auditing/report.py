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
from abliterate.auditing.reference_free import CLAIM, CPU, Blind, look
from abliterate.auditing.untied_output_head import HeadEvidence, head_evidence
from abliterate.direction import Direction
from abliterate.models.loading import Checkpoint
from abliterate.storage.artifacts import versions

_FULL = 0.9  # a removed share that counts as all of it


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The verdict on a checkpoint and what it rests on.

    Attributes:
        verdict: ``clean``, ``edited`` or ``undecided``.
        evidence: what decided: ``base``, ``declared``, ``output head``, ``writers`` or empty.
        reason: why undecided, else empty.
        direction: float64 unit ``[d_model]``, or None.
        strength: how much of the direction each unit lost; empty if not edited.
        style: which known edit it looks like, or None.
        removed: median share that the carrying units lost, 0 to 1, or None.
        embeddings: whether the embeddings carry it; None if there are none or it cannot be told.
        biases: the same of the biases.
        blind: what the writers alone tell.
        claim: what the checkpoint says of itself.
        head: what the output head tells.
        comparison: the difference from the base, if one was given.
        warnings: claims that the weights do not bear out, and the like.
        model: name and hashes of the checkpoint.
    """

    verdict: str
    evidence: str
    reason: str
    direction: Tensor | None = field(repr=False)
    strength: tuple[Strength, ...]
    style: str | None
    removed: float | None
    embeddings: bool | None
    biases: bool | None
    blind: Blind
    claim: DeclaredEdit
    head: HeadEvidence | None
    comparison: Comparison | None
    warnings: tuple[str, ...]
    model: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """All of it but the direction's values, for JSON."""
        blind = self.blind
        return {
            "verdict": self.verdict,
            "evidence": self.evidence,
            "reason": self.reason,
            "model": dict(self.model),
            "removed": self.removed,
            "full": None if self.removed is None else self.removed >= _FULL,
            "style": self.style,
            "embeddings": self.embeddings,
            "biases": self.biases,
            "warnings": list(self.warnings),
            "writers": {
                "verdict": blind.verdict,
                "reason": blind.reason,
                "p_value": blind.p_value,
                "claimed_below": CLAIM,
                "group": blind.group,
                "behind_gains": blind.gains,
                "detectable_scale": blind.detectable,
                "reading_energy": blind.reading,
                "compared": blind.pools,
                "set_aside": [asdict(one) for one in blind.set_aside],
                "groups": {
                    name: {
                        "ratio": gap.ratio,
                        "distance": gap.distance,
                        "agreement": gap.agreement,
                        "p_gap": gap.p_gap,
                        "p_agreement": gap.p_agreement,
                    }
                    for name, gap in blind.gaps.items()
                },
            },
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


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    return {
        "projected": [t.name for t in comparison.projected],
        "beyond": [t.name for t in comparison.beyond],
        "missing": list(comparison.missing),
        "added": list(comparison.added),
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
    blind = look(reading, device)
    verdict, evidence, vector, gains = _decide(blind, claim, head, comparison)
    extent = _Extent()
    if verdict == "edited" and vector is not None:
        of_head = head if evidence == "output head" else None
        extent = _extent(reading, vector, gains, comparison, of_head)
    reason = blind.reason if verdict == "undecided" else ""
    return Audit(
        verdict=verdict,
        evidence=evidence,
        reason=reason,
        direction=vector,
        strength=extent.strength,
        style=extent.style,
        removed=extent.removed,
        embeddings=extent.embeddings,
        biases=extent.biases,
        blind=blind,
        claim=claim,
        head=head,
        comparison=comparison,
        warnings=_warnings(verdict, claim, comparison, blind),
        model=checkpoint.identity(),
    )


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
    direction: Tensor,
    gains: bool,
    comparison: Comparison | None,
    head: HeadEvidence | None,
) -> _Extent:
    """Which units lost the direction, and how much of it.

    Args:
        reading: the checkpoint.
        direction: float64 unit ``[d_model]``.
        gains: it is the stream's, behind the gains of norms.
        comparison: the difference from the base, if there is one.
        head: the output head's evidence, where nothing else shows the edit.
    """
    units = strengths(reading, direction, gains, comparison)
    if head is not None:
        # Too little is gone for the other writers to show it; of the embedding it is exact.
        units = tuple(
            replace(u, removed=head.scale, carries=True)
            if u.kind == "embedding"
            else replace(u, carries=False)
            for u in units
        )
        style: str | None = "the embedding, perhaps other writers too"
    else:
        style = name_style(reading, units, direction, gains)
    removed = [u.removed for u in units if u.carries]
    embeddings = [u.carries for u in units if u.kind == "embedding"]
    return _Extent(
        strength=units,
        style=style,
        removed=float(torch.tensor(removed).median()) if removed else None,
        embeddings=all(embeddings) if embeddings else None,
        biases=biases_included(reading, direction, comparison),
    )


def _decide(
    blind: Blind, claim: DeclaredEdit, head: HeadEvidence | None, comparison: Comparison | None
) -> tuple[str, str, Tensor | None, bool]:
    """Verdict, what decided it, the direction, and whether that is behind the gains."""
    if comparison is not None:
        if len(comparison.projected) >= 2:
            return "edited", "base", comparison.direction, comparison.gains
        if not comparison.beyond and not comparison.added and not comparison.missing:
            return "clean", "base", None, True
    if claim.confirmed:
        return "edited", "declared", claim.direction, True
    if blind.verdict == "edited":
        return "edited", "writers", blind.direction, blind.gains
    if head is not None and head.projection:
        return "edited", "output head", head.direction, True
    return blind.verdict, "writers" if blind.verdict == "clean" else "", None, True


def _warnings(
    verdict: str, claim: DeclaredEdit, comparison: Comparison | None, blind: Blind
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
    if comparison is not None and verdict == "clean" and blind.verdict == "edited":
        warnings.append("the base itself carries the signature of an edit")
    return tuple(warnings)
