"""Greedy answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from abliterate.errors import UsageError
from abliterate.forward import Batch, for_each_batch
from abliterate.models import Loaded


def greedy_answers(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int | str = "auto",
    description: str = "complete",
) -> list[list[int]]:
    """Token ids of greedy answers, each up to and with its end of turn.

    Args:
        loaded: model and tokenizer.
        prompts: token ids.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per batch, or ``auto``.
        description: shown beside the progress bar.
    """
    if loaded.stream is not None:
        raise UsageError(
            "--offload would read the whole model for every token of an answer, so it does not "
            "generate: use --no-offload on a machine with room for the weights"
        )
    stops = stop_tokens(loaded)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    answers: list[list[int]] = [[] for _ in prompts]

    def run(batch: Batch) -> None:
        output = loaded.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
        )
        for row, ids in zip(batch.rows, output[:, batch.input_ids.shape[1] :], strict=True):
            answer = ids.tolist()
            ends = [index + 1 for index, token in enumerate(answer) if token in stops]
            answers[row] = answer[: ends[0]] if ends else answer

    with torch.inference_mode():
        # Answers grow beyond the prompts: the budget must not.
        for_each_batch(loaded.model, prompts, run, batch_size, description, grow=False)
    return answers


def stop_tokens(loaded: Loaded) -> list[int]:
    """End-of-turn tokens: the generation config's and the tokenizer's own."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    ids = [*found, loaded.tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(ids) if isinstance(token, int)]
