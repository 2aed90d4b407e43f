"""Many candidates and prompts in one pass over the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.inference.candidate_batches import FastPathFlags
from abliterate.inference.engine import CandidateRun
from abliterate.inference.fast_path import verified_runner
from abliterate.inference.forward import left_pad
from abliterate.inference.token_batches import TokenBudget
from abliterate.offload.layer_streaming import BatchRun, OffloadedModel
from abliterate.offload.streamed_interventions import Intervention, ablating, changed_job
from abliterate.offload.weight_passes import batches, retry, streaming_budget
from abliterate.writers import find_writers, stream_width
from abliterate.writers.tiny_model import shrunken

# A batch keeps its embeddings while it flows, beside the stream.
_COPIES = 2


def candidate_bytes(stream: OffloadedModel, tokens: int) -> int:
    """Memory of one candidate's activations on so many tokens."""
    size: int = stream.model.dtype.itemsize
    return tokens * stream.width * size * _COPIES


def run_candidates(
    stream: OffloadedModel,
    runs: Sequence[CandidateRun],
    tricks: FastPathFlags,
    batch_size: int | str,
    description: str,
) -> None:
    """All ``runs`` in one reading of the model.

    Args:
        stream: the model.
        runs: prompts and candidates.
        tricks: what may be saved.
        batch_size: prompts per batch, or ``auto``.
        description: shown beside the progress bar.
    """
    budget = streaming_budget(stream, batch_size)

    def jobs() -> list[BatchRun]:
        made: list[BatchRun] = []
        for run in runs:
            chosen = [run.prompts[row] for row in run.rows]
            for group in batches(stream, chosen, budget):
                rows = [run.rows[index] for index in group]
                made += _batch_jobs(stream, run, rows, tricks, budget)
        return made

    ablates = any(run.vectors is not None and run.layers is None for run in runs)
    with ablating(stream) if ablates else nullcontext():
        retry(stream, budget, jobs, description)


def _batch_jobs(
    stream: OffloadedModel,
    run: CandidateRun,
    rows: Sequence[int],
    tricks: FastPathFlags,
    budget: TokenBudget,
) -> list[BatchRun]:
    """One batch of prompts: the unmodified model, and each candidate."""
    batch = left_pad(stream.model, run.prompts, rows)
    by_layer: dict[int | None, list[int]] = {}
    for index in range(0 if run.vectors is None else len(run.vectors)):
        by_layer.setdefault(None if run.layers is None else run.layers[index], []).append(index)
    jobs: list[BatchRun] = []
    entered: dict[int, Tensor] = {}
    resumes = tricks.resume and run.baseline is not None
    if run.baseline is not None:
        use_baseline = run.baseline
        jobs.append(changed_job(stream, batch, None, lambda logits: use_baseline(logits[0], rows)))
        if resumes:
            jobs[0].change = _keep_entering(entered, by_layer)
    for layer, same in by_layer.items():
        assert run.vectors is not None
        assert run.use is not None
        size = budget.share(*batch.input_ids.shape) if tricks.rows else 1
        for first in range(0, len(same), size):
            chosen = same[first : first + size]
            # What is added starts from the unmodified stream, where that flows along.
            entering = None if layer is None or not resumes else partial(entered.__getitem__, layer)
            change = Intervention(run.vectors[chosen], layer)
            use = partial(_use, run.use, chosen, rows)
            jobs.append(changed_job(stream, batch, change, use, entering))
    return jobs


def _use(
    use: Callable[[Tensor, Sequence[int], Sequence[int]], None],
    candidates: Sequence[int],
    rows: Sequence[int],
    logits: Tensor,
) -> None:
    use(logits, candidates, rows)


def _keep_entering(
    entered: dict[int, Tensor], layers: Collection[int | None]
) -> Callable[[int, Tensor], Tensor]:
    """Notes the stream that enters each of ``layers``, for as long as it is there."""

    def keep(layer: int, hidden: Tensor) -> Tensor:
        entered.clear()
        if layer in layers:
            # A copy: the block may write into what it gets.
            entered[layer] = hidden.clone()
        return hidden

    return keep


def replay_tricks(model: PreTrainedModel) -> FastPathFlags:
    """What may be saved when candidates replay prompts, tried on a small random copy."""
    copy = shrunken(model.config)
    if type(copy) is not type(model):
        return FastPathFlags(rows=False, prefix=False, resume=False, last=False)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, stream_width(copy, find_writers(copy)), generator=generator)
    prompts = [list(range(3, 20)), list(range(5, 14))]
    with torch.inference_mode():
        return verified_runner(copy, prompts, vectors.double()).tricks
