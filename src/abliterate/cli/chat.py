"""The command ``chat``: a conversation in the terminal, or a line per turn from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.console import (
    live_columns,
    print_error,
    print_json,
    print_note,
    print_text,
    print_thought,
)
from abliterate.errors import AbliterateError, InputError, UsageError
from abliterate.settings import load_settings, refuse_without

if TYPE_CHECKING:
    from abliterate.direction import Direction
    from abliterate.direction_set import DirectionSet
    from abliterate.inference.dialogue import Conversation, Steering
    from abliterate.metrics.answers import Parts

_HELP = """\
/ablate      nothing writes along the direction
/add [A]     add A times the direction at its layer (1 if not given; -1 subtracts)
/off         no intervention
/reset       forget the conversation
/help        this list
/quit        leave, as Ctrl-D does; Ctrl-C ends an answer
//...        a message that starts with a slash"""


@dataclass
class _Talk:
    """What the loop over the user's lines keeps.

    Attributes:
        plain: the conversation without intervention, where two are compared.
        steered: the other, or the only one.
        steering: the present intervention.
        screen: both ends are a terminal.
        as_json: keep answers for the end.
        record: every turn.
    """

    plain: Conversation | None
    steered: Conversation
    steering: Steering
    screen: bool
    as_json: bool
    record: list[dict[str, Any]] = field(default_factory=list)

    def line(self, line: str) -> bool:
        """Deal with a line of the user's; False ends the conversation."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            return self.command(*text[1:].split())
        if text:
            self.turn(text.removeprefix("/") if text.startswith("//") else text)
        return True

    def command(self, name: str = "", *arguments: str) -> bool:
        from abliterate.inference.dialogue import Steering

        if arguments and (name != "add" or len(arguments) > 1):
            raise UsageError(f"/{name} takes {'one number' if name == 'add' else 'no argument'}")
        if name in ("quit", "exit"):
            return False
        if name == "help":
            self.note(_HELP)
        elif name == "reset":
            for conversation in (self.plain, self.steered):
                if conversation is not None:
                    conversation.turns = []
            self.note("(a new conversation)")
        elif name == "off":
            self.steer(Steering())
        elif name == "ablate":
            self.steer(Steering("ablate"))
        elif name == "add":
            self.steer(Steering("add", _number("/add", *arguments)))
        else:
            raise UsageError(f"unknown command '/{name}': /help lists them")
        return True

    def steer(self, steering: Steering) -> None:
        with self.steered.steered(steering):  # raises where it cannot be done
            self.steering = steering
        self.note(f"({steering})")

    def turn(self, text: str) -> None:
        entry: dict[str, Any] = {"user": text, "intervention": str(self.steering)}
        if self.as_json:
            if self.plain is not None:
                entry |= _fields(self.plain.reply(text, _off()), "baseline", "baseline_thought")
            entry |= _fields(self.steered.reply(text, self.steering), "answer", "thought")
            self.record.append(entry)
        elif self.plain is None:
            self.alone(text)
        elif self.screen:
            self.side_by_side(text, self.plain)
        else:
            for label, conversation, steering in self.both(self.plain):
                parts = conversation.reply(text, steering)
                if parts.thought:
                    print_thought(f"[{label}, thought] {parts.thought}\n")
                print_text(f"[{label}] {parts.answer or ''}\n")
                self.ended(parts)

    def both(self, plain: Conversation) -> list[tuple[str, Conversation, Steering]]:
        steered = str(self.steering)
        return [("baseline", plain, _off()), (steered, self.steered, self.steering)]

    def alone(self, text: str) -> None:
        thinking = False

        def thought(piece: str) -> None:
            nonlocal thinking
            thinking = True
            print_thought(piece)

        def heard(piece: str) -> None:
            nonlocal thinking
            if thinking:
                print_thought("\n\n")
            thinking = False
            print_text(piece)

        try:
            parts = self.steered.reply(text, self.steering, heard, thought)
        finally:
            if thinking:
                print_thought("\n")
            print_text("\n")
        self.ended(parts)

    def side_by_side(self, text: str, plain: Conversation) -> None:
        pairs = self.both(plain)
        with live_columns([label for label, _, _ in pairs]) as columns:
            replies = [
                conversation.reply(text, steering, *_in_column(column))
                for column, (_, conversation, steering) in zip(columns, pairs, strict=True)
            ]
        for parts in replies:
            self.ended(parts)

    def ended(self, parts: Parts) -> None:
        """Say so where there is no answer, since the thought has not ended."""
        if parts.answer is None:
            longer = self.steered.chat.longer_thoughts
            print_note(f"(the thought did not end: raise {longer})")

    def note(self, text: str) -> None:
        """Something about the conversation, beside it."""
        if self.screen:
            print_note(text)


def _fields(parts: Parts, answer: str, thought: str) -> dict[str, Any]:
    """A reply as the record has it: no thought where none was had, no answer where it goes on."""
    return {answer: parts.answer} | ({} if parts.thought is None else {thought: parts.thought})


def _in_column(append: Callable[..., None]) -> tuple[Callable[[str], None], Callable[[str], None]]:
    """What a column does with an answer, and with the thought before it."""
    thinking = False

    def thought(piece: str) -> None:
        nonlocal thinking
        thinking = True
        append(piece, "dim")

    def heard(piece: str) -> None:
        nonlocal thinking
        append("\n\n" + piece if thinking else piece)
        thinking = False

    return heard, thought


def _off() -> Steering:
    from abliterate.inference.dialogue import Steering

    return Steering()


def _number(option: str, text: str = "1") -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise UsageError(f"{option} takes a number, not '{text}'")
    return value


def _check_temperature(value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UsageError(f"--temperature must be 0 or more, not {value}")


def _typed() -> Iterator[str]:
    """Lines typed at a terminal, until Ctrl-D."""
    with suppress(ImportError):  # Windows: its console has both by itself
        import_module("readline")  # arrow keys and history for input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            print_text("\n")
            return
        except KeyboardInterrupt:
            print_note("\n(Ctrl-D or /quit leaves)")


def _piped() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 ({error.reason})") from None


def _loop(lines: Iterator[str], line: Callable[[str], bool], forgiving: bool) -> None:
    """Deal with line after line; at a terminal a mistake or Ctrl-C ends no more than its line."""
    for one in lines:
        try:
            if not line(one):
                return
        except KeyboardInterrupt:
            if not forgiving:
                raise
            print_note("(stopped)")
        except AbliterateError as error:
            if not forgiving:
                raise
            print_error(str(error))


def _format_of(run: Path) -> dict[str, dict[str, Any]]:
    """How ``extract`` formatted prompts, if ``run`` is a run folder with its record."""
    from abliterate.run_folder import EXTRACT
    from abliterate.run_records import read_extract, recorded_settings

    if not (run / EXTRACT).is_file():
        return {}
    return {"chat": recorded_settings(run, read_extract(run))["chat"]}


@opt.command()
def chat(
    *,
    model: opt.Model,
    direction: opt.DirectionFrom = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Begin with the ablation.")] = False,
    add: Annotated[
        float | None,
        typer.Option(
            "--add", help="Begin with this multiple of the direction added.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="The unchanged model's answers beside.")
    ] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of sampling; 0: greedy.")
    ] = 0.0,
    given: opt.Given,
    config: opt.Config = None,
    as_json: opt.Json = False,
) -> None:
    """Talk to a model, and switch the intervention in mid-conversation.

    At a terminal /help lists the commands. From a pipe every line is a turn or a command, and each
    answer goes to stdout; --json prints all turns at the end.
    """
    if ablate and add is not None:
        raise UsageError("--ablate and --add exclude each other")
    _check_temperature(temperature)
    coeff = None if add is None else _number("--add", str(add))
    if direction is None and (ablate or add is not None or compare):
        wanted = "--ablate" if ablate else "--compare" if add is None else "--add"
        raise UsageError(f"{wanted} needs --direction")
    if direction is None:
        refuse_without("--direction", given, *opt.OF_DIRECTION)
    if temperature == 0:
        refuse_without("--temperature", given, "model.seed")
    settings = load_settings(config, given)
    from abliterate.cli.commands import open_session
    from abliterate.direction_loading import find_direction, load_directions
    from abliterate.projection import Projection
    from abliterate.run_records import source_of_direction

    if direction is not None:
        find_direction(direction, settings.select.position)
        settings = load_settings(config, given, _format_of(Path(direction)))
    sources = [] if direction is None else [source_of_direction(direction)]
    made = settings.select

    def found() -> Direction | DirectionSet | None:
        if direction is None:
            return None
        without = Projection.asked(made)
        return load_directions(direction, without, made.position, made.interpolate)

    if coeff is not None:  # what cannot be added is told before the model is fetched
        from abliterate.inference.dialogue import Steering, check_steering

        check_steering(Steering("add", coeff), found())
    session, vector = open_session(model, settings, sources=sources), found()
    from abliterate.inference.direction_fit import check_fit

    check_fit(session.checkpoint, vector, settings.model.trust_remote_code)
    from abliterate.inference.dialogue import Conversation, Decoding, Steering
    from abliterate.run_rendering import settle_rendering

    settle_rendering(session, several=True)
    decoding = Decoding(settings.evaluate.max_new_tokens, temperature, settings.model.seed)

    def conversation() -> Conversation:
        return Conversation(session.load_in_memory(), vector, session.chat, decoding)

    first = Steering("ablate") if ablate else Steering()
    first = first if coeff is None else Steering("add", coeff)
    screen = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    talk = _Talk(conversation() if compare else None, conversation(), first, screen, as_json)
    talk.steered.check()
    if screen:
        talk.note(f"{model}: /help lists the commands, Ctrl-D leaves")
    talk.steer(first)
    _loop(_typed() if screen else _piped(), talk.line, screen)
    if as_json:
        print_json({"model": model, "turns": talk.record})
