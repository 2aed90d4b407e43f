"""What greedy decoding means here: the arg max of the model's own logits, token by token.

Every answer of this package is generated under these two functions, so that chat, evaluations,
judges and benchmarks say the same of the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig


def decoding_config(
    stops: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    pad_token_id: int = 0,
    **more: Any,
) -> GenerationConfig:
    """Greedy decoding, or sampling from the whole distribution at a temperature.

    To be used within :func:`plain_decoding`: ``generate`` fills what is left open here with the
    checkpoint's own settings.

    Args:
        stops: tokens that end an answer.
        max_new_tokens: longest answer.
        temperature: 0 for greedy decoding.
        pad_token_id: what fills a row that has ended; the mask keeps it out of attention.
        more: fields that do not change which token is chosen.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=pad_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
        **more,
    )


@contextmanager
def plain_decoding(model: Any, keep_ends: bool = False) -> Iterator[None]:
    """Hide the checkpoint's own generation config from ``model.generate``.

    Repetition penalties, suppressed, forced or biased tokens, beams, least lengths, n-gram bans,
    guidance and watermarks would all change the arg max. All fields go, not a list of them, so that
    one that a later transformers adds does not come back.

    Args:
        model: the model; its config is put back at the end.
        keep_ends: leave its special tokens (end of text, padding), for callers that give none.
    """
    own = model.generation_config
    ends = ("bos_token_id", "eos_token_id", "pad_token_id") if keep_ends else ()
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in ends})
    try:
        yield
    finally:
        model.generation_config = own
