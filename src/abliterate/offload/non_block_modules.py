"""Modules outside the blocks that do not hold their weights all the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.models.device_placement import to_device
from abliterate.offload.weights import Slot, Weights


def read_rows(module: nn.Module, weights: Weights, slot: Slot) -> None:
    """Make an embedding take the rows that it looks up from the file."""
    name = weights.source(slot)
    assert name is not None
    plain = module.forward
    # Some architectures look at the table itself too; on an accelerator that fails aloud.
    table = weights.mapped.tensor(name)
    if weights.device.type != "cpu":
        table = table.new_empty(
            (0, *table.shape[1:]), dtype=slot.empty.dtype, device=weights.device
        )
    standing = nn.Parameter(table, requires_grad=False)

    def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        used, places = torch.unique(ids, return_inverse=True)
        table = weights.mapped.tensor(name)
        rows = to_device(table[used.cpu()], weights.device).to(slot.empty.dtype)
        weights.mapped.bytes_read += rows.shape[0] * table[0].nbytes
        weights.mapped.forget([name])
        padding, module.padding_idx = module.padding_idx, None  # type: ignore[assignment]
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        try:
            return plain(places, *args, **kwargs)
        finally:
            module.padding_idx = padding  # type: ignore[assignment]
            module._parameters["weight"] = standing

    module._parameters["weight"] = standing
    replace_forward(module, forward)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have ``module(...)`` call ``forward``, hooks included."""
    module.__dict__["forward"] = forward


def load_on_use(module: nn.Module, weights: Weights, slots: Sequence[Slot]) -> None:
    """Load slots when ``module`` first runs, and keep them."""

    def load(*_: Any) -> None:
        handle.remove()
        weights.load(slots, keep=True)

    handle = module.register_forward_pre_hook(load)
