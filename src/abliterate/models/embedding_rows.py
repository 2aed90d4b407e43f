"""Token ids that a tokenizer knows and the model's embedding does not."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from abliterate.errors import CheckpointError
from abliterate.models.model_classes import text_config

# Names tokens in errors, where a model is at hand without its tokenizer.
_tokenizers: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()


def remember_tokenizer(model: Any, tokenizer: Any) -> None:
    """Let errors about a model's tokens name them."""
    if isinstance(model, PreTrainedModel):
        _tokenizers[model] = tokenizer


def embedding_rows(model: Any) -> int | None:
    """How many token ids a model's embedding knows; None where that cannot be said."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        rows = next(iter(getattr(getattr(embedding, "weight", None), "shape", ())), None)
    if not isinstance(rows, int):
        return None
    said = getattr(text_config(model), "vocab_size", None)  # where ranks hold parts of it
    return max(rows, said) if isinstance(said, int) else rows


def require_token(model: Any, token: int, where: str) -> None:
    """Refuse a token for which the embedding has no row.

    A tokenizer often has more tokens than that: it matters only once one is fed to the model.

    Args:
        model: the model.
        token: its id.
        where: what it occurs in, in words.

    Raises:
        CheckpointError: there is no row.
    """
    rows = embedding_rows(model)
    if rows is None or token < rows:
        return
    tokenizer = _tokenizers.get(model) if isinstance(model, PreTrainedModel) else None
    name, size = "", ""
    if tokenizer is not None:
        name = f" {tokenizer.convert_ids_to_tokens(token)!r}"
        size = f", the tokenizer {len(tokenizer):,} tokens"
    raise CheckpointError(
        f"token{name} (id {token}) of {where} has no row in the embedding of "
        f"{getattr(model, 'name_or_path', '') or 'the model'}, which has {rows:,} rows{size}: give "
        "a tokenizer and chat template that belong to the model"
    )
