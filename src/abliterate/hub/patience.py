"""Faults that pass: asked again a few times, as long after as the hub says."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, TypeVar

from abliterate.console import log
from abliterate.hub.reasons import PASSING, is_incomplete, short, status_of, transport_fault

T = TypeVar("T")

#: Asked again so often: where the hub answered that it cannot now, and where nothing answered.
_RETRIES, _RETRIES_UNANSWERED = 4, 2
_CLIENT_WAITS = re.compile(r"(?:Retrying in|Waiting) ([\d.]+) ?s.*\[Retry (\d+)/(\d+)\]")
#: Longer waits than this many seconds are the user's to decide.
LONGEST_WAIT = 300.0


def patiently(call: Callable[[], T], what: str, retries: int = _RETRIES) -> T:
    """What ``call`` gives, called again after a fault that passes.

    Args:
        call: asks the hub.
        what: it asks for, for the log.
        retries: how often at most.

    Raises:
        Exception: what ``call`` raised last.
    """
    _hear_waits()
    done = 0
    while True:
        try:
            return call()
        except Exception as error:  # the client's many error types have no narrower common base
            reason, wait = _passing(error, done)
            most = retries if status_of(error) else min(retries, _RETRIES_UNANSWERED)
            if reason is None or done >= most or wait > LONGEST_WAIT:
                raise
            done += 1
            log.warning("%s: %s: asking again in %g s (%d of %d)", what, reason, wait, done, most)
            time.sleep(wait)


class _Waits(logging.Handler):
    """Says in our log that the client waits by itself; its own lines hold whole addresses."""

    def emit(self, record: logging.LogRecord) -> None:
        if (wait := _CLIENT_WAITS.search(record.getMessage())) is not None:
            log.warning("the hub cannot now: asking again in %s s (%s of %s)", *wait.groups())


@cache
def _hear_waits() -> None:
    client = logging.getLogger("huggingface_hub.utils._http")
    client.setLevel(logging.WARNING)
    client.propagate = False
    client.addHandler(_Waits())


def _passing(error: Exception, done: int) -> tuple[str | None, float]:
    """What passes by itself (None: it does not), and after how many seconds."""
    wait = float(2**done)
    if (answer := status_of(error)) is not None:
        status, headers = answer
        if status not in PASSING:
            return None, wait
        asked = retry_after(headers)
        return f"the hub answers {status}", wait if asked is None else asked
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return None, wait
    if (fault := transport_fault(error)) is not None:
        return short(fault), wait
    return ("a file came incomplete" if is_incomplete(error) else None), wait


def retry_after(headers: Any) -> float | None:
    """The seconds that ``Retry-After`` names, as a number or as a date; None if it names none."""
    value = str(headers.get("Retry-After") or "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
