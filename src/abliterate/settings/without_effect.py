"""Settings that were given and would do nothing: refused, so that nobody thinks they did."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from abliterate.errors import UsageError
from abliterate.settings.marks import Needs, flags_of, needs_of, sections_of
from abliterate.settings.sections import Settings

Tables = Mapping[str, Mapping[str, Any]]


def check_effects(
    settings: BaseModel, options: Tables, configured: Tables, where: str, every: bool
) -> None:
    """Refuse settings that have no effect beside the others.

    Args:
        settings: all of them, as they count.
        options: per table, the options of the command, None where one was not given.
        configured: what a configuration file gives. It may serve several commands: only settings
            that this one has an option for are looked at, and values other than the default.
        where: the file.
        every: the command uses all settings, also those that it has no option for.

    Raises:
        UsageError: there is one.
    """
    for table, section in sections_of(type(settings)).items():
        given, written = options.get(table, {}), configured.get(table, {})
        own = getattr(settings, table)
        for key in section.model_fields:
            needs = needs_of(section, key)
            if needs is None or needs.are_met(own):
                continue
            option = flags_of(section, key).partition("/")[0]
            if given.get(key) is not None:
                raise _nothing(option, _asked(section, needs), option)
            default = section.model_fields[key].get_default(call_default_factory=True)
            looked_at = key in written and (every or key in given)
            if looked_at and getattr(own, key) != default:
                what = f"{where}: [{table}] {key}"
                raise _nothing(what, _asked(section, needs, toml=True), key)


def refuse_without(needed: str, options: Tables, *names: str, **others: object) -> None:
    """Refuse options of a command that do nothing without another one of it.

    Args:
        needed: the option that was not given.
        options: per table, the options of the command, None where one was not given.
        names: of the settings that do nothing: ``select.position``.
        others: values of options that are no settings, by name; None where one was not given.

    Raises:
        UsageError: one was given.
    """
    for option in given_options(options, names, others):
        raise _nothing(option, needed, option)


def given_options(
    options: Tables, names: Iterable[str], others: Mapping[str, object]
) -> Iterator[str]:
    """The spellings of those that were given; the arguments are :func:`refuse_without`'s."""
    sections = sections_of(Settings)
    for table, _, key in (name.partition(".") for name in names):
        if options.get(table, {}).get(key) is not None:
            yield flags_of(sections[table], key).partition("/")[0]
    for key, value in others.items():
        if value is not None:
            yield "--" + key.replace("_", "-")


def _nothing(what: str, needed: str, name: str) -> UsageError:
    return UsageError(f"{what} has no effect without {needed}: add it, or leave {name} out")


def _asked(section: type[BaseModel], needs: Needs, toml: bool = False) -> str:
    """What would have to be asked for."""
    value = next((one for one in needs.values if isinstance(one, str)), None)
    if toml:
        told = "" if value is None else f" = {json.dumps(value)}"
        return " or ".join(f"{name}{told}" for name in needs.settings)
    told = "" if value is None else f" {value}"
    return " or ".join(
        f"{flags_of(section, name).partition('/')[0]}{told}" for name in needs.settings
    )
