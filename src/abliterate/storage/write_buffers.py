"""Memory for blocks of tensors: reused by each thread, and gathered into long writes."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from abliterate.storage.file_io import PAGE, TargetFile

RUN_BYTES = 16 << 20  # long enough for a disk to be at its full speed


class _Scratch(threading.local):
    """Memory that a thread uses for one block after another: fresh memory costs as much time as
    the arithmetic on it."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def tensor(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised, on the CPU; valid until the thread's next call for that use."""
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(use)
        if memory is None or len(memory) < size:
            memory = self._memory[use] = torch.empty(size, dtype=torch.uint8)
        return memory[:size].view(dtype).view(list(shape))


scratch = _Scratch()


class Outgoing:
    """Neighbouring blocks on their way into a file, written in runs of ``RUN_BYTES``.

    For one thread, and one at a time in it: what was gathered and not flushed is lost.
    """

    def __init__(self, target: TargetFile) -> None:
        self._target = target
        self._run = torch.empty(0, dtype=torch.uint8)  # memory for the present one
        self._start = self._filled = 0

    def room(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled by the caller; its bytes will be written at byte ``offset``."""
        size = math.prod(shape) * dtype.itemsize
        if offset != self._start + self._filled or self._filled + size > len(self._run):
            self.flush()
            self._start, self._run = offset, _like_in_file(offset, size, dtype.itemsize)
        begin, self._filled = self._filled, self._filled + size
        return self._run[begin : self._filled].view(dtype).view(list(shape))

    def flush(self) -> None:
        """Write what was gathered."""
        content = as_bytes(self._run[: self._filled])
        if self._run.data_ptr() % PAGE == self._start % PAGE:
            self._target.write_past_cache(content, self._start)
        else:
            self._target.write(content, self._start)
        self._filled = 0


def _like_in_file(offset: int, least: int, alignment: int) -> Tensor:
    """This thread's memory for a run, in its page as far as the run's first byte is in the file's.

    Only where elements are not aligned in the file is it elsewhere: they must be in memory.
    """
    size = max(RUN_BYTES, least)
    memory = scratch.tensor("run", (size + 2 * PAGE,), torch.uint8)
    begin = -memory.data_ptr() % PAGE
    if offset % alignment == 0:
        begin += offset % PAGE
    return memory[begin : begin + size]


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data).cast("B")
