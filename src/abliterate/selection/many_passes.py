"""The search where passes are cheap: early stopping, and what it needs of the unmodified model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.inference.forward import all_last_logits
from abliterate.inference.in_memory import engine_of
from abliterate.metrics.refusal import refusal_score
from abliterate.models.loading import LoadedModel
from abliterate.selection.candidate_search import CandidateSearch
from abliterate.selection.prompt_scores import PromptScores, Save
from abliterate.selection.search_inputs import SearchInputs
from abliterate.selection.search_state import SearchState


class ManyPassesSearch:
    """:class:`CandidateSearch` on the prompts that the filters leave.

    Args:
        loaded: the model in memory; its ranks share the work.
        inputs: what candidates are scored on, before prompts are filtered.
        kept: the table that is filled in; what it holds is not measured again.
        n_answer: over how many answer tokens KL is averaged; 0 measures it at the prompt's end.
    """

    def __init__(
        self, loaded: LoadedModel, inputs: SearchInputs, kept: PromptScores, n_answer: int = 0
    ) -> None:
        self.loaded, self.inputs, self.kept, self.n_answer = loaded, inputs, kept, n_answer

    def measure_baselines(self) -> None:
        """Refusal scores of the unmodified model on harmful and harmless prompts."""
        if not self.kept.has_baselines:
            self.kept.harmful[:] = self._refusal_scores(self.inputs.harmful)
            self.kept.harmless[:] = self._refusal_scores(self.inputs.harmless)

    def run(self, used: tuple[Tensor, Tensor], save: Save | None = None) -> SearchState:
        """Score what is not known yet.

        Args:
            used: the rows of the harmful and of the harmless prompts that count.
            save: called with the table whenever candidates are finished.
        """
        harmful, harmless = (rows.tolist() for rows in used)
        inputs = replace(
            self.inputs,
            harmful=[self.inputs.harmful[row] for row in harmful],
            harmless=[self.inputs.harmless[row] for row in harmless],
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
        search = CandidateSearch(inputs, self.kept, used, save)
        search.run()
        return search.state

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
