"""Keys and values with room to grow, for answers.

The library's cache puts every new token's keys and values beside those before it by copying all of
them. With 128 rows of 250 tokens of the demo model that took 41% of the time of its answers; here
all are copied once in ``_ROOM`` tokens. The layers are the library's own otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Tokens a row: the copies cost next to nothing then, and the room little beside a prompt.
_ROOM = 64


class _Growing:
    """A tensor ``[batch, heads, tokens, d_head]`` that grows at its end.

    Attributes:
        held: what it last gave away, which is still what it holds if it comes back as it is.
    """

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self._buffer: Tensor | None = None
        self._end = 0

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """``held`` with the tokens of ``new`` behind it."""
        count, more = held.shape[2] if held.numel() else 0, new.shape[2]
        buffer = self._buffer
        if buffer is None or held is not self.held or self._end + more > buffer.shape[2]:
            buffer = new.new_empty(*new.shape[:2], count + more + _ROOM, new.shape[3])
            if count:
                buffer[:, :, :count] = held
            self._buffer, self._end = buffer, count
        buffer[:, :, self._end : self._end + more] = new
        self._end += more
        return buffer[:, :, self._end - count - more : self._end]


class _Roomy:
    """What both kinds of layers have in place of the library's copying."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._growing = _Growing(), _Growing()

    def _appended(self: Any, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that are held, with the new ones behind them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._growing
        return keys.append(self.keys, key_states), values.append(self.values, value_states)

    def _hold(self: Any, keys: Tensor, values: Tensor) -> None:
        """Keep these, which are the ends of what :meth:`_appended` gave."""
        self.keys, self.values = keys, values
        for growing, held in zip(self._growing, (keys, values), strict=True):
            growing.held = held


class RoomyLayer(_Roomy, DynamicLayer):  # type: ignore[misc]
    """A layer that keeps all tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the library's: keys and values of all tokens, with the new ones."""
        keys, values = self._appended(key_states, value_states)
        self._hold(keys, values)
        return keys, values


class RoomySlidingLayer(_Roomy, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that keeps the tokens that its window sees."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the library's: what the new tokens see; the window alone is kept."""
        keys, values = self._appended(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        self._hold(*(seen[:, :, -self.sliding_window + 1 :] for seen in (keys, values)))
        return keys, values


# The layers whose rows can be chosen from, and nothing but keys and values of tokens.
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
ROOMY_LAYERS = (RoomyLayer, RoomySlidingLayer)


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model whose layers are all plain.

    Args:
        config: of the decoder.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomySlidingLayer(sliding_window=layer.sliding_window)
        if isinstance(layer, DynamicSlidingWindowLayer)
        else RoomyLayer()
        for layer in cache.layers
    ]
    return cache


def take(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer, which keeps nothing of them."""
    keys, values = layer.keys, layer.values
    layer.keys = layer.values = keys.new_empty(0)
    if isinstance(layer, _Roomy):
        layer._growing = _Growing(), _Growing()
    return keys, values


def is_plain(cache: Any) -> bool:
    """Whether a cache has layers, all of which hold keys and values of tokens and nothing else."""
    return (
        isinstance(cache, DynamicCache)
        and bool(cache.layers)
        and all(type(layer) in (*PLAIN_LAYERS, *ROOMY_LAYERS) for layer in cache.layers)
    )


def can_cut(cache: Any) -> bool:
    """Whether tokens can be taken from the start of a cache; a window counts those it has seen."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, RoomyLayer) for layer in cache.layers
    )


def cut_start(cache: DynamicCache, count: int) -> None:
    """Take the first ``count`` tokens out of a cache of :func:`can_cut`."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, count:], layer.values[:, :, count:]
