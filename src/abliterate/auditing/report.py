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
from abliterate.auditing.tensor_diff import TensorDiff
from abliterate.auditing.untied_output_head import HeadEvidence, head_evidence
from abliterate.direction import Direction
from abliterate.models.loading import Checkpoint
from abliterate.storage.artifacts import versions

_FULL = 0.9  # a removed share that counts as all of it
_ALIKE = 0.8  # squared cosine of the directions of a checkpoint and its base


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
        removed: median share that the carrying units lost, or None; with a base it is signed, and
            negative where the direction was amplified.
        embeddings: whether the embeddings carry it; None if there are none or it cannot be told.
        biases: the same of the biases.
        blind: what the writers alone tell.
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
    sentence: str
    model: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """All of it but the direction's values, for JSON."""
        blind = self.blind
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
    blind = look(reading, device)
    control = _control(blind, comparison, base, device)
    verdict, evidence, vector, gains = _decide(blind, claim, head, comparison, control)
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
        sentence=_sentence(verdict, evidence, reason, blind, comparison, extent),
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
        style = name_style(reading, units, direction, gains, comparison)
    removed = [u.removed for u in units if u.carries]
    if comparison is not None and comparison.form is not None:
        removed = [comparison.form.scale]
    embeddings = [u.carries for u in units if u.kind == "embedding"]
    return _Extent(
        strength=units,
        style=style,
        removed=float(torch.tensor(removed).median()) if removed else None,
        embeddings=all(embeddings) if embeddings else None,
        biases=biases_included(reading, direction, comparison),
    )


def _control(
    blind: Blind, comparison: Comparison | None, base: Checkpoint | None, device: torch.device
) -> Blind | None:
    """The same test of the base, where it is asked: a doubt that the base shares is no evidence."""
    if base is None or comparison is None or comparison.form is not None or not comparison.beyond:
        return None
    return None if blind.verdict == "clean" else look(open_checkpoint(base), device)


def _is_shared(blind: Blind, control: Blind) -> bool:
    """Whether the base stands out as much as what is made from it."""
    if control.verdict == "clean" or (blind.verdict == "edited" != control.verdict):
        return False
    if blind.direction is None or control.direction is None:
        return blind.reason == control.reason
    return float(blind.direction @ control.direction) ** 2 > _ALIKE


def _decide(
    blind: Blind,
    claim: DeclaredEdit,
    head: HeadEvidence | None,
    comparison: Comparison | None,
    control: Blind | None,
) -> tuple[str, str, Tensor | None, bool]:
    """Verdict, what decided it, the direction, and whether that is behind the gains."""
    if comparison is not None:
        if comparison.form is not None:
            return "edited", "base", comparison.direction, comparison.gains
        whole = not comparison.added and not comparison.missing
        if not comparison.beyond and whole:
            return "clean", "base", None, True
        shared = control is not None and _is_shared(blind, control)
        if shared and whole and comparison.tested and not claim.confirmed:
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


def _sentence(
    verdict: str,
    evidence: str,
    reason: str,
    blind: Blind,
    comparison: Comparison | None,
    extent: _Extent,
) -> str:
    """Why the verdict is what it is."""
    if verdict == "undecided":
        return reason
    if comparison is not None and comparison.form is not None:
        text = comparison.form.text
        only = comparison.projected
        return f"{text}: {only[0].name}" if len(only) == 1 else text
    if verdict == "edited":
        return {
            "declared": "abliterate.json declares the edit, and the weights are as it says",
            "output head": "the embedding is the output head less a share of one direction",
        }.get(evidence, f"all of {blind.group} avoid one direction, far beyond chance "
                        f"(p = {blind.p_value:.0e})")  # fmt: skip
    if evidence == "base":
        if comparison is not None and comparison.beyond:
            return "tensors differ from the base, none by a projection"
        return "no tensor differs from the base"
    seen = f"an edit of all writers would show from scale {blind.detectable}"
    if comparison is not None:
        return f"tensors differ from the base, none by a projection; {seen}"
    return f"no direction is avoided beyond chance; {seen}"


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
