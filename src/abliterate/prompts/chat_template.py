"""Chat formatting: from a user's text to token ids, and the positions after the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from abliterate.console import log
from abliterate.errors import CheckpointError, UsageError
from abliterate.prompts.columns import well_formed
from abliterate.prompts.template_checks import (
    OTHER_TEMPLATE,
    Template,
    find_wrapping,
    stands,
    user,
)
from abliterate.prompts.template_process import TemplateError
from abliterate.prompts.thinking import Mode, find_thinking
from abliterate.settings.model_sections import ChatSettings

#: The template that writes texts as they are.
PLAIN = "plain"
# User texts that differ in how they end, so that only the template's own tokens are common.
_PROBES = ("a", "Z9", "x?", "end.", "(b)", "é", 'he said "no"', "count to 12", "tab;")
_SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class ChatFormat:
    """How a prompt becomes a conversation.

    Attributes:
        system: text of a system message, or None for the template's default.
        template_kwargs: further variables of the chat template (``{"enable_thinking": false}``).
        response_prefix: text that the assistant's turn starts with.
        template: a template instead of the tokenizer's, or ``plain`` for the text as it is, behind
            the special tokens that the tokenizer itself puts before a text (BOS).
        date: the day, as ``YYYY-MM-DD``, that a template is told that asks for it; None: the
            machine's.
        thinking: what is done about thoughts before the answer; None for what suits the template
            (:mod:`abliterate.prompts.thinking`).
        max_thinking_tokens: longest thought under ``skip``.
    """

    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_prefix: str = ""
    template: str | None = None
    date: str | None = None
    thinking: Mode | None = None
    max_thinking_tokens: int = 1024

    @classmethod
    def of(cls, chat: ChatSettings) -> ChatFormat:
        """As the settings have it."""
        return cls(
            chat.system,
            chat.arguments,
            chat.response_prefix,
            chat.template,
            chat.date,
            chat.thinking,
            chat.max_thinking_tokens,
        )

    @property
    def is_plain(self) -> bool:
        return self.template == PLAIN

    @property
    def longer_thoughts(self) -> str:
        """The option that lets a thought end that did not."""
        return "--max-thinking-tokens" if self.thinking == "skip" else "--max-new-tokens"


def template_of(tokenizer: Any, chat: ChatFormat) -> Template:
    """The template that writes conversations, with what it is told.

    Raises:
        CheckpointError: the tokenizer has none, and the format names none.
        InputError: a text is not valid Unicode.
    """
    arguments = dict(chat.template_kwargs)
    if chat.template is not None:
        arguments["chat_template"] = chat.template
    elif not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: give --template "
            "plain (the text as it is, for a base model) or --template FILE, or add one to its "
            "folder as chat_template.jinja"
        )
    if chat.system is not None:
        well_formed(chat.system, "the system message")
    return Template(tokenizer, arguments, chat.date, chat.system)


def check_format(tokenizer: Any, chat: ChatFormat, several: bool = False) -> None:
    """Find out whether texts come whole into prompts, before anything runs.

    Args:
        tokenizer: with its template.
        chat: how prompts are formatted.
        several: so do all turns of a longer conversation.

    Raises:
        CheckpointError: there is no template, or it fails, or it loses text.
        UsageError: an option has no effect on what the template writes.
    """
    if chat.is_plain:
        _check_plain(chat)
        return
    template = template_of(tokenizer, chat)
    find_wrapping(template)
    if several:
        find_wrapping(template, several)


def _check_plain(chat: ChatFormat) -> None:
    if chat.system is not None:
        raise UsageError(
            "--template plain writes no system message: leave --system out, put its text into the "
            "prompts, or give --template FILE"
        )
    if chat.template_kwargs:
        raise UsageError(
            f"--template-arg {next(iter(chat.template_kwargs))}: --template plain reads no "
            "arguments, leave it out"
        )
    if chat.thinking in ("answer", "skip"):
        raise UsageError(
            f"--thinking {chat.thinking}: --template plain says nothing of thoughts: leave "
            "--thinking out, or give --template FILE"
        )


def render(tokenizer: Any, text: str, chat: ChatFormat) -> str:
    """The conversation as the template writes it, up to where the assistant's answer starts.

    Raises:
        CheckpointError: the tokenizer has no chat template, or the template fails, loses or changes
            what it is given, or passes the bounds of time, memory and length.
        InputError: a text is not valid Unicode.
        UsageError: an option has no effect on what the template writes.
    """
    return render_turns(tokenizer, [user(text)], chat)


def render_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]], chat: ChatFormat) -> str:
    """A conversation of several turns, of which the last is the user's; as :func:`render`.

    ``plain`` puts each turn on lines of its own.
    """
    return _render_all(tokenizer, [turns], chat)[0]


def _render_all(
    tokenizer: Any, chats: Sequence[Sequence[Mapping[str, str]]], chat: ChatFormat
) -> list[str]:
    well_formed(chat.response_prefix, "the response prefix")
    for turns in chats:
        for turn in turns:
            well_formed(turn["content"], "the prompt")
    thinking = find_thinking(tokenizer, chat)
    if chat.is_plain:
        _check_plain(chat)
        rendered = ["\n".join(turn["content"] for turn in turns) for turns in chats]
    else:
        rendered = _render_template(template_of(tokenizer, chat), chats, thinking.variables)
    return [text + thinking.appended + chat.response_prefix for text in rendered]


def _render_template(
    template: Template,
    chats: Sequence[Sequence[Mapping[str, str]]],
    variables: Mapping[str, Any],
) -> list[str]:
    several = any(len(turns) > 1 for turns in chats)
    wrapping = find_wrapping(template, several)
    told = replace(template, arguments={**template.arguments, **variables})
    try:
        rendered = told.render(chats, wrapping)
    except TemplateError as error:
        raise CheckpointError(
            f"the chat template{template.name} fails ({error}): check --system and "
            f"--template-arg, or {OTHER_TEMPLATE}"
        ) from None
    for turns, text in zip(chats, rendered, strict=True):
        for turn in turns:
            if turn["role"] == "user" and not stands(turn["content"], text):
                shown = " ".join(turn["content"].split())[:_SHOWN]
                raise CheckpointError(
                    f"the chat template{template.name} loses or changes part of the prompt "
                    f"'{shown}': leave that prompt out, or {OTHER_TEMPLATE}"
                )
    return rendered


def tokenize(tokenizer: Any, rendered: Sequence[str], chat: ChatFormat) -> list[list[int]]:
    """Token ids of rendered conversations.

    A template writes the special tokens itself. Before ``plain`` text stand those that the
    tokenizer puts before any text; what it would put after one (an end of text) is left out.
    """
    if not rendered:
        return []
    if not chat.is_plain:
        return [list(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    after = _appended(tokenizer)
    return [list(ids[: len(ids) - after]) for ids in tokenizer(list(rendered))["input_ids"]]


def _appended(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts after a text."""
    framed, bare = (
        list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False)
    )
    starts = (n for n in range(len(framed)) if framed[n : n + len(bare)] == bare)
    start = next(starts, len(framed) - len(bare))
    return len(framed) - len(bare) - start


def encode(tokenizer: Any, texts: Sequence[str], chat: ChatFormat) -> list[list[int]]:
    """Token ids of each conversation of one turn; raises as :func:`render`."""
    if not texts:
        return []
    rendered = _render_all(tokenizer, [[user(text)] for text in texts], chat)
    return tokenize(tokenizer, rendered, chat)


def encode_somehow(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text in the tokenizer's template, or plain where it has none that works.

    For what holds on any tokens, and needs no template.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            return encode(tokenizer, texts, ChatFormat())
        except CheckpointError as error:
            log.warning("%s; here the texts are taken as they are", error)
    return encode(tokenizer, texts, ChatFormat(template=PLAIN))


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
        if count == 0 and chat.is_plain:
            log.info(
                "--template plain puts no tokens after the text: the one position is -1, its last "
                "token (--positions names others of the text)"
            )
            return (-1,)
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
    if chat.is_plain or not (chat.template or getattr(tokenizer, "chat_template", None)):
        return []
    template = replace(template_of(tokenizer, chat), system=None)
    rendered = template.finished_turn("a", answer)
    _, matched, after = rendered.rpartition(answer)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if matched and after else []
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [ids[0]] if ids and ids[0] in special else []
