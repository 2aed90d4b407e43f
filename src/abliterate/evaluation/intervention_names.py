"""The names of interventions, which need no model to be checked."""

from __future__ import annotations

from collections.abc import Collection

from abliterate.errors import UsageError

INTERVENTIONS = ("baseline", "ablate", "add", "subtract")
CHECKPOINT = "checkpoint"


def check_name(name: str, direction: object, edited: Collection[str] = ()) -> None:
    """Refuse what names no intervention, or one that lacks what it needs.

    Args:
        name: of ``--intervention``.
        direction: what ``--direction`` gave, or None.
        edited: the names of ``--checkpoint``.

    Raises:
        UsageError: it is so.
    """
    if name == CHECKPOINT:
        if not edited:
            raise UsageError("--intervention checkpoint needs --checkpoint DIR")
    elif name not in INTERVENTIONS:
        raise UsageError(
            f"--intervention must be one of {', '.join(INTERVENTIONS)}, checkpoint, not '{name}'"
        )
    elif name != "baseline" and direction is None:
        raise UsageError(f"--intervention {name} needs --direction")
