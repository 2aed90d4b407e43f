"""Models larger than memory: the layers are streamed from disk, with all prompts at once.

Uses ``inference``, whose passes these are, ``writers`` and ``checkpoints``.
"""

from __future__ import annotations

from abliterate.offload.layer_streaming import BatchRun, OffloadedModel
from abliterate.offload.open_model import (
    free_memory,
    open_stream,
)
from abliterate.offload.opening import OpenOptions, choose_opener, in_memory_opener

__all__ = [
    "BatchRun",
    "OffloadedModel",
    "OpenOptions",
    "choose_opener",
    "free_memory",
    "in_memory_opener",
    "open_stream",
]
