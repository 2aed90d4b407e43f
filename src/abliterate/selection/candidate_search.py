"""Scoring candidates: every one on every metric, or only what the choice can depend on.

The staged search measures induce first. Where that passes it tries KL on a few prompts, which is
enough to reject most of those that fail it; measures bypass on what is left; and completes KL from
the lowest bypass up, until one passes: that one wins. Induce and KL are summed batch by batch: as
no KL is below its prompt's ``kl_floor`` and no refusal score above ``MAX_REFUSAL_SCORE``, a partial
sum that fails with these in place of what is left rejects exactly. What was not measured could not
have changed the choice under the thresholds given. Where none passes, the candidates that no other
beats in all three are measured to the end. What each score is says
:func:`abliterate.selection.reference.score_candidate_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from abliterate.console import progress_bar
from abliterate.inference.batched_interventions import InterventionRunner
from abliterate.inference.candidate_batches import Candidates
from abliterate.inference.fast_path import verified_runner
from abliterate.metrics.refusal import MAX_REFUSAL_SCORE
from abliterate.selection.candidate_filters import METRICS, Score, best_candidate
from abliterate.selection.prompt_scores import PromptScores, Save
from abliterate.selection.search_inputs import Key, SearchInputs
from abliterate.selection.search_state import MARGIN, SearchState
from abliterate.selection.validation_batches import Round, ValidationBatches

# What counts for prompts to come: as exact as the state that judges what was rejected has it.
_HIGHEST = torch.tensor(MAX_REFUSAL_SCORE, dtype=torch.float64)
# Candidates that are measured before the scores are saved, in batches of a few prompts.
_AT_A_TIME = 4


class CandidateSearch:
    """A search under way: its state, and how prompts are run.

    Args:
        task: what candidates are scored on; of prompts those that count.
        kept: the table of all prompts given; an empty one if None.
        used: which rows of it the prompts of ``task`` are; all if None.
        save: called with the table whenever candidates are finished.

    Attributes:
        state: what is known of every candidate.
    """

    def __init__(
        self,
        task: SearchInputs,
        kept: PromptScores | None = None,
        used: tuple[Tensor, Tensor] | None = None,
        save: Save | None = None,
    ) -> None:
        self.task = task
        if kept is None:
            sizes = len(task.harmful), len(task.harmless)
            kept = PromptScores.empty(task.directions, *sizes)
        self.state = SearchState(task.grid, kept, used, save)

    @property
    def scores(self) -> dict[Key, Score]:
        return self.state.scores

    @cached_property
    def replay(self) -> InterventionRunner:
        task, usable = self.task, self.state.usable
        prompts = [*task.harmful, *task.harmless, *(task.answered or ())]
        keys = [usable[0], usable[-1]]
        return verified_runner(task.model, prompts, task.vectors(keys), task.batch_size)

    @cached_property
    def rounds(self) -> ValidationBatches:
        return ValidationBatches(self.task, self.replay)

    def run(self) -> list[Score]:
        """Score what is not known yet; all scores by position, then layer."""
        state = self.state
        if not state.usable:  # every candidate vanishes, is not finite, or lies in a pruned layer
            state.save()
            return list(state.scores.values())
        try:
            self._share_out(self._lacking(state.lacks_induce), self._induce)
            self._share_out(self._lacking(state.lacks_bypass), self._kl_and_bypass)
            with self.task.ranks.fail_together():  # the same on every rank: it is little
                while (key := state.wants_kl()) is not None:
                    self._kl([key], self._ablated([key]), True)
                    state.save()
            self._complete_front()
        finally:
            state.save()
        return list(state.scores.values())

    def _lacking(self, lacks: Callable[[Key], bool]) -> list[Key]:
        return [key for key in self.state.usable if lacks(key)]

    def _share_out(self, keys: Sequence[Key], measure: Callable[[Sequence[Key]], None]) -> None:
        """``measure`` candidates that lack something, some on each rank of the team."""
        ranks, state = self.task.ranks, self.state
        for chunk in ranks.chunks(keys):
            local_keys = ranks.split(chunk)
            with ranks.fail_together():
                measure(local_keys)
            if not ranks.is_unsplit:
                gathered = ranks.gather([state.exchange(key) for key in local_keys])
                for key, rows in zip(chunk, gathered, strict=True):
                    state.take(key, rows)
                state.save()

    def _complete_front(self) -> None:
        """If nothing passes: all metrics of the candidates that no other beats in all of them.

        Bypass comes first, as nothing bounds it before it is measured; then, from the lowest
        bypass up, what may still lie on the front. What was completed rules out others.
        """
        state = self.state
        lacking = [key for key in state.wants_front() if self.scores[key].bypass_score is None]
        self._share_out(lacking, self._bypass)
        while keys := state.wants_front():
            # More at once share batches, fewer at once rule out more.
            some = keys[: max(_AT_A_TIME * self.task.ranks.size, len(keys) // 4)]
            self._share_out(some, self._complete)

    def _complete(self, keys: Sequence[Key]) -> None:
        lacking = {
            metric: [key for key in keys if getattr(self.scores[key], metric) is None]
            for metric in METRICS
        }
        self._induce(lacking["induce_score"], complete=True)
        self._kl_and_bypass(lacking["kl_divergence"], complete=True)

    def _induce(self, keys: Sequence[Key], complete: bool = False) -> None:
        if not keys:
            return
        task, replay, state = self.task, self.replay, self.state
        rounds = self.rounds.induce
        limit = task.thresholds.induce - MARGIN
        least = -math.inf if complete or state.exhaustive else limit
        remaining = sorted(keys, key=lambda key: key[1])
        smallest = min((piece.batch.input_ids for piece, _ in rounds), key=torch.numel)
        with progress_bar(
            "select: induce", sum(task.n_layers - key[1] for key in remaining)
        ) as bar:
            while remaining:
                self._show(bar, len(remaining))
                same = sum(key[1] == remaining[0][1] for key in remaining)
                # Of the smallest batch a few at a time: Ctrl-C costs no more than that.
                together = _AT_A_TIME * replay.budget.share(*smallest.shape)
                together = min(max(together, same), replay.most_cached())
                if not (replay.tricks.join and replay.tricks.resume):
                    together = min(together, same)
                chunk, remaining = remaining[:together], remaining[together:]
                candidates = replay.prefill(task.vectors(chunk), [key[1] for key in chunk])
                table = self._table("induce", chunk, _HIGHEST)
                self._rounds(candidates, rounds, table, lambda top: top < least)
                self._note("induce", chunk, table)
                state.save()
                bar.update(sum(task.n_layers - key[1] for key in chunk))

    def _kl_and_bypass(self, keys: Sequence[Key], complete: bool = False) -> None:
        if not keys:
            return
        state, shapes = self.state, self._shapes(self.rounds.kl[0], self.rounds.bypass)
        remaining = list(keys)
        with progress_bar("select: KL, bypass", len(remaining)) as bar:
            while remaining:
                self._show(bar, len(remaining))
                together = self._together(shapes)
                chunk, remaining = remaining[:together], remaining[together:]
                candidates = self._ablated(chunk)
                if lacking := [k for k in chunk if self.scores[k].kl_divergence is None]:
                    some = _of(lacking, chunk, candidates)
                    self._kl(lacking, some, complete, math.inf if complete else None)
                if passing := [key for key in chunk if state.lacks_bypass(key)]:
                    self._measure_bypass(passing, _of(passing, chunk, candidates))
                state.save()
                bar.update(len(chunk))

    def _bypass(self, keys: Sequence[Key]) -> None:
        if not keys:
            return
        shapes, remaining = self._shapes(self.rounds.bypass), list(keys)
        with progress_bar("select: bypass", len(remaining)) as bar:
            while remaining:
                together = self._together(shapes)
                chunk, remaining = remaining[:together], remaining[together:]
                self._measure_bypass(chunk, self._ablated(chunk))
                self.state.save()
                bar.update(len(chunk))

    def _measure_bypass(self, keys: Sequence[Key], candidates: Candidates) -> None:
        table = self._table("bypass", keys, _HIGHEST)
        self._rounds(candidates, self.rounds.bypass, table)
        self._note("bypass", keys, table)

    def _shapes(self, *rounds: Sequence[Round]) -> list[torch.Size]:
        return [piece.batch.input_ids.shape for some in rounds for piece, _ in some]

    def _together(self, shapes: Sequence[torch.Size]) -> int:
        """How many candidates are ablated before the scores are saved."""
        together = _AT_A_TIME * min(self.replay.budget.share(*shape) for shape in shapes)
        return max(1, min(together, self.replay.most_cached()))

    def _ablated(self, keys: Sequence[Key]) -> Candidates:
        units = self.task.vectors(keys)
        return self.replay.prefill(units / units.norm(dim=1, keepdim=True))

    def _kl(
        self,
        keys: Sequence[Key],
        candidates: Candidates,
        complete: bool = False,
        limit: float | None = None,
    ) -> None:
        """Measure KL with early stopping: give up on candidates that cannot pass.

        Invariant: every row of the table holds a prompt's KL where it was measured and its lower
        bound where not, so that the row's mean is never above the candidate's KL, and equals it
        once all prompts are measured. A mean above the threshold rejects exactly. Of those that
        pass on the first prompts and may not win anyway, the rest is put off.

        Args:
            keys: the candidates.
            candidates: the same, ready to run.
            complete: put nothing off.
            limit: a KL above it is given up; by default the filter's.
        """
        state = self.state
        if limit is None:
            limit = math.inf if state.exhaustive else self.task.thresholds.kl + MARGIN
        probe_batches, remaining_batches, full_batches, kl_lower_bound = self.rounds.kl
        state.put_floor(kl_lower_bound)
        if complete:  # likely to pass: no step is worth a batch of its own
            remaining_batches = full_batches
        table = self._table("kl", keys, state.floor)  # the same where it was known before
        surviving = self._rounds(
            candidates, probe_batches, table, lambda low: low > limit, not remaining_batches
        )
        # One that fails so far is likely to be rejected before all prompts: sooner than by bypass.
        probed = [row for piece, _ in probe_batches for row in piece.batch.rows]
        kl_deferred = {
            index
            for index in (() if complete else surviving)
            if state.is_lazy(keys[index]) and float(table.values[index, probed].mean()) <= limit
        }
        chosen = sorted(surviving - kl_deferred)
        if chosen and remaining_batches:
            rows = table.pick(chosen)
            self._rounds(candidates.pick(chosen), remaining_batches, rows, lambda low: low > limit)
            table.values[chosen], table.measured[chosen] = rows.values, rows.measured
        self._note("kl", keys, table)

    def _table(self, metric: str, keys: Sequence[Key], missing: Tensor) -> _Table:
        """What is known of candidates, with ``missing`` (of each prompt) where nothing is."""
        rows = self.state.rows(metric, keys)
        known = ~rows.isnan()
        return _Table(torch.where(known, rows, missing.to(rows.dtype)), known)

    def _note(self, metric: str, keys: Sequence[Key], table: _Table) -> None:
        for key, values, which in zip(keys, table.values, table.measured, strict=True):
            self.state.put(metric, key, values, which)

    def _rounds(
        self,
        candidates: Candidates,
        rounds: Sequence[Round],
        table: _Table,
        hopeless: Callable[[float], bool] = lambda bound: False,
        last: bool = True,
    ) -> set[int]:
        """Measure batch by batch what is not measured yet, for as long as it matters.

        Args:
            candidates: what to measure.
            rounds: batches of prompts, and how to measure each.
            table: of these candidates; measures replace the bounds that stand in for prompts that
                are still to come.
            hopeless: whether a candidate with this bound of its mean can be dropped.
            last: no further rounds follow: after the last of these none is dropped any more.

        Returns:
            Which candidates went to the end.
        """
        surviving = list(range(len(candidates)))
        running, remaining = surviving, candidates
        for index, (piece, measure) in enumerate(rounds):
            columns = torch.tensor(piece.batch.rows)
            missing = [i for i in surviving if not bool(table.measured[i, columns].all())]
            if missing:
                if missing != running:
                    running, remaining = missing, candidates.pick(missing)
                at = torch.tensor(missing)[:, None], columns
                table.values[at] = self.replay.measure(remaining, piece, measure)
                table.measured[at] = True
            if last and index + 1 == len(rounds):
                break
            surviving = [i for i in surviving if not hopeless(float(table.values[i].mean()))]
            if not surviving:
                return set()
        return set(surviving)

    def _show(self, bar: Any, n_remaining: int) -> None:
        best = best_candidate(self.state.judged())
        described = f"position {best.position} layer {best.layer}" if best else "none yet"
        bar.set_postfix_str(f"{n_remaining} candidates left, best: {described}")


def _of(some: Sequence[Key], keys: Sequence[Key], candidates: Candidates) -> Candidates:
    """Those of ``candidates``, which are those of ``keys``."""
    if len(some) == len(keys):
        return candidates  # their caches need not be copied
    return candidates.pick([keys.index(key) for key in some])


@dataclass(frozen=True)
class _Table:
    """Scores of candidates under way, ``[candidates, prompts]``.

    Attributes:
        values: float64, a bound where nothing is measured yet.
        measured: where something is, bool.
    """

    values: Tensor
    measured: Tensor

    def pick(self, rows: Sequence[int]) -> _Table:
        return _Table(self.values[rows], self.measured[rows])
