"""Every setting of the pipeline, with the paper's values as defaults, and its TOML form.

A configuration file has the tables ``[model]``, ``[chat]``, ``[extract]``, ``[select]``,
``[orthogonalize]`` and ``[evaluate]``; options on the command line win over it.

A run folder is data, and may come from a stranger: a later stage takes from its record only the
settings that are marked :class:`Recorded` here, which name the experiment. What grants something
(code, addresses, keys, folders to read code from or to write to) or says how a machine is used is
never marked, so that it stands on the command line or in a configuration file or nowhere.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
)

from abliterate.errors import InputError, UsageError


@dataclass(frozen=True)
class Recorded:
    """Marks a setting that later stages take from a run folder's record.

    Without the mark a setting is never taken from there. Mark what names the experiment and can do
    nothing else: see the docstring of this module.
    """


def _parse_json_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object ({error})") from None


def _check_revision(value: str | None) -> str | None:
    """A name that git allows, so that it can also be part of a path in the hub's cache."""
    if value is not None and (
        not value.isprintable()
        or " " in value
        or ".." in value
        or value.startswith(("/", "-"))
        or not 0 < len(value) <= 255
    ):
        raise ValueError("must name a branch, tag or commit")
    return value


def public_url(url: str) -> str:
    """A URL as records and messages may have it: without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where the host is followed by something else
    except ValueError:
        return "***"
    if not parts.netloc:
        return url.rpartition("@")[2].partition("?")[0].partition("#")[0]
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# Attributes have the whole address; what is dumped into records has no secret.
_Endpoint = Annotated[str, PlainSerializer(public_url)]


def _well_formed(value: Any) -> Any:
    """Refuse text that no tokenizer and no JSON file takes: bytes that were no UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("not valid Unicode text") from None
    elif isinstance(value, Mapping):
        for item in value.items():
            _well_formed(item)
    elif isinstance(value, list | tuple):
        for part in value:
            _well_formed(part)
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    _unicode = field_validator("*")(_well_formed)


class ModelSettings(_Section):
    """Where and how the model runs."""

    revision: Annotated[str | None, AfterValidator(_check_revision), Recorded()] = None
    device: str = "auto"
    device_map: str | None = None
    tensor_parallel: bool = False
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "float64"], Recorded()] = (
        "auto"
    )
    batch_size: int | str = "auto"
    trust_remote_code: bool = False
    # Bounds: what numpy, torch and lm-eval all take.
    seed: Annotated[int, Recorded()] = Field(0, ge=0, le=2**32 - 1)
    offload: bool | None = None
    activation_memory: str | None = None


class ChatSettings(_Section):
    """How a prompt becomes a conversation."""

    system: Annotated[str | None, Recorded()] = None
    template_kwargs: Annotated[dict[str, Any], BeforeValidator(_parse_json_object), Recorded()] = (
        Field(default_factory=dict)
    )
    response_prefix: Annotated[str, Recorded()] = ""


class ExtractSettings(_Section):
    """Training prompts and positions (paper, section 2.3)."""

    harmful: Annotated[str, Recorded()] = "harmful"
    harmless: Annotated[str, Recorded()] = "harmless"
    n_train: Annotated[int, Recorded()] = Field(128, ge=1)
    positions: Annotated[str, Recorded()] = "post-instruction"
    filter: Annotated[bool, Recorded()] = True
    refusal_tokens: Annotated[tuple[str, ...], Recorded()] = ()
    save_activations: str | None = None
    activation_positions: Literal["last", "all"] = "last"


class SelectSettings(_Section):
    """Validation prompts and filters (paper, appendix C). None: the sources of ``extract``."""

    harmful: str | None = None
    harmless: str | None = None
    n_val: int = Field(32, ge=1)
    filter: bool = True
    kl_threshold: float = Field(0.1, ge=0)
    induce_threshold: float = 0.0
    prune_layers: float = Field(0.2, ge=0, lt=1)
    search: Literal["staged", "exhaustive"] = "staged"
    all_layers: bool = False
    kl_on: str = Field("last", pattern=r"^(last|response:[1-9][0-9]*)$")


