"""What is known of the candidates, and what a search still lacks; no model needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from abliterate.metrics.refusal import MAX_REFUSAL_SCORE
from abliterate.selection.candidate_filters import (
    Score,
    apply_filters,
    best_candidate,
    require_score,
)
from abliterate.selection.pareto_front import Corner, may_be_on_front
from abliterate.selection.prompt_scores import PromptScores, Save, measured
from abliterate.selection.search_inputs import CandidateGrid, Key

# A bound this close to a threshold does not reject: sums in another order may be on its other side.
MARGIN = 1e-9


class SearchState:
    """Scores so far, out of a table of prompts.

    Args:
        grid: the candidates and the filters.
        kept: the table of all prompts given; the state fills it in.
        used: the rows of the harmful and of the harmless prompts that count, or None for all.
        save: called with the table whenever candidates are finished.

    Attributes:
        scores: what is known of every candidate, by position and layer.
        usable: the candidates that are to be scored, layer by layer.
    """

    def __init__(
        self,
        grid: CandidateGrid,
        kept: PromptScores,
        used: tuple[Tensor, Tensor] | None = None,
        save: Save | None = None,
    ) -> None:
        self.grid, self.kept = grid, kept
        self._save = save or (lambda scores: None)
        harmful, harmless = used or (
            torch.arange(len(kept.harmful)),
            torch.arange(len(kept.harmless)),
        )
        self.used = {"bypass": harmful, "induce": harmless, "kl": harmless}
        useless, wanted = grid.useless(), grid.wanted()
        self.usable = [key for key in wanted if key not in useless]
        # What is put into the place of what was not measured yet.
        self.floor = kept.kl_floor[harmless]
        self.scores: dict[Key, Score] = {
            (position, layer): Score(position, layer)
            for position in grid.positions
            for layer in range(grid.n_layers)
        }
        if kept.n_touched:
            for key in self.scores:
                self.refresh(key)
        for key in useless & set(wanted):
            self.scores[key] = Score(*key, math.nan, math.nan, math.nan)

    def save(self) -> None:
        self._save(self.kept)

    @property
    def exhaustive(self) -> bool:
        return self.grid.search == "exhaustive"

    def row(self, metric: str, key: Key) -> Tensor:
        """A candidate's scores on the prompts that count, NaN where not measured, ``[prompts]``."""
        table: Tensor = getattr(self.kept, metric)
        return table[self.grid.row(key[0]), key[1]][self.used[metric]]

    def rows(self, metric: str, keys: Sequence[Key]) -> Tensor:
        """The same of several, ``[candidates, prompts]``."""
        return torch.stack([self.row(metric, key) for key in keys])

    def put(self, metric: str, key: Key, values: Tensor, which: Tensor) -> None:
        """Note a candidate's scores.

        Args:
            metric: ``bypass``, ``induce`` or ``kl``.
            key: the candidate.
            values: float64, one for each prompt that counts.
            which: which of them were measured, bool.
        """
        table: Tensor = getattr(self.kept, metric)
        columns = self.used[metric][which]
        table[self.grid.row(key[0]), key[1], columns] = measured(values[which])
        self.refresh(key)

    def put_floor(self, floor: Tensor) -> None:
        """Note what no KL of each prompt that counts is below, where it is not known yet."""
        self.floor = torch.where(self.floor.isnan(), floor, self.floor)
        self.kept.kl_floor[self.used["kl"]] = self.floor

    def exchange(self, key: Key) -> tuple[Tensor, ...]:
        """A candidate's rows, for :meth:`take`, and the floor of KL."""
        return *(self.row(metric, key) for metric in self.used), self.floor

    def take(self, key: Key, rows: Sequence[Tensor]) -> None:
        """What another rank has found: all ranks have the same of it, its floor included."""
        *found, floor = rows
        if not bool(floor.isnan().any()):
            self.kept.kl_floor[self.used["kl"]] = self.floor = floor
        for metric, values in zip(self.used, found, strict=True):
            self.put(metric, key, values, ~values.isnan())

    def refresh(self, key: Key) -> None:
        """Make a candidate's score anew from its rows."""
        bypass, induce, kl = (self.row(metric, key) for metric in self.used)
        highest = torch.full_like(induce, MAX_REFUSAL_SCORE)
        induce_at_most, kl_at_least = bound(induce, highest), bound(kl, self.floor)
        thresholds = self.grid.thresholds
        low = induce_at_most is not None and induce_at_most < thresholds.induce - MARGIN
        high = kl_at_least is not None and kl_at_least > thresholds.kl + MARGIN
        self.scores[key] = Score(
            *key,
            mean(bypass),
            mean(induce),
            mean(kl),
            kl_at_least=kl_at_least if high else None,
            induce_at_most=induce_at_most if low else None,
        )

    def judged(self) -> list[Score]:
        """All scores with the filters' verdicts, by position, then layer."""
        return apply_filters(list(self.scores.values()), self.grid.n_layers, self.grid.thresholds)

    def lacks_induce(self, key: Key) -> bool:
        """Whether induce has yet to be measured."""
        score = self.scores[key]
        return score.induce_score is None and (
            self.exhaustive or score.why_dropped(self.grid.thresholds) is None
        )

    def is_open(self, key: Key) -> bool:
        """Whether KL or bypass has yet to be measured, of those that pass so far."""
        score = self.scores[key]
        missing = None in (score.kl_divergence, score.bypass_score)
        return missing and (self.exhaustive or score.why_dropped(self.grid.thresholds) is None)

    def lacks_bypass(self, key: Key) -> bool:
        """Whether bypass, or a KL that is wanted whatever the bypass is, has yet to be measured."""
        score = self.scores[key]
        missing = score.bypass_score is None or (
            score.kl_divergence is None and not self.is_lazy(key)
        )
        # Pruned layers are scored for plots: by the other filters.
        return missing and (self.exhaustive or score.why_dropped(self.grid.thresholds) is None)

    def is_lazy(self, key: Key) -> bool:
        """Whether its KL matters only if no other candidate has a lower bypass."""
        return not self.exhaustive and key[1] < self.grid.first_pruned

    def wants_kl(self) -> Key | None:
        """Whose KL the choice depends on now: the lowest bypass of those that are not known."""
        lazy = {key for key in self.usable if self.is_lazy(key)}
        unknown = [
            score
            for score in self.judged()
            if score.reason == "unknown" and (score.position, score.layer) in lazy
        ]
        if not unknown:
            return None
        # As the choice goes: the first of those that have the lowest.
        best = min(unknown, key=lambda score: require_score(score.bypass_score))
        return best.position, best.layer

    def wants_front(self) -> list[Key]:
        """If nothing passes: the candidates not scored to the end that may lie on the front of
        bypass, induce and KL, by bypass."""
        if best_candidate(self.judged()) is not None:
            return []
        corners = {key: self._corner(key) for key in self.usable}
        known = {
            key: corner
            for key, corner in corners.items()
            if corner is not None and len(self.scores[key].computed) == len(self.used)
        }
        pruned = self.grid.first_pruned
        open_ones = [
            (corner.bypass, key)
            for key, corner in corners.items()
            if corner is not None
            and key not in known
            and may_be_on_front(
                corner,
                # A candidate that would be taken is not beaten by one that lies too late.
                [other for at, other in known.items() if at[1] < pruned or key[1] >= pruned],
            )
        ]
        return [key for _, key in sorted(open_ones, key=lambda pair: pair[0])]

    def _corner(self, key: Key) -> Corner | None:
        """The best that its scores can turn out to be; None if one is not finite."""
        score = self.scores[key]
        if any(math.isnan(getattr(score, metric)) for metric in score.computed):
            return None
        induce, kl = self.row("induce", key), self.row("kl", key)
        highest = torch.full_like(induce, MAX_REFUSAL_SCORE)
        induce_at_most, kl_at_least = bound(induce, highest), bound(kl, self.floor)

        def known(value: float | None, at_best: float | None, without: float) -> float:
            return next((one for one in (value, at_best) if one is not None), without)

        return Corner(
            known(score.bypass_score, None, -math.inf),
            known(score.induce_score, induce_at_most, math.inf),
            known(score.kl_divergence, kl_at_least, -math.inf),
        )

    def is_finished(self) -> bool:
        """Whether the choice needs nothing that is not in the table."""
        lacking = any(self.lacks_induce(key) or self.lacks_bypass(key) for key in self.usable)
        return not lacking and self.wants_kl() is None and not self.wants_front()


def mean(row: Tensor) -> float | None:
    """The mean of a row; None if it is not measured to the end, NaN if not finite."""
    if bool(row.isinf().any()):
        return math.nan
    return None if bool(row.isnan().any()) else float(row.mean())


def bound(row: Tensor, missing: Tensor) -> float | None:
    """The mean with ``missing`` in the place of what was not measured, of a row measured in part;
    None if nothing or all of it was, or if it is not finite."""
    unknown = row.isnan()
    if bool(row.isinf().any()) or bool(unknown.all()) or not bool(unknown.any()):
        return None
    value = float(torch.where(unknown, missing, row).mean())
    return None if math.isnan(value) else value
