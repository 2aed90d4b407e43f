"""What a batch takes of an accelerator's memory, and how much of it is free."""

from __future__ import annotations

from typing import Any

import torch

_NEEDED = (
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "max_memory_allocated",
    "reset_peak_memory_stats",
)
# The largest that any meter has seen, by device: a meter resets torch's own.
_highest: dict[torch.device, int] = {}


class MemoryMeter:
    """Tells what is taken on a device between :meth:`start` and :meth:`stop`.

    The allocator's own counters, on the host: the device is not waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._before = 0

    def start(self) -> None:
        """Count from here."""
        self._note()
        self._module.reset_peak_memory_stats(self.device)
        self._before = int(self._module.memory_allocated(self.device))

    def stop(self) -> int:
        """The most bytes that were taken at once since :meth:`start`, beyond those taken then."""
        return max(0, self._note() - self._before)

    def free(self) -> int:
        """Bytes that can still be taken, those included that the allocator keeps for reuse."""
        module, device = self._module, self.device
        kept = int(module.memory_reserved(device)) - int(module.memory_allocated(device))
        return int(module.mem_get_info(device)[0]) + max(0, kept)

    def _note(self) -> int:
        most = int(self._module.max_memory_allocated(self.device))
        _highest[self.device] = max(_highest.get(self.device, 0), most)
        return most


def find_meter(device: torch.device) -> MemoryMeter | None:
    """The meter of an accelerator; None on a CPU, and where the device does not count (MPS)."""
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return MemoryMeter(device) if all(hasattr(module, name) for name in _NEEDED) else None


def highest_seen(device: torch.device) -> int:
    """The most bytes that were taken on a device at once, as far as a meter has seen."""
    return _highest.get(device, 0)


def forget_highest() -> None:
    """Begin to look for the highest anew."""
    _highest.clear()
