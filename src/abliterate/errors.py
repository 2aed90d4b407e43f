"""Typed errors. Each carries the exit code the command line ends with.

The verdicts of ``verify`` (6) and ``audit`` (7 edited, 8 undecided) are exit codes, not errors.
Every message is one line that names the file, tensor or setting at fault and how to mend it.

A setting is named once, as its option (``--n-train``). The command line shows it so
(:func:`speaking_of_options`), or as the key of a configuration that gave it
(:func:`name_configured`); whoever calls a function reads the name of its argument.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_OPTION = re.compile(r"(?<![\w./=-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")
# Options whose argument has another name than theirs with underscores.
_ARGUMENTS = {
    "checkpoint": "edited",
    "dequantize": "quantized='dequantize'",
    "heads": "n_heads",
    "induce-threshold": "Thresholds(induce=...)",
    "intervention": "interventions",
    "kl-threshold": "Thresholds(kl=...)",
    "no-filter": "filter=False",
    "no-offload": "offload=False",
    "output": "out",
    "prune-layers": "Thresholds(prune_layers=...)",
    "refusal-token": "refusal_tokens",
    "requantize": "quantized='requantize'",
}
# Options that are fields of ``chat=ChatFormat(...)``.
_CHAT = {
    "date": "date",
    "max-thinking-tokens": "max_thinking_tokens",
    "response-prefix": "response_prefix",
    "system": "system",
    "template": "template",
    "template-arg": "template_kwargs",
    "thinking": "thinking",
}
# What stands behind such an option, as a field's value: a choice, or a variable's name and value.
_CHAT_VALUE = re.compile(
    r"--(?P<option>template|thinking) (?P<choice>plain|answer|skip|whole|FILE)\b"
    r"|--template-arg (?P<name>\w+)(?:=(?P<value>[\w\[\]]+))?"
)
# Whoever calls a function gives more prompts, and no number of them to draw.
_COUNT_OF_PROMPTS = re.compile(r" \(--n-(?:train|val|test)\)")
# Of other programs, or of no function.
_NO_ARGUMENTS = frozenset(("debug", "nproc-per-node"))
_speaks_of_options = False
# The command's configuration; by option, what it calls what it gives, and what it does not give.
_configured: tuple[str, Mapping[str, str], Mapping[str, str]] = ("", {}, {})


@contextmanager
def speaking_of_options() -> Iterator[None]:
    """Within the context messages name settings as options: for the command line."""
    global _speaks_of_options
    before, _speaks_of_options = _speaks_of_options, True
    name_configured()
    try:
        yield
    finally:
        _speaks_of_options = before
        name_configured()


def name_configured(
    file: str = "", keys: Mapping[str, str] | None = None, others: Mapping[str, str] | None = None
) -> None:
    """From now on errors name what a configuration gave as its user wrote it.

    Args:
        file: the configuration.
        keys: by option, ``--scale``, the key that the file has: ``[orthogonalize] scale``.
        others: likewise, keys that neither the file nor the command line gave.
    """
    global _configured
    _configured = (file, keys or {}, others or {})


def argument_name(option: str) -> str:
    """What a function's argument is called that the option ``--OPTION`` sets."""
    if option in _NO_ARGUMENTS:
        return f"--{option}"
    if option in _CHAT:
        return f"chat=ChatFormat({_CHAT[option]}=...)"
    return _ARGUMENTS.get(option, option.replace("-", "_"))


def addressed(text: str) -> str:
    """A message as its reader knows the settings; commands in backticks stay as they are."""
    if _speaks_of_options:
        return text
    parts = text.split("`")
    parts[::2] = map(_of_arguments, parts[::2])
    return "`".join(parts)


def _of_keys(text: str, explained: bool) -> str:
    """A message about what a configuration gave: ``FILE: [orthogonalize] scale must ...``.

    Where an option only stands in the midst of a message, the key is told behind it, if it is to be
    explained there.
    """
    file, keys, others = _configured
    first = _OPTION.match(text)
    parts = text.split("`")  # commands in backticks stay as they are
    if first is not None and first[0] in keys:
        every = {**others, **keys}
        parts[::2] = [_OPTION.sub(lambda m: every.get(m[0], m[0]), part) for part in parts[::2]]
        return f"{file}: {'`'.join(parts)}"
    named = dict.fromkeys(m[0] for part in parts[::2] for m in _OPTION.finditer(part))
    told = [f"{option} is {keys[option]}" for option in named if option in keys]
    return f"{text} ({', '.join(told)} in {file})" if told and explained else text


def _of_arguments(text: str) -> str:
    text = _CHAT_VALUE.sub(_chat_field, _COUNT_OF_PROMPTS.sub("", text))
    return _OPTION.sub(lambda match: argument_name(match[1]), text)


def _chat_field(match: re.Match[str]) -> str:
    if match["name"]:
        value = "..." if match["value"] in (None, "VALUE") else match["value"]
        return f"chat=ChatFormat(template_kwargs={{'{match['name']}': {value}}})"
    value = "..." if match["choice"] == "FILE" else f"'{match['choice']}'"
    return f"chat=ChatFormat({match['option']}={value})"


class AbliterateError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        if _speaks_of_options:
            return _of_keys(text, isinstance(self, UsageError | InputError))
        return addressed(text)


class UsageError(AbliterateError):
    """An option, a configuration key or a combination of them is wrong."""

    exit_code = 2


class InputError(AbliterateError):
    """A prompt source, a run folder or an artifact cannot be used."""

    exit_code = 3


class CheckpointError(AbliterateError):
    """A model or checkpoint cannot be read, loaded or written."""

    exit_code = 4


class RankError(CheckpointError):
    """Another process that shares the work failed or is gone."""


class DiskSpaceError(CheckpointError):
    """The output does not fit on its disk."""


class FetchError(CheckpointError):
    """The hub does not give a file, or part of one, now."""


class UnsupportedArchitectureError(CheckpointError):
    """No complete set of residual-stream writers is known for this architecture."""


class NeedsWeightsError(UnsupportedArchitectureError):
    """Its writers can only be proven on its own weights, which are not here."""


class PlanError(CheckpointError):
    """The writers were found, but the edit cannot be planned on the tensors on disk."""


class ShapeMismatchError(PlanError):
    """A tensor on disk has another shape than the model of the configuration.

    Attributes:
        parameter: the model's parameter.
        tensor: a tensor on disk that it is loaded from.
        expected: the parameter's shape.
        found: the shape that loading gives it.
    """

    def __init__(
        self, parameter: str, tensor: str, expected: tuple[int, ...], found: tuple[int, ...]
    ) -> None:
        super().__init__(f"{parameter} is {expected} in the model but {found} on disk ({tensor})")
        self.parameter, self.tensor = parameter, tensor
        self.expected, self.found = expected, found


class SelectionError(AbliterateError):
    """No candidate direction passes the filters.

    Attributes:
        front: the candidates that no other beats in bypass, induce and KL at once, as
            ``selection.json`` lists them.
    """

    exit_code = 5

    def __init__(self, message: str, front: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.front = front


class InterruptedWorkError(AbliterateError):
    """Ctrl-C came midway; the message says what was kept and how to go on."""

    exit_code = 130


def one_line(error: BaseException) -> str:
    """What a library's error says, on one line; empty where it says nothing."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, or its type where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
