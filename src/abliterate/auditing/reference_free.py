"""audit without a base: how empty the writers are, the candidate direction, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
from abliterate.auditing.eigengap_test import LEAST_WIDTH, Gap, SoftNullProjector, emptiest, gap
from abliterate.auditing.gram_matrices import ChannelScaling, make_scaling, read_emptiness
from abliterate.auditing.readers import reading_energy
from abliterate.auditing.soft_null_space import SHARE

CPU = torch.device("cpu")
#: An edit is claimed below this, nothing between the two is.
CLAIM, DOUBT = 1e-7, 1e-3
LADDER = (1.0, 0.8, 0.5, 0.3)
_ROUNDS = 8
_SEED = 0


@dataclass(frozen=True)
class SetAside:
    """A direction that no writer writes for another reason than an edit."""

    reason: str
    channels: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Blind:
    """What the writers alone tell.

    Attributes:
        verdict: ``clean``, ``edited`` or ``undecided``.
        reason: why undecided, else empty.
        p_value: of the best group, corrected for the number of groups that were tried.
        group: the group of units in which the direction stands out most.
        gaps: every group.
        direction: float64 ``[d_model]``, unit, or None.
        gains: the direction is that of the stream behind the gains; False: of the matrices as
            they are stored (an edit that overlooked the norms).
        set_aside: directions that were left out.
        detectable: the smallest scale of an edit of all writers that this test would have seen
            here, or None.
        reading: energy with which the other matrices read the direction, 1 for a typical one.
        pools: how many groups of matrices were compared.
    """

    verdict: str
    reason: str = ""
    p_value: float = 1.0
    group: str = ""
    gaps: Mapping[str, Gap] = field(default_factory=dict, repr=False)
    direction: Tensor | None = None
    gains: bool
    set_aside: tuple[SetAside, ...]
    detectable: float | None = None
    reading: float | None = None
    pools: int


def look(reading: CheckpointWriters, device: torch.device = CPU) -> Blind:
    """Judge a checkpoint from its writers alone.

    Args:
        reading: the checkpoint.
        device: where grams are made and inverted.
    """
    first = _judge(reading, True, device)
    if first.verdict == "edited" or not reading.has_gains:
        return first
    # Tools that do not know of norms behind a writer edit the matrices with the plain direction.
    plain = _judge(reading, False, device)
    doubtful = first.verdict == "clean" and plain.p_value <= DOUBT
    return plain if plain.verdict == "edited" or doubtful else first


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
        direction: float64 unit ``[d_model]``.
        reading: energy with which the other matrices read it; None where it is no more than chance.
    """

    units: Sequence[SoftNullProjector]
    gaps: Mapping[str, Gap]
    group: str
    p_value: float
    direction: Tensor
    reading: float | None


def _judge(reading: CheckpointWriters, gains: bool, device: torch.device) -> Blind:
    hypotheses = 2 if reading.has_gains else 1
    scaling, pools = make_scaling(reading, make_pools(reading.units, reading.d_model), gains)
    dead = tuple(int(i) for i in scaling.silent)
    aside = [SetAside("channels that a quarter of the writers leave", dead)] if dead else []
    try:
        if len(pools) < MIN_POOLS:
            raise _CannotTellError(f"{len(pools)} writers are too few to compare")
        _require_width(scaling.width)
        units = read_emptiness(reading, pools, scaling, gains, device)
        candidate = _find_candidate(reading, scaling, pools, units, hypotheses, aside)
    except _CannotTellError as error:
        return Blind(
            verdict="undecided",
            reason=str(error),
            gains=gains,
            set_aside=tuple(aside),
            pools=len(pools),
        )
    direction: Tensor | None = candidate.direction
    detectable, reason = None, ""
    if candidate.p_value <= CLAIM:
        verdict = "edited"
        gap_direction = candidate.gaps[candidate.group].direction
        direction = scaling.outwards(_refined(candidate.units, gap_direction))
    elif candidate.p_value <= DOUBT:
        verdict = "undecided"
        reason = "a direction stands out, but not far enough beyond chance to claim an edit"
    else:
        direction = None
        level = CLAIM / len(candidate.gaps) / hypotheses
        detectable = _power(candidate.units, pools, groups_of(pools)["all"], level)
        verdict = "clean" if detectable is not None else "undecided"
        reason = "" if detectable is not None else "even a whole edit would not stand out here"
    return Blind(
        verdict=verdict,
        reason=reason,
        p_value=candidate.p_value,
        group=candidate.group,
        gaps=candidate.gaps,
        direction=direction,
        gains=gains,
        set_aside=tuple(aside),
        detectable=detectable,
        reading=candidate.reading,
        pools=len(pools),
    )


def _find_candidate(
    reading: CheckpointWriters,
    scaling: ChannelScaling,
    pools: Sequence[ComponentPool],
    units: Sequence[SoftNullProjector],
    hypotheses: int,
    aside: list[SetAside],
) -> _Candidate:
    """Test all groups again and again, without the directions that turn out to be no edit's.

    Args:
        reading: the checkpoint.
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
        direction = scaling.outwards(gaps[best].direction)
        energy = reading_energy(reading, direction) if p_value <= DOUBT else None
        no_edit = _no_edit(direction, energy, aside) if p_value <= DOUBT else None
        if no_edit is None:
            return _Candidate(
                units=units,
                gaps=gaps,
                group=best,
                p_value=p_value,
                direction=direction,
                reading=energy,
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


def _refined(units: Sequence[SoftNullProjector], direction: Tensor) -> Tensor:
    """The direction that the carrying pools name, whichever group it was found in."""
    current = direction
    for _ in range(2):
        along = [unit.along(current) for unit in units]
        bound = (SHARE + max(along)) / 2
        carrying = [unit for unit, value in zip(units, along, strict=True) if value >= bound]
        if len(carrying) < 2:
            break
        refined = emptiest(carrying)
        if float(refined @ direction) ** 2 < 0.5:
            break  # it left for another
        current = refined
    return current


def _no_edit(direction: Tensor, read: float | None, aside: list[SetAside]) -> Tensor | None:
    """What has to be left out if a direction is no edit's, ``[d_model, m]``; None if it may be."""
    largest = direction.square().sort(descending=True)
    few = int((largest.values.cumsum(0) < 0.7).sum()) + 1
    if few <= 4:
        channels = tuple(sorted(int(i) for i in largest.indices[:few]))
        aside.append(SetAside("a few channels alone", channels))
        gone = torch.zeros(len(direction), few, dtype=torch.float64)
        gone[list(channels), range(few)] = 1.0
        return gone
    if float(direction.mean()) ** 2 * len(direction) > 0.5:
        aside.append(SetAside("the mean of all channels, which LayerNorm does not see"))
        return torch.ones(len(direction), 1, dtype=torch.float64)
    if read is not None and read < 0.02:
        aside.append(SetAside("a direction that nothing reads either"))
        return direction.unsqueeze(1)
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
    smallest = None
    for scale in LADDER:
        planted = [unit.edited(vector, scale) for unit in units]
        if _test(planted, pools, chosen).p_value > claim:
            break
        smallest = scale
    return smallest
