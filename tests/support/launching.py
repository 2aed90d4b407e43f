"""Starting ranks: by the real launchers, or one by one so that each one's end can be seen."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from warm_python import Ended, Running, warm_python

HOOKED = str(Path(__file__).with_name("hooked.py"))
_LONG = 300


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


def torchrun(
    ranks: int,
    *args: str | Path,
    env: Mapping[str, str] | None = None,
    options: tuple[str | Path, ...] = (),
    cold: bool = False,
) -> Ended:
    """``torchrun --standalone`` (no fixed port) of what ``python *args`` runs.

    Args:
        ranks: how many.
        args: ``-m MODULE`` or a file, and its arguments.
        env: variables beside the present ones.
        options: further ones of torchrun.
        cold: the ranks are Pythons of their own, which import all that they need; else they have
            it, and the launcher starts small programs that stand for them.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    program = args if cold else ("--no-python", *warm_python().command(*args))
    return warm_python().run(*launcher, *options, *program, env=env, timeout=_LONG)


def accelerate_launch(ranks: int, *args: str | Path, env: Mapping[str, str] | None = None) -> Ended:
    """``accelerate launch`` of what ``python *args`` runs, by such programs."""
    options = ("--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no",
               "--main_process_port", free_port(), "--dynamo_backend", "no")  # fmt: skip
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", *options, "--no_python")
    program = warm_python().command(*args)
    return warm_python().run(*launcher, *program, env=env, timeout=_LONG)


def each_rank(
    ranks: int,
    *args: str | Path,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[list[Running]], None] | None = None,
) -> list[Ended]:
    """The ranks without a launcher, over a store of this process's own (no fixed port).

    No agent is there to end them, so that each must come to its own end. ``meanwhile`` gets the
    processes when all are started.
    """
    store = TCPStore(
        "localhost", 0, is_master=True, timeout=timedelta(seconds=_LONG), wait_for_workers=False
    )
    begun = []
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
        begun.append(warm_python().begin(HOOKED, *args, env=variables))
    if meanwhile is not None:
        meanwhile([each.running for each in begun])
    return [each.end(_LONG) for each in begun]
