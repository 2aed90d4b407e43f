"""Sums over random groups of the prompts: the mean, and out of the same pass how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abliterate.models.device_placement import to_device
from abliterate.precision import summed_rows

# Groups of prompts: as many as there are prompts, as far as their sums take no more than this; of
# large models at least so many. Half of them make up each half of the prompts.
_BYTES, _LEAST = 64 << 20, 8
# A direction shorter than this, relative to the longest candidate, is rounding noise.
_VANISHING = 1e-9


@dataclass(frozen=True)
class GroupSums:
    """What is left of the activations of one kind of prompt.

    Attributes:
        sums: float64 ``[groups, n_positions, n_layers, d_model]`` on the CPU.
        counts: how many prompts each is the sum of, float64 ``[groups]``.
    """

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over all prompts, ``[n_positions, n_layers, d_model]``; NaN if there is none."""
        return self.sums.sum(0) / self.counts.sum()

    def half(self, which: int) -> Tensor:
        """The mean of every other group: half of the prompts."""
        return self.sums[which::2].sum(0) / self.counts[which::2].sum()

    def variance_along(self, units: Tensor) -> Tensor:
        """How much the mean along unit vectors varies from one draw of the prompts to another.

        Args:
            units: ``[n_positions, n_layers, d_model]``.

        Returns:
            ``[n_positions, n_layers]``, from the spread of the groups: where each group is one
            prompt, the prompts' sample variance over their number. NaN of less than two groups.
        """
        along = torch.einsum("gpld,pld->gpl", self.sums, units)
        total = self.counts.sum()
        spread = along - self.counts[:, None, None] * (along.sum(0) / total)
        n_groups = int((self.counts > 0).sum())
        if n_groups < 2:
            return torch.full_like(along[0], math.nan)
        return (spread / total).square().sum(0) * (n_groups / (n_groups - 1))


def assign_groups(n_prompts: int, shape: Sequence[int], seed: int, kind: str) -> list[int]:
    """To which group each prompt belongs, at random.

    Args:
        n_prompts: how many there are, on all ranks.
        shape: of one prompt's activations, ``(n_positions, n_layers, d_model)``.
        seed: of the run.
        kind: of the prompts: each has a draw of its own.
    """
    fit = _BYTES // (8 * math.prod(shape))
    n_groups = max(1, min(n_prompts, max(_LEAST, fit)))
    order = np.random.default_rng([seed, *kind.encode()]).permutation(n_prompts)
    groups = [0] * n_prompts
    for rank, prompt in enumerate(order.tolist()):
        groups[prompt] = rank % n_groups
    return groups


@dataclass(frozen=True)
class PartialSums:
    """What the rows of one batch add to the sums of their groups.

    Attributes:
        groups: of which groups.
        parts: tensors ``[groups, ...]`` on the rows' device that add up to the sums.
    """

    groups: tuple[int, ...]
    parts: tuple[Tensor, ...]


def sum_groups(rows: Tensor, which: Tensor, groups: Sequence[int]) -> list[PartialSums]:
    """The sums of some of ``rows`` by group, in float64's precision.

    On an accelerator groups of as many rows are summed at once: one after the other, launching them
    would take longer than the model.

    Args:
        rows: ``[n, ...]``.
        which: which of them count, bool ``[n]`` on the same device.
        groups: the group of each.
    """
    members: dict[int, list[int]] = {}
    for at, group in enumerate(groups):
        members.setdefault(group, []).append(at)
    if rows.device.type == "cpu":
        return [
            PartialSums((group,), tuple(part[None] for part in summed_rows(rows[own], which[own])))
            for group, own in members.items()
        ]
    by_size: dict[int, list[int]] = {}
    for group, own in members.items():
        by_size.setdefault(len(own), []).append(group)
    found = []
    for same in by_size.values():
        index = to_device(torch.tensor([members[g] for g in same]).T.contiguous(), rows.device)
        found.append(PartialSums(tuple(same), summed_rows(rows[index], which[index])))
    return found


@dataclass(frozen=True)
class Stability:
    """How sure each candidate is, float64 ``[n_positions, n_layers]``; NaN where it has no
    direction.

    Attributes:
        split_half_cosine: cosine of the differences of means of two random halves of the prompts.
        norm: length of the difference of means.
        norm_standard_error: standard error of that length (delta method: the spread of the prompts
            along the direction).
    """

    split_half_cosine: Tensor
    norm: Tensor
    norm_standard_error: Tensor


def stability(harmful: GroupSums, harmless: GroupSums) -> Stability:
    """How sure each candidate ``mean(harmful) - mean(harmless)`` is."""
    difference = harmful.mean - harmless.mean
    norm = difference.norm(dim=-1)
    finite = torch.isfinite(norm)
    longest = float(norm[finite].max()) if bool(finite.any()) else 0.0
    vanishes = ~(norm > _VANISHING * longest)
    one, other = (harmful.half(which) - harmless.half(which) for which in (0, 1))
    cosine = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
    units = difference / norm[..., None]
    variance = harmful.variance_along(units) + harmless.variance_along(units)
    return Stability(
        cosine.masked_fill(vanishes, math.nan),
        norm,
        variance.sqrt().masked_fill(vanishes, math.nan),
    )
