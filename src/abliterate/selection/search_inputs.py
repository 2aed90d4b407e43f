"""What a search scores candidates on, and which candidates there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.distributed.rank_group import ALONE, RankGroup
from abliterate.selection.candidate_filters import Thresholds, first_pruned_layer

Search = Literal["staged", "exhaustive"]
# Position and layer.
Key = tuple[int, int]

# A direction shorter than this, relative to the longest candidate, is rounding noise.
_VANISHING = 1e-9


@dataclass(frozen=True)
class CandidateGrid:
    """The candidates, and which of them a search is about; no model.

    Attributes:
        directions: unnormalised differences of means, ``[n_positions, n_layers, d_model]``.
        positions: what the first axis stands for.
        thresholds: the filters.
        search: ``staged`` skips what cannot change the choice, ``exhaustive`` nothing.
        all_layers: score the candidates of the pruned layers too.
    """

    directions: Tensor
    positions: tuple[int, ...]
    thresholds: Thresholds = field(default_factory=Thresholds)
    search: Search = "staged"
    all_layers: bool = False

    @property
    def n_layers(self) -> int:
        return self.directions.shape[1]

    @property
    def first_pruned(self) -> int:
        """The first of the layers whose candidates are dropped."""
        return first_pruned_layer(self.n_layers, self.thresholds)

    def row(self, position: int) -> int:
        """Where the candidates of a position lie."""
        return self.positions.index(position)

    def vectors(self, keys: Sequence[Key]) -> Tensor:
        """Their directions, ``[n, d_model]``."""
        rows = {position: row for row, position in enumerate(self.positions)}
        return torch.stack([self.directions[rows[position], layer] for position, layer in keys])

    def wanted(self) -> list[Key]:
        """The candidates to score, layer by layer; the rest scores nothing."""
        pruned = self.n_layers
        if self.search == "staged" and not self.all_layers:
            pruned = self.first_pruned
        return [(p, layer) for layer in range(min(pruned, self.n_layers)) for p in self.positions]

    def useless(self) -> set[Key]:
        """Candidates that are not finite or vanish: a template token's embedding is the same after
        every prompt, so its difference is none."""
        norms = self.directions.norm(dim=-1)
        finite = torch.isfinite(norms)
        vanishing = _VANISHING * float(norms[finite].max()) if bool(finite.any()) else 0.0
        bad = ~(finite & (norms > vanishing))
        return {(self.positions[int(row)], int(layer)) for row, layer in bad.nonzero()}


@dataclass(frozen=True)
class SearchInputs:
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
        ranks: the processes that score some candidates each.
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
    ranks: RankGroup = ALONE

    @property
    def n_layers(self) -> int:
        return self.directions.shape[1]

    @property
    def grid(self) -> CandidateGrid:
        """The candidates without the model."""
        return CandidateGrid(
            self.directions, self.positions, self.thresholds, self.search, self.all_layers
        )

    def vectors(self, keys: Sequence[Key]) -> Tensor:
        """Their directions, ``[n, d_model]``."""
        return self.grid.vectors(keys)

    def useless(self) -> set[Key]:
        """Candidates that are not finite or vanish."""
        return self.grid.useless()
