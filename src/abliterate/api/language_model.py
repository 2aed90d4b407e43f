"""A model and its tokenizer as the library's functions take them, in memory or streamed."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliterate.checkpoints.checkpoint import Checkpoint, find_checkpoint
from abliterate.errors import UsageError
from abliterate.inference.engine import Engine
from abliterate.inference.in_memory import engine_of
from abliterate.models.loading import LoadedModel
from abliterate.offload import OpenOptions, choose_opener
from abliterate.prompts.chat_template import ChatFormat
from abliterate.writers import decoder_blocks, find_writers, stream_width


@dataclass(frozen=True, repr=False)
class LanguageModel:
    """A model, its tokenizer and how prompts become conversations.

    Made by :func:`wrap` and :func:`load`; a model whose layers are streamed from disk is the same
    object.

    Attributes:
        loaded: model, tokenizer, checkpoint and what runs them.
        chat: system message, template and the like, the same for all that is done with it.
        batch_size: prompts per forward pass, or ``auto``.
    """

    loaded: LoadedModel
    chat: ChatFormat = field(default_factory=ChatFormat)
    batch_size: int | str = "auto"

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model; without weights of its own where it is streamed."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.loaded.tokenizer

    @property
    def name(self) -> str:
        """Folder or hub id."""
        return self.loaded.checkpoint.name

    @property
    def engine(self) -> Engine:
        """What runs it."""
        return engine_of(self.loaded)

    @property
    def is_streamed(self) -> bool:
        """Whether its layers come from disk at every pass."""
        return self.engine.reads_weights_every_pass

    @property
    def n_layers(self) -> int:
        """How many decoder blocks it has."""
        return len(decoder_blocks(self.model))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return stream_width(self.model, find_writers(self.model))

    def close(self) -> None:
        """Give files of a streamed model back; it cannot be run any more."""
        self.engine.close()

    def _facts(self) -> str:
        way = ", streamed" if self.is_streamed else ""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"{self.model.config.model_type}, {self.n_layers} layers, d_model {self.d_model}, "
            f"{dtype} on {self.engine.devices}{way}"
        )

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}: {self._facts()})"

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(self.name)}</b>: {html.escape(self._facts())}"


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: ChatFormat | None = None,
    batch_size: int | str = "auto",
) -> LanguageModel:
    """A model that transformers has loaded, as the library's functions take it.

    Args:
        model: any decoder-only causal language model, in evaluation mode.
        tokenizer: its tokenizer, with a chat template unless ``chat`` names one.
        chat: how prompts become conversations; None for the tokenizer's template as it is.
        batch_size: prompts per forward pass, or ``auto``.

    Raises:
        UsageError: one of the two is something else, or the model is in training mode.

    Source:
        No part of the paper.

    Examples:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained(M)
        >>> ab.wrap(model, AutoTokenizer.from_pretrained(M)).n_layers
        8
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"the model must be a transformers model, not a {type(model).__name__}: give (model, "
            "tokenizer) in this order"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(
            f"the tokenizer must be a transformers tokenizer, not a {type(tokenizer).__name__}"
        )
    if model.training:
        raise UsageError("the model is in training mode, in which dropout acts: call model.eval()")
    name = model.name_or_path or type(model).__name__
    loaded = LoadedModel(model, tokenizer, Checkpoint(name, Path(name)))
    return LanguageModel(loaded, chat or ChatFormat(), batch_size)


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    activation_memory: str | None = None,
    load_in: str = "none",
    attn_implementation: str = "auto",
    chat: ChatFormat | None = None,
    batch_size: int | str = "auto",
) -> LanguageModel:
    """Load a model and its tokenizer from safetensors, in memory or streamed from disk.

    Args:
        model: a folder, or a hub id as ``org/name`` or ``org/name@REVISION``.
        device: ``auto`` or a torch device.
        dtype: ``auto`` or the name of a dtype.
        offload: stream the layers from disk; None for what is larger than the free memory.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: the checkpoint's own code may run.
        activation_memory: of a streamed model, memory for activations, such as ``8GB``.
        load_in: ``8bit`` or ``4bit`` holds the matrices so in memory.
        attn_implementation: which of transformers' ways to compute attention.
        chat: how prompts become conversations.
        batch_size: prompts per forward pass, or ``auto``.

    Raises:
        CheckpointError: files are missing, damaged or in another format.
        UsageError: device, dtype or another argument cannot be used.

    Source:
        No part of the paper.

    Examples:
        >>> ab.load(M, device="cpu").d_model
        128
        >>> ab.load(M, device="cpu", offload=True).is_streamed
        True
    """
    if not isinstance(model, str | Path):
        raise UsageError(f"model must be a folder or a hub id, not {type(model).__name__}")
    checkpoint = find_checkpoint(str(model), revision)
    options = OpenOptions(
        device,
        dtype,
        trust_remote_code,
        offload,
        activation_memory,
        load_in=load_in,
        attn_implementation=attn_implementation,
    )
    loaded = choose_opener(checkpoint, options).open(checkpoint)
    return LanguageModel(loaded, chat or ChatFormat(), batch_size)


# What the functions take for a model.
ModelLike = LanguageModel | LoadedModel | tuple[Any, Any] | Sequence[Any]


def as_model(given: Any) -> LanguageModel:
    """What a user gives for a model.

    Raises:
        UsageError: it is none.
    """
    if isinstance(given, LanguageModel):
        return given
    if isinstance(given, LoadedModel):
        return LanguageModel(given)
    if isinstance(given, tuple | list) and len(given) == 2:
        return wrap(*given)
    raise UsageError(
        "the model must be what ab.wrap or ab.load returns, or a (model, tokenizer) pair, not a "
        f"{type(given).__name__}"
    )
