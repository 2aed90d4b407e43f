"""Run the command line in processes of its own that start in milliseconds.

A server process imports the libraries once and forks a child for each command; run as a script it
is that server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass
class Done:
    """What a command left behind; ``code`` is negative for a signal."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Commands:
    """The server, seen from a test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, *args: str | Path, environment: Mapping[str, str] | None = None) -> int:
        """Begin a command, with these variables beside the server's; returns its process id."""
        assert self._process.stdin is not None
        asked = [[str(arg) for arg in args], dict(environment or {})]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> Done:
        """The end of the command that was begun."""
        return Done(**self._answer())

    def __call__(self, *args: str | Path, environment: Mapping[str, str] | None = None) -> Done:
        self.start(*args, environment=environment)
        return self.wait()

    def fails(
        self, *args: str | Path, code: int, environment: Mapping[str, str] | None = None
    ) -> str:
        """The one line with which a command fails."""
        return failure(self(*args, environment=environment), code)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server is gone"
        return dict(json.loads(line))


def failure(done: Done, code: int) -> str:
    """The one line with which a command failed."""
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "unexpected" not in line
    return line


@contextmanager
def serving(environment: Mapping[str, str], *modules: str) -> Iterator[Commands]:
    """Start the server with these variables beside the present ones.

    Args:
        environment: the variables.
        modules: what it imports beforehand beside the usual.
    """
    with subprocess.Popen(
        [sys.executable, __file__, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        yield Commands(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(300)


def _serve() -> None:
    import torch
    import transformers

    import abliterate.cli.app
    import abliterate.editing.orthogonalize
    import abliterate.pipeline.stages

    assert transformers.AutoModelForCausalLM
    for module in sys.argv[1:]:
        import_module(module)
    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                code = 1
                try:
                    args, environment = json.loads(line)
                    os.environ.update(environment)
                    code = abliterate.cli.app.main(args)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            print(json.dumps({"pid": child}), flush=True)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = {}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                texts[name] = file.read().decode()
            print(json.dumps({"code": code, **texts}), flush=True)


if __name__ == "__main__":
    _serve()
