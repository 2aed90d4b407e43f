"""select: score every candidate direction and choose one (paper, section 2.3 and appendix C)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from abliterate.direction import Direction
from abliterate.errors import SelectionError, UsageError
from abliterate.extraction.extraction import Extraction
from abliterate.extraction.means import require_min_prompts
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thinks_first import or_thinks_first
from abliterate.inference.thoughts import ask, unfinished
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.sources import Prompt, check_prompts
from abliterate.selection.candidate_filters import (
    Score,
    Thresholds,
    apply_filters,
    best_candidate,
)
from abliterate.selection.few_passes import FewPassesSearch
from abliterate.selection.many_passes import ManyPassesSearch
from abliterate.selection.no_candidate import explain_no_candidate
from abliterate.selection.pareto_front import front_records
from abliterate.selection.prompt_scores import PromptScores, Save
from abliterate.selection.resampling import Resamples, resample
from abliterate.selection.search_inputs import CandidateGrid, Search, SearchInputs
from abliterate.selection.search_state import SearchState
from abliterate.writers import decoder_blocks, find_writers, stream_width

_KINDS = ("harmful", "harmless")

__all__ = [
    "Score",
    "Selection",
    "Thresholds",
    "apply_filters",
    "best_candidate",
    "choose_from_kept",
    "explain_no_candidate",
    "select",
]


@dataclass(frozen=True)
class Selection:
    """Every candidate's scores, and the winner.

    Attributes:
        scores: by position, then layer, with the filters' verdicts.
        thresholds: the filters.
        winner: the kept candidate with the lowest bypass score, or None.
        harmful_score: mean refusal score of the unmodified model on the harmful prompts used.
        harmless_score: the same on the harmless ones.
        n_harmful: how many harmful prompts were used.
        n_harmless: how many harmless prompts were used.
        resamples: how the choice falls on resamples of the prompts; None if nothing was scored.
    """

    scores: tuple[Score, ...]
    thresholds: Thresholds
    winner: Score | None
    harmful_score: float
    harmless_score: float
    n_harmful: int
    n_harmless: int
    resamples: Resamples | None = None
    unfinished: Mapping[str, int] = field(default_factory=dict)

    def front(self) -> list[dict[str, Any]]:
        """If no candidate passes: those that no other beats in bypass, induce and KL at once, with
        the filters that each fails; else empty."""
        if self.winner is not None:
            return []
        n_layers = 1 + max(score.layer for score in self.scores)
        return front_records(self.scores, n_layers, self.thresholds)

    def require_winner(self) -> Score:
        """The winner.

        Raises:
            SelectionError: no candidate passes; the message counts the reasons, shows the nearest
                misses and names the option that would admit them.
        """
        if self.winner is None:
            raise SelectionError(explain_no_candidate(self.scores, self.thresholds), self.front())
        return self.winner

    def direction(self, extraction: Extraction) -> Direction:
        """The winner's unnormalised vector; raises as :meth:`require_winner`."""
        winner = self.require_winner()
        return replace(extraction[winner.position, winner.layer], model=None)


def parse_kl_on(text: str) -> int:
    """How many answer tokens ``last`` (0) or ``response:N`` average the KL over.

    Raises:
        UsageError: it is neither.
    """
    if text == "last":
        return 0
    kind, _, count = text.partition(":")
    if kind != "response" or not count.isdecimal() or int(count) < 1:
        raise UsageError(f"--kl-on must be last or response:N, not '{text}'")
    return int(count)


