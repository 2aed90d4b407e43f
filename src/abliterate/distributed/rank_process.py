"""How one of several ranks behaves on the command line: rank 0 alone prints, all end together."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

from abliterate.console import log
from abliterate.distributed.launcher import launched
from abliterate.errors import AbliterateError, RankError


def begin() -> None:
    """Set this process up as its rank, if a launcher started it as one of several."""
    if not launched():
        return
    # Its own reports of lost connections, one from each thread, would bury ours.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    signal.signal(signal.SIGTERM, _stopped)
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        log.addFilter(_warnings_only)


def _warnings_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _stopped(number: int, frame: FrameType | None) -> Any:
    settle()
    raise RankError(
        "stopped by the launcher, as another rank failed or the job was cancelled: run the same "
        "command again to go on"
    )


def settle() -> None:
    """From here on the launcher cannot stop this rank: its exit code stands."""
    if launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def name() -> str:
    """What an error line of this rank starts with."""
    return f"rank {os.environ['RANK']}: " if launched() else ""


def explained(error: Exception) -> AbliterateError | None:
    """What an unexpected error of this rank comes from, if that is another rank's end."""
    if not launched():
        return None
    from abliterate.distributed.rank_group import lost_connection

    return lost_connection(error)


def end(code: int) -> int:
    """Part from the other ranks. Returns ``code``, or does not return.

    After a failure there is nobody to part from, and what gloo's threads do while Python takes the
    process down would hide the exit code.
    """
    if not launched():
        return code
    if code == 0:
        from abliterate.distributed.rank_group import leave_ranks

        try:
            leave_ranks()
            return code
        except RuntimeError:  # all is done and written
            log.warning("another rank ended early")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
