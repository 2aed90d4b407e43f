"""audit without a base: how empty writers (or readers) are, the candidates, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from abliterate.auditing.component_pools import (
    MIN_POOLS,
    ComponentPool,
    groups_of,
    halves_of,
    make_pools,
)
from abliterate.auditing.components import CheckpointWriters
from abliterate.auditing.eigengap_test import (
    LEAST_WIDTH,
    Gap,
    SoftNullProjector,
    claims,
    emptiest,
    gap,
)
from abliterate.auditing.gram_matrices import ChannelScaling, make_scaling, read_emptiness
from abliterate.auditing.readers import open_readers, reading_energy, writing_energy
from abliterate.auditing.soft_null_space import SHARE

CPU = torch.device("cpu")
#: An edit is claimed below the first, nothing between the two is. What is further below the first
#: is no better known: the tail was never measured there.
CLAIM, DOUBT = 1e-7, 1e-3
LADDER = (1.0, 0.8, 0.5, 0.3)
_CLEAR = 0.8  # where only edits of a larger scale would show, nothing is clean
_ROUNDS = 8
_SEED = 0


@dataclass(frozen=True)
class SetAside:
    """A direction that nothing writes (or reads) for another reason than an edit."""

    reason: str
    channels: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Blind:
    """What the writers alone tell, or the readers.

    Attributes:
        side: ``writers`` or ``readers``.
        verdict: ``clean``, ``edited`` or ``undecided``.
        reason: why undecided, else empty.
        p_value: of the best group, corrected for the number of groups that were tried.
        group: the group of units in which the direction stands out most.
        gaps: every group.
        directions: float64 ``[d_model, k]``, orthonormal, or None.
        gains: the direction is that of the stream behind the gains; False: of the matrices as
            they are stored (an edit that overlooked the norms).
        set_aside: directions that were left out.
        detectable: the smallest scale of an edit of all writers that this test would have seen
            here, or None.
        other_side: energy with which the other matrices read (or write) the direction, 1 for a
            typical one; the least of several.
        pools: how many groups of matrices were compared.
    """

    side: str
    verdict: str
    reason: str = ""
    p_value: float = 1.0
    group: str = ""
    gaps: Mapping[str, Gap] = field(default_factory=dict, repr=False)
    directions: Tensor | None = field(default=None, repr=False)
    gains: bool
    set_aside: tuple[SetAside, ...]
    detectable: float | None = None
    other_side: float | None = None
    pools: int

    @property
    def direction(self) -> Tensor | None:
        """The first of the directions, ``[d_model]``."""
        return None if self.directions is None else self.directions[:, 0]

    @property
    def count(self) -> int:
        """How many directions stand out."""
        return 0 if self.directions is None else self.directions.shape[1]


@dataclass(frozen=True)
class _Side:
    """What is looked at, and how a direction is held against the other side.

    Attributes:
        name: ``writers`` or ``readers``.
        reading: the checkpoint, whose units are these.
        other: energy of the other side along directions, as in ``reading_energy``.
        neither: what is said of a direction that the other side does not know either.
    """

    name: str
    reading: CheckpointWriters
    other: Callable[[Tensor], tuple[Tensor, Tensor]]
    neither: str


def look(reading: CheckpointWriters, device: torch.device = CPU) -> Blind:
    """Judge a checkpoint from its writers alone.

    Args:
        reading: the checkpoint.
        device: where grams are made and inverted.
    """
    side = _Side(
        "writers",
        reading,
        partial(reading_energy, reading),
        "a direction that nothing reads either",
    )
    first = _judge(side, True, device)
    if first.verdict == "edited" or not reading.has_gains:
        return first
    # Tools that do not know of norms behind a writer edit the matrices with the plain direction.
    plain = _judge(side, False, device)
    doubtful = first.verdict == "clean" and plain.p_value <= DOUBT
    return plain if plain.verdict == "edited" or doubtful else first


def look_at_readers(reading: CheckpointWriters, device: torch.device = CPU) -> Blind:
    """Judge a checkpoint from what reads its stream, as it is stored.

    Args:
        reading: the checkpoint.
        device: where grams are made and inverted.
    """
    other, neither = partial(writing_energy, reading), "a direction that nothing writes either"
    return _judge(_Side("readers", open_readers(reading), other, neither), True, device)


class _CannotTellError(Exception):
    """The writers alone say nothing; the message says why."""


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """The direction that stands out most, once those that are no edit's were left out.

    Attributes:
        units: the emptiness of each pool, without those that were left out.
        gaps: every group's.
        group: the one in which it stands out most.
        p_value: corrected for the number of tests.
        directions: float64 ``[d_model, k]``, orthonormal.
        other_side: energy with which the other side has them; None where they are no more than
            chance.
    """

    units: Sequence[SoftNullProjector]
    gaps: Mapping[str, Gap]
    group: str
    p_value: float
    directions: Tensor
    other_side: float | None


def _judge(side: _Side, gains: bool, device: torch.device) -> Blind:
    reading = side.reading
    hypotheses = 2 if reading.has_gains else 1
    units = make_pools(reading.units, reading.d_model, few=side.name == "readers")
    scaling, pools = make_scaling(reading, units, gains)
    dead = tuple(int(i) for i in scaling.silent)
    aside = [SetAside(f"channels that a quarter of the {side.name} leave", dead)] if dead else []
    try:
        if len(pools) < MIN_POOLS:
            raise _CannotTellError(f"{len(pools)} {side.name} are too few to compare")
        _require_width(scaling.width)
        emptinesses = read_emptiness(reading, pools, scaling, gains, device)
        candidate = _find_candidate(side, scaling, pools, emptinesses, hypotheses, aside)
    except _CannotTellError as error:
        return Blind(
            side=side.name,
            verdict="undecided",
            reason=str(error),
            gains=gains,
            set_aside=tuple(aside),
            pools=len(pools),
        )
    directions: Tensor | None = candidate.directions
    detectable, reason = None, ""
    if candidate.p_value <= CLAIM:
        verdict = "edited"
        found = candidate.gaps[candidate.group].directions
        directions = scaling.outwards(_refined(candidate.units, found))
    elif candidate.p_value <= DOUBT:
        verdict = "undecided"
        reason = "a direction stands out, but not far enough beyond chance to claim an edit"
    else:
        directions = None
        level = CLAIM / len(candidate.gaps) / hypotheses
        detectable = _power(candidate.units, pools, groups_of(pools)["all"], level)
        reason = _unclear(side, detectable, aside)
        verdict = "undecided" if reason else "clean"
    return Blind(
        side=side.name,
        verdict=verdict,
        reason=reason,
        p_value=candidate.p_value,
        group=candidate.group,
        gaps=candidate.gaps,
        directions=directions,
        gains=gains,
        set_aside=tuple(aside),
        detectable=detectable,
        other_side=candidate.other_side,
        pools=len(pools),
    )


def _unclear(side: _Side, detectable: float | None, aside: Sequence[SetAside]) -> str:
    """Why nothing stands out and yet nothing is clean; empty if it is."""
    if detectable is None:
        return "even a whole edit would not stand out here"
    if detectable > _CLEAR:
        return "none but a whole edit would stand out here"
    if any(one.reason == side.neither for one in aside):
        return "nothing reads or writes one direction: an edit of both, or never used"
    return ""


def _find_candidate(
    side: _Side,
    scaling: ChannelScaling,
    pools: Sequence[ComponentPool],
    units: Sequence[SoftNullProjector],
    hypotheses: int,
    aside: list[SetAside],
) -> _Candidate:
    """Test all groups again and again, without the directions that turn out to be no edit's.

    Args:
        side: the checkpoint's writers or readers.
        scaling: the coordinates of ``units``.
        pools: the units that are compared.
        units: the emptiness of each.
        hypotheses: how often a direction is looked for.
        aside: grows by what is left out.

    Raises:
        _CannotTellError: too many directions stand out, or too few channels are left.
    """
    groups, width = groups_of(pools), scaling.width
    for _ in range(_ROUNDS):
        gaps = {name: _test(units, pools, chosen) for name, chosen in groups.items()}
        best = min(gaps, key=lambda key: (gaps[key].p_value, -gaps[key].ratio))
        p_value = min(1.0, gaps[best].p_value * len(gaps) * hypotheses)
        directions = scaling.outwards(gaps[best].directions)
        energy, no_edit = None, None
        if p_value <= DOUBT:
            least, turned = side.other(directions)
            energy = None if bool(least[0].isnan()) else float(least[0])
            no_edit = _no_edit(directions, energy, turned[:, :1], side.neither, aside)
        if no_edit is None:
            return _Candidate(
                units=units,
                gaps=gaps,
                group=best,
                p_value=p_value,
                directions=directions,
                other_side=energy,
            )
        inside = torch.linalg.qr(scaling.inwards(no_edit))[0]
        width -= inside.shape[1]
        units = [unit.without(inside) for unit in units]
        _require_width(width)
    raise _CannotTellError("too many directions stand out that are no edit's")


def _require_width(width: int) -> None:
    if width < LEAST_WIDTH:
        raise _CannotTellError(f"{width} channels are too few for a direction to stand out")


def _test(
    units: Sequence[SoftNullProjector], pools: Sequence[ComponentPool], chosen: Sequence[int]
) -> Gap:
    ordered, halves = halves_of(pools, chosen)
    return gap([units[i] for i in ordered], halves)


def _refined(units: Sequence[SoftNullProjector], directions: Tensor) -> Tensor:
    """The directions that the carrying pools name, whichever group they were found in."""
    current, count = directions, directions.shape[1]
    for _ in range(2):
        along = [sum(unit.along(one) for one in current.T) / count for unit in units]
        bound = (SHARE + max(along)) / 2
        carrying = [unit for unit, value in zip(units, along, strict=True) if value >= bound]
        if len(carrying) < 2:
            break
        refined = emptiest(carrying, count)
        if float(torch.linalg.svdvals(refined.T @ directions)[-1]) ** 2 < 0.5:
            break  # they left for others
        current = refined
    return current


def _no_edit(
    directions: Tensor,
    energy: float | None,
    least: Tensor,
    neither: str,
    aside: list[SetAside],
) -> Tensor | None:
    """What has to be left out if directions are no edit's, ``[d_model, m]``; None if they may be.

    Args:
        directions: orthonormal, ``[d_model, k]``.
        energy: of the other side, where it has least of them.
        least: that direction, ``[d_model, 1]``.
        neither: what is said of it.
        aside: grows by what is left out.
    """
    width, count = directions.shape
    energies = directions.square().sum(dim=1)
    largest = energies.sort(descending=True)
    if count == 1:
        few = int((largest.values.cumsum(0) < 0.7).sum()) + 1
    else:  # channels that lie among the directions, each by itself
        few = int((largest.values >= 0.7).sum())
    if 0 < few <= max(4, count):
        channels = tuple(sorted(int(i) for i in largest.indices[:few]))
        aside.append(SetAside("a few channels alone", channels))
        gone = directions.new_zeros(width, few)
        gone[list(channels), range(few)] = 1.0
        return gone
    if float(directions.mean(dim=0).square().sum()) * width > 0.5:
        aside.append(SetAside("the mean of all channels, which LayerNorm does not see"))
        return directions.new_ones(width, 1)
    if energy is not None and energy < 0.02:
        aside.append(SetAside(neither))
        return least
    return None


def _power(
    units: Sequence[SoftNullProjector],
    pools: Sequence[ComponentPool],
    chosen: Sequence[int],
    claim: float,
) -> float | None:
    """The smallest scale of a planted edit of all writers that the same test claims."""
    generator = torch.Generator().manual_seed(_SEED + 1)
    vector = torch.randn(len(units[0].matrix), generator=generator, dtype=torch.float64)
    vector = vector / vector.norm()
    ordered, halves = halves_of(pools, chosen)
    for scale in reversed(LADDER):  # what is claimed at one scale is claimed at larger ones
        if claims([units[i].edited(vector, scale) for i in ordered], halves, claim):
            return scale
    return None
