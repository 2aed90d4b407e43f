"""One writer: is it clean, and is it its source's matrix less the direction and nothing else?

Every element of the edited matrix has to be ``W - s B^T B W`` rounded to the format, where ``W`` is
the source's, ``B`` ``[k, d_model]`` the directions and ``s`` the scale; and what all elements
together have along the directions has to agree far better than one element can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.editing.edit_plan import TensorEdit
from abliterate.editing.matrix_orthogonalization import EditStrength
from abliterate.verification.stored_values import Box, StoredValues, cut

_READ, _COMPUTED = 1 << 22, 1 << 18  # elements at a time
_STRIP = 1 << 18  # columns over which the editor keeps a row's norm
# A fitted share counts as another than the declared one beyond this.
_SHARE = 1e-2


@dataclass(frozen=True)
class WriterCheck:
    """One writer (or a part of one tensor) against its direction, and against its source.

    Attributes:
        name: the tensor on disk.
        residual: ``|u^T E|_F / |E|_F`` of the edited matrix as it is stored. Without the source its
            norm before the edit, to which the record of an edit relates, is not known.
        bound: the largest value that rounding explains.
        clean: the residual is within the bound.
        problem: in what it is not the source's tensor with the edit, or None where it is; empty
            where there was no source to compare with.
    """

    name: str
    residual: float
    bound: float
    clean: bool
    problem: str | None = ""

    @property
    def fails(self) -> bool:
        """Whether it is not what it has to be: the declared edit, or, without a source, clean."""
        return not self.clean if self.problem == "" else self.problem is not None


@dataclass
class _Sums:
    """What the blocks of one tensor add up to."""

    energy: float = 0.0
    along: float = 0.0
    explained: float = 0.0
    off: float = 0.0  # what is along the directions and should not be
    noise: float = 0.0
    strays: int = 0
    total: int = 0
    first: tuple[int, ...] | None = None
    worst: float = 0.0
    changed: bool = False
    fit: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


def check_writer(
    edit: TensorEdit,
    edited: StoredValues,
    source: StoredValues | None = None,
    recipe: EditStrength | None = None,
    diagnose: bool = False,
) -> WriterCheck:
    """Check one edit of one tensor, each file read once (twice where rows keep their norms).

    Args:
        edit: the tensor, its directions and its box; ``edit.axis`` is that of both readers.
        edited: the tensor as it is.
        source: what it was made from, if that is known.
        recipe: how much the edit removes; None for all.
        diagnose: look for the reason why it is not the edit; done where it is not.
    """
    recipe, sums = recipe or EditStrength(), _Sums()
    whole = edit.region or tuple((0, size) for size in edited.shape)
    for region in _regions(whole, edit.axis, recipe):
        factors = None
        if source is not None and recipe.keep_norms == "rows" and not _alone(region, edit.axis):
            factors = _row_factors(region, edit, source, recipe)
        for box, values, original in _blocks(region, edit.axis, edited, source):
            part = None
            if factors is not None:
                part = factors[_inside(region, box, edit.axis)]
            _add(sums, edit, edited, source, recipe, (box, values, original, part), diagnose)
    bound = 3 * math.sqrt(sums.explained)
    along, norm = math.sqrt(sums.along), math.sqrt(sums.energy) or 1.0
    problem = "holds NaN or infinity" if not math.isfinite(sums.energy) else ""
    if source is not None and not problem:
        problem = _problem(sums, recipe, bound)
        if problem and not diagnose:  # only now: it costs as much again
            return check_writer(edit, edited, source, recipe, diagnose=True)
    kept = None if source is not None and not problem else problem
    return WriterCheck(edit.name, along / norm, bound / norm, along <= bound, kept)


def _regions(region: Box, axis: int, recipe: EditStrength) -> Iterator[Box]:
    """Rows keep their norms over so many columns at most."""
    trailing = [i for i in range(axis + 1, len(region)) if region[i][1] - region[i][0] > 1]
    if recipe.keep_norms != "rows" or len(trailing) != 1:
        yield region
        return
    index = trailing[0]
    first, behind = region[index]
    for begin in range(first, behind, _STRIP):
        part = (begin, min(begin + _STRIP, behind))
        yield (*region[:index], part, *region[index + 1 :])


def _alone(region: Box, axis: int) -> bool:
    """Whether the stored rows are vectors along the stream, each on its own."""
    return all(behind - first == 1 for first, behind in region[axis + 1 :])


def _blocks(
    region: Box, axis: int, edited: StoredValues, source: StoredValues | None
) -> Iterator[tuple[Box, Tensor, Tensor | None]]:
    """Boxes whole along the axis, with the values of both, float64."""
    steps = edited.steps
    if source is not None:
        steps = tuple(map(math.lcm, steps, source.steps))
    for outer in cut(region, axis, steps, _READ):
        narrow = edited.read(outer)
        original = None if source is None else source.read(outer)
        for box in cut(outer, axis, steps, _COMPUTED):
            inner = tuple(
                slice(a - start, b - start) for (a, b), (start, _) in zip(box, outer, strict=True)
            )
            held = None if original is None else original[inner].double()
            yield box, narrow[inner].double(), held


def _removed(original: Tensor, edit: TensorEdit) -> tuple[Tensor, Tensor]:
    """``B^T B W`` in the box's own shape, and the norms of its columns ``[..., 1]``, d_model last.

    Args:
        original: ``W``.
        edit: with ``B``.
    """
    along_last = original.movedim(edit.axis, -1)
    coefficients = along_last @ edit.basis.T  # [..., k]
    removed = (coefficients @ edit.basis).movedim(-1, edit.axis)
    return removed, along_last.norm(dim=-1, keepdim=True)


def _row_factors(
    region: Box, edit: TensorEdit, source: StoredValues, recipe: EditStrength
) -> Tensor:
    """By how much rows along other axes than the stream grow, to have their norms again."""
    lead = [behind - first for first, behind in region[: edit.axis + 1]]
    shape = (*lead, *(1 for _ in region[edit.axis + 1 :]))
    before, after = torch.zeros(shape).double(), torch.zeros(shape).double()
    trailing = list(range(edit.axis + 1, len(region)))
    for box, values, _ in _blocks(region, edit.axis, source, None):
        left = values - recipe.scale * _removed(values, edit)[0]
        inside = _inside(region, box, edit.axis)
        before[inside] += values.square().sum(trailing, keepdim=True)
        after[inside] += left.square().sum(trailing, keepdim=True)
    return _factor(before.sqrt(), after.sqrt())


def _factor(before: Tensor, after: Tensor) -> Tensor:
    """1 where nothing is left that could carry the norm; NaN where it is too little to tell."""
    grown = torch.where(after > 1e-6 * before, before / after, torch.ones_like(after))
    return torch.where((after > 1e-7 * before) & (after < 1e-5 * before), torch.nan, grown)


def _inside(region: Box, box: Box, axis: int) -> tuple[slice, ...]:
    return tuple(
        slice(a - start, b - start) if i <= axis else slice(None)
        for i, ((a, b), (start, _)) in enumerate(zip(box, region, strict=True))
    )


def _add(
    sums: _Sums,
    edit: TensorEdit,
    edited: StoredValues,
    source: StoredValues | None,
    recipe: EditStrength,
    block: tuple[Box, Tensor, Tensor | None, Tensor | None],
    diagnose: bool,
) -> None:
    box, values, original, factor = block
    along = values.movedim(edit.axis, -1) @ edit.basis.T
    spread = edited.spread(values, box).movedim(edit.axis, -1)
    sums.energy += float(values.square().sum())
    sums.along += float(along.square().sum())
    sums.explained += float((spread.square() @ edit.basis.square().T).sum())
    if source is None or original is None:
        return
    removed, norms = _removed(original, edit)
    expected = original - recipe.scale * removed
    if recipe.keep_norms and factor is None:
        # Columns, or rows that are vectors along the stream themselves.
        norms_of = (each.norm(dim=edit.axis, keepdim=True) for each in (original, expected))
        factor = _factor(*norms_of)
    # What the arithmetic may leave: of each product, and of the sums along d_model.
    unit, width = 2.0**source.exponent, edit.basis.shape[1]
    of_sums = (edit.basis.abs().sum(0) * norms).movedim(-1, edit.axis)
    noise = original.abs().add_(removed.abs(), alpha=abs(recipe.scale)).mul_(4 * unit)
    noise.add_(of_sums, alpha=abs(recipe.scale) * unit * (8 + 4 * math.sqrt(width)))
    if factor is not None:
        expected, noise = expected * factor, (noise + 32 * unit * expected.abs()) * factor
        expected = torch.where(factor.isnan(), values, expected)
        noise = noise.nan_to_num(0.0)
    wrong = edited.strays(expected, values, noise, box)
    difference = values - expected
    sums.off += float((difference.movedim(edit.axis, -1) @ edit.basis.T).square().sum())
    of_noise = noise.movedim(edit.axis, -1).square() @ edit.basis.square().T
    sums.noise += float(of_noise.sum())
    sums.total += values.numel()
    if diagnose:
        sums.changed = sums.changed or not torch.equal(values, original)
        lost = original - values
        sums.fit[0] += float((lost * removed).sum())
        sums.fit[1] += float(removed.square().sum())
        sums.fit[2] += float(lost.square().sum())
    count = int(wrong.sum())
    if count:
        sums.strays += count
        sums.worst = max(sums.worst, float(difference[wrong].abs().max()))
        if sums.first is None:
            index = wrong.nonzero()[0].tolist()
            sums.first = tuple(start + i for i, (start, _) in zip(index, box, strict=True))


def _problem(sums: _Sums, recipe: EditStrength, bound: float) -> str:
    """In what the tensor is not the declared edit; empty where it is."""
    off = math.sqrt(sums.off)
    coherent = bound + 3 * math.sqrt(sums.noise)
    if not sums.strays and off <= coherent:
        return ""
    if sums.energy == 0:
        return "is zero"
    if not sums.changed:
        return "is the source's own: it was not edited"
    lost, had, whole = sums.fit
    fitted = lost / had if had > 0 else 0.0
    explained = lost**2 / (had * whole) if had * whole > 0 else 0.0
    if explained > 0.9 and abs(fitted - recipe.scale) > _SHARE and not recipe.keep_norms:
        return f"lost {fitted:.3g} of the direction, not {recipe.scale:g}"
    if not sums.strays:
        return f"has {off:.1e} too much along the direction, rounding explains {coherent:.1e}"
    at = ", ".join(map(str, sums.first or ()))
    return (
        f"{sums.strays:,} of {sums.total:,} values are not the source's less the direction "
        f"(first at [{at}], by up to {sums.worst:.1e})"
    )
