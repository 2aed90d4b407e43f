"""Chat formatting: from a user's text to token ids, and the positions after the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from abliterate.errors import CheckpointError, UsageError
from abliterate.prompts.columns import well_formed
from abliterate.prompts.template_process import (
    Conversation,
    TemplateError,
    render_conversations,
)
from abliterate.prompts.thinking import Mode, find_thinking

# User texts that differ in how they end, so that only the template's own tokens are common.
_PROBES = ("a", "Z9", "x?", "end.", "(b)", "é", 'he said "no"', "count to 12", "tab;")


@dataclass(frozen=True)
class ChatFormat:
    """How a prompt becomes a conversation.

    Attributes:
        system: text of a system message, or None for the template's default.
        template_kwargs: further variables of the chat template (``{"enable_thinking": false}``).
        response_prefix: text that the assistant's turn starts with.
        thinking: what is done about thoughts before the answer; None for what suits the template
            (:mod:`abliterate.prompts.thinking`).
        max_thinking_tokens: longest thought under ``skip``.
    """

    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_prefix: str = ""
    thinking: Mode | None = None
    max_thinking_tokens: int = 1024


def render(tokenizer: Any, text: str, chat: ChatFormat) -> str:
    """The conversation as the template writes it, up to where the assistant's answer starts.

    Raises:
        CheckpointError: the tokenizer has no chat template, or the template fails or passes the
            bounds of time, memory and length.
        InputError: a text is not valid Unicode.
    """
    return render_turns(tokenizer, [{"role": "user", "content": text}], chat)


def render_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]], chat: ChatFormat) -> str:
    """A conversation of several turns, of which the last is the user's; as :func:`render`."""
    return _render_all(tokenizer, [turns], chat)[0]


def _render_all(tokenizer: Any, chats: Sequence[Conversation], chat: ChatFormat) -> list[str]:
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: add one to its "
            "folder as chat_template.jinja"
        )
    well_formed(chat.response_prefix, "the response prefix")
    for turns in chats:
        for turn in turns:
            well_formed(turn["content"], "the prompt")
    thinking, system = find_thinking(tokenizer, chat), []
    if chat.system is not None:
        system = [{"role": "system", "content": well_formed(chat.system, "the system message")}]
    try:
        rendered = render_conversations(
            tokenizer,
            [[*system, *turns] for turns in chats],
            True,
            {**chat.template_kwargs, **thinking.variables},
        )
    except TemplateError as error:
        raise CheckpointError(
            f"the chat template of {tokenizer.name_or_path} fails ({error}): check --system and "
            "--chat-template-kwargs"
        ) from None
    return [text + thinking.appended + chat.response_prefix for text in rendered]


def encode(tokenizer: Any, texts: Sequence[str], chat: ChatFormat) -> list[list[int]]:
    """Token ids of each conversation; the template writes the special tokens itself."""
    if not texts:
        return []
    turns = [[{"role": "user", "content": text}] for text in texts]
    rendered = _render_all(tokenizer, turns, chat)
    return [list(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]


def post_instruction_ids(tokenizer: Any, chat: ChatFormat) -> list[int]:
    """The tokens that the template puts after the user's text, whatever that text is.

    They are the common suffix of conversations whose texts end differently (paper, section 2.3,
    takes them from a table of templates instead).
    """
    encoded = encode(tokenizer, _PROBES, chat)
    suffix: list[int] = []
    for column in zip(*(reversed(ids) for ids in encoded), strict=False):
        if len(set(column)) > 1:
            break
        suffix.insert(0, column[0])
    return suffix


def parse_positions(spec: str, tokenizer: Any, chat: ChatFormat) -> tuple[int, ...]:
    """Resolve ``post-instruction``, ``last`` or a list such as ``-5,-1`` to negative positions.

    Returns:
        Ascending positions counted from the end of the prompt; -1 is its last token.

    Raises:
        UsageError: the list is malformed or the template has no post-instruction tokens.
    """
    if spec == "last":
        return (-1,)
    if spec == "post-instruction":
        count = len(post_instruction_ids(tokenizer, chat))
        if count == 0:
            raise UsageError(
                "the chat template puts no tokens after the user's text: pass --positions last"
            )
        return tuple(range(-count, 0))
    try:
        positions = [int(part) for part in spec.split(",")]
    except ValueError:
        positions = []
    if not positions or any(p >= 0 for p in positions) or len(set(positions)) < len(positions):
        raise UsageError(
            f"--positions must be post-instruction, last or distinct negative numbers such as "
            f"-5,-1, not '{spec}'"
        )
    return tuple(sorted(positions))


def position_tokens(tokenizer: Any, positions: Sequence[int], chat: ChatFormat) -> list[str]:
    """The token string at each position, or ``(text)`` before the post-instruction tokens."""
    suffix = post_instruction_ids(tokenizer, chat)
    return [
        tokenizer.decode([suffix[position]]) if -position <= len(suffix) else "(text)"
        for position in positions
    ]


def end_of_turn_ids(tokenizer: Any, chat: ChatFormat) -> list[int]:
    """The special token that the template puts right after an assistant's answer, if it does."""
    answer = "yes"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        (rendered,) = render_conversations(tokenizer, [messages], False, chat.template_kwargs)
    except TemplateError:  # templates that take no finished turn have none to learn from
        return []
    _, matched, after = rendered.rpartition(answer)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if matched and after else []
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [ids[0]] if ids and ids[0] in special else []
