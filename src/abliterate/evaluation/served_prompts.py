"""Prompts as a server is sent them: as text that gives the same tokens, or as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.errors import UsageError
from abliterate.inference.thoughts import AnswerLimits
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.thinking import find_thinking


@dataclass(frozen=True)
class Conversations:
    """Prompts as messages, for a server whose own template renders them.

    Attributes:
        system: text of a system message.
        variables: of the template, ``chat_template_kwargs`` of a request.
    """

    system: str | None
    variables: Mapping[str, Any]

    @classmethod
    def of(cls, limits: AnswerLimits, chat: ChatFormat) -> Conversations:
        """Those that say what ``chat`` says.

        Raises:
            UsageError: messages cannot say it.
        """
        thinking = find_thinking(limits.reader.tokenizer, chat)
        if thinking.appended:
            raise UsageError(
                "--server-api chat: the empty thought that --thinking answer puts behind the "
                "prompt cannot be sent: pass --thinking whole, or leave --server-api out"
            )
        return cls(chat.system, {**chat.template_kwargs, **thinking.variables})

    def messages(self, text: str) -> list[dict[str, str]]:
        """What is sent for one prompt."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": text}]


def prompt_text(tokenizer: Any, ids: Sequence[int]) -> str | None:
    """A text that the tokenizer, with the special tokens that it adds to any text, turns into
    ``ids``; None if there is none."""
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    candidates = [text]
    if ids and (bos := getattr(tokenizer, "bos_token", None)):
        candidates.append(text.removeprefix(bos))
    for candidate in candidates:
        if list(tokenizer(candidate)["input_ids"]) == list(ids):
            return candidate
    return None


def ends_configured(checkpoint: Checkpoint, config: Any) -> Any:
    """The end-of-text tokens of a checkpoint's generation config, or of its configuration."""
    try:
        found = GenerationConfig.from_pretrained(checkpoint.folder).eos_token_id
    except (OSError, ValueError, TypeError):
        found = None
    return getattr(config, "eos_token_id", None) if found is None else found
