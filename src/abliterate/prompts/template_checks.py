"""Does a chat template write what it is given? Found out with probes, before anything runs.

A template is a program that a stranger wrote. Some read a text only as a list of parts, some ignore
the system role or later turns, some cut texts or change them. Whatever loses text would give wrong
figures in silence, so it is refused here, with what is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from abliterate.console import log
from abliterate.errors import CheckpointError, UsageError
from abliterate.prompts.template_process import (
    Conversation,
    TemplateError,
    TemplateLimitError,
    render_conversations,
    template_names,
    template_text,
)
from abliterate.prompts.template_worker import CLOCK, DATE_STRING

# No template holds these; the second is longer than what a template may want to cut off.
_SHORT = "Quartz lantern 481: which Rivers flow north?"
_LONG = "Velvet compass 927: " + " ".join(f"Item {number} stays." for number in range(500))
_SYSTEM, _ANSWER = "Pebble orchard 305 keeps Short sentences.", "Copper meadow 650 goes East."
_MARK = "umber913"
# Words that switch a model's thinking on and off, which templates take out of the texts.
_SWITCHES = re.compile(r"/(?:no_?)?think\b")
# What every template is given, whoever asks.
_GIVEN = {"messages", "add_generation_prompt"}
# What is passed to the renderer beside the arguments.
_RESERVED = {"messages", "conversation", "conversations", "tokenize"}
# Arguments that do something whatever the template reads.
_STEERING = {"chat_template", "add_generation_prompt", "continue_final_message"}
# Worded alike wherever a template cannot be used.
OTHER_TEMPLATE = "give another one with --template FILE, or --template plain"


def as_parts(text: str) -> list[dict[str, str]]:
    """A message's text as the list of parts that templates of image models read."""
    return [{"type": "text", "text": text}]


