"""The command line's options: those of the settings, made from their declarations, and shared ones.

A command is a function of what it alone takes. Where it has a parameter ``given``, the options of
the settings that name the command stand, and it receives their values as tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.markup import escape

from abliterate.console import set_up
from abliterate.settings import Option, Settings, flags_of, option_for, options_of, sections_of

# What options gave, as the tables of load_settings; None where an option was not given.
Given = dict[str, dict[str, Any]]

Model = Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", show_default=False)]
SelectedRun = Annotated[Path, typer.Argument(help="Run folder of select.", show_default=False)]
MovedModel = Annotated[
    str | None,
    typer.Option("--model", help="Checkpoint, if it has moved since extract.", show_default=False),
]
RunOut = Annotated[
    Path, typer.Option("-o", "--output", help="Run folder to write.", show_default=False)
]
DirectionFrom = Annotated[
    str | None,
    typer.Option(
        "--direction",
        help="Run folder, safetensors file with a tensor 'direction', or abliterate.json.",
        show_default=False,
    ),
]
Direction = Annotated[
    str,
    typer.Option(
        "--direction",
        help="Run folder, safetensors file or the abliterate.json of an edit.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file of settings, or the name of a bundled one: paper, quick. Options win.",
        show_default=False,
    ),
]
# Settings of what --direction is made into: idle where there is none.
OF_DIRECTION = (
    "select.project_harmless",
    "select.project_first_token",
    "select.position",
    "select.interpolate",
)
Edited = Annotated[
    Path | None,
    typer.Option("--edited", help="The edited checkpoint, if not RUN/model.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Only warnings on stderr; results still go to stdout."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library logs.")]

_Result = TypeVar("_Result")


@dataclass
class _SettingOption:
    """A parameter of a command, and the settings that it overrides, as table and name."""

    parameter: inspect.Parameter
    targets: list[tuple[str, str]] = field(default_factory=list)


def command(
    *, last: Sequence[str] = (), schema: type[BaseModel] = Settings
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Make a function the command of its name: with ``--quiet``, ``--debug`` and its settings.

    Args:
        last: parameters of settings that are listed after the others.
        schema: the settings that there are.
    """

    def declare(function: Callable[..., _Result]) -> Callable[..., _Result]:
        own = inspect.signature(function, eval_str=True)
        options = setting_options(function.__name__, schema, last)
        if bool(options) != ("given" in own.parameters):
            raise TypeError(f"{function.__name__}: 'given' goes with settings that name it")

        @wraps(function)
        def called(quiet: bool, debug: bool, **values: Any) -> _Result:
            set_up(quiet, debug)
            if options:
                values["given"] = given = Given()
                for name, option in options.items():
                    value = values.pop(name)
                    for table, key in option.targets:
                        given.setdefault(table, {})[key] = value
            return function(**values)

        parameters: list[inspect.Parameter] = []
        for name, parameter in own.parameters.items():
            held = [option.parameter for option in options.values()]
            parameters += held if name == "given" else [parameter]
        parameters += [_parameter("quiet", Quiet, False), _parameter("debug", Debug, False)]
        signature = inspect.Signature(
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters],
            return_annotation=own.return_annotation,
        )
        # typer reads both.
        called.__signature__ = signature  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return declare


def setting_options(
    command: str, schema: type[BaseModel], last: Sequence[str] = ()
) -> dict[str, _SettingOption]:
    """The options that a command has for settings, by the names of their parameters.

    The command's own settings come first; the chat format and the model, which most have, at last.
    """
    sections = sections_of(schema)
    shared, found = ("chat", "model"), dict[str, _SettingOption]()

    def place(table: str) -> tuple[int, bool]:
        return (shared.index(table) if table in shared else -1), table != command

    for table in sorted(sections, key=place):
        for key in sections[table].model_fields:
            if option := option_for(command, sections[table], key):
                made = _setting_parameter(sections[table], key, option)
                found.setdefault(made.name, _SettingOption(made)).targets.append((table, key))
    ending = [name for name in last if name in found]
    return {name: found[name] for name in (*(n for n in found if n not in last), *ending)}


def spell_out(argv: Sequence[str]) -> list[str]:
    """``--save-activations`` as ``=all``, ``--norm-preserve columns`` as ``=columns``, and their
    like: typer has no optional values."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    spelled, index = list[str](), 0
    while index < len(argv):
        arg, following = argv[index], argv[index + 1] if index + 1 < end else None
        if index >= end or arg not in _IMPLIED:
            spelled.append(arg)
        elif following in (*_CHOICES[arg], _IMPLIED[arg]):
            spelled.append(f"{arg}={following}")
            index += 1
        else:
            spelled.append(f"{arg}={_IMPLIED[arg]}")
        index += 1
    return spelled


def stray_value(argv: Sequence[str]) -> str | None:
    """What to say of a word behind an option whose value may be left out, and that it is none of.

    Args:
        argv: a command line on which there was an argument too many.
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    for arg, word in pairwise(argv[:end]):
        words = _CHOICES.get(arg)
        if words is None or word.startswith("-") or word in (*words, _IMPLIED[arg]):
            continue
        if words:
            return f"{arg} takes {' or '.join(words)}, or nothing behind it, not '{word}'"
        return f"{arg} takes its value behind an equals sign: write {arg}={word}"
    return None


@cache
def _setting_parameter(section: type[BaseModel], key: str, option: Option) -> inspect.Parameter:
    setting, flags = section.model_fields[key], flags_of(section, key)
    default = setting.get_default(call_default_factory=True)
    told = default in (None, "", (), {}) or "Default: " in option.help
    info = typer.Option(
        flags,
        # Help texts are rich markup: brackets of the source grammar are none.
        help=escape(option.help),
        show_default=False if told else str(default),
        rich_help_panel=option.panel,
    )
    kind = _kind(setting.annotation)
    name = flags.partition("/")[0].removeprefix("--").replace("-", "_")
    return _parameter(name, Annotated[kind | None, info], None)


def _kind(annotation: Any) -> Any:
    """What typer parses for a setting of this type; pydantic turns text into the rest."""
    union = get_origin(annotation) in (Union, UnionType)
    parts = get_args(annotation) if union else (annotation,)
    kinds = [part for part in parts if part is not type(None)]
    if len(kinds) == 1 and get_origin(kinds[0]) in (tuple, list):
        return list[str]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float) else str


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


# The values of flags that may stand alone.
_IMPLIED = {
    flags_of(section, key): option.implied
    for section in sections_of(Settings).values()
    for key in section.model_fields
    for option in options_of(section, key)
    if option.implied is not None
}


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words that a setting may be, where it is one of a few."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(w for part in parts if get_origin(part) is Literal for w in get_args(part))


_CHOICES = {
    flags_of(section, key): _choices(section.model_fields[key].annotation)
    for section in sections_of(Settings).values()
    for key in section.model_fields
    if flags_of(section, key) in _IMPLIED
}
