"""audit without a base: grams of all units, the candidate direction and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.audit.readers import reading_energy
from abliterate.audit.spectra import WIDE, precision
from abliterate.audit.statistic import (
    LEAST_WIDTH,
    Gap,
    edited,
    emptied,
    energy_along,
    gap,
    log_gram,
    refine,
)
from abliterate.audit.units import Reading, Unit, read_columns
from abliterate.console import progress

CPU = torch.device("cpu")
#: An edit is claimed below this, nothing between the two is.
CLAIM, DOUBT = 1e-7, 1e-3
#: Sampled columns of a cell, per channel of the stream.
_COLUMNS = 4
_LEAST_CELLS = 4
# Grams that are held at once: floats of memory, and eigendecompositions that still take minutes.
_MOST_FLOATS, _MOST_FLOPS = 1.5e9, 1.2e13
_FEWEST_CELLS = 12  # in a wide model: two of each kind in each third of the depth
_SMALL = 1024  # up to this width the power is measured for a ladder of scales
LADDER = (1.0, 0.8, 0.5, 0.3)
_ROUNDS = 8
_DEAD = 1e-4
_USUAL = 1.5  # rows whose norm is within this factor of the median are left as they are
_SEED = 0


@dataclass(frozen=True)
class Cell:
    """Units whose grams are added up: one each, or neighbouring layers in a wide model."""

    kind: str
    layers: tuple[int | None, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class SetAside:
    """A direction that no writer writes for another reason than an edit."""

    reason: str
    channels: tuple[int, ...] = ()


@dataclass(frozen=True)
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
        cells: how many grams were compared.
    """

    verdict: str
    reason: str
    p_value: float
    group: str
    gaps: Mapping[str, Gap] = field(repr=False)
    direction: Tensor | None
    gains: bool
    set_aside: tuple[SetAside, ...]
    detectable: float | None
    reading: float | None
    cells: int


