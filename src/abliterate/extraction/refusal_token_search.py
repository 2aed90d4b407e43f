"""Which first tokens count as refusing: those that are named, or that the model shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from abliterate.inference.in_memory import engine_of
from abliterate.metrics.refusal_evidence import Prompts, find_first_refusal_tokens
from abliterate.metrics.refusal_tokens import resolve_refusal_tokens
from abliterate.models.embedding_rows import require_token
from abliterate.models.loading import LoadedModel

# How many prompts of each kind the refusal tokens are detected from.
DETECT_PROMPTS = 32


def find_refusal_tokens(
    loaded: LoadedModel,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    names: Sequence[str],
    batch_size: int | str = "auto",
) -> list[int]:
    """The refusal tokens named, or those that the model's own first tokens show.

    Args:
        loaded: model and tokenizer.
        harmful: token ids of harmful prompts; the first 32 are looked at.
        harmless: token ids of harmless prompts.
        names: as ``--refusal-token`` gives them; empty to detect.
        batch_size: prompts per forward pass, or ``auto``.
    """
    if names:
        return named_refusal_tokens(loaded, names)
    sample = {"harmful": harmful[:DETECT_PROMPTS], "harmless": harmless[:DETECT_PROMPTS]}
    logits = engine_of(loaded).last_logits(sample, {"": None}, batch_size, "refusal tokens")[""]
    prompts = {"harmful": harmful, "harmless": harmless}
    return refusal_tokens_shown(logits["harmful"], logits["harmless"], loaded.tokenizer, prompts)


def named_refusal_tokens(loaded: LoadedModel, names: Sequence[str]) -> list[int]:
    """The refusal tokens that ``--refusal-token`` names.

    Raises:
        CheckpointError: the model has no logit for one.
        UsageError: a value is not a single token of the tokenizer.
    """
    tokens = resolve_refusal_tokens(loaded.tokenizer, names)
    for token in tokens:
        require_token(loaded.model, token, "--refusal-token")
    return tokens


def refusal_tokens_shown(
    harmful: Tensor, harmless: Tensor, tokenizer: Any, prompts: Prompts
) -> list[int]:
    """The refusal tokens that last-token logits ``[prompts, vocabulary]`` show; 32 rows count.

    Raises:
        InputError: they show none; it says what they do show.
    """

    def shares(rows: Tensor) -> Tensor:
        # Row by row: a float64 copy of all would be larger than what is looked at.
        chosen = rows[:DETECT_PROMPTS]
        return summed(row.double().softmax(-1) for row in chosen) / len(chosen)

    return find_first_refusal_tokens(shares(harmful), shares(harmless), tokenizer, prompts)


def summed(parts: Iterable[Tensor]) -> Tensor:
    return sum(parts, torch.zeros(1, dtype=torch.float64))
