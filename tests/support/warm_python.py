"""Python processes that start in milliseconds: forks of one that has imported the libraries.

``import torch, transformers, abliterate`` takes seconds of processor time, most of what a test that
starts processes costs. One server imports them once a test run, for all its workers; for each
process that is asked for it forks a child, which has its own arguments, variables, folder and
streams and can be killed like any other. What a test says about the *start* of a process (its
imports, a missing module, variables that a library reads when it is imported) needs a real one.

Run as a script this is the server. Its children meet no thread: it starts none.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import pkgutil
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from warm_client import ask

_CLIENT = str(Path(__file__).with_name("warm_client.py"))
# What commands import when they first need it.
_LATE = (
    "accelerate.commands.launch", "safetensors.torch", "torch.distributed.run",
    "torch.distributed.tensor", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip
# What few ask for, and what takes seconds to import.
_SELDOM = ("abliterate.evaluation.endpoint_client",)


@dataclass
class Ended:
    """How a process ended; ``code`` is negative for a signal."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Running:
    """A process that was started."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._answers = connection.makefile("rb", 0)  # the next line stays in the socket
        self.pid = int(self._answers.readline())
        self._code: int | None = None

    def wait(self, timeout: float | None = 600) -> int:
        """The exit code, negative for a signal; :class:`TimeoutError` if it goes on for longer."""
        if self._code is None:
            self._connection.settimeout(timeout)
            line = self._answers.readline()
            assert line, "the server is gone"
            self._code = int(line)
            self._answers.close()
            self._connection.close()
        return self._code

    def is_running(self) -> bool:
        return not select.select([self._connection], [], [], 0)[0]

    def kill(self) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class WarmPython:
    """The server, seen from a test: ``python`` with other words before it.

    Args:
        environment: variables beside the present ones, from the server's start on.
        modules: what it imports beforehand beside the usual.
        place: a folder for its socket, where one that is there already is joined.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        modules: Sequence[str] = (),
        place: str | None = None,
    ) -> None:
        self._environment = {"OMP_NUM_THREADS": "1", **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._is_shared = place is not None
        folder = place or tempfile.mkdtemp(prefix="warm-")  # the server removes it
        self.address = os.path.join(folder, "socket")
        hold = os.path.join(folder, "hold")
        try:
            self._hold = os.open(hold, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # there is no server yet, or no more
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder, 0o700)
            os.mkfifo(hold)
            self._hold = self._begin(hold, modules)

    def _begin(self, hold: str, modules: Sequence[str]) -> int:
        """Start the server, which ends when nobody holds the end of the pipe that this gives."""
        path = os.pathsep.join(dict.fromkeys(map(os.path.abspath, sys.path)))
        read = os.open(hold, os.O_RDONLY | os.O_NONBLOCK)
        held = os.open(hold, os.O_WRONLY)
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.address, *modules],
            stdin=read,
            stdout=subprocess.PIPE,
            env={**os.environ, **self._environment, "PYTHONPATH": path},
        )
        os.close(read)
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the server does not start"
        return held

    def close(self) -> None:
        """Let go of the server; processes that still run are left to themselves."""
        os.close(self._hold)
        if not self._is_shared and self._process is not None:
            self._process.communicate()

    def start(
        self,
        *arguments: str | Path,
        streams: tuple[int, int, int],
        env: Mapping[str, str] | None = None,
        terminal: bool = False,
    ) -> Running:
        """As ``python *arguments`` (``-m MODULE``, ``-c CODE`` or a file) would.

        Args:
            arguments: those of ``python``.
            streams: the files that become its stdin, stdout and stderr.
            env: variables beside the present ones and the server's.
            terminal: its stdin is a terminal, which becomes its own.
        """
        variables = {**os.environ, **self._environment, **(env or {})}
        asked = list(map(str, arguments))
        return Running(ask(self.address, asked, variables, streams, terminal))

    def begin(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        input: str = "",
    ) -> Begun:
        """Start one whose output is kept for its end."""
        files: list[Any] = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        files[0].write(input.encode())
        files[0].seek(0)
        numbers = [file.fileno() for file in files]
        streams = numbers[0], numbers[1], numbers[2]
        return Begun(self.start(*arguments, streams=streams, env=env), files)

    def run(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        input: str = "",
        timeout: float = 600,
    ) -> Ended:
        """Start one and wait for its end."""
        return self.begin(*arguments, env=env, input=input).end(timeout)

    def command(self, *arguments: str | Path) -> list[str]:
        """A command line for launchers: a small program that has the server run ``arguments``."""
        client = [sys.executable, "-I", "-S", _CLIENT, self.address]
        return [*client, *map(str, arguments)]


