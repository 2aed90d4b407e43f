"""The fastest way to replay prompts that gives what plain full passes give, tried once a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.console import log
from abliterate.inference.batched_interventions import InterventionRunner
from abliterate.inference.candidate_batches import FastPathFlags
from abliterate.inference.forward import can_pad, last_logits, left_pad
from abliterate.inference.interventions import ablate, add
from abliterate.inference.rounding import (
    COARSE,
    COPIES,
    LARGEST_ROUNDING,
    computes_finely,
    off_by,
    rounding_of_batches,
)
from abliterate.inference.token_batches import out_of_memory
from abliterate.inference.trials import FAILURES
from abliterate.precision import widened
from abliterate.writers import decoder_blocks

# Difference of logits, relative to their spread, that is rounding in a given dtype: the largest,
# and in half precision the root mean square.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4}
_ROUNDING_HALF = 1e-2
# A difference that no rounding explains.
_WRONG = {True: 0.1, False: COARSE}
# From the fastest to what any architecture allows that treats the rows of a batch alike.
_LADDER = (
    FastPathFlags(),
    FastPathFlags(join=False),
    FastPathFlags(prefix=False),
    FastPathFlags(join=False, prefix=False),
    FastPathFlags(join=False, last=False),
    FastPathFlags(join=False, last=False, prefix=False),
    FastPathFlags(join=False, last=False, resume=False),
    FastPathFlags(join=False, last=False, prefix=False, resume=False),
)


def verified_runner(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    vectors: Tensor,
    batch_size: int | str = "auto",
) -> InterventionRunner:
    """The fastest way to run ``prompts`` that gives what full passes give.

    Args:
        model: the model.
        prompts: token ids of every prompt that will run; the shortest and the longest are tried.
        vectors: ``[2, d_model]``, two directions to try.
        batch_size: prompts per forward pass, or ``auto``.
    """
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    ends = [prompts[by_length[0]], prompts[by_length[-1]]]
    # Where the first and where the second vector is added; in one batch where layers may join.
    layer = len(decoder_blocks(model)) // 2
    layers = (layer, min(layer + 1, len(decoder_blocks(model)) - 1))
    full = _full_passes(model, ends, vectors, layers)[0]
    fine = computes_finely(model)
    spread = float(widened(full).std())

    def off(tricks: FastPathFlags) -> tuple[float, InterventionRunner | None]:
        """How far from full passes, relative to the logits' spread, and what was tried; infinite if
        it fails."""
        try:
            replay = InterventionRunner(model, prompts, batch_size, tricks)
            return _difference(replay, ends, vectors, layers, full, fine, spread), replay
        except FAILURES as error:
            if out_of_memory(error):
                raise
            log.debug("%s cannot be used with this architecture: %s", tricks, error)
            return float("inf"), None

    # Rounding, from one candidate and prompt at a time to batches; measured where it matters.
    rounding = allowed = _ROUNDING[model.dtype] if fine else _ROUNDING_HALF
    noise, copied = 0.0, fine
    for tricks in _LADDER:
        difference, replay = off(tricks)
        if rounding < difference < _WRONG[fine] and not noise:
            noise = off(_LADDER[-1])[0]
            allowed = max(allowed, min(4 * noise, _WRONG[fine]))
        if allowed < difference <= LARGEST_ROUNDING and not copied:
            copies = _full_passes(model, ends, vectors, layers, COPIES).flatten(1, 2)
            allowed = max(allowed, rounding_of_batches(copies, full.flatten(0, 1), spread))
            copied = True
        if replay is not None and difference <= allowed:
            replay.start_budget()  # what a trial of two prompts takes is no measure
            return replay
        log.info("%s differs from full passes by %.1e: not used", tricks, difference)
    return InterventionRunner(model, prompts, batch_size, replace(_LADDER[-1], rows=False))


def _full_passes(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    vectors: Tensor,
    layers: tuple[int, int],
    copies: int = 1,
) -> Tensor:
    """Logits ``[copies, 2, 2, vocabulary]``: each vector ablated, and added, with one of the
    prompts, which makes up the batch."""
    rows = []
    for added in (False, True):
        for vector, ids, layer in zip(vectors, prompts, layers, strict=True):
            change = add(model, vector, layer) if added else ablate(model, vector)
            with change, torch.inference_mode():
                batch = left_pad(model, [ids] * copies, range(copies))
                rows.append(last_logits(model, batch))
    return torch.stack(rows, 1).view(copies, 2, 2, -1)


def _difference(
    replay: InterventionRunner,
    prompts: Sequence[Sequence[int]],
    vectors: Tensor,
    layers: tuple[int, int],
    full: Tensor,
    fine: bool,
    spread: float,
) -> float:
    """How far the logits of the row that is farthest are from those of full passes."""
    units = vectors / vectors.norm(dim=1, keepdim=True)
    off = 0.0
    both = list(range(len(prompts)))
    together = [both] if replay.tricks.join else [[at] for at in both]
    for rows in [both] if can_pad(replay.model) else [[row] for row in both]:
        piece, _ = replay.baseline(replay.piece(prompts, rows))
        got = [replay.logits(replay.prefill(units), piece)]
        parts = [replay.prefill(vectors[which], [layers[at] for at in which]) for which in together]
        got.append(torch.cat([replay.logits(part, piece) for part in parts]))
        for at, row in enumerate(rows):
            for way in (0, 1):
                off = max(off, off_by(got[way][row, at, -1], full[way, row], fine, spread))
    return off
