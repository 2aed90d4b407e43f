"""Scoring candidates: every one on every metric, or only what the choice can depend on.

The staged search measures induce first, KL only where induce passes, and bypass only where both
pass. Induce and KL are summed batch by batch: as no KL is below its prompt's ``kl_floor`` and no
refusal score above ``MAX_REFUSAL_SCORE``, a partial sum that fails with these in place of what is
left rejects exactly. What was not measured could not have changed the choice under the thresholds
given.
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
from abliterate.choice import Score, Thresholds, choose, first_pruned_layer, judge
from abliterate.console import progress_bar
from abliterate.forward import can_pad
from abliterate.refusal import MAX_REFUSAL_SCORE, kl_divergence, kl_floor, refusal_score
from abliterate.replay import Candidates, Measure, Piece, Replay
from abliterate.trial import verified_replay

Search = Literal["staged", "exhaustive"]
Key = tuple[int, int]

# A direction shorter than this, relative to the longest candidate, is rounding noise.
_VANISHING = 1e-9
# A bound this close to a threshold does not reject: sums in another order may be on its other side.
_MARGIN = 1e-9
# Logits that are scored in float64 at once.
_CHUNK = 1 << 22


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
            self._induce([key for key in self.usable if self.lacks_induce(key)])
            self._kl_and_bypass([key for key in self.usable if self.is_open(key)])
        finally:
            self.save(self.scores)
        return list(self.scores.values())

    @property
    def exhaustive(self) -> bool:
        return self.task.search == "exhaustive"

    def lacks_induce(self, key: Key) -> bool:
        """Whether induce has yet to be measured."""
        score = self.scores[key]
        dropped = not self.exhaustive and score.induce_at_most is not None
        return score.induce_score is None and not dropped

    def is_open(self, key: Key) -> bool:
        """Whether KL or bypass has yet to be measured."""
        score = self.scores[key]
        if self.exhaustive:
            return score.kl_divergence is None or score.bypass_score is None
        # Pruned layers are scored for plots: by the other filters.
        reason = score.why_dropped(self.task.thresholds)
        return reason is None and None in (score.kl_divergence, score.bypass_score)

    def _pieces(
        self, prompts: Sequence[Sequence[int]], n_answer: Sequence[int] | None = None
    ) -> list[Piece]:
        """Batches of ``prompts``, each a round after which candidates may be rejected."""
        replay, mix = self.replay, can_pad(self.task.model)
        lengths = [len(ids) - replay.prefix for ids in prompts]
        # A bound rarely rejects before half of the prompts; then in small steps, unless a small
        # batch takes as long as a large one.
        steps = (4, 8) if replay.budget.device.type == "cpu" else (2, 4)
        overhead = replay.budget.overhead // steps[1]
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        groups = []
        for half, step in zip((order[: len(order) // 2], order[len(order) // 2 :]), steps,
                              strict=True):  # fmt: skip
            most = math.ceil(len(order) / step)
            own = [lengths[row] for row in half]
            found = group_rows(own, replay.budget, mix, most, overhead)
            groups += [[half[index] for index in group] for group in found]
        keep = n_answer or [1] * len(prompts)
        return [replay.piece(prompts, rows, max(keep[row] for row in rows)) for rows in groups]

    @cached_property
    def _harmless(self) -> list[Baseline]:
        return [Baseline.of(self.replay, piece) for piece in self._pieces(self.task.harmless)]

    def _induce(self, keys: Sequence[Key]) -> None:
        by_layer: dict[int, list[Key]] = {}
        for key in keys:
            by_layer.setdefault(key[1], []).append(key)
        task, n = self.task, len(self.task.harmless)
        least = -math.inf if self.exhaustive else task.thresholds.induce - _MARGIN
        measure = refusal_measure(task.refusal_tokens)
        work = sum((task.n_layers - layer) * len(same) for layer, same in by_layer.items())
        left = len(keys)
        with progress_bar("select: induce", work) as bar:
            for layer, same in by_layer.items():
                self._show(bar, left)
                candidates = self.replay.prepare(task.vectors(same), layer)
                rounds = [(baseline.piece, measure) for baseline in self._harmless]
                bounds = torch.full((n,), MAX_REFUSAL_SCORE, dtype=torch.float64)
                means, alive = self._rounds(candidates, rounds, bounds, lambda top: top < least)
                for index, (key, value) in enumerate(zip(same, means, strict=True)):
                    score = self.scores[key]
                    self.scores[key] = (
                        replace(score, induce_score=value, induce_at_most=None)
                        if index in alive
                        else replace(score, induce_at_most=value)
                    )
                self.save(self.scores)
                left -= len(same)
                bar.update((task.n_layers - layer) * len(same))

    def _kl_and_bypass(self, keys: Sequence[Key]) -> None:
        if not keys:
            return
        task = self.task
        kl_rounds = self._harmless
        if task.answered is not None:
            pieces = self._pieces(task.answered, task.n_answer)
            kl_rounds = [Baseline.of(self.replay, piece, task.n_answer) for piece in pieces]
        harmful = self._pieces(task.harmful)
        bypass = refusal_measure(task.refusal_tokens)
        widest = max(kl_rounds, key=lambda one: one.piece.batch.input_ids.numel())
        together = self.replay.budget.share(*widest.piece.batch.input_ids.shape)
        together = max(1, min(together, self.replay.most_cached()))
        with progress_bar("select: KL, bypass", len(keys)) as bar:
            for first in range(0, len(keys), together):
                self._show(bar, len(keys) - first)
                some = list(keys[first : first + together])
                units = task.vectors(some)
                candidates = self.replay.prepare(units / units.norm(dim=1, keepdim=True))
                passing = self._kl(some, candidates, kl_rounds)
                if passing:
                    candidates = candidates.pick([some.index(key) for key in passing])
                    rounds = [(piece, bypass) for piece in harmful]
                    bounds = torch.full((len(task.harmful),), math.nan, dtype=torch.float64)
                    means, _ = self._rounds(candidates, rounds, bounds)
                    for key, value in zip(passing, means, strict=True):
                        self.scores[key] = replace(self.scores[key], bypass_score=value)
                self.save(self.scores)
                bar.update(len(some))

    def _kl(
        self, keys: Sequence[Key], candidates: Candidates, baselines: Sequence[Baseline]
    ) -> list[Key]:
        """Measure KL, giving up on candidates that cannot pass; returns those to go on with."""
        limit = math.inf if self.exhaustive else self.task.thresholds.kl + _MARGIN
        # The small batches first: one prompt may be enough.
        baselines = baselines[::-1]
        floors = torch.cat([one.floor for one in baselines])
        order = [row for one in baselines for row in one.piece.batch.rows]
        bounds = torch.empty_like(floors)
        bounds[order] = floors
        rounds = [(one.piece, one.kl) for one in baselines]
        means, alive = self._rounds(candidates, rounds, bounds, lambda least: least > limit)
        for index, (key, value) in enumerate(zip(keys, means, strict=True)):
            score = self.scores[key]
            self.scores[key] = (
                replace(score, kl_divergence=value, kl_at_least=None)
                if index in alive
                else replace(score, kl_at_least=value)
            )
        return [key for key in keys if self.is_open(key)]

    def _rounds(
        self,
        candidates: Candidates,
        rounds: Sequence[tuple[Piece, Measure]],
        bounds: Tensor,
        hopeless: Callable[[float], bool] = lambda bound: False,
    ) -> tuple[list[float], set[int]]:
        """Mean of a measure over prompts, batch by batch, for as long as it matters.

        Args:
            candidates: what to measure.
            rounds: batches of prompts, and how to measure each.
            bounds: float64 ``[prompts]``, what stands in for a prompt that is still to come.
            hopeless: whether a candidate with this bound of its mean can be dropped.

        Returns:
            The means (bounds of them for those dropped), and which candidates went to the end.
        """
        table = bounds.repeat(len(candidates), 1)
        alive, some = list(range(len(candidates))), candidates
        for index, (piece, measure) in enumerate(rounds):
            table[torch.tensor(alive)[:, None], torch.tensor(piece.batch.rows)] = (
                self.replay.measure(some, piece, measure)
            )
            if index + 1 == len(rounds):
                break
            going = [i for i in alive if not hopeless(float(table[i].mean()))]
            if not going:
                alive = []
                break
            if len(going) < len(alive):
                alive, some = going, candidates.pick(going)
        return table.mean(1).tolist(), set(alive)

    def _show(self, bar: Any, left: int) -> None:
        judged = judge(list(self.scores.values()), self.task.n_layers, self.task.thresholds)
        best = choose(judged)
        found = f"position {best.position} layer {best.layer}" if best else "none yet"
        bar.set_postfix_str(f"{left} candidates left, best: {found}")


@dataclass(frozen=True)
class Baseline:
    """The unmodified model's next-token distributions after the prompts of one batch.

    Attributes:
        piece: the batch, with what ``add`` starts from.
        logits: ``[prompts, kept tokens, vocabulary]``.
        weight: how much each kept token counts, ``[prompts, kept tokens]``; rows sum to one.
        floor: the least KL of each prompt, float64 ``[prompts]`` on the CPU.
        place: where each prompt is on the first axis.
    """

    piece: Piece
    logits: Tensor
    weight: Tensor
    floor: Tensor
    place: Mapping[int, int]

    @classmethod
    def of(cls, replay: Replay, piece: Piece, n_answer: Sequence[int] | None = None) -> Baseline:
        """Run the unmodified model on ``piece``."""
        piece, logits = replay.baseline(piece)
        weight = torch.zeros(logits.shape[:2], dtype=torch.float64)
        place = {row: at for at, row in enumerate(piece.batch.rows)}
        for row, at in place.items():
            count = n_answer[row] if n_answer else 1
            weight[at, piece.keep - count :] = 1 / count
        weight = weight.to(logits.device)
        return cls(piece, logits, weight, (kl_floor(logits) * weight).sum(1).cpu(), place)

    def kl(self, logits: Tensor, rows: tuple[int, ...]) -> Tensor:
        """KL of each candidate and prompt, averaged over the kept tokens."""
        result = logits.new_empty(logits.shape[:2], dtype=torch.float64)
        size = max(1, _CHUNK // logits.shape[-1] // len(logits))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            at = [self.place[row] for row in rows[part]]
            kl = kl_divergence(self.logits[at], logits[:, part])
            result[:, part] = (kl * self.weight[at]).sum(-1)
        return result


def refusal_measure(tokens: Sequence[int]) -> Measure:
    """The refusal score at the last token."""

    def measure(logits: Tensor, rows: tuple[int, ...]) -> Tensor:
        last = logits[:, :, -1]
        flat = last.flatten(0, 1)
        size = max(1, _CHUNK // flat.shape[-1])
        parts = [refusal_score(flat[i : i + size], tokens) for i in range(0, len(flat), size)]
        return torch.cat(parts).view(last.shape[:2])

    return measure
