"""What the stages ask of a streamed model, each in as few readings of it as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from abliterate.inference.forward import (
    can_pad,
    last_logits,
    left_pad,
    logits_needed,
    token_streams,
)
from abliterate.inference.token_batches import TokenBudget, group_rows
from abliterate.offload.layer_streaming import BatchRun, OffloadedModel

Rows = tuple[int, ...]

# Routed experts get few rows of a batch each: twice what a batch in memory starts with was measured
# to be faster with them, and no slower without.
CPU_TOKENS = 2048


def look(
    stream: OffloadedModel,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int],
    batch_size: int | str = "auto",
    description: str = "extract",
) -> tuple[Tensor, Tensor]:
    """Last-token logits and ``resid_pre`` of all prompts, in one reading of the model.

    Args:
        stream: the model.
        prompts: token ids.
        positions: where to look, counted from each prompt's end.
        batch_size: prompts per batch, or ``auto``.
        description: shown beside the progress bar.

    Returns:
        Logits ``[prompts, vocabulary]`` and activations ``[prompts, n_positions, n_layers,
        d_model]``, the mean over streams where an architecture has several; on the CPU, in memory
        or in a mapped file.
    """
    model = stream.model
    width = stream.width
    shape = (len(prompts), len(positions), stream.n_blocks, width)
    seen = stream.activations.empty(shape, model.dtype)
    needed = logits_needed(model, positions)
    where = torch.tensor(positions, device=stream.device)
    logits: list[Tensor] = []

    def job(rows: Rows) -> BatchRun:
        batch, at = left_pad(model, prompts, rows), torch.tensor(rows)

        def see(layer: int, hidden: Tensor, output: object) -> None:
            streams = token_streams(hidden, batch.input_ids.shape, width)[:, where]
            seen[at, :, layer] = streams.mean(2).cpu()

        def use(found: Tensor) -> None:
            last = found if needed == 1 else found[:, -1]
            if not logits:
                logits.append(stream.activations.empty((len(prompts), last.shape[-1]), last.dtype))
            logits[0][at] = last.cpu()

        return BatchRun(
            partial(last_logits, model, batch, needed),
            use,
            (len(rows), batch.input_ids.shape[1]),
            needed,
            see=see,
        )

    flow(stream, prompts, job, batch_size, description)
    return logits[0], seen


def flow(
    stream: OffloadedModel,
    prompts: Sequence[Sequence[int]],
    job: Callable[[Rows], BatchRun],
    batch_size: int | str = "auto",
    description: str = "stream",
    mix: bool = True,
) -> None:
    """Take ``prompts`` through the model together, in batches for which ``job`` makes the jobs.

    Args:
        stream: the model.
        prompts: token ids.
        job: makes the job of the prompts with these numbers.
        batch_size: prompts per batch, or ``auto``.
        description: shown beside the progress bar.
        mix: prompts of different lengths may share a batch, where the architecture allows it.

    Raises:
        UsageError: a single prompt does not fit into memory.
    """
    budget = streaming_budget(stream, batch_size)
    retry(stream, budget, lambda: [job(rows) for rows in batches(stream, prompts, budget, mix)],
          description)  # fmt: skip


def streaming_budget(stream: OffloadedModel, batch_size: int | str = "auto") -> TokenBudget:
    """Tokens per batch; fixed, as the batches of a pass are made before it starts."""
    budget = TokenBudget(stream.device, batch_size, grow=False)
    if stream.device.type == "cpu":
        budget.tokens = CPU_TOKENS
    return budget


def batches(
    stream: OffloadedModel, prompts: Sequence[Sequence[int]], budget: TokenBudget, mix: bool = True
) -> list[Rows]:
    """Which prompts share a batch."""
    return group_rows(list(map(len, prompts)), budget, mix and can_pad(stream.model))


def retry(
    stream: OffloadedModel,
    budget: TokenBudget,
    jobs: Callable[[], list[BatchRun]],
    description: str,
) -> None:
    """One reading of the model for the jobs made within ``budget``, halved until they fit.

    Raises:
        UsageError: a single row does not fit into memory.
    """
    # The whole pass starts again: a batch too large shows at the first block.
    while not _one_reading(stream, budget, jobs(), description):
        pass


def _one_reading(
    stream: OffloadedModel, budget: TokenBudget, jobs: list[BatchRun], description: str
) -> bool:
    """Whether the jobs fitted into memory; else the budget is smaller."""
    return budget.try_batch(
        partial(stream.run, jobs, description),
        max((job.rows for job in jobs), default=1),
        max((job.rows * job.width for job in jobs), default=1),
        lambda: (
            f"a single prompt and a block do not fit into the memory of {stream.device.type}: use "
            "a smaller --dtype, a smaller --activation-memory or another --device"
        ),
    )
