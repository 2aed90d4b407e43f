"""How a model that thinks before it answers is prompted: from its chat template alone.

The paper's refusal score looks at the first token after the prompt, which has to be the answer's
first. Templates of reasoning models end where a thought begins (``<think>``), or leave it to the
model to open one; some have a switch. What a template does is found by rendering it: a switch
counts if it changes what is rendered, and an empty thought is written in the form in which the
template writes a past one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

from abliterate.errors import CheckpointError, UsageError
from abliterate.metrics.answers import FINAL, TAGS, WORDS, ends_in_thought_channel
from abliterate.prompts.template_checks import Template, Wrapping, find_wrapping
from abliterate.prompts.template_process import TemplateError, TemplateLimitError

Mode = Literal["answer", "skip", "whole"]

# Variables by which templates turn thoughts on and off.
_SWITCHES = (
    "enable_thinking", "thinking", "enable_reasoning", "reasoning", "use_thinking", "think",
    "do_think", "thinking_mode", "reasoning_mode", "think_mode", "reasoning_effort",
    "thinking_effort", "thinking_budget", "reasoning_budget",
)  # fmt: skip
# Words that such a variable may take, where the template itself names them.
_OFF = ("none", "off", "disabled", "disable", "no_think", "nothink", "no-think", "non-thinking",
        "chat", "instruct", "false")  # fmt: skip
_ON = ("high", "on", "enabled", "enable", "thinking", "think", "medium", "low", "true")
# How an empty thought is written where the template does not show it; else on lines of its own.
_TIGHT = {
    "<seed:think>": ("<seed:think>", "</seed:think>"),
    "[THINK]": ("[THINK]", "[/THINK]"),
    "\u25c1think\u25b7": ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    "<|START_THINKING|>": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "<|channel>thought": ("<|channel>thought\n", "<channel|>"),
    "<|inner_prefix|>": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "<unused94>": ("<unused94>thought\n", "<unused95>"),
}
_FAMILIES = (*TAGS, *WORDS)
_ANY = re.compile(
    "|".join(re.escape(tag) for pair in _FAMILIES for tag in sorted(pair, key=len, reverse=True)),
    re.I,
)
_OPENING = {opening.lower(): (opening, closing) for opening, closing in _FAMILIES}
_CLOSING = {closing.lower(): (opening, closing) for opening, closing in _FAMILIES}
_HARMONY = ("<|channel|>", "<|message|>")
_USER, _THOUGHT, _ANSWER = "Which tree is 7 here?", "It may be 31 oaks.", "The 52 elms stand."
# Fields in which templates take the thought of a past turn.
_PAST = ("reasoning_content", "thinking", "reasoning", "thought")
_MANY = 64


@dataclass(frozen=True)
class Thinking:
    """What is done about a model's thoughts.

    Attributes:
        mode: ``answer``: the prompt ends where the answer begins; ``skip``: the model thinks first
            and what follows counts; ``whole``: neither; None where nothing says that it thinks.
        why: how that came about, for a line of the log.
        variables: further variables of the chat template.
        appended: text after the rendered conversation.
        begun: the prompt, with all that is appended, ends within a thought.
        marks: how a thought opens and how it ends.
        harmony: thoughts and answers are written in channels.
    """

    mode: Mode | None = None
    why: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)
    appended: str = ""
    begun: bool = False
    marks: tuple[str, str] | None = None
    harmony: bool = False

    def summary(self) -> dict[str, Any] | None:
        """As records hold it; None where nothing says that the model thinks."""
        if self.mode is None:
            return None
        return {
            "mode": self.mode,
            "why": self.why,
            "template_variables": dict(self.variables),
            "appended": self.appended,
        }

    def line(self) -> str | None:
        """What is said of it before anything runs."""
        if self.mode is None:
            return None
        others = [mode for mode in ("answer", "skip", "whole") if mode != self.mode]
        return f"thinking: {self.mode} ({self.why}); --thinking {' or '.join(others)} changes it"


class Chat(Protocol):
    """What of a ``ChatFormat`` this depends on."""

    @property
    def system(self) -> str | None: ...
    @property
    def template_kwargs(self) -> Mapping[str, Any]: ...
    @property
    def response_prefix(self) -> str: ...
    @property
    def template(self) -> str | None: ...
    @property
    def date(self) -> str | None: ...
    @property
    def is_plain(self) -> bool: ...
    @property
    def thinking(self) -> Mode | None: ...


_known: dict[str, Thinking] = {}


def find_thinking(tokenizer: Any, chat: Chat) -> Thinking:
    """What a tokenizer's template and ``chat.thinking`` make of the model's thoughts.

    Raises:
        TemplateLimitError: the template passes the bounds of time, memory or length.
        UsageError: ``chat.thinking`` is no mode.
    """
    if chat.thinking not in (None, *get_args(Mode)):
        raise UsageError(f"thinking must be answer, skip or whole, not {chat.thinking!r}")
    source = _source(tokenizer, chat)
    marked = _ANY.search(source) is not None or all(mark in source for mark in _HARMONY)
    switches = [name for name in _SWITCHES if re.search(rf"\b{name}\b", source)]
    if not source or (chat.thinking is None and not marked and not switches):
        return Thinking(begun=_is_begun(chat.response_prefix))
    what = [
        *(source, tokenizer.special_tokens_map, chat.thinking, chat.system, chat.response_prefix),
        *(chat.template, chat.date),
    ]
    key = json.dumps([*what, dict(chat.template_kwargs)], default=str, sort_keys=True)
    if key not in _known:
        if len(_known) >= _MANY:
            _known.clear()
        _known[key] = _Thoughts(tokenizer, chat, source).thinking(switches)
    return _known[key]


def opened_in(text: str) -> tuple[str, str] | None:
    """The marks of the thought that a text leaves open; None if it leaves none."""
    last = _last_mark(text)
    return None if last is None else _OPENING.get(last[0].lower())


def _is_begun(text: str) -> bool:
    return opened_in(text) is not None or ends_in_thought_channel(text)


def _last_mark(text: str) -> re.Match[str] | None:
    return next(reversed(list(_ANY.finditer(text))), None)


def _source(tokenizer: Any, chat: Chat) -> str:
    """The chat template itself; empty if there is none to look at."""
    if chat.is_plain:
        return ""
    given = chat.template or chat.template_kwargs.get("chat_template")
    try:
        found = tokenizer.get_chat_template(given, chat.template_kwargs.get("tools"))
    except (AttributeError, TypeError, ValueError):
        return ""
    return found if isinstance(found, str) else ""


class _Thoughts:
    """A chat template, asked by rendering."""

    def __init__(self, tokenizer: Any, chat: Chat, source: str) -> None:
        self.tokenizer, self.chat, self.source = tokenizer, chat, source
        arguments = dict(chat.template_kwargs)
        if chat.template is not None:
            arguments["chat_template"] = chat.template
        self.template = Template(tokenizer, arguments, chat.date, chat.system)
        self.wrapping = Wrapping()

    def thinking(self, switches: list[str]) -> Thinking:
        try:
            self.wrapping = find_wrapping(self.template)
        except TemplateLimitError:
            raise
        except CheckpointError:  # as below
            return Thinking()
        default = self.render({})
        if default is None:  # it fails on any prompt, which is told where prompts are rendered
            return Thinking()
        given = [name for name in switches if name in self.chat.template_kwargs]
        if all(mark in self.source for mark in _HARMONY):
            found = self._harmony(default)
        elif (switch := self._switch(switches, default)) is not None:
            found = switch
        else:
            found = self._empty_thought(default, given)
        return self._with_prefix(found, default)

    def _with_prefix(self, found: Thinking, default: str) -> Thinking:
        rendered = default
        if found.variables:
            rendered = self.render(found.variables) or default
        end = _after(rendered) + found.appended + self.chat.response_prefix
        return Thinking(
            found.mode, found.why, found.variables, found.appended, _is_begun(end),
            found.marks, found.harmony,
        )  # fmt: skip

    def _harmony(self, default: str) -> Thinking:
        if self.chat.thinking in ("skip", "whole"):
            why = "harmony: analysis comes before the final channel"
            return Thinking(self.chat.thinking, why, harmony=True)
        end = _after(default).rstrip()
        appended = FINAL
        if end.endswith(FINAL):
            appended = ""
        elif end.endswith("<|message|>"):  # the template has opened the analysis
            appended = f"<|end|><|start|>assistant{FINAL}"
        return Thinking(
            "answer", "harmony: the prompt opens the final channel", {}, appended, harmony=True
        )

    def _switch(self, switches: list[str], default: str) -> Thinking | None:
        """By a variable that turns thoughts off; None if the template has none."""
        for name in switches:
            if name in self.chat.template_kwargs:
                continue
            on = next(
                (text for value in self._values(name, _ON, True, 1024)
                 if (text := self.render({name: value})) is not None), None,
            )  # fmt: skip
            for value in self._values(name, _OFF, False, 0):
                off = self.render({name: value})
                if off is None or opened_in(_after(off)) or off == on:
                    continue
                if off == default and on is None:
                    continue
                return self._switched(name, value, default, off, on)
        return None

    def _switched(self, name: str, value: Any, default: str, off: str, on: str | None) -> Thinking:
        marks = self._marks(on or default)
        shown = f"{name}={json.dumps(value)}"
        if self.chat.thinking == "whole":
            return Thinking("whole", "the template as it is", marks=marks)
        if self.chat.thinking == "skip":
            if off != default:
                return Thinking("skip", "the model thinks first", marks=marks)
            chosen = next(v for v in self._values(name, _ON, True, 1024)
                          if self.render({name: v}) == on)  # fmt: skip
            why = f"the template's {name}={json.dumps(chosen)} makes it think"
            return Thinking("skip", why, {name: chosen}, marks=marks)
        if off == default:
            return Thinking("answer", f"the template's default is {shown}", marks=marks)
        return Thinking("answer", f"the template's {shown}", {name: value}, marks=marks)

    def _values(self, name: str, words: tuple[str, ...], truth: bool, budget: int) -> list[Any]:
        """What the variable may be set to: truth, a number, or words that the template names."""
        if name.endswith("budget"):
            return [budget]
        named = [word for word in words if re.search(rf"""["']{word}["']""", self.source)]
        flag = [truth] if not name.endswith(("mode", "effort")) else []
        return [*flag, *named]

    def _empty_thought(self, default: str, given: list[str]) -> Thinking:
        """By an empty thought, which closes what the template opened or stands before the answer.

        Args:
            default: what the template writes as it is.
            given: the switches that the user has set.
        """
        end = _after(default)
        opened, last = opened_in(end), _last_mark(end)
        marks = opened or self._marks(default)
        wanted = self.chat.thinking
        if marks is None:  # nothing says that it thinks
            why = "neither template nor tokenizer names a mark of thoughts"
            return Thinking(wanted, why)
        if wanted in ("skip", "whole"):
            why = "the model thinks first" if wanted == "skip" else "the template as it is"
            return Thinking(wanted, why, marks=marks)
        if opened is None and last is not None:
            return Thinking("answer", "the template closes the thought", marks=marks)
        if wanted is None and given:
            if self._means_off(given):
                return Thinking("answer", f"{given[0]} is given", marks=marks)
            return Thinking("whole", f"{given[0]} is given", marks=marks)
        opening, closing = self._form(marks)
        if opened is None:
            why = f"an empty {marks[0]} stands before the answer"
            return Thinking("answer", why, {}, opening + closing, marks=marks)
        assert last is not None
        written = end[last.start() :]
        rest = opening[len(written) :] if opening.startswith(written) else ""
        why = f"the prompt ends within {marks[0]}, which is closed"
        return Thinking("answer", why, {}, rest + closing, marks=marks)

    def _means_off(self, given: list[str]) -> bool:
        value = self.chat.template_kwargs[given[0]]
        return not value or str(value).lower() in _OFF

    def _marks(self, rendered: str) -> tuple[str, str] | None:
        """How this family marks a thought: by its prompt, its template or its vocabulary."""
        added = " ".join(map(str, getattr(self.tokenizer, "added_tokens_encoder", {})))
        # A vocabulary may hold marks that the model was not trained to write: it counts if asked.
        asked = self.chat.thinking is not None
        for text in (_after(rendered), self.source, added if asked else ""):
            if (found := _ANY.search(text)) is not None:
                tag = found[0].lower()
                return _OPENING.get(tag) or _CLOSING[tag]
        return None

    def _form(self, marks: tuple[str, str]) -> tuple[str, str]:
        """What stands before and after a thought, as the template writes one of an earlier turn."""
        said: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
        said |= dict.fromkeys(_PAST, _THOUGHT)
        past = self._render([{"role": "user", "content": _USER}, said], {}, False) or ""
        before, thought, after = _after(past).partition(_THOUGHT)
        between, answered, _ = after.partition(_ANSWER)
        at = before.lower().rfind(marks[0].lower())
        if thought and answered and at >= 0 and marks[1].lower() in between.lower():
            return before[at:], between
        opening, closing = marks
        return _TIGHT.get(opening, (f"{opening}\n", f"\n{closing}\n\n"))

    def render(self, variables: Mapping[str, Any]) -> str | None:
        """What the template makes of a user's text, up to where the model goes on."""
        return self._render([{"role": "user", "content": _USER}], variables, True)

    def _render(
        self, turns: list[dict[str, Any]], variables: Mapping[str, Any], prompt: bool
    ) -> str | None:
        arguments = {**self.template.arguments, **variables}
        try:
            (text,) = replace(self.template, arguments=arguments).render(
                [turns], self.wrapping, prompt
            )
        except TemplateError:
            return None
        return text


def _after(rendered: str) -> str:
    """What follows the user's text."""
    return rendered.rpartition(_USER)[2]