class OrthogonalizeSettings(_Section):
    """The edited checkpoint; see ``abliterate.editing.options.EditOptions``."""

    overwrite: bool = False
    allow_leak: float | None = Field(default=None, ge=0)
    layers: str | None = None
    components: str | None = None
    scale: float = 1.0
    norm_preserve: bool = False
    tied_embeddings: Literal["untie", "share", "skip"] = "untie"
    requantize: bool = False
    dequantize: bool = False
    add: float | None = None
    as_lora: bool = False
    device: str = "cpu"
    jobs: int | None = Field(None, ge=1)
    low_disk: bool = False


class EvaluateSettings(_Section):
    """Test prompts, decoding, judge and capability checks.

    None for the prompts: the sources of ``extract``, and all that they hold.
    """

    harmful: str | None = None
    harmless: str | None = None
    n_test: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(512, ge=1)
    corpus: tuple[str, ...] = ()
    corpus_texts: int = Field(4096, ge=1)
    corpus_tokens: int = Field(256, ge=2)
    tasks: str | None = None
    tasks_dir: str | None = None
    task_limit: int | None = Field(None, ge=1)
    judge: str | None = None
    judge_url: _Endpoint | None = None
    judge_model: str | None = None
    judge_template: Literal["llama-guard", "prompt"] = "llama-guard"
    judge_timeout: float = Field(60.0, gt=0)
    judge_retries: int = Field(4, ge=0)
    judge_concurrency: int = Field(8, ge=1)


class Settings(_Section):
    """All settings of a run."""

    model: ModelSettings = ModelSettings()
    chat: ChatSettings = ChatSettings()
    extract: ExtractSettings = ExtractSettings()
    select: SelectSettings = SelectSettings()
    orthogonalize: OrthogonalizeSettings = OrthogonalizeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


Tables = Mapping[str, Mapping[str, Any]]


def load_settings(
    file: Path | None = None, options: Tables | None = None, base: Tables | None = None
) -> Settings:
    """Settings from a TOML file and the options that were given.

    Args:
        file: the configuration, or None for the defaults.
        options: per table, the options that win over the file; None values are skipped.
        base: per table, what an earlier stage recorded; the file and the options win over it.

    Raises:
        UsageError: the file is missing or no TOML, or a key or value is wrong; the message names
            the nearest valid key.
    """
    configured = {} if file is None else _read_toml(file)
    where = "the recorded settings" if file is None else str(file)
    _check_keys(configured, where)
    document: dict[str, dict[str, Any]] = {}
    for layer in (base or {}, configured, options or {}):
        for table, values in layer.items():
            given = {key: value for key, value in values.items() if value is not None}
            document[table] = {**document.get(table, {}), **given}
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        table, *rest = (str(part) for part in first["loc"])
        key = ".".join(rest) or table
        given_option = (options or {}).get(table, {}).get(key) is not None
        source = f"--{key.replace('_', '-')}" if given_option else f"{where}: [{table}] {key}"
        message = first["msg"].removeprefix("Value error, ")
        given_value = "what it holds" if key == "judge_url" else repr(first["input"])
        raise UsageError(f"{source}: {message}, not {given_value}") from None


def parse_layers(text: str | None) -> frozenset[int] | None:
    """The layers that ``10-25`` or ``3,5-7`` names.

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
            raise UsageError(f"--layers must be such as 10-25 or 3,5-7, not '{text}'")
        layers.update(range(first, last + 1))
    return frozenset(layers)


def is_recorded(section: type[BaseModel], name: str) -> bool:
    """Whether later stages take this setting of a section from a run folder's record."""
    return any(isinstance(mark, Recorded) for mark in section.model_fields[name].metadata)


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
        message = first["msg"].removeprefix("Value error, ")
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
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"configuration file {file} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"configuration file {file} is not readable TOML: {error}") from None


def _check_keys(document: Mapping[str, Any], where: str) -> None:
    tables = Settings.model_fields
    for table, values in document.items():
        if table not in tables:
            raise UsageError(f"{where}: unknown table [{table}]{_nearest(table, tables)}")
        if not isinstance(values, dict):
            raise UsageError(f"{where}: [{table}] must be a table")
        section = tables[table].annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        keys = section.model_fields
        for key in values:
            if key not in keys:
                raise UsageError(f"{where}: unknown key '{key}' in [{table}]{_nearest(key, keys)}")


def _nearest(name: str, valid: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f", did you mean '{close[0]}'?" if close else f" (valid: {', '.join(valid)})"
