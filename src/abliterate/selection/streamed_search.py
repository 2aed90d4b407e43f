"""select on a streamed model: candidates and prompts flow through it together.

The first reading runs the unmodified model on all prompts and, from each source layer on, its
candidates added to the stream (induce). The second ablates the candidates that induce leaves, on
harmless prompts (KL) and harmful ones (bypass). A reading is repeated for further candidates only
where their activations exceed the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.console import log
from abliterate.inference.forward import left_pad
from abliterate.inference.token_batches import TokenBudget
from abliterate.metrics.refusal import kl_divergence, refusal_score
from abliterate.offload.layer_streaming import BatchRun, OffloadedModel
from abliterate.offload.open_model import replay_tricks
from abliterate.offload.streamed_interventions import Intervention, ablating, changed_job
from abliterate.offload.weight_passes import Rows, batches, retry, streaming_budget
from abliterate.selection.candidate_filters import Score
from abliterate.selection.candidate_search import CandidateSearch
from abliterate.selection.search_inputs import Key, SearchInputs

# A batch keeps its embeddings while it flows, beside the stream.
_COPIES = 2


class StreamedSearch:
    """The search of ``CandidateSearch``, in few readings of a streamed model.

    Attributes:
        harmful_scores: refusal score of each harmful prompt, float64, unmodified model.
        harmless_scores: the same of the harmless prompts.
    """

    def __init__(
        self, stream: OffloadedModel, task: SearchInputs, known: Mapping[Key, Score] | None = None
    ) -> None:
        self.stream, self.task, self.known = stream, task, known
        self.tricks = replay_tricks(stream.model)
        self._induce: dict[Key, Tensor] = {}
        self._baseline: Tensor | None = None
        self.harmful_scores = torch.zeros(len(task.harmful), dtype=torch.float64)
        self.harmless_scores = torch.zeros(len(task.harmless), dtype=torch.float64)
        self._first_readings()

    def run(
        self,
        use_harmful: Tensor,
        use_harmless: Tensor,
        save: Callable[[Mapping[Key, Score]], None] | None = None,
    ) -> list[Score]:
        """All scores by position, then layer.

        Args:
            use_harmful: which harmful prompts count, bool.
            use_harmless: the same for harmless prompts.
            save: called with all scores after each reading.
        """
        scorer = CandidateSearch(self.task, self.known, save)
        for key, values in self._induce.items():
            score = scorer.scores[key]
            value = float(values[use_harmless].mean())
            scorer.scores[key] = replace(score, induce_score=value, induce_at_most=None)
        scorer.save(scorer.scores)
        keys = [key for key in scorer.usable if scorer.is_open(key)]
        harmful, harmless = (use.nonzero()[:, 0].tolist() for use in (use_harmful, use_harmless))
        tokens = sum(len(self.task.harmful[row]) for row in harmful)
        tokens += sum(len(self.task.harmless[row]) for row in harmless)
        for some in self._portions(keys, tokens):
            self._ablate(scorer, some, harmful, harmless)
            scorer.save(scorer.scores)
        return list(scorer.scores.values())

    def _portions(self, keys: Sequence[Key], tokens: int) -> Iterator[list[Key]]:
        """Candidates that flow together: as many as fit the activations' budget."""
        each = tokens * self.stream.width * self.stream.model.dtype.itemsize * _COPIES
        size = max(1, int(self.stream.activations.budget // max(1, each)))
        if len(keys) > size:
            log.info(
                "the activations of %d candidates take %.1f GB: the model is read %d times "
                "(--activation-memory)",
                len(keys),
                len(keys) * each / 1e9,
                -(-len(keys) // size),
            )
        for first in range(0, len(keys), size):
            yield list(keys[first : first + size])

    def _first_readings(self) -> None:
        scorer = CandidateSearch(self.task, self.known)
        keys = [key for key in scorer.usable if scorer.lacks_induce(key)]
        tokens = sum(map(len, self.task.harmless))
        portions = list(self._portions(keys, tokens)) or [[]]
        for number, some in enumerate(portions):
            budget = streaming_budget(self.stream, self.task.batch_size)
            retry(
                self.stream,
                budget,
                lambda some=some, budget=budget, whole=not number: self._induce_jobs(  # type: ignore[misc]
                    some, budget, whole
                ),
                "select: induce",
            )

    def _induce_jobs(self, keys: Sequence[Key], budget: TokenBudget, whole: bool) -> list[BatchRun]:
        """The unmodified model on the prompts, and each candidate from its layer on.

        Args:
            keys: the candidates.
            budget: tokens to a batch.
            whole: the harmful prompts too, and the baselines are kept.
        """
        jobs: list[BatchRun] = []
        task, stream = self.task, self.stream
        by_layer: dict[int, list[Key]] = {}
        for key in keys:
            by_layer.setdefault(key[1], []).append(key)
        if whole:
            for rows in batches(stream, task.harmful, budget):

                def harmful(logits: Tensor, rows: Rows = rows) -> None:
                    scores = refusal_score(logits[0], task.refusal_tokens)
                    self.harmful_scores[list(rows)] = scores.cpu()

                jobs.append(
                    changed_job(stream, left_pad(stream.model, task.harmful, rows), None, harmful)
                )
        for rows in batches(stream, task.harmless, budget):
            jobs += self._harmless_jobs(rows, by_layer, budget)
        return jobs

    def _harmless_jobs(
        self, rows: Rows, by_layer: Mapping[int, Sequence[Key]], budget: TokenBudget
    ) -> list[BatchRun]:
        task, stream = self.task, self.stream
        batch = left_pad(stream.model, task.harmless, rows)
        entered: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> Tensor:
            entered.clear()
            if layer in by_layer:
                # A copy: the block may write into what it gets.
                entered[layer] = hidden.clone()
            return hidden

        def baseline(logits: Tensor) -> None:
            if self._baseline is None:
                shape = (len(task.harmless), logits.shape[-1])
                self._baseline = stream.activations.empty(shape, logits.dtype)
            self._baseline[list(rows)] = logits[0].cpu()
            scores = refusal_score(logits[0], task.refusal_tokens)
            self.harmless_scores[list(rows)] = scores.cpu()

        first = changed_job(stream, batch, None, baseline)
        if self.tricks.resume:
            first.change = keep
        jobs = [first]
        for layer, same in by_layer.items():
            vectors = task.vectors(same)
            for at in self._together(len(same), batch.input_ids.shape, budget):

                def use(logits: Tensor, some: Sequence[Key] = same[at]) -> None:
                    for key, own in zip(some, logits, strict=True):
                        values = self._induce.setdefault(
                            key, torch.zeros(len(task.harmless), dtype=torch.float64)
                        )
                        values[list(rows)] = refusal_score(own, task.refusal_tokens).cpu()

                entering = None
                if self.tricks.resume:

                    def entering(layer: int = layer) -> Tensor:
                        return entered[layer]

                change = Intervention(vectors[at], layer)
                jobs.append(changed_job(stream, batch, change, use, entering))
        return jobs

    def _together(self, n: int, shape: Sequence[int], budget: TokenBudget) -> Iterator[slice]:
        """Which candidates share a batch."""
        size = budget.share(*shape) if self.tricks.rows else 1
        for first in range(0, n, size):
            yield slice(first, first + size)

    def _ablate(
        self,
        scorer: CandidateSearch,
        keys: Sequence[Key],
        harmful: Sequence[int],
        harmless: Sequence[int],
    ) -> None:
        """KL and bypass of candidates, in one reading."""
        task, stream = self.task, self.stream
        vectors = task.vectors(keys)
        units = vectors / vectors.norm(dim=1, keepdim=True)
        kl = torch.zeros(len(keys), len(task.harmless), dtype=torch.float64)
        bypass = torch.zeros(len(keys), len(task.harmful), dtype=torch.float64)

        def measure_kl(logits: Tensor, at: slice, rows: Sequence[int]) -> None:
            assert self._baseline is not None
            base = self._baseline[list(rows)].to(logits.device)
            for index, own in zip(range(len(keys))[at], logits, strict=True):
                kl[index, list(rows)] = kl_divergence(base, own).cpu()

        def measure_bypass(logits: Tensor, at: slice, rows: Sequence[int]) -> None:
            for index, own in zip(range(len(keys))[at], logits, strict=True):
                bypass[index, list(rows)] = refusal_score(own, task.refusal_tokens).cpu()

        budget = streaming_budget(self.stream, self.task.batch_size)

        def jobs() -> list[BatchRun]:
            made: list[BatchRun] = []
            for prompts, used, measure in (
                (task.harmless, harmless, measure_kl),
                (task.harmful, harmful, measure_bypass),
            ):
                own = [prompts[row] for row in used]
                for group in batches(stream, own, budget):
                    rows = [used[index] for index in group]
                    batch = left_pad(stream.model, prompts, rows)
                    for at in self._together(len(keys), batch.input_ids.shape, budget):

                        def use(
                            logits: Tensor,
                            at: slice = at,
                            rows: Sequence[int] = rows,
                            measure: Callable[..., None] = measure,
                        ) -> None:
                            measure(logits, at, rows)

                        made.append(changed_job(stream, batch, Intervention(units[at]), use))
            return made

        with ablating(stream):
            retry(stream, budget, jobs, "select: KL, bypass")
        for index, key in enumerate(keys):
            scorer.scores[key] = replace(
                scorer.scores[key],
                kl_divergence=float(kl[index, list(harmless)].mean()),
                bypass_score=float(bypass[index, list(harmful)].mean()),
                kl_at_least=None,
            )