def make_cells(units: Sequence[Unit], width: int) -> list[Cell]:
    """One cell for each unit, or as few for each kind as memory and time allow."""
    most = int(max(_FEWEST_CELLS, min(_MOST_FLOATS / width**2, _MOST_FLOPS / (10 * width**3))))
    if len(units) <= most:
        return [Cell(u.kind, (u.layer,), (u,)) for u in units]
    kinds = dict.fromkeys(u.kind for u in units)
    cells = []
    for kind in kinds:
        own = [u for u in units if u.kind == kind]
        number = max(1, min(len(own), round(most * len(own) / len(units))))
        for index in range(number):
            some = own[len(own) * index // number : len(own) * (index + 1) // number]
            cells.append(Cell(kind, tuple(u.layer for u in some), tuple(some)))
    return cells


def read_grams(
    reading: Reading, cells: Sequence[Cell], gains: bool = True, device: torch.device = CPU
) -> list[Tensor]:
    """The gram of each cell, each unit in it with the same weight, ``[d, d]`` on the device."""
    width, dtype = reading.d_model, precision(reading.d_model)
    share = _COLUMNS if width <= WIDE else _COLUMNS // 2
    grams = []
    for cell in progress(cells, "audit: writers", total=len(cells)):
        total = torch.zeros(width, width, dtype=dtype, device=device)
        for unit in cell.units:
            most = max(64, math.ceil(share * width / len(cell.units)))
            columns = read_columns(reading, unit, most, _SEED, gains)
            energy = float(columns.square().sum())
            if energy > 0:
                # Scaled first: the product of small numbers leaves float32.
                here = (columns / math.sqrt(energy)).to(device, dtype)
                del columns
                total.addmm_(here, here.T)
        grams.append(total)
    return grams


def look(reading: Reading, device: torch.device = CPU) -> Blind:
    """Judge a checkpoint from its writers alone.

    Args:
        reading: the checkpoint.
        device: where grams are made and decomposed.
    """
    cells = make_cells(reading.units, reading.d_model)
    first = _judge(reading, cells, read_grams(reading, cells, device=device), True)
    if first.verdict == "edited" or not reading.has_gains:
        return first
    # Tools that do not know of norms behind a writer edit the matrices with the plain direction.
    plain = _judge(reading, cells, read_grams(reading, cells, False, device), False)
    return plain if plain.verdict == "edited" else first


def _judge(reading: Reading, cells: Sequence[Cell], grams: Sequence[Tensor], gains: bool) -> Blind:
    present = [(c, g) for c, g in zip(cells, grams, strict=True) if float(g.trace()) > 0]
    cells, grams = [c for c, _ in present], [g for _, g in present]
    hypotheses = 2 if reading.has_gains else 1
    basis, aside = _live(grams, reading.d_model)
    if len(cells) < _LEAST_CELLS or basis.shape[1] < LEAST_WIDTH:
        reason = (
            f"{len(cells)} writers are too few to compare"
            if len(cells) < _LEAST_CELLS
            else f"{basis.shape[1]} channels are too few for a direction to stand out"
        )
        return Blind(
            "undecided", reason, 1.0, "", {}, None, gains, tuple(aside), None, None, len(cells)
        )
    groups = groups_of(cells)
    for _ in range(_ROUNDS):
        logs = [log_gram(_inside(gram, basis)) for gram in grams]
        gaps = _test(logs, groups, cells)
        name = min(gaps, key=lambda key: (gaps[key].p_value, -gaps[key].ratio))
        best = gaps[name]
        p_value = min(1.0, best.p_value * len(gaps) * hypotheses)
        direction = basis @ best.direction
        direction = direction / direction.norm()
        read = None
        if p_value > DOUBT:
            break
        read = reading_energy(reading, direction)
        smaller = _without(basis, direction, read, aside)
        if smaller is None:
            break
        basis = smaller
        if basis.shape[1] < LEAST_WIDTH:
            break
    done = tuple(aside)
    if p_value <= CLAIM:
        chosen = groups[name]
        refined = _refined([grams[i] for i in chosen], direction)
        return Blind(
            "edited", "", p_value, name, gaps, refined, gains, done, None, read, len(cells)
        )
    if p_value <= DOUBT:
        reason = "a direction stands out, but not far enough beyond chance to claim an edit"
        return Blind(
            "undecided", reason, p_value, name, gaps, direction, gains, done, None, read, len(cells)
        )
    detectable = _power(grams, logs, basis, groups, cells, hypotheses)
    reason = "" if detectable is not None else "even a whole edit would not stand out here"
    return Blind(
        "clean" if detectable is not None else "undecided",
        reason, p_value, name, gaps, None, gains, done, detectable, None, len(cells),
    )  # fmt: skip


def _refined(grams: Sequence[Tensor], direction: Tensor) -> Tensor:
    """First on all units of the group, then on those alone that carry the edit."""
    typical = [typical_energy(gram) for gram in grams]
    found = refine(grams, direction, typical)
    energies = [energy_along(g, found) / t for g, t in zip(grams, typical, strict=True)]
    bound = max(10 * min(energies), 0.1)
    low = [i for i, energy in enumerate(energies) if energy <= bound]
    if len(low) < 2:
        return found
    return refine([grams[i] for i in low], found, [typical[i] for i in low])


def groups_of(cells: Sequence[Cell]) -> dict[str, list[int]]:
    """The groups of cells in which an edit may hide: all, by kind, by third of the depth."""
    every = range(len(cells))
    kinds = {"attention": ("attention", "mixer"), "mlp": ("mlp", "expert")}
    layers = [layer for cell in cells for layer in cell.layers if layer is not None]
    depth = max(layers, default=-1) + 1
    inner = [i for i in every if cells[i].layers[0] is not None]
    groups = {"all": list(every), "blocks": inner}
    groups |= {n: [i for i in inner if cells[i].kind in kinds[n]] for n in kinds}
    for index, name in enumerate(("first third", "middle third", "last third")):
        low, high = depth * index / 3, depth * (index + 1) / 3
        groups[name] = [i for i in inner if low <= _middle(cells[i]) + 0.5 <= high]
    unique = {tuple(chosen): name for name, chosen in reversed(groups.items())}
    return {
        name: chosen
        for name, chosen in groups.items()
        if len(chosen) >= _LEAST_CELLS and unique[tuple(chosen)] == name
    }


def _middle(cell: Cell) -> float:
    inside = [layer for layer in cell.layers if layer is not None]
    return sum(inside) / len(inside)


def _inside(gram: Tensor, basis: Tensor) -> Tensor:
    """A gram in the coordinates of a basis ``[d, k]``, which may be on another device."""
    if bool((basis.count_nonzero(dim=0) == 1).all()):  # channels, each with a factor
        chosen = basis.abs().argmax(dim=0)
        factors = basis[chosen, torch.arange(basis.shape[1])].to(gram)
        chosen = chosen.to(gram.device)
        cut = gram[chosen][:, chosen]
        return cut.mul_(factors.unsqueeze(1)).mul_(factors)
    here = basis.to(gram)
    out: Tensor = here.T @ gram @ here
    return out


def _test(
    logs: Sequence[Tensor], groups: Mapping[str, Sequence[int]], cells: Sequence[Cell]
) -> dict[str, Gap]:
    gaps = {}
    for name, chosen in groups.items():
        # Alternate within each kind, so that each half has its share of all depths and kinds.
        kinds = dict.fromkeys(cells[i].kind for i in chosen)
        ordered = [i for kind in kinds for i in chosen if cells[i].kind == kind]
        halves = [position % 2 == 1 for position in range(len(ordered))]
        gaps[name] = gap([logs[i] for i in ordered], halves)
    return gaps


def _live(grams: Sequence[Tensor], width: int) -> tuple[Tensor, list[SetAside]]:
    """The channels that are written at all, unusual ones scaled to the rest: ``[d_model, live]``.

    What all writers share in the norms of their rows widens the spectrum's lower edge and says
    nothing; a direction survives the scaling, its coordinates change by known factors.
    """
    rows = torch.stack([gram.diagonal().double().cpu() for gram in grams])
    relative = rows / rows.median(dim=1, keepdim=True).values.clamp(min=1e-300)
    silent = (relative < _DEAD).double().mean(dim=0) > 0.25
    norms = torch.exp(torch.log(relative.clamp(_DEAD, 1 / _DEAD)).mean(dim=0) / 2)
    norms = norms / norms.clamp(1 / _USUAL, _USUAL)
    basis = torch.diag(1 / norms)[:, ~silent]
    dead = tuple(int(i) for i in silent.nonzero()[:, 0])
    aside = [SetAside("channels that a quarter of the writers leave", dead)] if dead else []
    return basis, aside


def _without(
    basis: Tensor, direction: Tensor, read: float | None, aside: list[SetAside]
) -> Tensor | None:
    """A basis without a direction that is no edit's; None if it may be one."""
    squares = direction.square()
    largest = squares.sort(descending=True)
    few = int((largest.values.cumsum(0) < 0.7).sum()) + 1
    if few <= 4:
        channels = tuple(sorted(int(i) for i in largest.indices[:few]))
        aside.append(SetAside("a few channels alone", channels))
        gone = torch.zeros(len(direction), few, dtype=torch.float64)
        gone[list(channels), range(few)] = 1.0
    elif float(direction.mean()) ** 2 * len(direction) > 0.5:
        aside.append(SetAside("the mean of all channels, which LayerNorm does not see"))
        gone = torch.ones(len(direction), 1, dtype=torch.float64)
    elif read is not None and read < 0.02:
        aside.append(SetAside("a direction that nothing reads either"))
        gone = direction.unsqueeze(1)
    else:
        return None
    inside = basis.T @ gone
    keep = torch.linalg.qr(torch.cat([inside, torch.eye(len(inside), dtype=torch.float64)], 1))[0]
    smaller: Tensor = basis @ keep[:, gone.shape[1] :]
    return smaller


def typical_energy(gram: Tensor) -> float:
    """The median energy of random directions."""
    generator = torch.Generator().manual_seed(_SEED)
    tries = torch.randn(len(gram), 64, generator=generator, dtype=torch.float64)
    tries = tries / tries.norm(dim=0)
    tries = tries.to(gram)
    return float((tries * (gram @ tries)).sum(dim=0).median())


def _power(
    grams: Sequence[Tensor],
    logs: Sequence[Tensor],
    basis: Tensor,
    groups: Mapping[str, Sequence[int]],
    cells: Sequence[Cell],
    hypotheses: int,
) -> float | None:
    """The smallest scale of a planted edit of all writers that the same test claims."""
    generator = torch.Generator().manual_seed(_SEED + 1)
    every = {"all": groups["all"]}
    if len(basis) > WIDE:
        vector = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64)
        planted = [emptied(log, vector / vector.norm()) for log in logs]
        whole = _test(planted, every, cells)["all"]
        return LADDER[0] if whole.p_value * len(groups) * hypotheses <= CLAIM else None
    live = basis.abs().sum(dim=1) > 0
    smallest = None
    for scale in LADDER if len(basis) <= _SMALL else LADDER[:1]:
        vector = live * torch.randn(len(live), generator=generator, dtype=torch.float64)
        planted = edited(grams, vector / vector.norm(), scale)
        changed = [log_gram(_inside(gram, basis)) for gram in planted]
        found = _test(changed, every, cells)["all"]
        if found.p_value * len(groups) * hypotheses > CLAIM:
            break
        smallest = scale
    return smallest
