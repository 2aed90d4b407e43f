"""What ways that save work are tried against, before a model's answers come from them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from abliterate.inference.decoding import decoding_config, plain_decoding
from abliterate.inference.forward import Batch, padding_token
from abliterate.models.library_versions import cache_name

#: What an architecture that does not allow such a way may raise.
FAILURES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError)


def first_tokens(model: Any, batch: Batch, count: int, cache: DynamicCache | None = None) -> Any:
    """What ``generate`` gives for the first tokens of an answer, their logits and cache included.

    Args:
        model: the model.
        batch: the prompts.
        count: how many tokens, whatever they are.
        cache: keys and values of all tokens but the last, or None.
    """
    config = decoding_config(
        [],
        count,
        pad_token_id=padding_token(model),
        return_dict_in_generate=True,
        output_logits=True,
    )
    with plain_decoding(model), torch.inference_mode():
        return model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **{cache_name(): cache},
            generation_config=config,
        )
