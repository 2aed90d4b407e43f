"""select: score every candidate direction and choose one (paper, section 2.3 and appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from abliterate.direction import Direction
from abliterate.errors import SelectionError, UsageError
from abliterate.extraction.means import Extraction, require_min_prompts
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thinks_first import or_thinks_first
from abliterate.inference.thoughts import Asked, ask, unfinished
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.sources import Prompt, check_prompts
from abliterate.selection.candidate_filters import (
    Score,
    Thresholds,
    apply_filters,
    best_candidate,
    explain_no_candidate,
)
from abliterate.selection.few_passes import FewPassesSearch
from abliterate.selection.many_passes import ManyPassesSearch
from abliterate.selection.search_inputs import Key, Search, SearchInputs
from abliterate.writers import decoder_blocks, find_writers, stream_width

_KINDS = ("harmful", "harmless")

__all__ = [
    "Score",
    "Selection",
    "Thresholds",
    "apply_filters",
    "best_candidate",
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
    """

    scores: tuple[Score, ...]
    thresholds: Thresholds
    winner: Score | None
    harmful_score: float
    harmless_score: float
    n_harmful: int
    n_harmless: int
    unfinished: Mapping[str, int] = field(default_factory=dict)

    def require_winner(self) -> Score:
        """The winner.

        Raises:
            SelectionError: no candidate passes; the message counts the reasons, shows the nearest
                misses and names the option that would admit them.
        """
        if self.winner is None:
            raise SelectionError(explain_no_candidate(self.scores, self.thresholds))
        return self.winner

    def direction(self, extraction: Extraction) -> Direction:
        """The winner's unnormalised difference of means; raises as :meth:`require_winner`."""
        winner = self.require_winner()
        row = extraction.positions.index(winner.position)
        vector = extraction.directions[row, winner.layer]
        return Direction(vector, winner.position, winner.layer)


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
    known: Mapping[Key, Score] | None = None,
    save: Callable[[Mapping[Key, Score]], None] | None = None,
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
        known: scores that an interrupted search has left.
        save: called with all scores whenever candidates are finished.

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
    passes = _open_search(loaded, inputs, n_answer, known)
    baselines = passes.baseline_scores()
    with or_thinks_first(loaded, chat, asked["harmful"].ids):
        used = _filter_prompts(*baselines, filter, asked)
    found = _result(passes.run(*used, save), inputs, baselines, used)
    return replace(found, unfinished=unfinished(asked))


def _open_search(
    loaded: LoadedModel, inputs: SearchInputs, n_answer: int, known: Mapping[Key, Score] | None
) -> ManyPassesSearch | FewPassesSearch:
    """The search that suits what a pass of the model costs."""
    engine = engine_of(loaded)
    if n_answer:
        engine.require_answers("--kl-on response:N", "--kl-on last")
    if engine.reads_weights_every_pass:
        return FewPassesSearch(engine, inputs, known)
    return ManyPassesSearch(loaded, inputs, n_answer, known)


def _filter_prompts(
    harmful: Tensor, harmless: Tensor, filter: bool, asked: Mapping[str, Asked]
) -> tuple[Tensor, Tensor]:
    """Which harmful and which harmless prompts count, bool, by their refusal scores.

    A prompt whose thought has not ended never does.

    Raises:
        InputError: too few are left.
    """
    ended = [torch.tensor(asked[kind].ended, dtype=torch.bool) for kind in _KINDS]
    for kind, one in asked.items():
        one.finished(kind)
    if not filter:
        return ended[0], ended[1]
    use_harmful, use_harmless = (harmful > 0) & ended[0], (harmless < 0) & ended[1]
    require_min_prompts("harmful", int(use_harmful.sum()), len(harmful), "n-val")
    require_min_prompts("harmless", int(use_harmless.sum()), len(harmless), "n-val")
    return use_harmful, use_harmless


def _result(
    scores: Sequence[Score],
    inputs: SearchInputs,
    baselines: tuple[Tensor, Tensor],
    used: tuple[Tensor, Tensor],
) -> Selection:
    """Filter and choose, with the means of the unmodified model on the prompts used."""
    judged = apply_filters(scores, inputs.n_layers, inputs.thresholds)
    harmful_score, harmless_score = (
        float(values[use].mean()) for values, use in zip(baselines, used, strict=True)
    )
    n_harmful, n_harmless = (int(use.sum()) for use in used)
    return Selection(
        tuple(judged),
        inputs.thresholds,
        best_candidate(judged),
        harmful_score,
        harmless_score,
        n_harmful,
        n_harmless,
    )
