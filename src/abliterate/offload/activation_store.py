"""Where activations wait between blocks: in memory up to a budget, beyond it in mapped files."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.errors import DiskSpaceError

# Not worth a file of its own.
SMALL = 1 << 16


class Activations:
    """A budget of memory for tensors that wait, and the files for those beyond it.

    A spilled tensor stays the object that it was, for whoever holds it: only its storage changes,
    to the pages of a file without a name, whose space is free again once the tensor is gone.

    Attributes:
        budget: bytes of memory.
        in_memory: bytes that wait in memory now.
        spilled: bytes that were moved to files so far.
        peak: largest ``in_memory`` so far.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget = budget
        self.folder = folder
        self.in_memory = self.spilled = self.peak = 0
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def hold(self, value: Any) -> None:
        """Account for every tensor in ``value`` that waits, and spill it past the budget.

        Those of an accelerator are left to :mod:`abliterate.offload.activation_swap`.

        Args:
            value: a tensor, or tuples, lists and dictionaries of such.
        """
        for tensor in tensors_in(value):
            size = tensor.untyped_storage().nbytes()
            if (
                tensor.device.type != "cpu"
                or size < SMALL
                or not tensor.is_contiguous()
                or self._is_known(tensor)
            ):
                continue
            if size != tensor.numel() * tensor.element_size():
                continue  # a view: what it is of waits elsewhere
            if self.in_memory + size > self.budget:
                mapped = self._file(tuple(tensor.shape), tensor.dtype)
                mapped.copy_(tensor)
                tensor.set_(mapped)  # type: ignore[call-overload]
                size = 0
            self._note(tensor, size)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU to collect results in, within the budget or in a file."""
        size = math.prod(shape) * dtype.itemsize
        if size <= SMALL:
            return torch.empty(shape, dtype=dtype)
        if self.in_memory + size > self.budget:
            tensor = self._file(shape, dtype)
            size = 0
        else:
            tensor = torch.empty(shape, dtype=dtype)
        self._note(tensor, size)
        return tensor

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known() is tensor

    def _note(self, tensor: Tensor, size: int) -> None:
        key = id(tensor)
        self.in_memory += size
        self.peak = max(self.peak, self.in_memory)

        def gone(reference: weakref.ref[Tensor]) -> None:
            self.in_memory -= size
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(tensor, gone)

    def _file(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = count * dtype.itemsize
        with tempfile.NamedTemporaryFile(
            prefix="abliterate-activations-", dir=self.folder, delete=False
        ) as file:
            path = Path(file.name)
            try:
                # Claimed now: a full disk must not show as a crash when a page is written.
                _claim(file.fileno(), size)
                tensor = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
            except OSError as error:
                raise DiskSpaceError(
                    f"{size / 1e9:.1f} GB of activations do not fit into {path.parent} "
                    f"({error.strerror}): set TMPDIR to a folder with room, or raise "
                    "--activation-memory"
                ) from None
            finally:
                with suppress(OSError):
                    path.unlink()
        self.spilled += size
        return tensor.view(shape)


def _claim(file: int, size: int) -> None:
    import os

    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, depth - 1)
