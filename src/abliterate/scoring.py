"""Scoring candidates: every one on every metric, or only what the choice can depend on.

The staged search measures induce first. Where that passes it tries KL on a few prompts, which is
enough to reject most of those that fail it; measures bypass on what is left; and completes KL from
the lowest bypass up, until one passes: that one wins. Induce and KL are summed batch by batch: as
no KL is below its prompt's ``kl_floor`` and no refusal score above ``MAX_REFUSAL_SCORE``, a partial
sum that fails with these in place of what is left rejects exactly. What was not measured could not
have changed the choice under the thresholds given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.batching import group_rows
from abliterate.candidates import Candidates, Piece
from abliterate.choice import Score, Thresholds, choose, first_pruned_layer, judge, known
from abliterate.console import progress_bar
from abliterate.forward import can_pad
from abliterate.measures import Measure, Reference, refusal_measure
from abliterate.refusal import MAX_REFUSAL_SCORE
from abliterate.replay import Replay
from abliterate.team import ALONE, Team
from abliterate.trial import verified_replay

Search = Literal["staged", "exhaustive"]
Key = tuple[int, int]
# A batch of prompts, and what to read from its logits.
Round = tuple[Piece, Measure]

# A direction shorter than this, relative to the longest candidate, is rounding noise.
_VANISHING = 1e-9
# A bound this close to a threshold does not reject: sums in another order may be on its other side.
_MARGIN = 1e-9
# Candidates that are measured before the scores are saved, in batches of a few prompts.
_AT_A_TIME = 4
# KL is tried on one in this many prompts before bypass is measured.
_TRIED = 8
# A batch of prompts runs for about as many candidates at once, which share what it costs beyond
# its tokens.
_SHARED = 8


@dataclass(frozen=True)
class Task:
    """What candidates are scored on.

    Attributes:
        model: the model.
        directions: unnormalised differences of means, ``[n_positions, n_layers, d_model]``.
        positions: what the first axis stands for.
        harmful: token ids of validation prompts, for bypass.
        harmless: the same, for induce.
        answered: harmless prompts with the answer tokens after which KL is measured too; None
            measures it at the last prompt token.
        n_answer: how many last tokens of each of ``answered`` count; None is one of each.
        refusal_tokens: the refusal tokens.
        thresholds: the filters.
        search: ``staged`` skips what cannot change the choice, ``exhaustive`` nothing.
        all_layers: score the candidates of the pruned layers too.
        batch_size: prompts per forward pass, or ``auto``.
        team: the processes that score some candidates each.
    """

    model: PreTrainedModel
    directions: Tensor
    positions: tuple[int, ...]
    harmful: Sequence[Sequence[int]]
    harmless: Sequence[Sequence[int]]
    refusal_tokens: tuple[int, ...]
    answered: Sequence[Sequence[int]] | None = None
    n_answer: Sequence[int] | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    search: Search = "staged"
    all_layers: bool = False
    batch_size: int | str = "auto"
    team: Team = ALONE

    @property
    def n_layers(self) -> int:
        return self.directions.shape[1]

    def vectors(self, keys: Sequence[Key]) -> Tensor:
        """Their directions, ``[n, d_model]``."""
        rows = {position: row for row, position in enumerate(self.positions)}
        return torch.stack([self.directions[rows[position], layer] for position, layer in keys])

    def wanted(self) -> list[Key]:
        """The candidates to score, layer by layer; the rest scores nothing."""
        pruned = self.n_layers
        if self.search == "staged" and not self.all_layers:
            pruned = first_pruned_layer(self.n_layers, self.thresholds)
        return [(p, layer) for layer in range(min(pruned, self.n_layers)) for p in self.positions]

    def useless(self) -> set[Key]:
        """Candidates that are not finite or vanish: a template token's embedding is the same after
        every prompt, so its difference is none."""
        norms = self.directions.norm(dim=-1)
        vanishing = _VANISHING * float(self.directions.nan_to_num().norm(dim=-1).max())
        bad = ~(torch.isfinite(norms) & (norms > vanishing))
        return {(self.positions[int(row)], int(layer)) for row, layer in bad.nonzero()}


class Scorer:
    """The state of a search: scores so far, and how prompts are run.

    Attributes:
        scores: what is known of every candidate, by position and layer.
        save: called with ``scores`` whenever candidates are finished.
    """

    def __init__(
        self,
        task: Task,
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
    def replay(self) -> Replay:
        task = self.task
        prompts = [*task.harmful, *task.harmless, *(task.answered or ())]
        keys = [self.usable[0], self.usable[-1]]
        return verified_replay(task.model, prompts, task.vectors(keys), task.batch_size)

    def run(self) -> list[Score]:
        """Score what is not known yet; all scores by position, then layer."""
        try:
            self._share_out(self.lacks_induce, self._induce)
            self._share_out(self._lacks_bypass, self._kl_and_bypass)
            with self.task.team.working():  # the same on every rank: it is little
                self._complete_kl([key for key in self.usable if self._is_lazy(key)])
        finally:
            self.save(self.scores)
        return list(self.scores.values())

    def _share_out(
        self, lacking: Callable[[Key], bool], measure: Callable[[Sequence[Key]], None]
    ) -> None:
        """``measure`` the candidates that lack something, some on each rank of the team."""
        team = self.task.team
        for keys in team.rounds([key for key in self.usable if lacking(key)]):
            own = team.share(keys)
            with team.working():
                measure(own)
            if not team.alone:
                found = team.gather([self.scores[key] for key in own])
                self.scores |= zip(keys, found, strict=True)
                self.save(self.scores)

    @property
    def exhaustive(self) -> bool:
        return self.task.search == "exhaustive"

    def lacks_induce(self, key: Key) -> bool:
        """Whether induce has yet to be measured."""
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

    def _pieces(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
        steps: int = 1,
        n_answer: Sequence[int] | None = None,
        shared: int = _SHARED,
    ) -> list[Piece]:
        """Batches of ``prompts`` (of some of them), of at most 1 / ``steps`` of them each, which
        run for about ``shared`` candidates at once."""
        rows = range(len(prompts)) if rows is None else rows
        lengths = [len(prompts[row]) - self.replay.prefix for row in rows]
        keep = n_answer or [1] * len(prompts)
        pieces = []
        for group in self._groups(lengths, math.ceil(len(rows) / steps), shared):
            own = [rows[at] for at in group]
            pieces.append(self.replay.piece(prompts, own, max(keep[row] for row in own)))
        return pieces

    def _groups(self, lengths: Sequence[int], most: int, shared: int) -> list[tuple[int, ...]]:
        budget, mix = self.replay.budget, can_pad(self.task.model)
        return group_rows(lengths, budget, mix, most, budget.overhead // shared)

    @cached_property
    def _harmless(self) -> tuple[list[Piece], Reference]:
        """Batches after which candidates may be rejected by induce, and what KL compares with."""
        prompts, prefix = self.task.harmless, self.replay.prefix
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        # A bound rarely rejects before half of the prompts; then in small steps, unless a small
        # batch takes as long as a large one.
        steps = (4, 8) if self.replay.budget.device.type == "cpu" else (2, 4)
        early = set(order[: len(order) // 2])
        # The unmodified model runs once: on few batches, of which these are cut.
        wide, reference = self._reference(
            self._pieces(prompts, order, shared=1), [1] * len(prompts)
        )
        cut = []
        for piece in wide:
            rows = piece.batch.rows
            first = sum(row in early for row in rows)
            for part, step in ((range(first), steps[0]), (range(first, len(rows)), steps[1])):
                lengths = [len(prompts[rows[at]]) - prefix for at in part]
                most = math.ceil(len(prompts) / step)
                for group in self._groups(lengths, most, _SHARED):
                    own = slice(part[group[0]], part[group[-1]] + 1)
                    cut.append(piece.part(own, max(lengths[at] for at in group)))
        return cut, reference

    def _reference(
        self, pieces: Sequence[Piece], counts: Sequence[int]
    ) -> tuple[list[Piece], Reference]:
        runs = [run for piece in pieces for run in self.replay.baselines(piece)]
        parts = ((logits, piece.batch.rows) for piece, logits in runs)
        return [piece for piece, _ in runs], Reference.of(parts, counts)

    @cached_property
    def _kl_rounds(self) -> tuple[list[Round], list[Round], list[Round], Tensor]:
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

        def rounds(rows: Sequence[int], steps: int) -> list[Round]:
            pieces = self._pieces(prompts, rows, steps, task.n_answer)
            return [(piece, reference.kl) for piece in pieces]

        rest = order[first:]
        return rounds(order[:first], 1), rounds(rest, 4), rounds(rest, 1), reference.floor

    def _induce(self, keys: Sequence[Key]) -> None:
        task, replay = self.task, self.replay
        pieces = self._harmless[0]
        measure = refusal_measure(task.refusal_tokens)
        least = -math.inf if self.exhaustive else task.thresholds.induce - _MARGIN
        left = sorted(keys, key=lambda key: key[1])
        smallest = min(pieces, key=lambda piece: piece.batch.input_ids.numel())
        with progress_bar("select: induce", sum(task.n_layers - key[1] for key in left)) as bar:
            while left:
                self._show(bar, len(left))
                same = sum(key[1] == left[0][1] for key in left)
                # Of the smallest batch a few at a time: Ctrl-C costs no more than that.
                together = _AT_A_TIME * replay.budget.share(*smallest.batch.input_ids.shape)
                together = min(max(together, same), replay.most_cached())
                if not (replay.tricks.join and replay.tricks.resume):
                    together = min(together, same)
                some, left = left[:together], left[together:]
                candidates = replay.prepare(task.vectors(some), [key[1] for key in some])
                table = torch.full(
                    (len(some), len(task.harmless)), MAX_REFUSAL_SCORE, dtype=torch.float64
                )
                rounds = [(piece, measure) for piece in pieces]
                alive = self._rounds(candidates, rounds, table, lambda top: top < least)
                for index, key in enumerate(some):
                    value = float(table[index].mean())
                    self.scores[key] = (
                        replace(self.scores[key], induce_score=value, induce_at_most=None)
                        if index in alive
                        else replace(self.scores[key], induce_at_most=value)
                    )
                self.save(self.scores)
                bar.update(sum(task.n_layers - key[1] for key in some))

    def _kl_and_bypass(self, keys: Sequence[Key]) -> None:
        if not keys:
            return
        task, replay = self.task, self.replay
        bypass = refusal_measure(task.refusal_tokens)
        harmful = [(piece, bypass) for piece in self._pieces(task.harmful)]
        shapes = [piece.batch.input_ids.shape for piece, _ in [*self._kl_rounds[0], *harmful]]
        left = list(keys)
        with progress_bar("select: KL, bypass", len(left)) as bar:
            while left:
                self._show(bar, len(left))
                together = _AT_A_TIME * min(replay.budget.share(*shape) for shape in shapes)
                together = max(1, min(together, replay.most_cached()))
                some, left = left[:together], left[together:]
                done = len(some)
                candidates = self._ablated(some)
                self._tables |= self._kl(some, candidates)
                passing = [key for key in some if self._lacks_bypass(key)]
                if passing:
                    candidates = candidates.pick([some.index(key) for key in passing])
                    table = torch.zeros(len(passing), len(task.harmful), dtype=torch.float64)
                    self._rounds(candidates, harmful, table)
                    for key, value in zip(passing, table.mean(1).tolist(), strict=True):
                        self.scores[key] = replace(self.scores[key], bypass_score=value)
                self.save(self.scores)
                bar.update(done)

    def _complete_kl(self, keys: Sequence[Key]) -> None:
        """KL of the candidates with the lowest bypass, up to the first that passes."""
        while True:
            judged = judge(list(self.scores.values()), self.task.n_layers, self.task.thresholds)
            open_ones = [
                score
                for score in judged
                if score.reason == "unknown" and (score.position, score.layer) in keys
            ]
            if not open_ones:
                return
            # As the choice goes: the first of those that have the lowest.
            best = min(open_ones, key=lambda score: known(score.bypass_score))
            key = best.position, best.layer
            self._kl([key], self._ablated([key]), True)
            self.save(self.scores)

    def _ablated(self, keys: Sequence[Key]) -> Candidates:
        units = self.task.vectors(keys)
        return self.replay.prepare(units / units.norm(dim=1, keepdim=True))

    def _kl(
        self,
        keys: Sequence[Key],
        candidates: Candidates,
        complete: bool = False,
    ) -> dict[Key, Tensor]:
        """Measure KL, giving up on candidates that cannot pass.

        Args:
            keys: the candidates.
            candidates: the same, ready to run.
            complete: measure all prompts, also of those whose KL may turn out not to matter.

        Returns:
            Tables of those that were only tried.
        """
        limit = math.inf if self.exhaustive else self.task.thresholds.kl + _MARGIN
        # One that is completed is likely to pass: no step is worth a batch of its own.
        tried, rest, whole, floor = self._kl_rounds
        rest = whole if complete else rest
        table = torch.stack([self._tables.get(key, floor) for key in keys]).clone()
        alive = set(range(len(keys)))
        if not all(key in self._tables for key in keys):
            alive = self._rounds(candidates, tried, table, lambda low: low > limit, not rest)
        lazy = set() if complete else {at for at in alive if self._is_lazy(keys[at])}
        # One that fails so far is likely to be rejected before all prompts: sooner than by bypass.
        sample = [row for piece, _ in tried for row in piece.batch.rows]
        lazy -= {at for at in lazy if float(table[at, sample].mean()) > limit}
        going = sorted(alive - lazy)
        if going and rest:
            own = table[going]
            done = self._rounds(candidates.pick(going), rest, own, lambda low: low > limit)
            table[going] = own
            alive = lazy | {going[at] for at in done}
        for index, key in enumerate(keys):
            value, score = float(table[index].mean()), self.scores[key]
            if index not in alive:
                self.scores[key] = replace(score, kl_at_least=value)
            elif index not in lazy or not rest:
                self.scores[key] = replace(score, kl_divergence=value, kl_at_least=None)
        return {keys[at]: table[at] for at in lazy} if rest else {}

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
        alive, some = list(range(len(candidates))), candidates
        for index, (piece, measure) in enumerate(rounds):
            table[torch.tensor(alive)[:, None], torch.tensor(piece.batch.rows)] = (
                self.replay.measure(some, piece, measure)
            )
            if last and index + 1 == len(rounds):
                break
            going = [i for i in alive if not hopeless(float(table[i].mean()))]
            if not going:
                return set()
            if len(going) < len(alive):
                some = candidates.pick(going)
                alive = going
        return set(alive)

    def _show(self, bar: Any, left: int) -> None:
        judged = judge(list(self.scores.values()), self.task.n_layers, self.task.thresholds)
        best = choose(judged)
        found = f"position {best.position} layer {best.layer}" if best else "none yet"
        bar.set_postfix_str(f"{left} candidates left, best: {found}")
