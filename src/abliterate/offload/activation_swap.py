"""Activations of an accelerator wait in main memory.

A pass that waits for a block holds tensors in its own variables, out of reach, so they are not
replaced: their storage is copied and made empty, and filled again before the pass goes on. Whoever
holds a tensor, or a view of it, then has it back as it was.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abliterate.offload.activation_store import SMALL, Activations, tensors_in


def parking(device: torch.device) -> bool:
    """Whether what waits is moved: on a CPU it is in main memory anyway."""
    return device.type != "cpu"


@dataclass
class Lot:
    """The storages that are away now, of all passes: some are shared between them.

    Attributes:
        activations: what gives the main memory (or files) for them.
        away: by storage, a tensor of it, which keeps it, and its bytes.
    """

    activations: Activations
    away: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget what nobody comes back for."""
        self.away.clear()


class Parked:
    """What one pass holds on the accelerator.

    Args:
        lot: where it goes while the pass waits.
        fixed: storages that are not to be moved (those of the model itself).
    """

    def __init__(self, lot: Lot, fixed: set[int]) -> None:
        self._lot, self._fixed = lot, fixed
        # All that it ever waited with and still has: a pass keeps its first input to the end.
        self._seen: dict[int, weakref.ref[Tensor]] = {}

    def put(self, value: Any) -> None:
        """Move what is in ``value``, and what was in earlier ones, to main memory."""
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            known = storage._cdata in self._lot.away
            if known or (storage.nbytes() >= SMALL and storage._cdata not in self._fixed):
                self._seen[id(tensor)] = weakref.ref(tensor)
        for tensor in self._alive():
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            if storage._cdata in self._lot.away or not size:
                continue
            kept = self._lot.activations.empty((size,), torch.uint8)
            kept.copy_(_bytes(tensor))
            self._lot.away[storage._cdata] = tensor, kept
            storage.resize_(0)

    def bring(self, value: Any = None) -> None:
        """Bring back what is in ``value``, or everything."""
        for tensor in self._alive() if value is None else list(tensors_in(value)):
            storage = tensor.untyped_storage()
            found = self._lot.away.pop(storage._cdata, None)
            if found is not None:
                storage.resize_(len(found[1]))
                _bytes(tensor).copy_(found[1])

    def _alive(self) -> list[Tensor]:
        alive = [tensor for seen in self._seen.values() if (tensor := seen()) is not None]
        self._seen = {id(tensor): weakref.ref(tensor) for tensor in alive}
        return alive


def _bytes(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, whatever part of it the tensor shows."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())  # type: ignore[call-overload, no-any-return]
