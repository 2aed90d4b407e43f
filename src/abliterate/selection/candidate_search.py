"""Scoring candidates: every one on every metric, or only what the choice can depend on.

The staged search measures induce first. Where that passes it tries KL on a few prompts, which is
enough to reject most of those that fail it; measures bypass on what is left; and completes KL from
the lowest bypass up, until one passes: that one wins. Induce and KL are summed batch by batch: as
no KL is below its prompt's ``kl_floor`` and no refusal score above ``MAX_REFUSAL_SCORE``, a partial
sum that fails with these in place of what is left rejects exactly. What was not measured could not
have changed the choice under the thresholds given. What each score is says
:func:`abliterate.selection.reference.score_candidate_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from abliterate.console import progress_bar
from abliterate.inference.batched_interventions import InterventionRunner
from abliterate.inference.candidate_batches import Candidates
from abliterate.inference.fast_path import verified_runner
from abliterate.metrics.refusal import MAX_REFUSAL_SCORE
from abliterate.selection.candidate_filters import (
    Score,
    apply_filters,
    best_candidate,
    first_pruned_layer,
    require_score,
)
from abliterate.selection.search_inputs import Key, SearchInputs
from abliterate.selection.validation_batches import Round, ValidationBatches

# A bound this close to a threshold does not reject: sums in another order may be on its other side.
_MARGIN = 1e-9
# Candidates that are measured before the scores are saved, in batches of a few prompts.
_AT_A_TIME = 4


class CandidateSearch:
    """The state of a search: scores so far, and how prompts are run.

    Attributes:
        scores: what is known of every candidate, by position and layer.
        save: called with ``scores`` whenever candidates are finished.
    """

    def __init__(
        self,
        task: SearchInputs,
        known: Mapping[Key, Score] | None = None,
        save: Callable[[Mapping[Key, Score]], None] | None = None,
    ) -> None:
        self.task = task
        self.save = save or (lambda scores: None)
        # Float64 ``[prompts]`` of candidates whose KL was tried, with bounds of what was not.
        self._tables: dict[Key, Tensor] = {}
        self.scores: dict[Key, Score] = {
            (position, layer): Score(position, layer)
            for position in task.positions
            for layer in range(task.n_layers)
        }
        self.scores |= {key: score for key, score in (known or {}).items() if key in self.scores}
        wanted, useless = task.wanted(), task.useless()
        for key in useless & set(wanted):
            self.scores[key] = Score(*key, math.nan, math.nan, math.nan)
        self.usable = [key for key in wanted if key not in useless]

    @cached_property
    def replay(self) -> InterventionRunner:
        task = self.task
        prompts = [*task.harmful, *task.harmless, *(task.answered or ())]
        keys = [self.usable[0], self.usable[-1]]
        return verified_runner(task.model, prompts, task.vectors(keys), task.batch_size)

    @cached_property
    def rounds(self) -> ValidationBatches:
        return ValidationBatches(self.task, self.replay)

    def run(self) -> list[Score]:
        """Score what is not known yet; all scores by position, then layer."""
        if not self.usable:  # every candidate vanishes, is not finite, or lies in a pruned layer
            self.save(self.scores)
            return list(self.scores.values())
        try:
            self._share_out(self.lacks_induce, self._induce)
            self._share_out(self._lacks_bypass, self._kl_and_bypass)
            with self.task.ranks.fail_together():  # the same on every rank: it is little
                self._complete_kl([key for key in self.usable if self._is_lazy(key)])
        finally:
            self.save(self.scores)
        return list(self.scores.values())

    def _share_out(
        self, lacking: Callable[[Key], bool], measure: Callable[[Sequence[Key]], None]
    ) -> None:
        """``measure`` the candidates that lack something, some on each rank of the team."""
        ranks = self.task.ranks
        for keys in ranks.chunks([key for key in self.usable if lacking(key)]):
            local_keys = ranks.split(keys)
            with ranks.fail_together():
                measure(local_keys)
            if not ranks.is_unsplit:
                gathered = ranks.gather([self.scores[key] for key in local_keys])
                self.scores |= zip(keys, gathered, strict=True)
                self.save(self.scores)

    @property
    def exhaustive(self) -> bool:
        return self.task.search == "exhaustive"

    def lacks_induce(self, key: Key) -> bool:
        """Whether induce has yet to be measured."""
        score = self.scores[key]
        dropped = not self.exhaustive and score.induce_at_most is not None
        return score.induce_score is None and not dropped

    def is_open(self, key: Key) -> bool:
        """Whether KL or bypass has yet to be measured, of those that pass so far."""
        score = self.scores[key]
        missing = None in (score.kl_divergence, score.bypass_score)
        return missing and (self.exhaustive or score.why_dropped(self.task.thresholds) is None)

    def _lacks_bypass(self, key: Key) -> bool:
        """Whether bypass, or a KL that is wanted whatever the bypass is, has yet to be measured."""
        score = self.scores[key]
        missing = score.bypass_score is None or (
            score.kl_divergence is None and not self._is_lazy(key)
        )
        # Pruned layers are scored for plots: by the other filters.
        return missing and (self.exhaustive or score.why_dropped(self.task.thresholds) is None)

    def _is_lazy(self, key: Key) -> bool:
        """Whether its KL matters only if no other candidate has a lower bypass."""
        pruned = first_pruned_layer(self.task.n_layers, self.task.thresholds)
        return not self.exhaustive and key[1] < pruned

    def _induce(self, keys: Sequence[Key]) -> None:
        task, replay = self.task, self.replay
        rounds = self.rounds.induce
        least = -math.inf if self.exhaustive else task.thresholds.induce - _MARGIN
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
                table = torch.full(
                    (len(chunk), len(task.harmless)), MAX_REFUSAL_SCORE, dtype=torch.float64
                )
                surviving = self._rounds(candidates, rounds, table, lambda top: top < least)
                for index, key in enumerate(chunk):
                    value = float(table[index].mean())
                    self.scores[key] = (
                        replace(self.scores[key], induce_score=value, induce_at_most=None)
                        if index in surviving
                        else replace(self.scores[key], induce_at_most=value)
                    )
                self.save(self.scores)
                bar.update(sum(task.n_layers - key[1] for key in chunk))

    def _kl_and_bypass(self, keys: Sequence[Key]) -> None:
        if not keys:
            return
        task, replay = self.task, self.replay
        harmful = self.rounds.bypass
        shapes = [piece.batch.input_ids.shape for piece, _ in [*self.rounds.kl[0], *harmful]]
        remaining = list(keys)
        with progress_bar("select: KL, bypass", len(remaining)) as bar:
            while remaining:
                self._show(bar, len(remaining))
                together = _AT_A_TIME * min(replay.budget.share(*shape) for shape in shapes)
                together = max(1, min(together, replay.most_cached()))
                chunk, remaining = remaining[:together], remaining[together:]
                candidates = self._ablated(chunk)
                self._tables |= self._kl(chunk, candidates)
                passing = [key for key in chunk if self._lacks_bypass(key)]
                if passing:
                    candidates = candidates.pick([chunk.index(key) for key in passing])
                    table = torch.zeros(len(passing), len(task.harmful), dtype=torch.float64)
                    self._rounds(candidates, harmful, table)
                    for key, value in zip(passing, table.mean(1).tolist(), strict=True):
                        self.scores[key] = replace(self.scores[key], bypass_score=value)
                self.save(self.scores)
                bar.update(len(chunk))

    def _complete_kl(self, keys: Sequence[Key]) -> None:
        """KL of the candidates with the lowest bypass, up to the first that passes."""
        while True:
            judged = apply_filters(
                list(self.scores.values()), self.task.n_layers, self.task.thresholds
            )
            open_ones = [
                score
                for score in judged
                if score.reason == "unknown" and (score.position, score.layer) in keys
            ]
            if not open_ones:
                return
            # As the choice goes: the first of those that have the lowest.
            best = min(open_ones, key=lambda score: require_score(score.bypass_score))
            key = best.position, best.layer
            self._kl([key], self._ablated([key]), True)
            self.save(self.scores)

    def _ablated(self, keys: Sequence[Key]) -> Candidates:
        units = self.task.vectors(keys)
        return self.replay.prefill(units / units.norm(dim=1, keepdim=True))

    def _kl(
        self,
        keys: Sequence[Key],
        candidates: Candidates,
        complete: bool = False,
    ) -> dict[Key, Tensor]:
        """Measure KL with early stopping: give up on candidates that cannot pass.

        Invariant: every row of ``table`` holds a prompt's KL where it was measured and its lower
        bound where not, so that the row's mean is never above the candidate's KL, and equals it
        once all prompts are measured. A mean above the threshold rejects exactly.

        Args:
            keys: the candidates.
            candidates: the same, ready to run.
            complete: measure all prompts, also of those whose KL may turn out not to matter.

        Returns:
            Tables of those whose KL was put off after the first prompts.
        """
        limit = math.inf if self.exhaustive else self.task.thresholds.kl + _MARGIN
        probe_batches, remaining_batches, full_batches, kl_lower_bound = self.rounds.kl
        if complete:  # likely to pass: no step is worth a batch of its own
            remaining_batches = full_batches
        table = torch.stack([self._tables.get(key, kl_lower_bound) for key in keys]).clone()
        surviving = set(range(len(keys)))
        if not all(key in self._tables for key in keys):
            surviving = self._rounds(
                candidates, probe_batches, table, lambda low: low > limit, not remaining_batches
            )
        # One that fails so far is likely to be rejected before all prompts: sooner than by bypass.
        probed = [row for piece, _ in probe_batches for row in piece.batch.rows]
        kl_deferred = {
            index
            for index in (() if complete else surviving)
            if self._is_lazy(keys[index]) and float(table[index, probed].mean()) <= limit
        }
        chosen = sorted(surviving - kl_deferred)
        if chosen and remaining_batches:
            rows = table[chosen]
            passed = self._rounds(
                candidates.pick(chosen), remaining_batches, rows, lambda low: low > limit
            )
            table[chosen] = rows
            surviving = kl_deferred | {chosen[index] for index in passed}
        for index, key in enumerate(keys):
            value, score = float(table[index].mean()), self.scores[key]
            if index not in surviving:
                self.scores[key] = replace(score, kl_at_least=value)
            elif index not in kl_deferred or not remaining_batches:
                self.scores[key] = replace(score, kl_divergence=value, kl_at_least=None)
        return {keys[index]: table[index] for index in kl_deferred} if remaining_batches else {}

    def _rounds(
        self,
        candidates: Candidates,
        rounds: Sequence[Round],
        table: Tensor,
        hopeless: Callable[[float], bool] = lambda bound: False,
        last: bool = True,
    ) -> set[int]:
        """Measure batch by batch, for as long as it matters.

        Args:
            candidates: what to measure.
            rounds: batches of prompts, and how to measure each.
            table: float64 ``[candidates, prompts]``, in which measures replace the bounds that
                stand in for prompts that are still to come.
            hopeless: whether a candidate with this bound of its mean can be dropped.
            last: no further rounds follow: after the last of these none is dropped any more.

        Returns:
            Which candidates went to the end.
        """
        surviving, remaining = list(range(len(candidates))), candidates
        for index, (piece, measure) in enumerate(rounds):
            table[torch.tensor(surviving)[:, None], torch.tensor(piece.batch.rows)] = (
                self.replay.measure(remaining, piece, measure)
            )
            if last and index + 1 == len(rounds):
                break
            hopeful = [i for i in surviving if not hopeless(float(table[i].mean()))]
            if not hopeful:
                return set()
            if len(hopeful) < len(surviving):
                remaining = candidates.pick(hopeful)
                surviving = hopeful
        return set(surviving)

    def _show(self, bar: Any, n_remaining: int) -> None:
        judged = apply_filters(list(self.scores.values()), self.task.n_layers, self.task.thresholds)
        best = best_candidate(judged)
        described = f"position {best.position} layer {best.layer}" if best else "none yet"
        bar.set_postfix_str(f"{n_remaining} candidates left, best: {described}")
