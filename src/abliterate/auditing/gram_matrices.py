"""From the files to the emptiness of each pool, in coordinates in which channels are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.auditing.component_pools import ComponentPool
from abliterate.auditing.components import AuditedComponent, CheckpointWriters, read_columns
from abliterate.auditing.eigengap_test import SoftNullProjector, of_matrix
from abliterate.auditing.soft_null_space import FINE_GRAM, emptiness, is_wide, precision, storage
from abliterate.console import progress
from abliterate.errors import CheckpointError

# Sampled columns of a pool, per channel of the stream.
_COLUMNS, _WIDE_COLUMNS = 4, 2
_ROW_UNITS = 4  # of a pool whose rows' norms are measured, in a wide model
_ROW_COLUMNS = 256  # of each of them
_DEAD = 1e-4
_USUAL = 1.5  # rows whose norm is within this factor of the median are left as they are
_BLOCKS = 4
_SEED = 0
_GUESS = 0.2  # of the first shift, as a multiple of the mean energy


@dataclass(frozen=True)
class ChannelScaling:
    """Coordinates of the channels that are written at all, unusual ones scaled to the rest.

    What all writers share in the norms of their rows widens the spectrum's edge and says nothing;
    a direction survives the scaling, its coordinates change by known factors.

    Attributes:
        live: the channels, ``[k]``.
        silent: the others.
        factors: float64 ``[k]``.
        d_model: width of the stream.
    """

    live: Tensor = field(repr=False)
    silent: Tensor = field(repr=False)
    factors: Tensor = field(repr=False)
    d_model: int

    @property
    def width(self) -> int:
        return len(self.live)

    def outwards(self, inside: Tensor) -> Tensor:
        """Directions ``[k, m]`` as orthonormal ones of the stream, ``[d_model, m]``."""
        out = inside.new_zeros(self.d_model, inside.shape[1])
        out[self.live] = self.factors.unsqueeze(1) * inside
        one = inside.shape[1] == 1  # whose sign stays
        basis: Tensor = out / out.norm() if one else torch.linalg.qr(out)[0]
        return basis

    def inwards(self, directions: Tensor) -> Tensor:
        """What is orthogonal to these in here is so to ``directions`` ``[d_model, m]`` outside."""
        return self.factors.unsqueeze(1) * directions[self.live]

    def cut(self, gram: Tensor) -> Tensor:
        """A gram in these coordinates; the given one may be changed."""
        if self.width < self.d_model:
            live = self.live.to(gram.device)
            gram = gram[live][:, live]
        factors = self.factors.to(gram)
        return gram.mul_(factors.unsqueeze(1)).mul_(factors)


def make_scaling(
    reading: CheckpointWriters, pools: Sequence[ComponentPool], gains: bool
) -> tuple[ChannelScaling, list[ComponentPool]]:
    """The scaling of all pools, and those of them that are not zero."""
    wide_model = is_wide(reading.d_model)
    rows, present = [], []
    for pool in pools:
        step = max(1, math.ceil(len(pool.units) / _ROW_UNITS)) if wide_model else 1
        max_columns = _ROW_COLUMNS if wide_model else _max_columns(reading, pool)
        energy = torch.zeros(reading.d_model, dtype=torch.float64)
        for unit in pool.units[::step]:
            dtype = precision(reading.d_model)
            columns = read_columns(reading, unit, max_columns, _SEED, gains, dtype)
            row_energy = torch.linalg.vector_norm(columns, dim=1, dtype=torch.float64).square()
            whole = _finite(float(row_energy.sum()), unit)
            energy += row_energy / whole if whole > 0 else row_energy
        if float(energy.sum()) > 0:
            rows.append(energy)
            present.append(pool)
    if not rows:
        every = torch.arange(reading.d_model)
        return ChannelScaling(
            every, every[:0], torch.ones(len(every), dtype=torch.float64), len(every)
        ), []
    stacked = torch.stack(rows)
    relative = stacked / stacked.median(dim=1, keepdim=True).values.clamp(min=1e-300)
    silent = (relative < _DEAD).double().mean(dim=0) > 0.25
    norms = torch.exp(torch.log(relative.clamp(_DEAD, 1 / _DEAD)).mean(dim=0) / 2)
    norms = norms / norms.clamp(1 / _USUAL, _USUAL)
    live = (~silent).nonzero()[:, 0]
    scaling = ChannelScaling(live, silent.nonzero()[:, 0], 1 / norms[live], reading.d_model)
    return scaling, present


def read_emptiness(
    reading: CheckpointWriters,
    pools: Sequence[ComponentPool],
    scaling: ChannelScaling,
    gains: bool,
    device: torch.device,
) -> list[SoftNullProjector]:
    """The emptiness of each pool, each unit in it with the same weight, on the device."""
    projectors, guess = [], _GUESS
    fine: set[str] = set()  # kinds whose spectra were too steep for float32
    for pool in progress(pools, "audit: writers", total=len(pools)):
        matrix = None
        if pool.kind not in fine:
            coarse = precision(reading.d_model)
            matrix, guess = _emptiness(reading, pool, scaling, gains, device, coarse, guess)
        wide = is_wide(reading.d_model)
        if matrix is None or (wide and guess <= FINE_GRAM):
            if not wide:
                fine.add(pool.kind)
            matrix, guess = _emptiness(reading, pool, scaling, gains, device, torch.float64, guess)
            assert matrix is not None
        projectors.append(of_matrix(matrix.to(storage(reading.d_model))))
        del matrix
    return projectors


def _emptiness(
    reading: CheckpointWriters,
    pool: ComponentPool,
    scaling: ChannelScaling,
    gains: bool,
    device: torch.device,
    dtype: torch.dtype,
    guess: float,
) -> tuple[Tensor | None, float]:
    gram, columns = _gram(reading, pool, gains, device, dtype)
    gram = scaling.cut(gram)
    rows = gram.diagonal()
    zero = int((rows <= 1e-12 * rows.max()).sum())
    del rows
    return emptiness(gram, max(zero, scaling.width - columns), guess)


def _gram(
    reading: CheckpointWriters,
    pool: ComponentPool,
    gains: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, int]:
    """The lower triangle of a pool's gram ``[d, d]`` (in blocks), and its number of columns."""
    width = reading.d_model
    total = torch.zeros(width, width, dtype=dtype, device=device)
    count = 0
    step = -(-width // _BLOCKS)
    for unit in pool.units:
        columns = read_columns(reading, unit, _max_columns(reading, pool), _SEED, gains, dtype)
        norm = _finite(float(torch.linalg.vector_norm(columns, dtype=torch.float64)), unit)
        if norm > 0:
            # Scaled first: products of very small or large numbers leave float32.
            here = columns.div_(norm).to(device)
            count += here.shape[1]
            for begin in range(0, width, step):
                end = min(begin + step, width)
                total[begin:end, :end].addmm_(here[begin:end], here[:end].T)
    return total, count


def _max_columns(reading: CheckpointWriters, pool: ComponentPool) -> int:
    share = _WIDE_COLUMNS if is_wide(reading.d_model) else _COLUMNS
    return max(64, math.ceil(share * reading.d_model / len(pool.units)))


def _finite(energy: float, unit: AuditedComponent) -> float:
    if not math.isfinite(energy):
        raise CheckpointError(f"{unit.label}: the gain of its norm makes its weights infinite")
    return energy