class Begun:
    """A process whose output goes to files."""

    def __init__(self, running: Running, files: list[BinaryIO]) -> None:
        self.running, self._files = running, files

    def end(self, timeout: float = 600) -> Ended:
        """Wait for its end; it is killed if that does not come."""
        try:
            code = self.running.wait(timeout)
        except TimeoutError:
            self.running.kill()
            raise
        texts = []
        for file in self._files[1:]:
            file.seek(0)
            texts.append(file.read().decode())
        for file in self._files:
            file.close()
        return Ended(code, *texts)


@cache
def warm_python() -> WarmPython:
    """The one of this test run, which is started when one of its workers first needs it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        python = WarmPython()
    else:
        place = os.path.join(tempfile.gettempdir(), f"warm-{run}")
        with FileLock(f"{place}.lock"):
            python = WarmPython(place=place)
    atexit.register(python.close)
    return python


def _hear(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline()), streams


def _become(request: dict[str, Any], streams: list[int]) -> int:
    """Live as the process that was asked for; returns its exit code."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["terminal"]:
        os.login_tty(streams[0])
    else:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
    for stream in streams:
        if stream > 2:
            with contextlib.suppress(OSError):
                os.close(stream)
    if (torch := sys.modules.get("torch")) is not None:
        # torch makes its pool of threads again at first use after a fork, and two threads at once
        # (those that load weights) may find none: "pool INTERNAL ASSERT FAILED".
        torch.set_num_threads(torch.get_num_threads())
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    arguments = request["arguments"]
    try:
        _run(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    first, *rest = arguments
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def _end(code: int) -> None:
    """What the interpreter does at its end, without taking down all that was imported."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def _import(modules: list[str]) -> None:
    import torch
    import transformers

    import abliterate.cli.app
    from abliterate.resources import demo_model_dir

    assert transformers.AutoModelForCausalLM
    for found in pkgutil.walk_packages(abliterate.__path__, "abliterate."):
        if not found.name.endswith("__main__") and found.name not in _SELDOM:
            import_module(found.name)
    for name in (*_LATE, *modules):
        with contextlib.suppress(ImportError):  # an older library has no such module
            import_module(name)
    torch.set_num_threads(1)
    # What the first command of a process makes and keeps: the options, the library's table of
    # names, the proof of the demo model's architecture.
    with contextlib.redirect_stdout(io.StringIO()):
        abliterate.cli.app.main(["writers", str(demo_model_dir()), "--quiet"])


def _forget_ends() -> None:
    """Spare children what torch does at the end of a process: a table of compilations that it made
    none of, and 170 libraries of operators that are taken apart, 0.05 s in all."""
    if (dynamo := sys.modules.get("torch._dynamo.utils")) is not None:
        atexit.unregister(dynamo.dump_compile_times)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def _serve(address: str, modules: list[str]) -> None:
    import gc

    _import(modules)
    _forget_ends()
    gc.collect()
    gc.freeze()  # children leave the pages of these objects alone
    assert threading.active_count() == 1
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as ready:
        listener.bind(address)
        listener.listen(64)
        for source in (listener, woken, sys.stdin):
            ready.register(source, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in ready.select():
                if key.fileobj is sys.stdin:
                    folder = os.path.dirname(address)
                    shutil.rmtree(folder, ignore_errors=True)
                    with contextlib.suppress(OSError):
                        os.unlink(f"{folder}.lock")
                    return
                if key.fileobj is listener:
                    connection = listener.accept()[0]
                    request, streams = _hear(connection)
                    child = os.fork()
                    if child == 0:
                        for other in (listener, woken, wake, connection, *running.values()):
                            other.close()
                        code = 1
                        try:
                            code = _become(request, streams)
                        finally:
                            _end(code)
                    for stream in streams:
                        os.close(stream)
                    running[child] = connection
                    connection.sendall(f"{child}\n".encode())
                    ready.register(connection, selectors.EVENT_READ, child)
                elif key.fileobj is woken:
                    with contextlib.suppress(BlockingIOError):
                        woken.recv(4096)
                    _bury(running, ready)
                elif key.data in running:  # who asked is gone
                    os.kill(key.data, signal.SIGKILL)
                    ready.unregister(key.fileobj)


def _bury(running: dict[int, socket.socket], ready: selectors.BaseSelector) -> None:
    """Tell who asked for them how children ended."""
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        connection = running.pop(child)
        with contextlib.suppress(KeyError):
            ready.unregister(connection)
        with contextlib.suppress(OSError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        connection.close()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
