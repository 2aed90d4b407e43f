"""Outputs stay out of checkpoints: what lies in one is taken for a part of it, and is copied,
published and replaced with it."""

from __future__ import annotations

from pathlib import Path

from abliterate.errors import UsageError
from abliterate.storage.json_text import parse_json

_MOST = 32 << 20  # bytes of a configuration


def check_outside_checkpoints(path: Path, *, itself: bool = False) -> None:
    """Refuse an output that would lie in a checkpoint.

    Args:
        path: what is to be made.
        itself: it is a folder that may be there, and may be a checkpoint.

    Raises:
        UsageError: it would.
    """
    whole = path.expanduser().resolve()
    for folder in ((whole,) if itself else ()) + tuple(whole.parents):
        if is_checkpoint(folder):
            raise UsageError(
                f"output {path} lies in the checkpoint {folder}, which would be more than its "
                "files then: choose a place outside of it"
            )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model's configuration and weights."""
    try:
        config = folder / "config.json"
        if not config.is_file() or config.stat().st_size > _MOST:
            return False
        if next(folder.glob("*.safetensors"), None) is None:
            return False
        document = parse_json(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and bool({"model_type", "architectures"} & document.keys())
