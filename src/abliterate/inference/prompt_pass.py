"""Keys and values of prompts, with little padding, for a batch of answers to go on from.

A batch of answers is as wide as its longest prompt, and reading a token costs about as much as
saying one. So prompts are read in groups of similar length, the opening that all of them share
once, and the keys and values are put side by side for the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from abliterate.console import log
from abliterate.inference.candidate_batches import expanded, shared_prefix
from abliterate.inference.forward import (
    Batch,
    can_pad,
    input_device,
    last_logits,
    left_pad,
)
from abliterate.inference.roomy_cache import is_plain, roomy_cache
from abliterate.inference.rounding import same_logits
from abliterate.inference.token_batches import TokenBudget, group_rows, out_of_memory
from abliterate.inference.trials import FAILURES, first_tokens
from abliterate.models.device_placement import to_device
from abliterate.models.model_classes import text_config

# Reading in groups is worth it where it saves as much as so many batches cost.
_WORTH = 8
# Tokens of the two prompts that the way is tried out on, and how many of them are shared.
_TRIAL, _SHARED = (7, 14), 4

# Rows, what they read, and by layer the keys and values of it.
Part = tuple[list[int], Batch, list[tuple[Tensor, Tensor]]]

_agrees: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class PromptPass:
    """How the prompts of a model are read.

    Args:
        model: the model.
        prompts: token ids of all prompts that will be answered.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.prompts = model, prompts
        self.budget = TokenBudget(input_device(model))
        longest = max(map(len, prompts), default=0)
        # Every prompt keeps a token of its own to read, and its last, which begins the answer.
        shared = shared_prefix(prompts) - 1 if len(prompts) > 1 else 0
        # A window that slides over a gap between the opening and the rest would see too little.
        self.prefix = max(0, shared) if longest <= _window(model) else 0
        self._opening: list[tuple[Tensor, Tensor]] | None = None

    def saves(self, rows: Sequence[int]) -> bool:
        """Whether reading ``rows`` in groups spares enough, and gives the same."""
        lengths = [len(self.prompts[row]) for row in rows]
        if len(rows) < 2 or min(lengths) < 2:
            return False
        if not (can_pad(self.model) and can_join(self.model)):
            return False
        groups = self._groups(rows)
        grouped = self.prefix + sum(
            len(group) * (len(self.prompts[group[-1]]) - self.prefix) for group in groups
        )
        spared = len(rows) * max(lengths) - grouped - len(groups) * self.budget.overhead
        return spared >= _WORTH * self.budget.overhead and agrees(self.model)

    def cache(self, rows: Sequence[int]) -> DynamicCache | None:
        """Keys and values of all tokens of ``rows`` but the last, padded on the left.

        None where this architecture's cannot be put together.
        """
        return self._join(rows, [self._read(group) for group in self._groups(rows)])

    def _read(self, group: list[int]) -> Part:
        """Keys and values of all tokens of a group of rows but the last."""
        batch = left_pad(self.model, [p[:-1] for p in self._pick(group)], range(len(group)),
                         self.prefix)  # fmt: skip
        cache = expanded(tuple(self._opened()), len(group)) if self.prefix else DynamicCache()
        last_logits(self.model, batch, past=cache)
        return group, batch, _layers(cache)

    def _pick(self, rows: Sequence[int]) -> list[Sequence[int]]:
        return [self.prompts[row] for row in rows]

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows of similar length, shortest first."""
        lengths = [len(self.prompts[row]) - 1 - self.prefix for row in rows]
        groups = group_rows(lengths, self.budget)
        return [[rows[index] for index in group] for group in groups]

    def _opened(self) -> list[tuple[Tensor, Tensor]]:
        if self._opening is None:
            cache = DynamicCache()
            opening = list(self.prompts[0][: self.prefix])
            last_logits(self.model, left_pad(self.model, [opening], [0]), past=cache)
            self._opening = _layers(cache)
        return self._opening

    def _join(self, rows: Sequence[int], parts: list[Part]) -> DynamicCache | None:
        joined = roomy_cache(text_config(self.model))
        if len(joined.layers) != len(parts[0][2]):
            return None
        place = {row: index for index, row in enumerate(rows)}
        width = max(len(prompt) for prompt in self._pick(rows)) - 1
        for layer in range(len(joined.layers)):
            both = []
            for which in (0, 1):
                first = parts[0][2][layer][which]
                whole = first.new_zeros(len(rows), first.shape[1], width, first.shape[3])
                for group, batch, layers in parts:
                    self._place(whole, [place[row] for row in group], batch, layers[layer][which])
                both.append(whole)
            for _, _, layers in parts:  # one layer is held twice, not all
                nothing = layers[layer][0].new_empty(0)
                layers[layer] = nothing, nothing
            joined.update(both[0], both[1], layer)
        return joined

    def _place(self, whole: Tensor, where: list[int], batch: Batch, found: Tensor) -> None:
        """Put a group's keys or values into the rows ``where``, at their right ends."""
        width, own = whole.shape[2], found.shape[2] - self.prefix
        index = to_device(torch.tensor(where), whole.device)
        whole[index, :, width - own :] = found[:, :, self.prefix :]
        if not self.prefix:
            return
        for length in set(batch.lengths):  # the opening stands right before what is a row's own
            some = [at for at, own in enumerate(batch.lengths) if own == length]
            picked = to_device(torch.tensor(some), whole.device)
            start = width - length - self.prefix
            whole[index[picked], :, start : start + self.prefix] = found[picked, :, : self.prefix]


def agrees(model: PreTrainedModel) -> bool:
    """Whether answers that go on from joined keys and values are those of a plain start.

    Tried once a model: some architectures keep more than keys and values, or count tokens on
    their own.
    """
    if model not in _agrees:
        try:
            _agrees[model] = _try_out(model)
        except FAILURES as error:
            if out_of_memory(error):
                raise
            log.debug("prompts are not read in groups with this architecture: %s", error)
            _agrees[model] = False
    return _agrees[model]


def _try_out(model: PreTrainedModel) -> bool:
    short, long = _TRIAL
    opening = list(range(3, 3 + _SHARED))
    prompts = [
        [*opening, *range(20, 20 + short - _SHARED)],
        [*opening, *range(40, 40 + long - _SHARED)],
    ]
    reading = PromptPass(model, prompts)
    batch = left_pad(model, prompts, [0, 1])
    for prefix in {0, _SHARED if long <= _window(model) else 0}:
        reading.prefix = prefix
        cache = reading.cache([0, 1])
        if cache is None:
            return False
        plain, joined = (
            torch.stack(first_tokens(model, batch, 2, past).logits) for past in (None, cache)
        )
        if not same_logits(model, joined, plain):
            return False
    return True


def bytes_of_a_token(model: PreTrainedModel, prompt: Sequence[int]) -> float:
    """What an answer's cache takes for a token, seen on the first few of a prompt."""
    cache, some = DynamicCache(), list(prompt[: _TRIAL[0]])
    last_logits(model, left_pad(model, [some], [0]), past=cache)
    held = sum(tensor.numel() * tensor.element_size() for pair in _layers(cache) for tensor in pair)
    return held / len(some)


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def can_join(model: PreTrainedModel) -> bool:
    """Whether an answer's cache holds keys and values of tokens, and nothing else."""
    return is_plain(DynamicCache(config=text_config(model)))


def _window(model: PreTrainedModel) -> float:
    """How many tokens back every layer sees."""
    layers = DynamicCache(config=text_config(model)).layers
    windows = (getattr(layer, "sliding_window", None) for layer in layers)
    return min((w for w in windows if w), default=float("inf"))