def select(
    loaded: LoadedModel,
    extraction: Extraction,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    thresholds: Thresholds | None = None,
    filter: bool = True,
    chat: ChatFormat | None = None,
    batch_size: int | str = "auto",
    search: Search = "staged",
    all_layers: bool = False,
    kl_on: str = "last",
    kept: PromptScores | None = None,
    save: Save | None = None,
    seed: int = 0,
) -> Selection:
    """Score every candidate of ``extraction`` on validation prompts and choose one.

    Args:
        loaded: model and tokenizer.
        extraction: the candidates, their positions and the refusal tokens.
        harmful: validation prompts that extraction did not use.
        harmless: the same.
        thresholds: the filters; the paper's by default.
        filter: drop harmful prompts that are not refused and harmless ones that are.
        chat: system message and template variables, as extraction had them.
        batch_size: prompts per forward pass, or ``auto``.
        search: ``staged`` leaves out what cannot change the choice; ``exhaustive`` scores every
            candidate on every metric.
        all_layers: ``staged`` scores the candidates of the pruned layers like the others.
        kl_on: ``last`` measures KL at the last prompt token, ``response:N`` averages it over the
            first N tokens of the unmodified model's greedy answers.
        kept: scores by prompt that an earlier search of the same model, candidates, prompts and
            ``kl_on`` has left: what they hold is not measured again. Filled in.
        save: called with the scores by prompt whenever candidates are finished.
        seed: of the resamples of the prompts.

    Raises:
        InputError: too few prompts are left after filtering, or the candidates are another
            model's.
        UsageError: ``kl_on`` or ``search`` is none of these.
    """
    check_prompts(harmful=harmful, harmless=harmless)
    thresholds, chat = thresholds or Thresholds(), chat or ChatFormat()
    width = stream_width(loaded.model, find_writers(loaded.model))
    extraction.check(len(decoder_blocks(loaded.model)), width)
    n_answer = parse_kl_on(kl_on)
    if search not in ("staged", "exhaustive"):
        raise UsageError(f"--search must be staged or exhaustive, not '{search}'")
    asked = {
        kind: ask(loaded, [prompt.text for prompt in prompts], chat, batch_size, kind)
        for kind, prompts in (("harmful", harmful), ("harmless", harmless))
    }
    inputs = SearchInputs(
        loaded.model,
        extraction.directions,
        extraction.positions,
        asked["harmful"].ids,
        asked["harmless"].ids,
        refusal_tokens=extraction.refusal_tokens,
        thresholds=thresholds,
        search=search,
        all_layers=all_layers,
        batch_size=batch_size,
        ranks=loaded.ranks,
    )
    kept = kept or PromptScores.empty(extraction.directions, len(harmful), len(harmless))
    passes = _open_search(loaded, inputs, n_answer, kept)
    passes.measure_baselines()
    for kind, one in asked.items():
        one.finished(kind)
    kept.leave_out(*(torch.tensor(asked[kind].ended, dtype=torch.bool) for kind in _KINDS))
    with or_thinks_first(loaded, chat, asked["harmful"].ids):
        used = _filter_prompts(kept, filter)
    return replace(_result(passes.run(used, save), seed), unfinished=unfinished(asked))


def choose_from_kept(
    kept: PromptScores,
    extraction: Extraction,
    thresholds: Thresholds,
    filter: bool = True,
    search: Search = "staged",
    all_layers: bool = False,
    seed: int = 0,
) -> Selection | None:
    """What :func:`select` would come to, without a model; None if the choice needs more scores.

    Args:
        kept: scores by prompt of this model and these candidates and prompts.
        extraction: the candidates.
        thresholds: as for :func:`select`, and so are the others.
        filter: likewise.
        search: likewise.
        all_layers: likewise.
        seed: likewise.

    Raises:
        InputError: too few prompts are left after filtering.
    """
    if not kept.has_baselines:
        return None
    grid = CandidateGrid(
        extraction.directions, extraction.positions, thresholds, search, all_layers
    )
    state = SearchState(grid, kept, _filter_prompts(kept, filter))
    if not state.is_finished():
        return None
    left_out = dict(zip(_KINDS, kept.left_out, strict=True))
    unended = left_out if any(left_out.values()) else {}
    return replace(_result(state, seed), unfinished=unended)


def _open_search(
    loaded: LoadedModel, inputs: SearchInputs, n_answer: int, kept: PromptScores
) -> ManyPassesSearch | FewPassesSearch:
    """The search that suits what a pass of the model costs."""
    engine = engine_of(loaded)
    if n_answer:
        engine.require_answers("--kl-on response:N", "--kl-on last")
    if engine.reads_weights_every_pass:
        return FewPassesSearch(engine, inputs, kept)
    return ManyPassesSearch(loaded, inputs, kept, n_answer)


def _filter_prompts(kept: PromptScores, filter: bool) -> tuple[Tensor, Tensor]:
    """The rows of the harmful and of the harmless prompts that count, by their refusal scores.

    A prompt whose thought has not ended never does.

    Raises:
        InputError: too few are left.
    """
    if not filter:
        return _usable(kept.harmful), _usable(kept.harmless)
    use_harmful = (kept.harmful > 0) & kept.harmful.isfinite()
    use_harmless = kept.harmless < 0
    require_min_prompts("harmful", int(use_harmful.sum()), len(use_harmful), "n-val")
    require_min_prompts("harmless", int(use_harmless.sum()), len(use_harmless), "n-val")
    return use_harmful.nonzero()[:, 0], use_harmless.nonzero()[:, 0]


def _usable(scores: Tensor) -> Tensor:
    """The rows with a score, or all where none has: then that is what is to be told."""
    return (scores.isfinite() if bool(scores.isfinite().any()) else scores.isinf()).nonzero()[:, 0]


def _result(state: SearchState, seed: int) -> Selection:
    """Filter and choose, with the means of the unmodified model on the prompts used."""
    judged = state.judged()
    harmful, harmless = state.used["bypass"], state.used["induce"]
    return Selection(
        tuple(judged),
        state.grid.thresholds,
        best_candidate(judged),
        float(state.kept.harmful[harmful].mean()),
        float(state.kept.harmless[harmless].mean()),
        len(harmful),
        len(harmless),
        resample(state, judged, seed),
    )
