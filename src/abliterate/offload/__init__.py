"""Models larger than memory: the layers are streamed from disk, with all prompts at once."""

from __future__ import annotations

from abliterate.offload.opening import (
    free_memory,
    load_or_stream,
    must_stream,
    open_stream,
    parse_memory,
)
from abliterate.offload.stream import Job, Stream

__all__ = [
    "Job",
    "Stream",
    "free_memory",
    "load_or_stream",
    "must_stream",
    "open_stream",
    "parse_memory",
]
