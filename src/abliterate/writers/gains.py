"""Per-channel maps: which parameter an elementwise factor is, and what it is added to.

Multiplying by ``g`` per channel keeps a contribution orthogonal to ``r`` if it was orthogonal to
``g * r``, and an edit of the weights can see to that as long as ``g`` is a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.writers.op_trace import Trace, storage_of
from abliterate.writers.plan import Gain

#: More rows than this in a per-channel map means that it is not one (a table, an activation).
MAX_GAIN_ROWS = 16


class Blocked(Exception):
    """No condition on the operation's inputs makes its output orthogonal to a direction."""


@dataclass(frozen=True)
class Context:
    """What rules look things up in: the trace, the owner of each parameter's memory, d_model."""

    trace: Trace
    parameters: Mapping[int, tuple[str, Tensor]]
    size: int


def _affine(ctx: Context, tensor: Tensor, seq: int) -> tuple[str, Tensor, float, float] | None:
    """``(name, view, a, b)`` where ``tensor == a * parameter + b`` at every element, else None."""
    owner = ctx.parameters.get(storage_of(tensor))
    if owner is not None:
        return owner[0], tensor, 1.0, 0.0
    write = ctx.trace.last_write(tensor, seq)
    if write is None:
        return None
    arguments, name = write.op.arguments, write.op.name
    source = arguments.get("self")
    if not isinstance(source, Tensor) or source.numel() != tensor.numel():
        return None
    inner = _affine(ctx, source, write.op.seq)
    if inner is None:
        return None
    parameter, view, a, b = inner
    if name in ("_to_copy", "clone"):
        return inner
    other = arguments.get("other")
    if isinstance(other, Tensor) and other.numel() == 1 and storage_of(other) not in ctx.parameters:
        other = other.item()
    if name == "neg":
        return parameter, view, -a, -b
    if isinstance(other, int | float):
        if name == "mul":
            return parameter, view, a * other, b * other
        if name == "add":
            return parameter, view, a, b + other * arguments.get("alpha", 1)
    return None


def gains_of(ctx: Context, tensor: Tensor, axis: int, seq: int, centred: bool) -> list[Gain]:
    """The per-channel maps that multiplying by ``tensor`` amounts to, one for each of its rows."""
    affine = _affine(ctx, tensor, seq)
    if affine is None:
        raise Blocked("multiplied per channel by a gate that depends on the input")
    parameter, view, a, b = affine
    if a == 0:
        raise Blocked("multiplied per channel by a constant")
    # ``view`` has as many elements as ``tensor``; find the channels' stride and the rows' starts.
    size = tensor.shape[axis]
    axes = [i for i in range(view.ndim) if view.shape[i] == size and view.stride(i) != 0]
    same = [i for i in axes if i - view.ndim == axis - tensor.ndim]
    axes = same or axes
    if len(axes) != 1:
        raise Blocked(f"multiplied per channel by a function of {parameter}")
    at = axes[0]
    starts = _offsets(view.select(at, 0))
    if len(starts) > MAX_GAIN_ROWS:
        raise Blocked(f"multiplied per channel by {parameter}, which differs between inputs")
    owner = ctx.parameters[storage_of(view)][1]
    channels = [i for i in range(owner.ndim) if owner.stride(i) == view.stride(at)]
    channels = [i for i in channels if owner.shape[i] == size]
    if len(channels) != 1 or size != ctx.size:
        raise Blocked(f"multiplied per channel by a part of {parameter}")
    indices = (_index_of(owner, start, channels[0]) for start in starts)
    return [Gain(parameter, b / a, centred, index) for index in indices]


def _offsets(view: Tensor) -> list[int]:
    """Where the elements of a view lie in memory, without repeats."""
    offsets = {int(view.storage_offset())}
    for length, stride in zip(view.shape, view.stride(), strict=True):
        steps = range(length) if stride else range(1)
        offsets = {start + i * stride for start in offsets for i in steps}
    return sorted(offsets)


def _index_of(owner: Tensor, start: int, channels: int) -> tuple[int | None, ...]:
    """The index of a parameter's ``[d_model]`` vector that starts at an offset in its memory."""
    if owner.ndim == 1:
        return ()
    position = torch.unravel_index(torch.tensor(start - owner.storage_offset()), owner.shape)
    return tuple(None if i == channels else int(v) for i, v in enumerate(position))
