"""What ``torchrun`` or ``accelerate launch`` says of a process, in its environment."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ
