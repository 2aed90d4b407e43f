"""The search where passes are cheap: early stopping, and what it needs of the unmodified model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor

from abliterate.inference.forward import all_last_logits
from abliterate.inference.in_memory import engine_of
from abliterate.metrics.refusal import refusal_score
from abliterate.models.loading import LoadedModel
from abliterate.selection.candidate_filters import Score
from abliterate.selection.candidate_search import CandidateSearch
from abliterate.selection.search_inputs import Key, Save, SearchInputs


class ManyPassesSearch:
    """:class:`CandidateSearch` on the prompts that the filters leave.

    Args:
        loaded: the model in memory; its ranks share the work.
        inputs: what candidates are scored on, before prompts are filtered.
        n_answer: over how many answer tokens KL is averaged; 0 measures it at the prompt's end.
        known: scores that an interrupted search has left.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        inputs: SearchInputs,
        n_answer: int = 0,
        known: Mapping[Key, Score] | None = None,
    ) -> None:
        self.loaded, self.inputs, self.n_answer, self.known = loaded, inputs, n_answer, known

    def baseline_scores(self) -> tuple[Tensor, Tensor]:
        """Refusal scores of the unmodified model on harmful and harmless prompts."""
        return self._refusal_scores(self.inputs.harmful), self._refusal_scores(self.inputs.harmless)

    def run(
        self, use_harmful: Tensor, use_harmless: Tensor, save: Save | None = None
    ) -> list[Score]:
        """All scores by position, then layer.

        Args:
            use_harmful: which harmful prompts count, bool.
            use_harmless: the same for harmless prompts.
            save: called with all scores whenever candidates are finished.
        """
        inputs = replace(
            self.inputs,
            harmful=list(compress(self.inputs.harmful, use_harmful)),
            harmless=list(compress(self.inputs.harmless, use_harmless)),
        )
        if self.n_answer:
            answers = engine_of(self.loaded).answers(
                inputs.harmless, self.n_answer, inputs.batch_size, "select: answers"
            )
            # The last answer token is predicted, not read.
            answered = [
                [*ids, *answer[:-1]] for ids, answer in zip(inputs.harmless, answers, strict=True)
            ]
            inputs = replace(inputs, answered=answered, n_answer=list(map(len, answers)))
        return CandidateSearch(inputs, self.known, save).run()

    def _refusal_scores(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Float64 ``[prompts]``; each rank runs some prompts."""
        ranks, tokens = self.loaded.ranks, self.inputs.refusal_tokens
        local_prompts = ranks.split(prompts)
        scores = torch.empty(0, dtype=torch.float64)
        with ranks.fail_together():
            if local_prompts:
                logits = all_last_logits(self.loaded.model, local_prompts, self.inputs.batch_size)
                scores = refusal_score(logits, tokens)
        return ranks.gather_rows(scores)
