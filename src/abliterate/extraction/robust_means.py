"""Means that a few outliers do not move: winsorised means and geometric medians.

Both come as rows, one of each prompt, whose plain mean is the estimate: of the winsorised mean the
activations with their extremes pulled in, of the geometric median the activations weighed as its
last step weighs them. How sure a candidate is follows from those rows as it does from activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from abliterate.distributed.rank_group import RankGroup
from abliterate.errors import UsageError
from abliterate.extraction.group_sums import GroupSums

Robust = Literal["none", "winsor", "median"]
_STEPS, _PRECISION, _SAME = 1000, 1e-12, 1e-13


def require_one_process(robust: Robust, ranks: RankGroup) -> None:
    """Refuse a robust mean of prompts that several ranks divide.

    Raises:
        UsageError: they do.
    """
    if robust != "none" and not ranks.is_unsplit:
        raise UsageError(
            f"--robust {robust} needs all prompts in one process: run it by itself, or leave it out"
        )


class CollectedRows:
    """The activations of one kind of prompt, all at once on the CPU, as the model gives them.

    They take ``n_prompts * n_positions * n_layers * d_model`` numbers of the model's dtype.
    """

    def __init__(self, n_prompts: int, shape: Sequence[int]) -> None:
        self._size = (n_prompts, *shape)
        self._rows: Tensor | None = None

    def put(self, rows: Sequence[int], activations: Tensor) -> None:
        """Take a batch ``[batch, n_positions, n_layers, d_model]``; it may come again."""
        if self._rows is None:
            self._rows = torch.empty(self._size, dtype=activations.dtype)
        self._rows[list(rows)] = activations.to("cpu")

    def sums(
        self, kept: Sequence[bool], groups: Sequence[int], robust: Robust, quantile: float
    ) -> GroupSums:
        """What :func:`robust_rows` makes of the prompts that count, summed by group."""
        assert self._rows is not None, "no prompt was read"
        which = torch.tensor([index for index, used in enumerate(kept) if used], dtype=torch.long)
        of_group = torch.tensor(groups)[which]
        n_groups = max(groups) + 1
        counts = torch.bincount(of_group, minlength=n_groups).double()
        sums = torch.zeros(n_groups, *self._size[1:], dtype=torch.float64)
        for layer in range(self._size[2]):
            values = self._rows[which, :, layer].double()  # [n, n_positions, d_model]
            sums[:, :, layer].index_add_(0, of_group, robust_rows(values, robust, quantile))
        return GroupSums(sums, counts)


def clipped(n_prompts: int, quantile: float) -> int:
    """How many of so many prompts' values are pulled in at each end."""
    return min(int(quantile * n_prompts + 1e-9), (n_prompts - 1) // 2)


def robust_rows(values: Tensor, robust: Robust, quantile: float) -> Tensor:
    """Rows whose mean is a robust mean of ``values``.

    Args:
        values: float64 ``[n, n_positions, d_model]``.
        robust: ``winsor``: of each coordinate, the values beyond the ``quantile`` at either end
            become those at it. ``median``: rows about the geometric median, the point with the
            smallest sum of distances (Weiszfeld's iteration).
        quantile: the share of the prompts at each end.
    """
    if robust == "none" or not len(values):
        return values
    if robust == "winsor":
        ends = clipped(len(values), quantile)
        low, high = (values.kthvalue(k, dim=0).values for k in (ends + 1, len(values) - ends))
        return values.clamp(low, high)
    median, weights = _geometric_median(values)
    return median + weights * (values - median)


def _geometric_median(values: Tensor) -> tuple[Tensor, Tensor]:
    """The medians ``[n_positions, d_model]``, and weights ``[n, n_positions, 1]`` of mean one."""
    scale = values.norm(dim=-1, keepdim=True).amax(0).clamp_(min=1e-300)  # [n_positions, 1]
    median = values.mean(0)
    for _ in range(_STEPS):
        distances = (values - median).norm(dim=-1, keepdim=True)
        apart = distances > _SAME * scale
        inverse = torch.where(apart, 1 / distances, torch.zeros_like(distances))
        total = inverse.sum(0)
        step = (inverse * (values - median)).sum(0)
        # Where the median lies on prompts it stays if they hold it (Vardi and Zhang, 2000).
        pull = step.norm(dim=-1, keepdim=True)
        held = (~apart).sum(0).double()
        share = torch.where(held > 0, 1 - held / pull.clamp(min=1e-300), torch.ones_like(pull))
        move = step / total.clamp(min=1e-300) * share.clamp(min=0.0)
        median = median + move
        if bool((move.norm(dim=-1, keepdim=True) <= _PRECISION * scale).all()):
            break
    distances = (values - median).norm(dim=-1, keepdim=True)
    weights = 1 / torch.maximum(distances, _SAME * scale)
    return median, weights / weights.mean(0)
