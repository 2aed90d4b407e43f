"""Starting ranks: by the real launchers, or one by one so that each one's end can be seen."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import hooked
from torch.distributed import TCPStore

HOOKED = str(Path(__file__).with_name("hooked.py"))
_LONG = 300


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def check_close(ours: Any, theirs: Any, tolerance: float = 1e-3) -> None:
    """Nested figures are the same, numbers up to ``tolerance``."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            check_close(ours[key], value, tolerance)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            check_close(one, other, tolerance)
    elif isinstance(theirs, float):
        assert abs(ours - theirs) <= tolerance
    else:
        assert ours == theirs


def free_port() -> str:
    """One that is free now: the oldest accelerate takes no 0 for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def torchrun(ranks: int, *args: str | Path, env: Mapping[str, str] | None = None) -> Ended:
    """``torchrun --standalone`` (no fixed port); ``args`` start with its own options."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return _end(_start((*launcher, *map(str, args)), env or {}))


def accelerate_launch(ranks: int, *args: str | Path, env: Mapping[str, str] | None = None) -> Ended:
    """``accelerate launch`` of a module."""
    options = ("--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no",
               "--main_process_port", free_port(), "--dynamo_backend", "no")  # fmt: skip
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", *options, "--module")
    return _end(_start((*launcher, *map(str, args)), env or {}))


def each_rank(
    ranks: int,
    *args: str | Path,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[list[BaseProcess]], None] | None = None,
) -> list[Ended]:
    """The ranks without a launcher, over a store of this process's own (no fixed port).

    They are forked by a process that has imported all there is to import. No agent is there to end
    them, so that each must come to its own end. ``meanwhile`` gets the processes when all are
    started.
    """
    store = TCPStore(
        "localhost", 0, is_master=True, timeout=timedelta(seconds=_LONG), wait_for_workers=False
    )
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{folder}/{rank}.out", f"{folder}/{rank}.err") for rank in range(ranks)]
        processes: list[BaseProcess] = []
        for rank in range(ranks):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                **(env or {}),
            }
            arguments = (list(map(str, args)), variables, *files[rank])
            processes.append(_forks().Process(target=hooked.run_forked, args=arguments))
            processes[-1].start()
        if meanwhile is not None:
            meanwhile(processes)
        return [_joined(*each) for each in zip(processes, files, strict=True)]


@cache
def _forks() -> multiprocessing.context.ForkServerContext:
    """Forks of one process that has the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hooked"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where it is to find them
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _joined(process: BaseProcess, files: tuple[str, str]) -> Ended:
    process.join(_LONG)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{process.name} has not ended after {_LONG} s")
    # A rank that was killed at once has written nothing.
    texts = [path.read_text() if path.exists() else "" for path in map(Path, files)]
    return Ended(process.exitcode, *texts)


def _start(command: tuple[str, ...], env: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def _end(process: subprocess.Popen[str]) -> Ended:
    try:
        out, err = process.communicate(timeout=_LONG)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ended(process.returncode, out, err)
