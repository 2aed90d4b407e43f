"""The fastest way to replay prompts that gives what plain full passes give, tried once a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.batching import out_of_memory
from abliterate.console import log
from abliterate.forward import can_pad, last_logits, pad
from abliterate.interventions import ablate, add
from abliterate.replay import Replay, Tricks
from abliterate.writers import decoder_blocks

# Largest difference of logits, relative to their spread, that is rounding in a given dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4}
_ROUNDING_HALF = 2e-2
# A difference that no rounding explains.
_WRONG = 0.1
# From the fastest to what any architecture allows that treats the rows of a batch alike.
_LADDER = (
    Tricks(),
    Tricks(prefix=False),
    Tricks(last=False),
    Tricks(last=False, prefix=False),
    Tricks(last=False, resume=False),
    Tricks(last=False, prefix=False, resume=False),
)
# What an architecture that does not allow a trick may raise.
_FAILURES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError)


def verified_replay(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    vectors: Tensor,
    batch_size: int | str = "auto",
) -> Replay:
    """The fastest way to run ``prompts`` that gives what full passes give.

    Args:
        model: the model.
        prompts: token ids of every prompt that will run; the shortest and the longest are tried.
        vectors: ``[2, d_model]``, two directions to try.
        batch_size: prompts per forward pass, or ``auto``.
    """
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    ends = [prompts[by_length[0]], prompts[by_length[-1]]]
    layer = len(decoder_blocks(model)) // 2
    full = _full_passes(model, ends, vectors, layer)
    spread = float(full.double().std()) + 1e-30

    def off(tricks: Tricks) -> float:
        """How far from full passes, relative to the logits' spread; infinite if it fails."""
        try:
            replay = Replay(model, prompts, batch_size, tricks)
            return _difference(replay, ends, vectors, layer, full) / spread
        except _FAILURES as error:
            if out_of_memory(error):
                raise
            log.debug("%s cannot be used with this architecture: %s", tricks, error)
            return float("inf")

    # Rounding, from one candidate and prompt at a time to batches; measured where it matters.
    rounding = _ROUNDING.get(model.dtype, _ROUNDING_HALF)
    noise = 0.0
    for tricks in _LADDER:
        difference = off(tricks)
        if rounding < difference < _WRONG and not noise:
            noise = off(_LADDER[-1])
        if difference <= max(rounding, 4 * noise):
            return Replay(model, prompts, batch_size, tricks)
        log.info("%s differs from full passes by %.1e: not used", tricks, difference)
    return Replay(model, prompts, batch_size, replace(_LADDER[-1], rows=False))


def _full_passes(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], vectors: Tensor, layer: int
) -> Tensor:
    """Logits ``[2, 2, vocabulary]``: each vector ablated, and added, with one of the prompts."""
    rows = []
    for where in (None, layer):
        for vector, ids in zip(vectors, prompts, strict=True):
            change = ablate(model, vector) if where is None else add(model, vector, where)
            with change, torch.inference_mode():
                rows.append(last_logits(model, pad(model, [ids], [0]))[0])
    return torch.stack(rows).view(2, 2, -1)


def _difference(
    replay: Replay,
    prompts: Sequence[Sequence[int]],
    vectors: Tensor,
    layer: int,
    full: Tensor,
) -> float:
    """Largest difference of logits from those of full passes."""
    units = vectors / vectors.norm(dim=1, keepdim=True)
    off = 0.0
    both = list(range(len(prompts)))
    for rows in [both] if can_pad(replay.model) else [[row] for row in both]:
        piece, _ = replay.baseline(replay.piece(prompts, rows))
        for way, where in enumerate((None, layer)):
            candidates = replay.prepare(units if where is None else vectors, where)
            got = replay.logits(candidates, piece)[:, :, -1]
            for at, row in enumerate(rows):
                error = (got[row, at] - full[way, row]).abs().max()
                off = max(off, float(error.nan_to_num(float("inf"))))
    return off
