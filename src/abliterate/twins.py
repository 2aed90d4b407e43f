"""Copies of a small model that share its weights, so that each core runs a batch of its own.

Splitting every product between the cores leaves them waiting for one another where products are
small, and does nothing for what lies between them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# A block with more parameters keeps several cores busy by itself.
_LARGEST_BLOCK = 2_000_000
_MOST = 4


def worth_having(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> int:
    """How many models should run at once: as many as there are cores, for a small one on a CPU."""
    spread = getattr(model, "hf_device_map", None) or (getattr(model, "_tp_size", None) or 1) > 1
    if model.device.type != "cpu" or spread:
        return 1
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return min(_MOST, torch.get_num_threads()) if largest <= _LARGEST_BLOCK else 1


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules and hooks of its own, and the same tensors."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class Crew:
    """Threads that share the cores evenly."""

    def __init__(self, size: int) -> None:
        each = max(1, torch.get_num_threads() // size)
        self._pool = ThreadPoolExecutor(size, "replay", partial(torch.set_num_threads, each))

    def map(self, run: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """``run`` on each of ``items`` at once; if one fails, the others end first."""
        futures = [self._pool.submit(run, item) for item in items]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]
