"""Directions that are tried at once, on batches of prompts that share their opening tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from abliterate.inference.forward import Batch
from abliterate.models.device_placement import to_device

# Keys and values ``[candidates, heads, tokens, head size]`` of each layer.
Cache = tuple[tuple[Tensor, Tensor], ...]

# Fewer shared tokens than this are not worth a cache.
_MIN_PREFIX = 4


@dataclass(frozen=True)
class FastPathFlags:
    """What is saved, beside the vocabulary projection.

    Attributes:
        rows: several candidates in one batch.
        prefix: the shared opening tokens run once per candidate.
        resume: ``add`` starts at its own layer.
        join: candidates of different layers share a batch, which takes ``resume``.
        last: the last block computes what it writes for the last token only.
    """

    rows: bool = True
    prefix: bool = True
    resume: bool = True
    last: bool = True
    join: bool = True


@dataclass(frozen=True)
class Candidates:
    """Directions that are tried at once, in one way.

    Attributes:
        vectors: ``[candidates, d_model]``, unit vectors to ablate or vectors to add.
        layers: None to ablate everywhere, else the layer at whose input each is added, ascending.
        cache: keys and values of the shared opening tokens, or None: under each candidate, or of
            those that a block runs on, which are the first ones (one row that stands for nothing
            where there are none).
        resumed: no block before its own runs for a candidate that is added.
    """

    vectors: Tensor
    layers: tuple[int, ...] | None = None
    cache: Cache | None = None
    resumed: bool = True

    def __len__(self) -> int:
        return len(self.vectors)

    def active(self, block: int) -> int:
        """How many candidates, from the first, need ``block`` to run."""
        if self.layers is None or not self.resumed:
            return len(self)
        return bisect_right(self.layers, block)

    def pick(self, which: slice | Sequence[int]) -> Candidates:
        """Some of them, in their order."""
        every = range(len(self))
        index = list(every[which] if isinstance(which, slice) else which)
        if len(index) == len(every) and index == list(every):
            return self
        layers = self.layers and tuple(self.layers[at] for at in index)
        cache = self.cache
        if cache is not None:
            # What is picked goes to a device once, not with every layer; neighbours need not.
            rows: dict[tuple[int, torch.device], Tensor | slice] = {}
            picked = []
            for layer, (keys, values) in enumerate(cache):
                key = self.active(layer), keys.device
                if key not in rows:
                    own = [at for at in index if at < key[0]] or [0]
                    if own == list(range(own[0], own[-1] + 1)):
                        rows[key] = slice(own[0], own[-1] + 1)
                    else:
                        rows[key] = to_device(torch.tensor(own), keys.device)
                picked.append((keys[rows[key]], values[rows[key]]))
            cache = tuple(picked)
        return replace(self, vectors=self.vectors[index], layers=layers, cache=cache)


@dataclass(frozen=True)
class PromptBatch:
    """A batch of prompts without their shared opening tokens.

    Attributes:
        batch: the prompts.
        keep: how many of the last tokens' logits are wanted.
        streams: ``resid_pre`` ``[prompts, tokens, d_model]`` of the unmodified model, by layer.
    """

    batch: Batch
    keep: int = 1
    streams: tuple[Tensor, ...] = ()

    def part(self, which: slice, width: int) -> PromptBatch:
        """Some of the prompts, which are not longer than ``width`` tokens."""
        b = self.batch
        cached = b.attention_mask.shape[1] - b.input_ids.shape[1]
        mask = b.attention_mask[which]
        batch = Batch(
            b.rows[which],
            b.input_ids[which, -width:],
            torch.cat([mask[:, :cached], mask[:, -width:]], dim=1),
            b.position_ids[which, -width:],
            b.lengths[which],
        )
        return PromptBatch(
            batch, self.keep, tuple(stream[which, -width:] for stream in self.streams)
        )

    def halves(self) -> Iterator[PromptBatch]:
        """The first and the second half of the prompts."""
        half, width = len(self.batch.rows) // 2, self.batch.input_ids.shape[1]
        yield self.part(slice(None, half), width)
        yield self.part(slice(half, None), width)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many opening tokens all prompts share and a cache should hold; each keeps one more."""
    # What the first and the last in alphabetical order share, all in between share.
    ends = min(map(tuple, prompts)), max(map(tuple, prompts))
    same = 0
    for one, other in zip(*ends, strict=False):
        if one != other:
            break
        same += 1
    same = min(same, min(map(len, prompts)) - 1)
    return same if same >= _MIN_PREFIX else 0


def expanded(cache: Cache, prompts: int) -> DynamicCache:
    """A cache to go on from, each candidate's keys and values for ``prompts`` rows in a row."""
    result = DynamicCache()
    for keys, values in cache:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = (
            t.unsqueeze(1).expand(-1, prompts, -1, -1, -1).flatten(0, 1) for t in (keys, values)
        )
        result.layers.append(layer)
    return result
