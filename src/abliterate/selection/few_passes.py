"""The search where a pass reads all weights: candidates and prompts share as few as possible.

The first pass runs the unmodified model on all prompts and, from each source layer on, its
candidates added to the stream (induce). The second ablates the candidates that induce leaves, on
harmless prompts (KL) and harmful ones (bypass). A pass is repeated for further candidates only
where their activations exceed the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.console import log
from abliterate.inference.engine import CandidateRun, Engine
from abliterate.metrics.refusal import local_kl, log_odds
from abliterate.models.device_placement import to_device
from abliterate.precision import to_host
from abliterate.selection.candidate_filters import Score
from abliterate.selection.candidate_search import CandidateSearch
from abliterate.selection.search_inputs import Key, Save, SearchInputs


class FewPassesSearch:
    """The search of ``CandidateSearch``, in few passes.

    Args:
        engine: runs the model.
        inputs: what candidates are scored on.
        known: scores that an interrupted search has left.
    """

    def __init__(
        self, engine: Engine, inputs: SearchInputs, known: Mapping[Key, Score] | None = None
    ) -> None:
        self.engine, self.inputs, self.known = engine, inputs, known
        self._induce: dict[Key, Tensor] = {}
        self._baseline: Tensor | None = None
        # Refusal scores of the unmodified model, float64 ``[prompts]``.
        self._harmful_scores = torch.zeros(len(inputs.harmful), dtype=torch.float64)
        self._harmless_scores = torch.zeros(len(inputs.harmless), dtype=torch.float64)

    def baseline_scores(self) -> tuple[Tensor, Tensor]:
        """Refusal scores of the unmodified model on harmful and harmless prompts.

        The candidates are added to the stream in the same pass.
        """
        search = CandidateSearch(self.inputs, self.known)
        keys = [key for key in search.usable if search.lacks_induce(key)]
        tokens = sum(map(len, self.inputs.harmless))
        every = range(len(self.inputs.harmful))
        # The harmful prompts flow along the first time.
        runs = [CandidateRun(self.inputs.harmful, every, baseline=self._note_harmful)]
        for chunk in list(self._portions(keys, tokens)) or [[]]:
            runs.append(self._induce_run(chunk))
            self._run(runs, "select: induce")
            runs = []
        return self._harmful_scores, self._harmless_scores

    def run(
        self,
        use_harmful: Tensor,
        use_harmless: Tensor,
        save: Save | None = None,
    ) -> list[Score]:
        """All scores by position, then layer.

        Args:
            use_harmful: which harmful prompts count, bool.
            use_harmless: the same for harmless prompts.
            save: called with all scores after each pass.
        """
        search = CandidateSearch(self.inputs, self.known, save)
        for key, values in self._induce.items():
            score = search.scores[key]
            value = float(values[use_harmless].mean())
            search.scores[key] = replace(score, induce_score=value, induce_at_most=None)
        search.save(search.scores)
        keys = [key for key in search.usable if search.is_open(key)]
        harmful, harmless = (use.nonzero()[:, 0].tolist() for use in (use_harmful, use_harmless))
        tokens = sum(len(self.inputs.harmful[row]) for row in harmful)
        tokens += sum(len(self.inputs.harmless[row]) for row in harmless)
        for chunk in self._portions(keys, tokens):
            self._ablate(search, chunk, harmful, harmless)
            search.save(search.scores)
        return list(search.scores.values())

    def _portions(self, keys: Sequence[Key], tokens: int) -> Iterator[list[Key]]:
        """Candidates that share a pass over so many tokens of prompts."""
        size = self.engine.candidates_at_once(tokens)
        if len(keys) > size:
            log.info(
                "the activations of %d candidates take %.1f GB: the model is read %d times "
                "(--activation-memory)",
                len(keys),
                self.engine.candidate_bytes(tokens) * len(keys) / 1e9,
                -(-len(keys) // size),
            )
        for first in range(0, len(keys), size):
            yield list(keys[first : first + size])

    def _run(self, runs: Sequence[CandidateRun], description: str) -> None:
        self.engine.run_candidates(runs, self.inputs.batch_size, description)

    def _note_harmful(self, logits: Tensor, rows: Sequence[int]) -> None:
        self._harmful_scores[list(rows)] = self._refusal(logits)

    def _note_harmless(self, logits: Tensor, rows: Sequence[int]) -> None:
        if self._baseline is None:
            shape = len(self.inputs.harmless), logits.shape[-1]
            self._baseline = self.engine.collector(shape, logits.dtype)
        here = logits.cpu()
        self._baseline[list(rows)] = here
        self._harmless_scores[list(rows)] = self._refusal(here)

    def _refusal(self, logits: Tensor) -> Tensor:
        return to_host(log_odds(logits, self.inputs.refusal_tokens))[0]

    def _refusals(self, logits: Tensor) -> Tensor:
        """Of ``[candidates, prompts, vocabulary]``, ``[candidates, prompts]`` in one transfer."""
        tokens = self.inputs.refusal_tokens
        return to_host(torch.stack([log_odds(one, tokens) for one in logits]))[0]

    def _induce_run(self, keys: Sequence[Key]) -> CandidateRun:
        """The unmodified model on harmless prompts, and each candidate from its layer on."""
        prompts = self.inputs.harmless
        run = CandidateRun(prompts, range(len(prompts)), baseline=self._note_harmless)
        if not keys:
            return run
        table = torch.zeros(len(keys), len(prompts), dtype=torch.float64)
        self._induce |= zip(keys, table, strict=True)

        def use(logits: Tensor, candidates: Sequence[int], rows: Sequence[int]) -> None:
            for index, scores in zip(candidates, self._refusals(logits), strict=True):
                table[index, list(rows)] = scores

        layers = [layer for _, layer in keys]
        return replace(run, vectors=self.inputs.vectors(keys), layers=layers, use=use)

    def _ablate(
        self,
        search: CandidateSearch,
        keys: Sequence[Key],
        harmful: Sequence[int],
        harmless: Sequence[int],
    ) -> None:
        """KL and bypass of candidates, in one pass."""
        inputs = self.inputs
        vectors = inputs.vectors(keys)
        units = vectors / vectors.norm(dim=1, keepdim=True)
        kl = torch.zeros(len(keys), len(inputs.harmless), dtype=torch.float64)
        bypass = torch.zeros(len(keys), len(inputs.harmful), dtype=torch.float64)

        def measure_kl(logits: Tensor, candidates: Sequence[int], rows: Sequence[int]) -> None:
            assert self._baseline is not None
            base = to_device(self._baseline[list(rows)], logits.device)
            found = to_host(torch.stack([local_kl(base, one) for one in logits]))[0]
            for index, values in zip(candidates, found, strict=True):
                kl[index, list(rows)] = values

        def measure_bypass(logits: Tensor, candidates: Sequence[int], rows: Sequence[int]) -> None:
            for index, scores in zip(candidates, self._refusals(logits), strict=True):
                bypass[index, list(rows)] = scores

        runs = [
            CandidateRun(inputs.harmless, harmless, units, use=measure_kl),
            CandidateRun(inputs.harmful, harmful, units, use=measure_bypass),
        ]
        self._run(runs, "select: KL, bypass")
        for index, key in enumerate(keys):
            search.scores[key] = replace(
                search.scores[key],
                kl_divergence=float(kl[index, list(harmless)].mean()),
                bypass_score=float(bypass[index, list(harmful)].mean()),
                kl_at_least=None,
            )
