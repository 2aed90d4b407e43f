"""Follow tensors through the library's checkpoint conversions without holding their values.

A ``Traced`` tensor has the real shape of a tensor on disk but no elements. Instead it can say, for
any of its elements, which element of which tensor on disk that is. The library's own conversion
operations (stack, concatenate, chunk, transpose, reshape) run on it unchanged, whatever the size,
so nothing here knows what an operation is called or which architecture uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# From element offsets in a tensor's (contiguous) storage to the number of the tensor on disk that
# each element comes from and its offset there.
Origin = Callable[[Tensor], tuple[Tensor, Tensor]]

_COPIES = {torch.ops.aten.clone, torch.ops.aten._to_copy}


class TraceError(Exception):
    """A conversion did something to a tensor other than move its elements."""


class Traced(torch.Tensor):
    """A tensor without values whose every element knows where on disk it comes from.

    Attributes:
        meta: of its shape, on the meta device.
        origin: where each element comes from.
        whole: the number of the tensor on disk that it is, whole and as it is there; None where it
            is made of something else, or that is not known.
    """

    meta: Tensor
    origin: Origin
    whole: int | None

    @staticmethod
    def __new__(cls, meta: Tensor, origin: Origin, whole: int | None = None) -> Traced:
        new: Traced = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=torch.device("cpu")
        )
        new.meta, new.origin, new.whole = meta, origin, whole
        return new

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({tuple(self.shape)})"

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The source and offset in it of the elements at ``index``, shaped [ndim, n]."""
        strides = torch.tensor(self.meta.stride(), dtype=torch.long).reshape(-1, 1)
        return self.origin((index * strides).sum(0) + int(self.meta.storage_offset()))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is torch.ops.aten.cat:
            return _cat(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if packet is torch.ops.aten.stack:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return _cat([t.unsqueeze(dim) for t in args[0]], dim)
        if packet in _COPIES:
            return _cat([args[0]], 0)
        source = args[0]
        if not isinstance(source, Traced) or any(isinstance(a, Traced) for a in args[1:]):
            raise TraceError(f"cannot follow {packet} on several tensors")
        out = func(source.meta, *args[1:], **kwargs)
        if isinstance(out, Tensor):
            return _view(out, source, packet)
        return [_view(piece, source, packet) for piece in out]


def leaf(number: int, shape: Sequence[int]) -> Traced:
    """The tensor on disk with this number, as it is there."""
    return Traced(
        torch.empty(tuple(shape), device="meta"),
        lambda offsets: (torch.full_like(offsets, number), offsets),
        number,
    )


def unravel(offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """The indices, [ndim, n], of elements with these offsets in a contiguous tensor."""
    rows = []
    for size in reversed(shape):
        rows.append(offsets % size)
        offsets = offsets // size
    return torch.stack(rows[::-1]) if rows else offsets.new_zeros((0, len(offsets)))


def _view(out: Tensor, source: Traced, packet: Any) -> Traced:
    """``out`` as a view of ``source``; a new storage means that values were computed."""
    if out.untyped_storage()._cdata != source.meta.untyped_storage()._cdata:
        raise TraceError(f"cannot follow {packet}")
    meta = source.meta
    same = (out.shape, out.stride(), out.storage_offset()) == (
        meta.shape,
        meta.stride(),
        meta.storage_offset(),
    )
    return Traced(out, source.origin, source.whole if same else None)


def _cat(pieces: Sequence[Traced], dim: int) -> Traced:
    """A new contiguous tensor made of ``pieces`` along ``dim``."""
    first = pieces[0]
    if first.ndim == 0:
        return first
    dim %= first.ndim
    for piece in pieces:
        if (*piece.shape[:dim], *piece.shape[dim + 1 :]) != (
            *first.shape[:dim],
            *first.shape[dim + 1 :],
        ):
            raise TraceError(f"cannot join {tuple(first.shape)} and {tuple(piece.shape)}")
    sizes = torch.tensor([piece.shape[dim] for piece in pieces])
    ends = sizes.cumsum(0)
    shape = (*first.shape[:dim], int(ends[-1]), *first.shape[dim + 1 :])

    def origin(offsets: Tensor) -> tuple[Tensor, Tensor]:
        index = unravel(offsets, shape)
        which = torch.searchsorted(ends, index[dim], right=True)
        index[dim] -= (ends - sizes)[which]
        numbers, places = torch.empty_like(offsets), torch.empty_like(offsets)
        for number in set(which.tolist()):
            chosen = which == number
            numbers[chosen], places[chosen] = pieces[number].at(index[:, chosen])
        return numbers, places

    return Traced(torch.empty(shape, device="meta"), origin)