@dataclass(frozen=True)
class Wrapping:
    """Which roles' texts the template reads as lists of parts.

    Attributes:
        parts: those roles.
        marked: the parts have a key more, which only stands in what is written if the template
            writes the list as it is, as Python shows it.
    """

    parts: frozenset[str] = frozenset()
    marked: bool = False

    def messages(self, turns: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
        """The turns as the template takes them."""
        return [{**turn, "content": self._content(turn)} for turn in turns]

    def _content(self, turn: Mapping[str, str]) -> str | list[dict[str, str]]:
        if turn["role"] not in self.parts:
            return turn["content"]
        (part,) = as_parts(turn["content"])
        return [part | {_MARK: _MARK}] if self.marked else [part]


@dataclass(frozen=True)
class Template:
    """A tokenizer's template with all that it is told but the conversation.

    Attributes:
        tokenizer: whose template, unless the arguments hold another one.
        arguments: variables and arguments, as ``apply_chat_template`` takes them.
        date: the day that it is told if it asks for one.
        system: text of the system message that stands before every conversation, or None.
    """

    tokenizer: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    system: str | None = None

    @property
    def name(self) -> str:
        where = " of --template" if "chat_template" in self.arguments else ""
        return where or f" of {self.tokenizer.name_or_path}"

    @property
    def first(self) -> list[dict[str, str]]:
        """The messages before the user's first."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def render(
        self, turns: Sequence[Conversation], wrapping: Wrapping, add_generation_prompt: bool = True
    ) -> list[str]:
        """Each conversation's text, behind the system message."""
        messages = [wrapping.messages([*self.first, *each]) for each in turns]
        return render_conversations(
            self.tokenizer, messages, add_generation_prompt, self.arguments, self.date
        )

    @property
    def text(self) -> str:
        """The template itself."""
        return template_text(self.tokenizer, self.arguments)

    def names(self) -> frozenset[str] | None:
        """As :func:`template_names`."""
        return template_names(self.tokenizer, self.arguments)

    def finished_turn(self, text: str, answer: str) -> str:
        """A turn of the user's and its answer; empty if the template takes none."""
        for roles in ((), ("user", "assistant"), ("user",)):
            try:
                way = Wrapping(frozenset(roles))
                (rendered,) = self.render([[user(text), assistant(answer)]], way, False)
            except TemplateError:
                continue
            if answer in rendered:
                return rendered
        return ""

    def asks_for_date(self) -> bool | None:
        """Whether what it writes depends on the day; None where only the tokenizer's code knows."""
        asked = self.names()
        if asked is None:
            return None
        return CLOCK in asked or (DATE_STRING in asked and DATE_STRING not in self.arguments)


@dataclass(frozen=True)
class _Problem:
    """What is wrong with a way to give the template its texts; the larger ``rank`` got further."""

    rank: int
    text: str


def squeezed(text: str) -> str:
    """Text without whitespace, which templates trim, and without switches, which they take out."""
    return "".join(_SWITCHES.sub("", text).split())


def stands(text: str, rendered: str) -> bool:
    """Whether a template has written all of ``text``, whatever it did to its whitespace."""
    return text in rendered or squeezed(text) in squeezed(rendered)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# What was found, by all that it depends on: a stage reads the same tokenizer more than once.
_known: dict[str, Wrapping] = {}
_MOST_KNOWN = 256


def find_wrapping(template: Template, several: bool = False) -> Wrapping:
    """How the template takes texts so that it writes all of them; found once.

    Args:
        template: the template.
        several: conversations of several turns must be written whole too.

    Raises:
        CheckpointError: the template fails, or loses or changes text; the message says which.
        UsageError: it never reads one of its arguments.
    """
    key = _key(template, several)
    if key not in _known:
        check_arguments(template)
        wrapping = _find(template)
        if several:
            wrapping = _find_several(template, wrapping)
        else:
            _check_system(template, wrapping)
            _note(template, wrapping)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = wrapping
    return _known[key]


def _key(template: Template, several: bool) -> str:
    tokenizer = template.tokenizer
    about = [
        repr(type(tokenizer)),
        *(getattr(tokenizer, name, None) for name in ("name_or_path", "chat_template")),
        getattr(tokenizer, "special_tokens_map", None),
        *(template.arguments, template.date, template.system, several),
    ]
    return json.dumps(about, default=str, sort_keys=True)


def check_arguments(template: Template) -> None:
    """Refuse arguments that the template never reads.

    Raises:
        UsageError: naming those that it does read.
    """
    taken = next((name for name in template.arguments if name in _RESERVED), None)
    if taken is not None:
        raise UsageError(
            f"--template-arg {taken}: the prompts decide what the chat template is told there: "
            "leave it out"
        )
    names = template.names() if template.arguments else None
    if names is None:
        return
    unread = next((name for name in template.arguments if name not in names | _STEERING), None)
    if unread is None:
        return
    usual = {*template.tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *_GIVEN, CLOCK}
    reads = ", ".join(sorted(names - usual)) or "none"
    raise UsageError(
        f"--template-arg {unread}: the chat template{template.name} never reads it (it reads: "
        f"{reads})"
    )


def _find(template: Template) -> Wrapping:
    """The first way in which probes of user and system stand in what is written."""
    probed = replace(template, system=_SYSTEM if _has_text(template.system) else template.system)
    worst: _Problem | None = None
    for wrapping in _ways(probed):
        problem = _problem(probed, wrapping)
        if problem is None:
            return wrapping
        if worst is None or problem.rank > worst.rank:
            worst = problem
    assert worst is not None
    raise CheckpointError(f"the chat template{template.name} {worst.text}")


def _ways(template: Template) -> Iterator[Wrapping]:
    roles = {"user", "assistant"}
    ways: list[set[str]] = [set(), roles]
    if template.system is not None:
        ways = [set(), roles | {"system"}, roles, {"system"}]
    yield from (Wrapping(frozenset(way)) for way in ways)


def _problem(template: Template, wrapping: Wrapping) -> _Problem | None:
    try:
        marked = replace(wrapping, marked=True)
        short, long = template.render([[user(_SHORT)], [user(_LONG)]], marked)
    except TemplateError as error:
        return _Problem(0, _failure(template, wrapping, error))
    if _MARK in short.casefold():
        return _Problem(0, f"writes lists of parts as they are: {OTHER_TEMPLATE}")
    for text, rendered in ((_SHORT, short), (_LONG, long)):
        if not stands(text, rendered):
            return _Problem(1, _loss(template, wrapping, text, rendered, short == long))
    if _has_text(template.system) and not stands(_SYSTEM, short):
        return _Problem(
            2,
            "leaves the system message out: leave --system out, put its text into the prompts, or "
            + OTHER_TEMPLATE,
        )
    return None


def _loss(template: Template, wrapping: Wrapping, text: str, rendered: str, alike: bool) -> str:
    """What has become of the user's text, in words."""
    if _has_text(template.system) and _works(replace(template, system=None), wrapping):
        return (
            "loses the user's text behind a system message: leave --system out, or "
            + OTHER_TEMPLATE
        )
    if alike:
        return f"loses the user's text, and writes the same for every prompt: {OTHER_TEMPLATE}"
    whole, written = squeezed(text), squeezed(rendered)
    if whole.casefold() in written.casefold():
        return f"changes capital letters in the user's text: {OTHER_TEMPLATE}"
    kept = max((n for n in range(len(whole)) if whole[:n] in written), default=0)
    if kept > 8:  # more than chance
        return f"cuts the user's text off after some {_place(text, kept)} characters: " + (
            OTHER_TEMPLATE
        )
    return f"loses the user's text, or changes it: {OTHER_TEMPLATE}"


def _place(text: str, count: int) -> int:
    """Where in ``text`` so many characters that are no whitespace have passed."""
    places = [index for index, letter in enumerate(text) if not letter.isspace()]
    return places[count - 1] + 1


def _works(template: Template, wrapping: Wrapping) -> bool:
    try:
        (rendered,) = template.render([[user(_SHORT)]], wrapping)
    except TemplateError:
        return False
    return stands(_SHORT, rendered)


def _failure(template: Template, wrapping: Wrapping, error: TemplateError) -> str:
    """What a template says that refuses, and what to do about it."""
    if template.system is not None and _works(replace(template, system=None), wrapping):
        return (
            f"takes no system message ({error}): leave --system out, put its text into the "
            f"prompts, or {OTHER_TEMPLATE}"
        )
    if template.system is None and _works(replace(template, system=_SYSTEM), wrapping):
        return f"fails without a system message ({error}): give one with --system TEXT"
    for names in (("tools",), ("documents",), ("tools", "documents")):
        more: dict[str, Any] = {name: [] for name in names if name not in template.arguments}
        changed = replace(template, arguments={**template.arguments, **more})
        if more and _works(changed, wrapping):
            given = " ".join(f"--template-arg {name}=[]" for name in more)
            return f"fails ({error}): it wants a list, give {given}"
    unknown = re.match(r"'(\w+)' is undefined", str(error))
    if unknown and unknown[1] in (template.names() or ()):
        return f"fails ({error}): give it with --template-arg {unknown[1]}=VALUE, or a whole " + (
            "template with --template FILE"
        )
    return f"fails ({error}): check --system and --template-arg, or {OTHER_TEMPLATE}"


def _check_system(template: Template, wrapping: Wrapping) -> None:
    """The system message itself: a template may take what it reads out of it, not ignore it."""
    if not _has_text(template.system):
        return
    assert template.system is not None
    turns, bare = [[user(_SHORT)]], replace(template, system=None)
    try:
        (with_it,) = template.render(turns, wrapping)
    except TemplateError as error:
        raise CheckpointError(
            f"the chat template{template.name} refuses this system message ({error}): word it "
            "otherwise, or leave --system out"
        ) from None
    if stands(template.system, with_it):
        return
    try:
        without = bare.render(turns, wrapping)
    except TemplateError:  # it wants one
        without = []
    if [with_it] == without:
        raise CheckpointError(
            f"the chat template{template.name} leaves this system message out: word it otherwise, "
            "or leave --system out"
        )
    log.warning("the chat template%s writes the system message otherwise", template.name)


def _note(template: Template, wrapping: Wrapping) -> None:
    """Say what is odd, and may be meant."""
    bare = replace(template, system=None) if template.system is not None else template
    turns = [[user(_SHORT)], [user(_SHORT), assistant(_ANSWER)]]
    try:
        (asked,) = bare.render(turns[:1], wrapping)
        closed, answered = bare.render(turns, wrapping, add_generation_prompt=False)
    except (TemplateError, TemplateLimitError):  # that takes no finished turn
        return
    if (times := squeezed(asked).count(squeezed(_SHORT))) > 1:
        log.warning("the chat template%s writes the user's text %d times", template.name, times)
    before = answered.partition(_ANSWER)[0]
    opening = before.removeprefix(asked)
    if asked == closed and len(opening) < len(before) and opening.strip():
        log.warning(
            "the chat template%s ignores add_generation_prompt: prompts end before %r, which it "
            "puts before answers (--response-prefix can)",
            template.name,
            opening,
        )


def _find_several(template: Template, wrapping: Wrapping) -> Wrapping:
    """Such that the turns of a longer conversation stand in what is written."""
    turns = [user(_SHORT), assistant(_ANSWER), user(_LONG)]
    texts = {"the first turn": _SHORT, "the answer before": _ANSWER, "the last turn": _LONG}
    problem = ""
    for parts in (wrapping.parts, wrapping.parts ^ {"assistant"}):
        way = Wrapping(frozenset(parts))
        try:
            (rendered,) = template.render([turns], way)
        except TemplateError as error:
            problem = problem or f"fails on a second turn ({error})"
            continue
        lost = [name for name, text in texts.items() if not stands(text, rendered)]
        if not lost:
            return way
        problem = f"loses {', '.join(lost)} of a conversation"
    raise CheckpointError(f"the chat template{template.name} {problem}: {OTHER_TEMPLATE}")


def _has_text(system: str | None) -> bool:
    return system is not None and bool(system.strip())
