"""The refusal tokens: those that are named, and those that a model's own first tokens show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from abliterate.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

# Paper, appendix B: the first tokens of each family's refusals.
REFUSAL_TOKEN_PRESETS = {
    "llama-2": ("I",),
    "llama-3": ("I",),
    "gemma": ("I",),
    "yi": ("I",),
    "qwen": ("I", "As"),
}

# A detected refusal token carries at least this share of the first-token probability after harmful
# prompts, and at most this fraction of that after harmless ones.
_MIN_SHARE = 0.05
_MAX_HARMLESS_RATIO = 0.25

# A token by its number, which no text can be mistaken for.
_BY_ID = re.compile(r"(?:#|id:)(\d+)")


def detect_refusal_tokens(harmful: Tensor, harmless: Tensor) -> list[int]:
    """First tokens that carry much probability after harmful prompts and little after harmless.

    Args:
        harmful: mean first-token probabilities ``[vocabulary]`` over harmful prompts.
        harmless: the same over harmless prompts.

    Returns:
        Token ids, most probable first; none where no token stands out.
    """
    chosen = (harmful >= _MIN_SHARE) & (harmless <= _MAX_HARMLESS_RATIO * harmful)
    ids = [int(index) for index in chosen.nonzero()[:, 0]]
    return sorted(ids, key=lambda index: (-float(harmful[index]), index))


def token_text(tokenizer: Any, token: int) -> str:
    """A token as people read it: its text, or ``id:1234`` where it is but a part of a character."""
    text: str = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else f"id:{token}"


def resolve_refusal_tokens(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """Token ids of ``--refusal-token`` values: token strings, ids or a family preset's name.

    Raises:
        UsageError: a value is not a single token of this tokenizer.
    """
    ids: list[int] = []
    for name in names:
        texts = REFUSAL_TOKEN_PRESETS.get(name.lower(), (name,))
        ids.extend(_single_token(tokenizer, text) for text in texts)
    return list(dict.fromkeys(ids))


def _single_token(tokenizer: Any, text: str) -> int:
    if (by_id := _BY_ID.fullmatch(text)) is not None:
        # Compared by length first: Python refuses to read numbers of thousands of digits.
        if len(by_id[1].lstrip("0")) < 10 and int(by_id[1]) < len(tokenizer):
            return int(by_id[1])
        raise UsageError(
            f"--refusal-token {text:.40}: the tokenizer has the ids 0 to {len(tokenizer) - 1}"
        )
    if text.isdecimal() and int(text) < len(tokenizer):
        return int(text)
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(encoded) != 1:
        # SentencePiece-style tokenizers put a word boundary in front of a lone word.
        known = tokenizer.convert_tokens_to_ids(text)
        if known is not None and known != tokenizer.unk_token_id:
            return int(known)
        raise UsageError(
            f"--refusal-token '{text}' is {len(encoded)} tokens, not one: give its first token or "
            "a token id (id:1234)"
        )
    return int(encoded[0])
