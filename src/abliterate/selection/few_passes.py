"""The search where a pass reads all weights: candidates and prompts share as few as possible.

The first pass runs the unmodified model on all prompts and, from each source layer on, its
candidates added to the stream (induce). The second ablates the candidates that induce leaves, on
harmless prompts (KL) and harmful ones (bypass). A pass is repeated for further candidates only
where their activations exceed the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.console import log
from abliterate.inference.engine import CandidateRun, Engine
from abliterate.metrics.refusal import local_kl, log_odds
from abliterate.models.device_placement import to_device
from abliterate.precision import to_host
from abliterate.selection.prompt_scores import PromptScores, Save, measured
from abliterate.selection.search_inputs import Key, SearchInputs
from abliterate.selection.search_state import SearchState


class FewPassesSearch:
    """The search of ``CandidateSearch``, in few passes.

    Args:
        engine: runs the model.
        inputs: what candidates are scored on, before prompts are filtered.
        kept: the table that is filled in; an empty one if None.
    """

    def __init__(
        self, engine: Engine, inputs: SearchInputs, kept: PromptScores | None = None
    ) -> None:
        self.engine, self.inputs = engine, inputs
        if kept is None:
            sizes = len(inputs.harmful), len(inputs.harmless)
            kept = PromptScores.empty(inputs.directions, *sizes)
        self.kept = kept
        # Last logits of the unmodified model on harmless prompts.
        self._baseline: Tensor | None = None

    def measure_baselines(self) -> None:
        """Refusal scores of the unmodified model on harmful and harmless prompts.

        The candidates are added to the stream in the same pass.
        """
        state = SearchState(self.inputs.grid, self.kept)
        keys = [key for key in state.usable if state.lacks_induce(key)]
        tokens = sum(map(len, self.inputs.harmless))
        every = range(len(self.inputs.harmful))
        # The harmful prompts flow along the first time.
        runs = [CandidateRun(self.inputs.harmful, every, baseline=self._note_harmful)]
        for chunk in list(self._portions(keys, tokens)) or [[]]:
            runs.append(self._induce_run(state, chunk))
            self._run(runs, "select: induce")
            runs = []

    def run(self, used: tuple[Tensor, Tensor], save: Save | None = None) -> SearchState:
        """Score what is not known yet.

        Args:
            used: the rows of the harmful and of the harmless prompts that count.
            save: called with the table after each pass.
        """
        state = SearchState(self.inputs.grid, self.kept, used, save)
        state.save()
        self._ablate_all(state, [key for key in state.usable if state.is_open(key)])
        # Only where nothing passes: all that may be the best of the rest.
        self._ablate_all(state, state.wants_front())
        return state

    def _ablate_all(self, state: SearchState, keys: Sequence[Key]) -> None:
        harmful, harmless = state.used["bypass"].tolist(), state.used["kl"].tolist()
        tokens = sum(len(self.inputs.harmful[row]) for row in harmful)
        tokens += sum(len(self.inputs.harmless[row]) for row in harmless)
        for chunk in self._portions(keys, tokens):
            self._ablate(state, chunk, harmful, harmless)
            state.save()

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
        self.kept.harmful[list(rows)] = self._refusal(logits)

    def _note_harmless(self, logits: Tensor, rows: Sequence[int]) -> None:
        if self._baseline is None:
            shape = len(self.inputs.harmless), logits.shape[-1]
            self._baseline = self.engine.collector(shape, logits.dtype)
        here = logits.cpu()
        self._baseline[list(rows)] = here
        self.kept.harmless[list(rows)] = self._refusal(here)

    def _refusal(self, logits: Tensor) -> Tensor:
        return to_host(log_odds(logits, self.inputs.refusal_tokens))[0]

    def _refusals(self, logits: Tensor) -> Tensor:
        """Of ``[candidates, prompts, vocabulary]``, ``[candidates, prompts]`` in one transfer."""
        tokens = self.inputs.refusal_tokens
        return to_host(torch.stack([log_odds(one, tokens) for one in logits]))[0]

    def _induce_run(self, state: SearchState, keys: Sequence[Key]) -> CandidateRun:
        """The unmodified model on harmless prompts, and each candidate from its layer on."""
        prompts = self.inputs.harmless
        run = CandidateRun(prompts, range(len(prompts)), baseline=self._note_harmless)
        if not keys:
            return run

        def use(logits: Tensor, candidates: Sequence[int], rows: Sequence[int]) -> None:
            for index, scores in zip(candidates, self._refusals(logits), strict=True):
                _put(state, "induce", keys[index], scores, rows)

        layers = [layer for _, layer in keys]
        return replace(run, vectors=self.inputs.vectors(keys), layers=layers, use=use)

    def _ablate(
        self,
        state: SearchState,
        keys: Sequence[Key],
        harmful: Sequence[int],
        harmless: Sequence[int],
    ) -> None:
        """KL and bypass of candidates, in one pass."""
        inputs = self.inputs
        vectors = inputs.vectors(keys)
        units = vectors / vectors.norm(dim=1, keepdim=True)

        def measure_kl(logits: Tensor, candidates: Sequence[int], rows: Sequence[int]) -> None:
            assert self._baseline is not None
            base = to_device(self._baseline[list(rows)], logits.device)
            found = to_host(torch.stack([local_kl(base, one) for one in logits]))[0]
            for index, values in zip(candidates, found, strict=True):
                _put(state, "kl", keys[index], values, rows)

        def measure_bypass(logits: Tensor, candidates: Sequence[int], rows: Sequence[int]) -> None:
            for index, scores in zip(candidates, self._refusals(logits), strict=True):
                _put(state, "bypass", keys[index], scores, rows)

        runs = [
            CandidateRun(inputs.harmless, harmless, units, use=measure_kl),
            CandidateRun(inputs.harmful, harmful, units, use=measure_bypass),
        ]
        self._run(runs, "select: KL, bypass")
        for key in keys:
            state.refresh(key)


def _put(state: SearchState, metric: str, key: Key, values: Tensor, rows: Sequence[int]) -> None:
    """Note scores on some of all prompts given, whether they count or not."""
    table: Tensor = getattr(state.kept, metric)
    table[state.grid.row(key[0]), key[1], list(rows)] = measured(values)
