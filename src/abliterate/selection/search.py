"""select: score every candidate direction and choose one (paper, section 2.3 and appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.direction import Direction
from abliterate.errors import SelectionError, UsageError
from abliterate.extraction.means import Extraction, require_min_prompts
from abliterate.inference.forward import all_last_logits
from abliterate.inference.generation import greedy_answers
from abliterate.metrics.refusal import refusal_score
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.prompts.sources import Prompt, check_prompts
from abliterate.selection.candidate_filters import (
    Score,
    Thresholds,
    apply_filters,
    best_candidate,
    explain_no_candidate,
)
from abliterate.selection.candidate_search import CandidateSearch
from abliterate.selection.search_inputs import Key, Search, SearchInputs
from abliterate.writers import decoder_blocks, find_writers, stream_width

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
    tokens = extraction.refusal_tokens
    harmful_ids = encode(loaded.tokenizer, [prompt.text for prompt in harmful], chat)
    harmless_ids = encode(loaded.tokenizer, [prompt.text for prompt in harmless], chat)
    streamed = None
    if loaded.stream is None:
        harmful_score = _refusal_scores(loaded, harmful_ids, tokens, batch_size)
        harmless_score = _refusal_scores(loaded, harmless_ids, tokens, batch_size)
    else:
        from abliterate.selection.streamed_search import StreamedSearch

        if n_answer:
            raise UsageError(
                "--kl-on response:N needs the model's answers, which --offload cannot generate in "
                "few readings of it: use --kl-on last"
            )
        streamed = StreamedSearch(
            loaded.stream,
            SearchInputs(
                loaded.model,
                extraction.directions,
                extraction.positions,
                harmful_ids,
                harmless_ids,
                tokens,
                thresholds=thresholds,
                search=search,
                all_layers=all_layers,
                batch_size=batch_size,
            ),
            known,
        )
        harmful_score, harmless_score = streamed.harmful_scores, streamed.harmless_scores
    use_harmful = harmful_score > 0 if filter else torch.ones_like(harmful_score, dtype=torch.bool)
    use_harmless = (
        harmless_score < 0 if filter else torch.ones_like(harmless_score, dtype=torch.bool)
    )
    if filter:
        require_min_prompts("harmful", int(use_harmful.sum()), len(harmful), "n-val")
        require_min_prompts("harmless", int(use_harmless.sum()), len(harmless), "n-val")
    harmless_used = [ids for ids, use in zip(harmless_ids, use_harmless, strict=True) if use]
    answered, lengths = None, None
    if n_answer:
        answers = greedy_answers(loaded, harmless_used, n_answer, batch_size, "select: answers")
        # The last answer token is predicted, not read.
        answered = [ids + new[:-1] for ids, new in zip(harmless_used, answers, strict=True)]
        lengths = list(map(len, answers))
    task = SearchInputs(
        loaded.model,
        extraction.directions,
        extraction.positions,
        [ids for ids, use in zip(harmful_ids, use_harmful, strict=True) if use],
        harmless_used,
        extraction.refusal_tokens,
        answered,
        lengths,
        thresholds,
        search,
        all_layers,
        batch_size,
        loaded.ranks,
    )
    if streamed is None:
        scores = CandidateSearch(task, known, save).run()
    else:
        scores = streamed.run(use_harmful, use_harmless, save)
    judged = apply_filters(scores, extraction.directions.shape[1], thresholds)
    return Selection(
        tuple(judged),
        thresholds,
        best_candidate(judged),
        float(harmful_score[use_harmful].mean()),
        float(harmless_score[use_harmless].mean()),
        int(use_harmful.sum()),
        int(use_harmless.sum()),
    )


def _refusal_scores(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    batch_size: int | str,
) -> Tensor:
    """Of the unmodified model, float64 ``[prompts]``; each rank of a team runs some prompts."""
    own = loaded.ranks.split(prompts)
    scores = torch.empty(0, dtype=torch.float64)
    with loaded.ranks.fail_together():
        if own:
            scores = refusal_score(all_last_logits(loaded.model, own, batch_size), tokens)
    return loaded.ranks.gather_rows(scores)
