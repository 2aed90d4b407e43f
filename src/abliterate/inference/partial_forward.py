"""Passes through a model that leave out blocks or tokens, or record what others start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.inference.forward import block_input


@contextmanager
def last_token_only(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, ``modules`` get the last token alone.

    What they return broadcasts over the tokens when it is added to the stream, which makes the
    other tokens' streams wrong and the last one right.
    """

    def last(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = block_input(args, kwargs)[:, -1:]
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(last, with_kwargs=True).remove)
        yield


@dataclass
class Recording:
    """``resid_pre`` of every block, ``[batch, tokens, d_model]``, and how blocks return it."""

    streams: list[Tensor] = field(default_factory=list)
    as_tuple: bool = False


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[Recording]:
    """Record the one pass that runs inside."""
    recording = Recording()

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.streams.append(block_input(args, kwargs))

    def left(module: nn.Module, args: Any, output: Any) -> None:
        recording.as_tuple = isinstance(output, tuple)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(entered, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(left).remove)
        yield recording


@contextmanager
def rows_join_at_layer(
    blocks: Sequence[nn.Module],
    counts: Sequence[int],
    starts: Mapping[int, Tensor],
    as_tuple: bool,
) -> Iterator[None]:
    """Within the context, rows of the batch join block by block; until then they cost nothing.

    Args:
        blocks: all decoder blocks.
        counts: how many rows, from the first, each block runs on; never fewer than the one before.
        starts: by block, ``resid_pre`` ``[rows, tokens, d_model]`` of the rows that join there.
        as_tuple: blocks return a tuple.
    """

    def run(index: int, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        before = counts[index - 1] if index else 0

        def joined(*args: Any, **kwargs: Any) -> Any:
            hidden = block_input(args, kwargs)
            if not counts[index]:
                return (hidden,) if as_tuple else hidden
            if index in starts:
                start = starts[index]
                hidden = torch.cat([hidden[:before], start]) if before else start
            if counts[index] < counts[-1]:
                args, kwargs = _first_rows((args, kwargs), counts[index], counts[-1])
            if args:
                return forward(hidden, *args[1:], **kwargs)
            return forward(**{**kwargs, "hidden_states": hidden})

        return joined

    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = run(index, block, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:  # of a library that moves blocks between devices
                block.forward = forward


def _first_rows(value: Any, rows: int, total: int) -> Any:
    """Masks, positions and whatever else a block gets for each row of the batch, cut short."""
    if isinstance(value, Tensor):
        return value[:rows] if value.ndim > 1 and value.shape[0] == total else value
    if type(value) in (tuple, list):
        return type(value)(_first_rows(item, rows, total) for item in value)
    if type(value) is dict:
        return {key: _first_rows(item, rows, total) for key, item in value.items()}
    return value
