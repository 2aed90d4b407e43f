"""Passes through a model that leave out blocks or tokens, or record what others start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from abliterate.forward import block_input


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
def skipped(blocks: Sequence[nn.Module], as_tuple: bool) -> Iterator[None]:
    """Within the context, ``blocks`` hand on what they get, at no cost."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = block_input(args, kwargs)
        return (hidden,) if as_tuple else hidden

    # What spreads a model over devices has put a forward of its own there.
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = before
