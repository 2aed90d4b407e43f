"""Greedy answers, in left-padded batches under a token budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from abliterate.console import progress_bar
from abliterate.distributed.rank_group import ALONE
from abliterate.errors import UsageError
from abliterate.inference.batch_decoding import BatchDecoder
from abliterate.inference.engine import OnAnswer, OnFirstLogits, Settled
from abliterate.inference.forward import (
    can_pad,
    does_not_fit,
    input_device,
    is_tensor_parallel,
    last_logits,
    left_pad,
)
from abliterate.inference.prompt_pass import PromptPass, bytes_of_a_token, can_join
from abliterate.inference.token_batches import TokenBudget, attempt, group_rows, note_answers
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat, end_of_turn_ids
from abliterate.prompts.thinking import find_thinking

# Keys and values of this many tokens, prompt and answer together, are held at once where it is not
# known what they take; a batch that runs out of memory all the same halves it.
_TOKENS = {"cpu": 16384}
_TOKENS_ACCELERATOR = 65536
# On a CPU they may take so many bytes, and no more than this share of the machine's memory: a batch
# that goes on without the rows that have ended is the better the more rows it starts with.
_CPU_BYTES, _CPU_SHARE = 2 << 30, 1 / 8


def greedy_answers(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int | str = "auto",
    description: str = "complete",
    on_answer: OnAnswer | None = None,
    done: Collection[int] = (),
    chat: ChatFormat | None = None,
    ends: Collection[int] = (),
    settled: Settled | None = None,
    on_first: OnFirstLogits | None = None,
) -> list[list[int]]:
    """Token ids of greedy answers, each up to and with its end of turn.

    Rows are sorted by length and grouped under a token budget. The grouping does not depend on
    ``done``: a batch runs again whole if one of its rows is missing, so that answers do not depend
    on where an earlier run stopped.

    Args:
        loaded: model and tokenizer; the ranks of its team answer some prompts each, and exchange
            the answers in a few rounds.
        prompts: token ids.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per batch, or ``auto``.
        description: shown beside the progress bar.
        on_answer: called with row and token ids as soon as an answer ends, once a row; the text
            that it returns is shown beside the bar.
        done: rows whose answers are known; they stay empty in the result.
        chat: how the prompts were formatted, for the template's own end of turn.
        ends: further tokens that end an answer.
        settled: whether the tokens of an answer so far are enough, asked every 8 of them; it then
            ends there.
        on_first: called with rows and the logits ``[rows, vocabulary]``, on the CPU, that their
            answers start from: of every row, those in ``done`` too. Where all answers of a batch
            are known it runs for these alone, in the same shape.

    Raises:
        UsageError: ``max_new_tokens`` is below 1, ``batch_size`` is neither ``auto`` nor a positive
            number, or a single prompt does not fit into memory.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    answers: list[list[int]] = [[] for _ in prompts]
    ranks, known = loaded.ranks, set(done)
    if not ranks.is_unsplit:
        wanted = range(len(prompts))
        left = [row for row in wanted if on_first is not None or row not in known]
        alone = replace(loaded, ranks=ALONE)
        for turn in ranks.chunks(left):
            own_rows = ranks.split(turn)
            own = [prompts[row] for row in own_rows]
            starts = RowLogits(len(own))
            with ranks.fail_together():
                found = greedy_answers(
                    alone,
                    own,
                    max_new_tokens,
                    batch_size,
                    description,
                    done=[at for at, row in enumerate(own_rows) if row in known],
                    chat=chat,
                    ends=ends,
                    settled=settled,
                    on_first=None if on_first is None else starts.put,
                )
            if on_first is not None:
                on_first(turn, ranks.gather_rows(starts.rows))
            for row, answer in zip(turn, ranks.gather(found), strict=True):
                if row in known:
                    continue
                answers[row] = answer
                if on_answer:
                    on_answer(row, answer)
        return answers
    model = loaded.model
    budget = TokenBudget(
        input_device(model), batch_size, grow=False, in_step=is_tensor_parallel(model)
    )
    budget.tokens = _TOKENS.get(budget.device.type, _TOKENS_ACCELERATOR)
    mix = can_pad(loaded.model)
    if mix and len(prompts):
        _measure(model, prompts, budget, batch_size)
    stops = list(dict.fromkeys([*stop_tokens(loaded, chat), *ends]))
    decoder = BatchDecoder(loaded, max_new_tokens, mix, stops, settled, on_first)
    reading = PromptPass(model, prompts)

    def plan(rows: Sequence[int]) -> list[tuple[int, ...]]:
        # Each row is as long as its prompt and the answer that it may grow: a batch's width.
        lengths = [len(prompts[row]) + max_new_tokens for row in rows]
        # A batch costs its overhead again with every token that it says.
        overhead = budget.overhead * max_new_tokens
        groups = group_rows(lengths, budget, mix, overhead=overhead)
        return [tuple(rows[index] for index in group) for group in groups]

    with progress_bar(description, len(prompts)) as bar, torch.inference_mode():

        def keep(row: int, answer: list[int]) -> None:
            if row in known:
                return
            known.add(row)
            answers[row] = answer
            note = on_answer(row, answer) if on_answer else None
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(1)

        bar.update(len(known))
        planned = plan(range(len(prompts)))
        while planned:
            rows = planned.pop()  # the longest first: what does not fit shows at once
            answered = known.issuperset(rows)
            if answered and on_first is None:
                continue
            batch = left_pad(loaded.model, prompts, rows)
            tokens = len(rows) * (batch.input_ids.shape[1] + max_new_tokens)
            too_long = partial(
                "a prompt of {} tokens and an answer of {} do not fit into the memory of {}: lower "
                "--max-new-tokens, use a smaller --dtype or another --device".format,
                len(prompts[rows[0]]),
                max_new_tokens,
                budget.device.type,
            )
            way = reading if reading.saves(rows) else None
            run = partial(decoder.run, batch, keep, way, 1 if answered else max_new_tokens)
            if not budget.try_batch(run, len(rows), tokens, too_long):
                planned = plan([row for group in [*planned, rows] for row in group])
            note_answers(model, budget)
    return answers


