"""Models larger than memory: the layers are streamed from disk, with all prompts at once."""

from __future__ import annotations

from abliterate.offload.layer_streaming import BatchRun, OffloadedModel
from abliterate.offload.open_model import (
    free_memory,
    load_or_stream,
    must_stream,
    open_stream,
)

__all__ = [
    "BatchRun",
    "OffloadedModel",
    "free_memory",
    "load_or_stream",
    "must_stream",
    "open_stream",
]
