"""Settings from TOML files, from the options that were given, and from the records of stages."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from abliterate.errors import InputError, UsageError, name_configured
from abliterate.resources import config_dir
from abliterate.settings.complaints import complaint
from abliterate.settings.marks import flags_of, followed_table, is_recorded, listed, sections_of
from abliterate.settings.sections import Settings
from abliterate.settings.values import memory_size
from abliterate.settings.without_effect import Tables, check_effects


def load_settings(
    file: Path | None = None,
    options: Tables | None = None,
    base: Tables | None = None,
    schema: type[Settings] = Settings,
    every: bool = False,
) -> Settings:
    """Settings from a TOML file and the options that were given.

    Args:
        file: the configuration, or the name of a bundled one; None for the defaults.
        options: per table, the options that win over the file; None values are skipped.
        base: per table, what an earlier stage recorded; the file and the options win over it.
        schema: the settings that there are.
        every: the command uses all settings, not only those that it has options for.

    Raises:
        UsageError: the file is missing or no TOML, or a key or value is wrong (the message names
            the nearest valid key) or has no effect beside the others.
    """
    configured = {} if file is None else _read_toml(file)
    where = "the recorded settings" if file is None else str(file)
    _check_keys(configured, where, schema)
    tables = sections_of(schema)
    configured = {name: _as_options(values, tables[name]) for name, values in configured.items()}
    if configured:
        _name_configured(configured, options or {}, where, schema, every)
    document: dict[str, dict[str, Any]] = {}
    for layer in (base or {}, configured, options or {}):
        for table, values in layer.items():
            given = {key: value for key, value in values.items() if value is not None}
            document[table] = {**document.get(table, {}), **given}
    _follow(document, schema)
    try:
        settings = schema.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        # Behind them: which of several types it was tried as.
        table, key, *_ = *map(str, first["loc"]), ""
        given_option = (options or {}).get(table, {}).get(key) is not None
        source = (
            flags_of(tables[table], key).partition("/")[0]
            if given_option
            else f"{where}: [{table}] {key}"
        )
        message = complaint(first)
        hidden = key in ("judge_url", "second_judge_url", "server")
        if first["type"] == "tuple_type":
            example = "..." if hidden else first["input"]
            message = f"must be a list, such as [{json.dumps(example, default=str)}]"
        given_value = "what it holds" if hidden else repr(first["input"])
        raise UsageError(f"{source}: {message}, not {given_value}") from None
    check_effects(settings, options or {}, configured, where, every)
    return settings


def _name_configured(
    configured: Tables, options: Tables, where: str, schema: type[BaseModel], every: bool
) -> None:
    """Let errors about what a file gives to this command name the keys."""
    held, absent, typed = dict[str, list[str]](), dict[str, list[str]](), set[str]()
    for table, section in sections_of(schema).items():
        given = options.get(table, {})
        for key in section.model_fields:
            option = flags_of(section, key).partition("/")[0]
            if given.get(key) is not None:
                typed.add(option)
            counts = key in configured.get(table, {}) and (every or key in given)
            (held if counts else absent).setdefault(option, []).append(f"[{table}] {key}")
    name_configured(
        where,
        {option: " or ".join(names) for option, names in held.items() if option not in typed},
        # Of several that are absent none is meant more than the others.
        {option: n for option, (n, *more) in absent.items() if not more and option not in typed},
    )


def _follow(document: dict[str, dict[str, Any]], schema: type[BaseModel]) -> None:
    """Settings that were not given are those of the section that they follow."""
    for table, section in sections_of(schema).items():
        for key in section.model_fields:
            followed = document.get(followed_table(section, key) or "", {})
            if key in followed and key not in document.get(table, {}):
                document[table] = {**document.get(table, {}), key: followed[key]}


def parse_memory(text: str, option: str) -> int:
    """Bytes of ``24GB``, ``512MiB`` or a plain number.

    Args:
        text: the size.
        option: which option gave it.

    Raises:
        UsageError: it is none of these, or not positive.
    """
    try:
        return memory_size(text)
    except ValueError as error:
        raise UsageError(f"{option} {error}, not '{text}'") from None


def parse_layers(text: str | None, option: str = "--layers") -> frozenset[int] | None:
    """The layers that ``10-25`` or ``3,5-7`` names, as ``option`` was given them.

    Raises:
        UsageError: it names none.
    """
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        first, last = (int(end or ends[1]) for end in ends.groups()) if ends else (1, 0)
        if last < first:
            raise UsageError(f"{option} must be such as 10-25 or 3,5-7, not '{text}'")
        layers.update(range(first, last + 1))
    return frozenset(layers)


def take_recorded(
    document: Any, where: str, schema: type[BaseModel] = Settings
) -> dict[str, dict[str, Any]]:
    """What a record of settings may decide for a later stage: the ``base`` of load_settings.

    All of the record is checked by type; of that, only settings marked :class:`Recorded` are taken.

    Args:
        document: the record's settings, as parsed JSON.
        where: the file, for error messages.
        schema: the settings that there are.

    Raises:
        InputError: an unknown table or setting, or a value of the wrong type or out of bounds.
    """
    try:
        checked = schema.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":  # parsed once already: it is about its characters
            raise InputError(
                f"{where}: the settings hold half a character: run extract again"
            ) from None
        table, *rest = (*map(str, first["loc"]), "")
        name = f"[{table}] {'.'.join(filter(None, rest))}".strip() if table else "the settings"
        message = complaint(first)
        raise InputError(
            f"{where}: {name}: {message}, not {first['input']!r:.80}: run extract again"
        ) from None
    taken: dict[str, dict[str, Any]] = {}
    for table in schema.model_fields:
        section: BaseModel = getattr(checked, table)
        taken[table] = {
            name: getattr(section, name)
            for name in type(section).model_fields
            if name in section.model_fields_set and is_recorded(type(section), name)
        }
    return taken


def _read_toml(file: Path) -> dict[str, Any]:
    """A file, or where there is none of that name the bundled one: ``paper``."""
    bundled = {path.stem: path for path in sorted(config_dir().glob("*.toml"))}
    if not file.exists():
        file = bundled.get(str(file), file)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(bundled)
        raise UsageError(
            f"configuration file {file} does not exist, and is none of the bundled {names}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"configuration file {file} is not readable TOML: {error}") from None


def _as_options(values: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """TOML has lists, days and numbers of its own; options write them as text: ``[40]`` as
    ``["40"]``, ``positions = [-5, -1]`` as ``"-5,-1"``."""

    def told(key: str, value: Any) -> Any:
        if type(value) is date:
            return value.isoformat()
        kinds = _kinds(section.model_fields[key].annotation)
        if isinstance(value, list) and tuple in kinds:
            return [one.isoformat() if type(one) is date else str(one) for one in value]
        if listed(section, key) is not None and str in kinds and isinstance(value, list | int):
            return ",".join(map(str, value if isinstance(value, list) else [value]))
        return value

    return {key: told(key, value) for key, value in values.items()}


def _check_keys(document: Mapping[str, Any], where: str, schema: type[BaseModel]) -> None:
    tables = sections_of(schema)
    for table, values in document.items():
        if table not in tables:
            homes = _homes(table, tables)
            if homes and not isinstance(values, dict):
                raise UsageError(f"{where}: '{table}' must stand under {homes}")
            raise UsageError(f"{where}: unknown table [{table}]{_nearest(table, tables)}")
        if not isinstance(values, dict):
            raise UsageError(f"{where}: [{table}] must be a table")
        fields = tables[table].model_fields
        for key, value in values.items():
            if key not in fields:
                homes = _homes(key, tables)
                told = f": it belongs under {homes}" if homes else _nearest(key, fields)
                raise UsageError(f"{where}: unknown key '{key}' in [{table}]{told}")
            wrong = _wrong_kind(value, fields[key].annotation)
            if wrong is not None:
                given = json.dumps(value) if isinstance(value, bool) else repr(value)
                raise UsageError(f"{where}: [{table}] {key}: {wrong}, not {given}")
            if isinstance(value, list):
                _check_members(f"{where}: [{table}] {key}", value, tables, table, key)


def _homes(key: str, tables: Mapping[str, type[BaseModel]]) -> str:
    """The tables that have a key: ``[extract] or [select]``."""
    return " or ".join(
        f"[{name}]" for name, section in tables.items() if key in section.model_fields
    )


def _wrong_kind(value: Any, annotation: Any) -> str | None:
    """What a key must be where TOML says something of another type: no number is meant by ``true``
    or ``"24"``, no switch by ``"no"``, and no whole number by ``8.0``."""
    kinds = _kinds(annotation)
    if isinstance(value, bool) and not kinds & {bool, Any}:
        return "must be a number" if kinds & {int, float} else "must be text"
    if isinstance(value, str) and bool in kinds and not kinds & {str, Any}:
        return "must be true or false"
    if isinstance(value, str) and kinds & {int, float} and kinds <= {int, float, NoneType}:
        return "must be a number" if float in kinds else "must be an integer"
    if isinstance(value, float) and int in kinds and not kinds & {float, Any}:
        return "must be an integer"
    return None


def _check_members(
    what: str, value: list[Any], tables: Mapping[str, type[BaseModel]], table: str, key: str
) -> None:
    """Refuse a list where there is none, one without members, and members that no option can be.

    Raises:
        UsageError: it is one of these.
    """
    mark, kinds = listed(tables[table], key), _kinds(tables[table].model_fields[key].annotation)
    if mark is None and tuple not in kinds:
        if kinds <= {str, NoneType}:
            several = [
                f"[{name}]"
                for name, section in tables.items()
                if key in section.model_fields
                and tuple in _kinds(section.model_fields[key].annotation)
            ]
            alone = f" ({' and '.join(several)} alone takes several)" if several else ""
            raise UsageError(f"{what}: must be one text, not a list{alone}")
        return  # whoever checks the value says what it must be
    for one in value:
        if isinstance(one, bool) or not isinstance(one, str | int | date):
            kind = {list: "a list", dict: "a table", bool: "a switch"}.get(type(one), repr(one))
            raise UsageError(f"{what}: each member must be text or a whole number, not {kind}")
    if mark is not None and not value:
        raise UsageError(f"{what} is empty: name one at least, or leave it out for {mark.unless}")


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows; those of a list's members are not looked at."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(args[0])
    if origin is Literal:
        return {type(one) for one in args}
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, args))
    return {origin or annotation}


def _nearest(name: str, valid: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, valid, n=1)
    return f", did you mean '{close[0]}'?" if close else f" (valid: {', '.join(valid)})"