class RowLogits:
    """Logits of so many rows, put together from the batches that they ran in."""

    def __init__(self, count: int) -> None:
        self._found: list[Tensor | None] = [None] * count

    def put(self, rows: Sequence[int], logits: Tensor) -> None:
        """Keep the logits ``[rows, vocabulary]`` of some rows."""
        for row, of_row in zip(rows, logits, strict=True):
            self._found[row] = of_row

    @property
    def is_whole(self) -> bool:
        """Whether all rows are there."""
        return all(logits is not None for logits in self._found)

    @property
    def rows(self) -> Tensor:
        """``[count, vocabulary]``; of no rows, an empty tensor."""
        found = [logits for logits in self._found if logits is not None]
        return torch.stack(found) if found else torch.empty(0, 0)


def _measure(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], budget: TokenBudget, size: int | str
) -> None:
    """Set the budget by what the longest prompt takes with its keys and values, if it can be told.

    The same prompts and the same free memory give the same batches, whatever is answered already.
    """
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    if budget.device.type == "cpu" and can_join(model):
        room = min(_CPU_BYTES, _CPU_SHARE * psutil.virtual_memory().total)
        with torch.inference_mode():
            budget.tokens = int(room / bytes_of_a_token(model, prompts[longest]))
        return
    trial = TokenBudget(budget.device, size, False, is_tensor_parallel(model), measure=True)
    if not trial.measures:
        return
    batch = left_pad(model, prompts, [longest])

    def run() -> None:
        with torch.inference_mode():
            last_logits(model, batch, past=DynamicCache())

    if attempt(run):  # what is made once does not count
        tokens = batch.input_ids.numel()
        if trial.try_batch(run, 1, tokens, partial(does_not_fit, tokens, budget.device)):
            budget.tokens = trial.tokens


def stop_tokens(loaded: LoadedModel, chat: ChatFormat | None = None) -> list[int]:
    """End-of-turn tokens: the generation config's, the tokenizer's and the chat template's own."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    return ends_of_turn(loaded.tokenizer, configured, chat)


def ends_of_turn(tokenizer: Any, configured: Any, chat: ChatFormat | None = None) -> list[int]:
    """As :func:`stop_tokens`, of a model that is not loaded.

    Args:
        tokenizer: the model's.
        configured: what its generation config names, one token or a list of them or None.
        chat: how prompts are formatted.
    """
    found = configured if isinstance(configured, list) else [configured]
    chat = chat or ChatFormat()
    ids = [*found, tokenizer.eos_token_id, *end_of_turn_ids(tokenizer, chat)]
    # What a stranger's file says may be anything, and no token.
    known = (token for token in ids if isinstance(token, int) and 0 <= token < 2**31)
    stops = list(dict.fromkeys(int(token) for token in known))
    thinking = find_thinking(tokenizer, chat)
    if thinking.harmony and thinking.mode != "answer":  # what ends a message ends a thought too
        names = {token: tokenizer.convert_ids_to_tokens(token) for token in stops}
        stops = [token for token in stops if names[token] != "<|end|>"] or stops
    return stops
