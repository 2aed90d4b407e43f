"""Run the command line in processes of its own that start in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from warm_python import Begun, Ended, WarmPython

Done = Ended


class Commands:
    """The command line, seen from a test."""

    def __init__(self, python: WarmPython) -> None:
        self._python = python
        self._begun: Begun | None = None

    def start(self, *args: str | Path, environment: Mapping[str, str] | None = None) -> int:
        """Begin a command, with these variables beside the present ones; returns its process id."""
        self._begun = self._python.begin("-m", "abliterate", *args, env=environment)
        return self._begun.running.pid

    def wait(self) -> Done:
        """The end of the command that was begun."""
        assert self._begun is not None
        return self._begun.end()

    def __call__(
        self,
        *args: str | Path,
        environment: Mapping[str, str] | None = None,
        input: str = "",
    ) -> Done:
        return self._python.run("-m", "abliterate", *args, env=environment, input=input)

    def fails(
        self, *args: str | Path, code: int, environment: Mapping[str, str] | None = None
    ) -> str:
        """The one line with which a command fails."""
        return failure(self(*args, environment=environment), code)


def failure(done: Done, code: int) -> str:
    """The one line with which a command failed."""
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err, done.err
    (line,) = done.errors
    assert "unexpected" not in line
    return line


@contextmanager
def serving(environment: Mapping[str, str], *modules: str) -> Iterator[Commands]:
    """Commands of a server that had these variables when it imported the libraries.

    Args:
        environment: the variables.
        modules: what it imports beforehand beside the usual.
    """
    python = WarmPython(environment, modules)
    try:
        yield Commands(python)
    finally:
        python.close()
