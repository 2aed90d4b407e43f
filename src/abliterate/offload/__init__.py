"""Models larger than memory: the layers are streamed from disk, with all prompts at once."""

from __future__ import annotations

from abliterate.offload.opening import must_stream, open_stream, parse_memory
from abliterate.offload.stream import Job, Stream

__all__ = ["Job", "Stream", "must_stream", "open_stream", "parse_memory"]
