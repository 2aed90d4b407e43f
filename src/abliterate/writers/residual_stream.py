"""The decoder blocks of a model and the residual stream at their boundaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from abliterate.models.device_placement import to_device
from abliterate.precision import widest
from abliterate.writers.op_trace import Call, elements_of, tensors_in


class DiscoveryError(Exception):
    """The model has no decoder blocks that could be recognised."""


@dataclass(frozen=True)
class BlockCall:
    """One call of a decoder block: one stream in and out, ``[..., d_model]``.

    ``index`` is the element of the block's output that ``stream_out`` is; ``weight`` the number of
    parameters in the list of blocks.
    """

    module: str
    layer: int
    begin: int
    end: int
    stream_in: Tensor
    stream_out: Tensor
    index: int
    weight: int


@dataclass(frozen=True)
class BlockList:
    """The members of one module list that may be decoder blocks, and how large they are."""

    members: dict[str, int]
    parameters: int


def block_lists(model: nn.Module) -> list[BlockList]:
    """Candidates for decoder blocks: members with children of the outermost module lists."""
    names: list[str] = []
    lists: list[BlockList] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in names)
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        members = {f"{name}.{i}": i for i, m in enumerate(module) if next(m.children(), None)}
        if members:
            names.append(name)
            size = sum(p.numel() for p in module.parameters())
            lists.append(BlockList(members, size))
    return lists


def streams_of(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor, int]]:
    """The streams into and out of a block: floating inputs and outputs of the same shape, paired.

    Most blocks have one. A reversible block has two, in and out in the same order.

    Returns:
        ``(input, output, index of the output)``, both ``[..., d_model]``.
    """
    hidden = [(i, t) for i, t in enumerate(outputs) if t is not None and _hidden(t)]
    if not hidden:
        return []
    shape = hidden[0][1].shape
    sources = [t for t in inputs if _hidden(t) and t.shape == shape]
    results = [(i, t) for i, t in hidden if t.shape == shape]
    return [(s, t, i) for s, (i, t) in zip(sources, results, strict=False)]


def _hidden(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2


def block_calls(model: nn.Module, calls: Iterable[Call]) -> list[BlockCall]:
    """The recorded calls that were decoder blocks handing on the stream, in order.

    Where lists of blocks have streams of different widths (a byte encoder, say, and the
    transformer proper), the stream is that of the largest.

    Raises:
        DiscoveryError: where there are none.
    """
    lists = {member: blocks for blocks in block_lists(model) for member in blocks.members}
    candidates: list[BlockCall] = []
    for call in calls:
        blocks = lists.get(call.module)
        if blocks is None:
            continue
        layer = blocks.members[call.module]
        for stream in streams_of(call.inputs, call.outputs):
            weight = blocks.parameters
            candidates.append(BlockCall(call.module, layer, call.begin, call.end, *stream, weight))
    if not candidates:
        raise DiscoveryError("no decoder blocks: no module list hands on a [..., d_model] stream")
    width = max(candidates, key=lambda block: block.weight).stream_out.shape[-1]
    return [block for block in candidates if block.stream_out.shape[-1] == width]


def ratio(hidden: Tensor, unit: Tensor) -> Tensor:
    """The largest share of a stream ``[..., d_model]`` along a unit direction, where it lies."""
    wide = hidden.detach().to(widest(hidden.device))
    h = wide.reshape(*hidden.shape[:-1], -1, unit.shape[0])
    shares: Tensor = (h @ unit.to(h)).abs() / h.norm(dim=-1).clamp_min(1e-30)
    return shares.max()


def largest(ratios: Sequence[Tensor]) -> float:
    """The largest of :func:`ratio`'s results; infinity where the stream is not finite.

    Hooks only note them: a device is waited for here, once.
    """
    first = ratios[0]
    worst = float(torch.stack([one.to(first.device) for one in ratios]).max())
    return worst if math.isfinite(worst) else math.inf  # NaN if one of them is


def leak(
    model: nn.Module, direction: Tensor, input_ids: Tensor, blocks: Collection[str] = ()
) -> float:
    """The largest ``|h . r| / ||h||`` over every block boundary and token.

    Args:
        direction: ``[d_model]``; it is normalised.
        input_ids: ``[batch, tokens]``.
        blocks: names of the decoder blocks (``WriterPlan.blocks``); by default the members of the
            largest module list, and of others with a stream of the same width.

    Returns:
        The leak; infinity where the stream is not finite.

    Raises:
        DiscoveryError: where the model has no decoder blocks with a stream of that width.
    """
    wide = direction.cpu().double()
    unit = wide / wide.norm()
    sizes = {member: each.parameters for each in block_lists(model) for member in each.members}
    if blocks:
        sizes = {name: sizes[name] for name in blocks}
    seen: list[tuple[int, int, Tensor]] = []
    on = cache(lambda device: to_device(unit.to(widest(device)), device))

    def hook(size: int) -> Callable[[nn.Module, object, object, object], None]:
        def measure(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            for before, after, _ in streams_of(tensors_in((args, kwargs)), elements_of(output)):
                width = after.shape[-1]
                if width % unit.shape[0] == 0:
                    here = on(after.device)
                    seen.extend((size, width, ratio(side, here)) for side in (before, after))

        return measure

    handles = [
        module.register_forward_hook(hook(sizes[name]), with_kwargs=True)
        for name, module in model.named_modules()
        if name in sizes
    ]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise DiscoveryError(f"no decoder blocks with a stream of width {unit.shape[0]}")
    width = max((size, width) for size, width, _ in seen)[1]
    return largest([share for _, w, share in seen if w == width])
