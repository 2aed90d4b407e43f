"""Typed errors. Each carries the exit code the command line ends with.

The verdicts of ``verify`` (6) and ``audit`` (7 edited, 8 undecided) are exit codes, not errors.
Every message is one line that names the file, tensor or option at fault and how to mend it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class AbliterateError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


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
