"""Which prompts candidates are measured on together, and in which order.

A batch after which candidates may be rejected is small; one that is measured to the end is large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from abliterate.inference.batched_interventions import InterventionRunner
from abliterate.inference.candidate_batches import PromptBatch
from abliterate.inference.forward import can_pad
from abliterate.inference.token_batches import group_rows
from abliterate.metrics.logit_metrics import BaselineLogits, LogitMetric, refusal_metric
from abliterate.selection.search_inputs import SearchInputs

# A batch of prompts, and what to read from its logits.
Round = tuple[PromptBatch, LogitMetric]

# KL is tried on one in this many prompts before bypass is measured.
_TRIED = 8
# A batch of prompts runs for about as many candidates at once, which share what it costs beyond
# its tokens.
_SHARED = 8


class ValidationBatches:
    """The batches of a search."""

    def __init__(self, task: SearchInputs, replay: InterventionRunner) -> None:
        self.task, self.replay = task, replay

    @cached_property
    def bypass(self) -> list[Round]:
        """All harmful prompts."""
        measure = refusal_metric(self.task.refusal_tokens)
        return [(piece, measure) for piece in self._pieces(self.task.harmful)]

    @cached_property
    def induce(self) -> list[Round]:
        """All harmless prompts, after some of which candidates may be rejected."""
        measure = refusal_metric(self.task.refusal_tokens)
        return [(piece, measure) for piece in self._harmless[0]]

    @cached_property
    def kl(self) -> tuple[list[Round], list[Round], list[Round], Tensor]:
        """The prompts on which KL is tried, all others in small and in large batches, and the
        least KL of each prompt."""
        task = self.task
        if task.answered is None:
            prompts, reference = task.harmless, self._harmless[1]
        else:
            assert task.n_answer is not None
            prompts = task.answered
            every = self._pieces(prompts, None, 1, task.n_answer)
            reference = self._reference(every, task.n_answer)[1]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        first = max(1, len(order) // _TRIED)

        def rounds(rows: Sequence[int], steps: int, shared: int = _SHARED) -> list[Round]:
            pieces = self._pieces(prompts, rows, steps, task.n_answer, shared)
            return [(piece, reference.kl) for piece in pieces]

        probed, remaining = order[:first], order[first:]
        # The large batches are for one candidate at a time.
        return (
            rounds(probed, 1),
            rounds(remaining, 4),
            rounds(remaining, 1, 1),
            reference.floor,
        )

    @cached_property
    def _harmless(self) -> tuple[list[PromptBatch], BaselineLogits]:
        """Batches after which candidates may be rejected by induce, and what KL compares with."""
        prompts, prefix = self.task.harmless, self.replay.prefix
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        # A bound rarely rejects before half of the prompts; then in small steps, unless a small
        # batch takes as long as a large one.
        steps = (4, 8) if self.replay.budget.device.type == "cpu" else (2, 4)
        early = set(order[: len(order) // 2])
        # The unmodified model runs once: on few batches, of which these are cut.
        large, reference = self._reference(
            self._pieces(prompts, order, shared=1), [1] * len(prompts)
        )
        cut = []
        for piece in large:
            rows = piece.batch.rows
            first = sum(row in early for row in rows)
            for part, step in ((range(first), steps[0]), (range(first, len(rows)), steps[1])):
                lengths = [len(prompts[rows[index]]) - prefix for index in part]
                max_rows = math.ceil(len(prompts) / step)
                for group in self._groups(lengths, max_rows, _SHARED):
                    of_group = slice(part[group[0]], part[group[-1]] + 1)
                    cut.append(piece.part(of_group, max(lengths[index] for index in group)))
        return cut, reference

    def _reference(
        self, pieces: Sequence[PromptBatch], counts: Sequence[int]
    ) -> tuple[list[PromptBatch], BaselineLogits]:
        runs = [run for piece in pieces for run in self.replay.baselines(piece)]
        parts = ((logits, piece.batch.rows) for piece, logits in runs)
        return [piece for piece, _ in runs], BaselineLogits.of(parts, counts)

    def _pieces(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
        steps: int = 1,
        n_answer: Sequence[int] | None = None,
        shared: int = _SHARED,
    ) -> list[PromptBatch]:
        """Batches of ``prompts`` (of some of them), of at most 1 / ``steps`` of them each, which
        run for about ``shared`` candidates at once."""
        rows = range(len(prompts)) if rows is None else rows
        lengths = [len(prompts[row]) - self.replay.prefix for row in rows]
        keep = n_answer or [1] * len(prompts)
        pieces = []
        for group in self._groups(lengths, math.ceil(len(rows) / steps), shared):
            chosen = [rows[index] for index in group]
            pieces.append(self.replay.piece(prompts, chosen, max(keep[row] for row in chosen)))
        return pieces

    def _groups(self, lengths: Sequence[int], max_rows: int, shared: int) -> list[tuple[int, ...]]:
        budget, mix = self.replay.budget, can_pad(self.task.model)
        return group_rows(lengths, budget, mix, max_rows, budget.overhead // shared)
