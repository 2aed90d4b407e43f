"""The verdict of an audit: which evidence decides, and the sentence that says why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.auditing.compare import Comparison
from abliterate.auditing.components import open_checkpoint
from abliterate.auditing.edit_record import DeclaredEdit
from abliterate.auditing.reference_free import CLAIM, Blind, look, look_at_readers
from abliterate.auditing.untied_output_head import HeadEvidence
from abliterate.models.loading import Checkpoint

_ALIKE = 0.8  # squared cosine of the directions of a checkpoint and its base
#: What writers and readers alone tell.
Looked = tuple[Blind, Blind]


@dataclass(frozen=True)
class Decision:
    """The verdict.

    Attributes:
        verdict: as in :class:`Audit`, like the next two.
        evidence: what decided.
        reason: why undecided.
        directions: float64 ``[d_model, k]``, orthonormal, or None.
        gains: they are the stream's, behind the gains of norms.
    """

    verdict: str
    evidence: str = ""
    reason: str = ""
    directions: Tensor | None = None
    gains: bool = True


def control_of(
    looked: Looked, comparison: Comparison | None, base: Checkpoint | None, device: torch.device
) -> Looked | None:
    """The same tests of the base, where it is asked: a doubt that it shares is no evidence."""
    if base is None or comparison is None or comparison.form is not None or not comparison.beyond:
        return None
    if all(one.verdict == "clean" for one in looked):
        return None
    reading = open_checkpoint(base)
    return look(reading, device), look_at_readers(reading, device)


def _is_shared(blind: Blind, control: Blind) -> bool:
    """Whether the base stands out as much as what is made from it."""
    if blind.verdict == "clean":
        return True
    if control.verdict == "clean" or (blind.verdict == "edited" != control.verdict):
        return False
    if blind.directions is None or control.directions is None:
        return blind.reason == control.reason
    if blind.count != control.count:
        return False
    cosines = torch.linalg.svdvals(blind.directions.T @ control.directions)
    return float(cosines[-1]) ** 2 > _ALIKE


def decide(
    looked: Looked,
    claim: DeclaredEdit,
    head: HeadEvidence | None,
    comparison: Comparison | None,
    control: Looked | None,
) -> Decision:
    """The verdict, from all evidence; a base decides, then what is declared, then the weights."""
    if comparison is not None:
        if comparison.form is not None:
            shared = comparison.form.shared.unsqueeze(1)
            return Decision("edited", "base", directions=shared, gains=comparison.gains)
        whole = not comparison.added and not comparison.missing
        if not comparison.beyond and whole:
            return Decision("clean", "base")
        alike = control is not None and all(map(_is_shared, looked, control))
        if alike and whole and comparison.tested and not claim.confirmed:
            return Decision("clean", "base")
    if claim.confirmed:
        along = None if claim.direction is None else claim.direction.unsqueeze(1)
        return Decision("edited", "declared", directions=along)
    for one in looked:
        if one.verdict == "edited":
            return Decision("edited", one.side, directions=one.directions, gains=one.gains)
    if head is not None and head.projection:
        return Decision("edited", "output head", directions=head.direction.unsqueeze(1))
    writers, readers = looked
    if writers.verdict == "undecided":
        return Decision("undecided", reason=writers.reason)
    if readers.directions is not None:
        return Decision("undecided", reason=f"{readers.reason}, among the readers")
    return Decision("clean", "writers")


def sentence_of(found: Decision, looked: Looked, comparison: Comparison | None) -> str:
    """Why the verdict is what it is."""
    if found.verdict == "undecided":
        return found.reason
    if comparison is not None and comparison.form is not None:
        text = comparison.form.text
        only = comparison.projected
        return f"{text}: {only[0].name}" if len(only) == 1 else text
    if found.verdict == "edited":
        return {
            "declared": "abliterate.json declares the edit, and the weights are as it says",
            "output head": "the embedding is the output head less a share of one direction",
            "writers": _said_of(looked[0]),
            "readers": _said_of(looked[1]),
        }[found.evidence]
    if found.evidence == "base":
        if comparison is not None and comparison.beyond:
            return _differences(comparison)
        return "no tensor differs from the base"
    writers, readers = looked
    seen = f"an edit of all writers would show from scale {writers.detectable}"
    if readers.verdict == "clean":
        seen += f", of all readers from {readers.detectable}"
    else:
        seen += f"; edits of readers cannot be told: {readers.reason}"
    if comparison is not None:
        return f"{_differences(comparison)}; {seen}"
    return f"no direction is avoided beyond chance; {seen}"


def _differences(comparison: Comparison) -> str:
    """What is said of tensors that differ, none by a projection."""
    cut = sum(one.state == "truncated" for one in comparison.tensors)
    if not cut:
        return "tensors differ from the base, none by a projection"
    many = "1 matrix is an approximation" if cut == 1 else f"{cut} matrices are approximations"
    return f"{many} of lower rank: so many directions are gone that it is no edit along a few"


def _said_of(blind: Blind) -> str:
    """What the writers or readers of an edited checkpoint have in common."""
    who = f"all {blind.side}" if blind.group == "all" else f"{blind.side} ({blind.group})"
    what = "one direction" if blind.count == 1 else f"{blind.count} directions"
    return f"{who} avoid {what}, far beyond chance ({p_text(blind.p_value)})"


def p_text(p_value: float) -> str:
    """A p-value as far as it was calibrated."""
    return f"p < {CLAIM:.0e}" if p_value < CLAIM else f"p = {p_value:.2g}"
