"""``resid_pre`` reduced batch by batch: float64 sums over prompts, and their mean (section 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.distributed.rank_group import ALONE, RankGroup
from abliterate.extraction.group_sums import GroupSums, sum_groups
from abliterate.inference.engine import ActivationReader, BatchActivations
from abliterate.inference.in_memory import InMemoryReader
from abliterate.inference.token_batches import attempt
from abliterate.metrics.refusal import log_odds
from abliterate.models.device_placement import to_device
from abliterate.precision import to_host

Kept = tuple[bool, ...]


def mean_resid_pre(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    refusal_tokens: Sequence[int] | None = None,
    sign: float = 1.0,
    batch_size: int | str = "auto",
) -> tuple[Tensor, Kept]:
    """Mean ``resid_pre`` over prompts of a model in memory.

    Args:
        model: the model.
        prompts: token ids.
        positions: where to look, counted from each prompt's end.
        refusal_tokens: if given, only prompts whose refusal score has the sign ``sign`` count.
        sign: +1 keeps refused prompts, -1 keeps answered ones.
        batch_size: prompts per forward pass, or ``auto``.

    Returns:
        float64 ``[n_positions, n_layers, d_model]`` on the CPU (NaN if no prompt counts), and for
        each prompt whether it counts.
    """
    reader = InMemoryReader(model, {"": prompts}, positions, batch_size)
    one_group = [0] * len(prompts)
    sums, kept = sums_of_groups(reader, "", one_group, refusal_tokens=refusal_tokens, sign=sign)
    return sums.mean, kept


def sums_of_groups(
    reader: ActivationReader,
    kind: str,
    groups: Sequence[int],
    *,
    seen: Sequence[BatchActivations] = (),
    refusal_tokens: Sequence[int] | None = None,
    sign: float = 1.0,
    keep: Sequence[Callable[[Sequence[int], Tensor], None]] = (),
    ended: Sequence[bool] | None = None,
    ranks: RankGroup = ALONE,
) -> tuple[GroupSums, Kept]:
    """As :func:`mean_resid_pre`, reduced batch by batch to one float64 sum a group of prompts.

    Args:
        reader: gives the activations.
        kind: of which prompts.
        groups: to which group each of them belongs; of several ranks, this one's share.
        seen: the first of them, where they have been run already.
        refusal_tokens: if given, only prompts whose refusal score has the sign ``sign`` count.
        sign: +1 keeps refused prompts, -1 keeps answered ones.
        keep: each is called with the rows of each batch and their activations.
        ended: of each prompt, whether the thought about it has; others never count.
        ranks: the processes whose prompts make up the mean, by an all-reduce of their sums.
    """
    n_groups = 1 + max(ranks.all_gather(max(groups, default=0)))
    totals = torch.zeros(n_groups, *reader.shape, dtype=torch.float64)
    counted = torch.zeros(n_groups, dtype=torch.float64)
    kept = [True] * len(groups)

    def accumulate(batch: BatchActivations) -> None:
        device = batch.activations.device
        counts = torch.ones(len(batch.rows), dtype=torch.bool, device=device)
        if refusal_tokens is not None:
            counts = sign * log_odds(batch.logits, refusal_tokens) > 0
        if ended is not None and not all(ended):
            whole = torch.tensor([ended[row] for row in batch.rows])
            counts = counts & to_device(whole, counts.device)
        counts = counts.to(device)
        of_rows = [groups[row] for row in batch.rows]
        partial_sums = sum_groups(batch.activations, counts, of_rows)
        # What a batch has to say comes in one transfer, for which an accelerator is waited for.
        flags, *sums = to_host(counts, *(part for some in partial_sums for part in some.parts))
        for take in keep:
            take(list(batch.rows), batch.activations)
        # Last: what has run out of memory by here comes again.
        fetched = iter(sums)
        for some in partial_sums:
            for _ in some.parts:
                totals[list(some.groups)] += next(fetched)
        counted.index_add_(0, torch.tensor(of_rows), flags)
        for row, flag in zip(batch.rows, flags.tolist(), strict=True):
            kept[row] = bool(flag)

    with ranks.fail_together():
        for batch in seen:
            _in_parts(batch, accumulate)
        first = sum(len(batch.rows) for batch in seen)
        description = f"extract: {kind}".removesuffix(": ")
        reader.read(kind, range(first, len(groups)), accumulate, description)
    sums = GroupSums(ranks.all_reduce_sum(totals), ranks.all_reduce_sum(counted))
    return sums, tuple(ranks.gather(kept))


def _in_parts(batch: BatchActivations, use: Callable[[BatchActivations], None]) -> None:
    """Call ``use`` on a batch, or on halves of it where memory runs out."""
    half = len(batch.rows) // 2
    if not half:
        use(batch)
    elif not attempt(partial(use, batch)):
        for part in (slice(None, half), slice(half, None)):
            _in_parts(
                BatchActivations(batch.rows[part], batch.logits[part], batch.activations[part]), use
            )
