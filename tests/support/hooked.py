"""The command line as one of several ranks, one of which fails at a set moment.

``FAULT`` is ``RANK CALL DEED``: at its CALL-th piece of work (a batch run of ``extract``, a round
of ``select``, a batch of answers of ``evaluate``), rank RANK is killed (``kill``), raises
(``raise``) or waits until somebody opens the named pipe PATH (``wait:PATH``).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from abliterate.cli.app import main
from abliterate.errors import InputError
from abliterate.inference import in_memory
from abliterate.inference.generation import _Decoder
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


if __name__ == "__main__":
    rank, call, what = os.environ.get("FAULT", "-1 1 none").split(" ", 2)
    if os.environ["RANK"] == rank:
        in_memory.collect_activations = faulty(in_memory.collect_activations, int(call), what)
        CandidateSearch._induce = faulty(CandidateSearch._induce, int(call), what)  # type: ignore[method-assign]
        _Decoder.run = faulty(_Decoder.run, int(call), what)  # type: ignore[method-assign]
    sys.exit(main())
