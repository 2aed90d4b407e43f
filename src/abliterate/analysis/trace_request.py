"""What ``trace`` is asked for; checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from abliterate.errors import UsageError


@dataclass(frozen=True)
class TraceRequest:
    """What to trace.

    Attributes:
        harmful: prompt source, or None for the run's own test prompts.
        harmless: likewise.
        n_prompts: how many of each, or None for as many as there are.
        suffix: what is put after the harmful prompts, or None.
        n_heads: how many heads are listed.
    """

    harmful: str | None = None
    harmless: str | None = None
    n_prompts: int | None = None
    suffix: str | None = None
    n_heads: int = 10


def check_request(request: TraceRequest) -> None:
    """Refuse counts below one.

    Raises:
        UsageError: there is one.
    """
    for option, count in (("--n-prompts", request.n_prompts), ("--heads", request.n_heads)):
        if count is not None and count < 1:
            raise UsageError(f"{option} must be at least 1, not {count}")
