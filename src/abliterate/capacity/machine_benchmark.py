"""How fast this machine reads, copies and computes, measured in a second or two.

However slow it is, or busy with something else: what is measured ends once it has taken so long.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from abliterate.inference.token_batches import TokenBudget
from abliterate.storage.guarded_files import naming

_SAMPLE = 256 << 20
_COPIED = 64 << 20
# Seconds after which one measurement takes no larger sample.
_LONGEST = 1.0
# Tokens to begin with on a CPU, and of a batch of answers.
FEW_ROWS = 32
# Weights of the layers that are measured, so that they come from memory and not from a cache.
_WEIGHTS = 128 << 20
_MOST_LAYERS = 8
# Wider layers are no faster, only longer to measure.
_WIDEST = {"cpu": 2048}
_WIDEST_ACCELERATOR = 8192


def disk_speed(folder: Path | None) -> float:
    """Bytes per second that come from the disk under ``folder``, past the page cache.

    Args:
        folder: a checkpoint; without weights (or without any) a file is written and read.
    """
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    if largest is not None and largest.stat().st_size >= 1 << 20:
        return _read_speed(largest)
    with tempfile.TemporaryDirectory(prefix="abliterate-speed-") as made:
        path = Path(made, "bytes")
        with naming(path), path.open("wb") as file:
            file.write(os.urandom(1 << 20) * 64)
            file.flush()
            os.fsync(file.fileno())
        return _read_speed(path)  # once it is closed: Windows opens no file twice so


def _read_speed(path: Path) -> float:
    size = min(path.stat().st_size, _SAMPLE)
    buffer = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        seconds, left = 0.0, size
        while left > 0 and seconds < _LONGEST:
            got = file.readinto(buffer[: min(len(buffer), left)])
            if not got:
                break
            left -= got
            seconds = time.perf_counter() - begun
        return (size - left) / max(seconds, 1e-9)


def copy_speed() -> float:
    """Bytes per second copied within main memory, into pages that are new to the process."""
    source = torch.ones(_COPIED, dtype=torch.uint8)
    begun = time.perf_counter()
    copies, seconds = 0, 0.0
    while copies < 3 and seconds < _LONGEST:
        source.clone()
        copies, seconds = copies + 1, time.perf_counter() - begun
    return copies * _COPIED / max(seconds, 1e-9)


@torch.inference_mode()
def layer_speed(
    width: int, dtype: torch.dtype, device: torch.device, rows: int | None = None
) -> float:
    """Floating-point operations per second of feed-forward layers, norm and activation included.

    A matrix product alone, over and over with the same weights, is faster than any model.

    Args:
        width: d_model.
        dtype: of the computation.
        device: where it runs.
        rows: tokens at once; None is as many as a batch of prompts has.
    """
    width = min(width, _WIDEST.get(device.type, _WIDEST_ACCELERATOR))
    most, inner = rows or TokenBudget(device).tokens, 4 * width
    size = 2 * width * inner * dtype.itemsize
    n = min(_MOST_LAYERS, -(-_WEIGHTS // size))
    up = [torch.randn(inner, width, device=device, dtype=dtype) / width**0.5 for _ in range(n)]
    down = [torch.randn(width, inner, device=device, dtype=dtype) / inner**0.5 for _ in range(n)]
    hidden = torch.randn(most, width, device=device, dtype=dtype)

    def run(stream: Tensor) -> float:
        begun = time.perf_counter()
        for one, other in zip(up, down, strict=True):
            stream = stream + linear(silu(linear(rms_norm(stream, (width,)), one)), other)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - begun

    # Few tokens are slower than many, but take no minutes where the machine is slow.
    rows = min(FEW_ROWS, most) if device.type == "cpu" else most
    seconds = run(hidden[:rows])
    while rows < most and 2 * seconds < _LONGEST:
        rows = min(2 * rows, most)
        seconds = run(hidden[:rows])
    if 2 * seconds < _LONGEST:
        seconds = (run(hidden[:rows]) + run(hidden[:rows])) / 2
    return n * 4 * rows * width * inner / max(seconds, 1e-9)
