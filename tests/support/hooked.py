"""The command line as one of several ranks, one of which fails at a set moment.

``FAULT`` is ``RANK CALL DEED``: at its CALL-th piece of work (a batch run of ``extract``, a round
of ``select``, a batch of answers of ``evaluate``, a shard that ``orthogonalize`` is about to write;
``finish`` is when it has written its first), rank RANK is killed (``kill``), raises (``raise``) or
waits until somebody opens the named pipe PATH (``wait:PATH``).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from abliterate.cli.app import main
from abliterate.editing import orthogonalize
from abliterate.editing.workspace import Workspace
from abliterate.errors import InputError
from abliterate.inference import in_memory
from abliterate.inference.batch_decoding import BatchDecoder
from abliterate.selection.candidate_search import CandidateSearch


def deed(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise InputError("the disk of this rank is on fire")
    os.close(os.open(what.removeprefix("wait:"), os.O_RDONLY))


def faulty(work: Callable[..., Any], at: int, what: str) -> Callable[..., Any]:
    calls = itertools.count(1)

    def run(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            deed(what)
        return work(*args, **kwargs)

    return run


def and_then(work: Callable[..., Any], what: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> None:
        work(*args, **kwargs)
        deed(what)

    return run


def install() -> None:
    """Make the fault of ``FAULT``, if it is this rank's."""
    rank, call, what = os.environ.get("FAULT", "-1 1 none").split(" ", 2)
    if os.environ["RANK"] != rank:
        return
    if call == "finish":
        Workspace.finish = and_then(Workspace.finish, what)  # type: ignore[method-assign]
        return
    in_memory.collect_activations = faulty(in_memory.collect_activations, int(call), what)
    CandidateSearch._induce = faulty(CandidateSearch._induce, int(call), what)  # type: ignore[method-assign]
    BatchDecoder.run = faulty(BatchDecoder.run, int(call), what)  # type: ignore[method-assign]
    orthogonalize.write_shards = faulty(orthogonalize.write_shards, int(call), what)


if __name__ == "__main__":
    install()
    sys.exit(main())
