"""One step back through an operation: what must hold of its inputs for its output to be fixed.

The question asked of a tensor is "is it orthogonal to direction u along this axis, for every
input?". Each rule turns that question about an operation's output into the same question about its
inputs, possibly with another direction (a ``Gain``), or raises ``Blocked`` where no such question
about the inputs is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from abliterate.writers.gains import Blocked, Context, gains_of
from abliterate.writers.op_trace import Op, Write, storage_of
from abliterate.writers.plan import Gain


@dataclass(frozen=True)
class Step:
    """Ask the same of ``tensor`` along ``axis``, the direction first going through ``gain``.

    ``product`` says that the tensor is multiplied or looked up, rather than moved or added;
    ``part`` that its channels are ``(start, stop)`` of the output's.
    """

    tensor: Tensor
    axis: int
    gain: Gain | None = None
    product: bool = False
    part: tuple[int, int] | None = None


Rule = Callable[[Context, Write, int], list[Step]]


def _aligned(tensor: Any, out: Tensor, axis: int) -> int | None:
    """The axis of an operand that broadcasting puts at the output's ``axis``; None if constant."""
    if not isinstance(tensor, Tensor):
        return None
    operand_axis = axis - out.ndim + tensor.ndim
    if operand_axis < 0 or tensor.shape[operand_axis] == 1 or tensor.stride(operand_axis) == 0:
        return None
    return operand_axis


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool((value == 0).all())
    return bool(value == 0)


def _through(tensor: Tensor, write: Write, axis: int, gain: Gain | None = None) -> list[Step]:
    operand_axis = _aligned(tensor, write.tensor, axis)
    if operand_axis is None:
        if _is_zero(tensor):
            return []
        raise Blocked("adds one value to every channel")
    return [Step(tensor, operand_axis, gain)]


def _channel_mean(ctx: Context, op: Op, whole: Tensor, mean: Any) -> bool:
    """Whether ``mean`` is the mean of ``whole`` over its last axis."""
    last = ctx.trace.last_write(mean, op.seq) if isinstance(mean, Tensor) else None
    if last is None or last.op.name != "mean":
        return False
    source = last.op.arguments["self"]
    return storage_of(source) == storage_of(whole) and source.shape == whole.shape


def _add(ctx: Context, write: Write, axis: int) -> list[Step]:
    left, right = write.op.arguments["self"], write.op.arguments["other"]
    if write.op.name == "rsub":
        left, right = right, left
    if (
        write.op.name == "sub"
        and _aligned(right, write.tensor, axis) is None
        and _channel_mean(ctx, write.op, left, right)
    ):
        return _through(left, write, axis, Gain(None, centred=True))
    steps = []
    for term in (left, right):
        if isinstance(term, Tensor):
            steps += _through(term, write, axis)
        elif not _is_zero(term):
            raise Blocked("adds one value to every channel")
    return steps


def _mul(ctx: Context, write: Write, axis: int) -> list[Step]:
    left, right = write.op.arguments["self"], write.op.arguments["other"]
    pairs = [(left, right), (right, left)]
    for value, factor in pairs:
        value_axis = _aligned(value, write.tensor, axis)
        if value_axis is not None and _aligned(factor, write.tensor, axis) is None:
            return [Step(value, value_axis)]
    reason = Blocked("multiplied per channel by a gate that depends on the input")
    for value, factor in reversed(pairs) if left.numel() < right.numel() else pairs:
        value_axis, factor_axis = (
            _aligned(value, write.tensor, axis),
            _aligned(factor, write.tensor, axis),
        )
        if value_axis is None or factor_axis is None:
            continue
        try:
            gains = gains_of(ctx, factor, factor_axis, write.op.seq, centred=False)
        except Blocked as error:
            reason = error
            continue
        return [Step(value, value_axis, gain) for gain in gains]
    raise reason


def _div(ctx: Context, write: Write, axis: int) -> list[Step]:
    if _aligned(write.op.arguments["other"], write.tensor, axis) is not None:
        raise Blocked("divided per channel")
    return _through(write.op.arguments["self"], write, axis)


def _norm(ctx: Context, write: Write, axis: int) -> list[Step]:
    """Fused LayerNorm and RMSNorm over the last axis."""
    arguments, op = write.op.arguments, write.op
    if write.index or axis != write.tensor.ndim - 1 or len(arguments["normalized_shape"]) != 1:
        raise Blocked("normalised over other axes")
    centred, weight = op.name == "native_layer_norm", arguments.get("weight")
    gains: list[Gain | None] = [Gain(None, centred=True) if centred else None]
    if weight is not None:
        gains = [*gains_of(ctx, weight, 0, op.seq, centred)]
    steps = [Step(arguments["input"], axis, gain) for gain in gains]
    if arguments.get("bias") is not None:
        steps.append(Step(arguments["bias"], 0))
    return steps


def _matmul(ctx: Context, write: Write, axis: int) -> list[Step]:
    """``mm``, ``bmm`` and their biased forms: rows come from the left, columns from the right."""
    arguments, ndim = write.op.arguments, write.tensor.ndim
    left = arguments.get("batch1", arguments.get("mat1", arguments["self"]))
    right = arguments.get("batch2", arguments.get("mat2"))
    if axis < ndim - 2:
        raise Blocked("batched over channels")
    steps = [Step(right if axis == ndim - 1 else left, axis, product=True)]
    if write.op.name in ("addmm", "baddbmm") and arguments.get("beta", 1) != 0:
        steps += _through(arguments["self"], write, axis)
    return steps


def _convolution(ctx: Context, write: Write, axis: int) -> list[Step]:
    """Channels on axis 1. Depthwise: every tap is a gain. Dense: the weight is the writer."""
    arguments, weight = write.op.arguments, write.op.arguments["weight"]
    value, groups = arguments["input"], arguments["groups"]
    if axis != 1 or arguments["transposed"]:
        raise Blocked("convolved along the channels")
    steps = [] if arguments["bias"] is None else [Step(arguments["bias"], 0)]
    if groups == 1:
        return [Step(weight, 0, product=True), *steps]
    if groups != value.shape[1] or weight.shape[0] != groups:
        raise Blocked("convolved in groups of channels")
    return [Step(value, 1, gain) for gain in gains_of(ctx, weight, 0, write.op.seq, False)] + steps


def _grouped_matmul(ctx: Context, write: Write, axis: int) -> list[Step]:
    """Each group of rows times its own matrix of ``[groups, in, out]``."""
    arguments = write.op.arguments
    right = arguments.get("mat2", arguments.get("weight"))
    if not isinstance(right, Tensor) or right.ndim != 3 or axis != write.tensor.ndim - 1:
        raise Blocked("multiplied in groups along the channels")
    steps = [Step(right, 2, product=True)]
    bias = arguments.get("bias")
    return steps if bias is None else [*steps, Step(bias, bias.ndim - 1)]


def _mv(ctx: Context, write: Write, axis: int) -> list[Step]:
    return [Step(write.op.arguments["self"], 0, product=True)]


def _embedding(ctx: Context, write: Write, axis: int) -> list[Step]:
    if axis != write.tensor.ndim - 1:
        raise Blocked("looked up along the channels")
    return [Step(write.op.arguments["weight"], 1, product=True)]


def _same(ctx: Context, write: Write, axis: int) -> list[Step]:
    return _through(write.op.arguments["self"], write, axis)


def _copy(ctx: Context, write: Write, axis: int) -> list[Step]:
    return _through(write.op.arguments["src"], write, axis)


def _where(ctx: Context, write: Write, axis: int) -> list[Step]:
    arguments = write.op.arguments
    if _aligned(arguments["condition"], write.tensor, axis) is not None:
        raise Blocked("masked per channel")
    return [s for term in ("self", "other") for s in _through(arguments[term], write, axis)]


def _masked_fill(ctx: Context, write: Write, axis: int) -> list[Step]:
    arguments = write.op.arguments
    if _aligned(arguments["mask"], write.tensor, axis) is not None:
        raise Blocked("masked per channel")
    if not _is_zero(arguments["value"]):
        raise Blocked("adds one value to every channel")
    return _through(arguments["self"], write, axis)


def _cat(ctx: Context, write: Write, axis: int) -> list[Step]:
    tensors, out = write.op.arguments["tensors"], write.tensor
    dim = write.op.arguments.get("dim", 0)
    if write.op.name == "stack":
        dim %= out.ndim
        if dim == axis:
            raise Blocked("channels stacked from separate tensors")
        return [Step(t, axis - (dim < axis)) for t in tensors]
    if dim % out.ndim == axis and any(t.shape[axis] % ctx.size for t in tensors):
        if out.shape[axis] != ctx.size:
            raise Blocked("channels concatenated from separate tensors")
        stops = list(accumulate(t.shape[axis] for t in tensors))
        parts = zip([0, *stops], stops, strict=False)
        return [Step(t, axis, part=part) for t, part in zip(tensors, parts, strict=True)]
    return [Step(t, axis) for t in tensors if t.numel()]


def _reduce(ctx: Context, write: Write, axis: int) -> list[Step]:
    """Sums and means over other axes."""
    source, keep = write.op.arguments["self"], write.op.arguments.get("keepdim", False)
    dims = {d % source.ndim for d in write.op.arguments.get("dim") or range(source.ndim)}
    kept = [d for d in range(source.ndim) if keep or d not in dims]
    source_axis = kept[axis]
    if source_axis in dims:
        raise Blocked("summed over channels")
    return [Step(source, source_axis)]


def _along_other(ctx: Context, write: Write, axis: int) -> list[Step]:
    """Operations along one axis (cumsum, index_select, flip, roll) that is not the channels'."""
    source, dims = write.op.arguments["self"], write.op.arguments.get("dim")
    dims = write.op.arguments.get("dims", dims)
    for dim in dims if isinstance(dims, list | tuple) else [dims]:
        if dim is None or dim % source.ndim == axis:
            raise Blocked(f"{write.op.name} along the channels")
    return [Step(source, axis)]


def _gather(ctx: Context, write: Write, axis: int) -> list[Step]:
    index = write.op.arguments["index"]
    if index.stride(axis) != 0 and index.shape[axis] > 1:
        moved = index.movedim(axis, 0)
        if not bool((moved == moved[:1]).all()):
            raise Blocked("gathered per channel")
    return _along_other(ctx, write, axis)


def _indexed_axis(write: Write, indexed: Tensor, result: Tensor, axis: int) -> int:
    """Where ``axis`` of ``result = indexed[indices]`` lies in ``indexed``."""
    taken: list[int] = []
    position = 0
    for index in write.op.arguments["indices"]:
        width = index.ndim if index is not None and index.dtype == torch.bool else 1
        if index is not None:
            taken += range(position, position + width)
        position += width
    kept = [d for d in range(indexed.ndim) if d not in taken]
    news = result.ndim - len(kept)
    contiguous = taken == list(range(taken[0], taken[-1] + 1))
    first = taken[0] if contiguous else 0
    layout: list[int | None] = [*kept[:first], *([None] * news), *kept[first:]]
    if (source_axis := layout[axis]) is None:
        raise Blocked("indexed along the channels")
    return source_axis


def _index(ctx: Context, write: Write, axis: int) -> list[Step]:
    source = write.op.arguments["self"]
    return [Step(source, _indexed_axis(write, source, write.tensor, axis))]


def _index_put(ctx: Context, write: Write, axis: int) -> list[Step]:
    """``out[indices] = values``: the channels of ``values`` are found from the right."""
    target, values = write.tensor, write.op.arguments["values"]
    steps = [] if write.inplace else [Step(write.op.arguments["self"], axis)]
    if values.numel() == 1 and _is_zero(values):
        return steps
    values_axis = values.ndim - (target.ndim - axis)
    if values_axis < 0 or values.shape[values_axis] != target.shape[axis]:
        raise Blocked("written along the channels")
    return [*steps, Step(values, values_axis)]


def _scatter(ctx: Context, write: Write, axis: int) -> list[Step]:
    """``index_add``, ``scatter_add``, ``index_copy``: the source has the target's axes."""
    arguments = write.op.arguments
    source = arguments.get("source", arguments.get("src"))
    if arguments["dim"] % write.tensor.ndim == axis or not isinstance(source, Tensor):
        raise Blocked("scattered along the channels")
    steps = [] if write.inplace else [Step(arguments["self"], axis)]
    return [*steps, Step(source, axis)]


def _pad(ctx: Context, write: Write, axis: int) -> list[Step]:
    from_right = write.tensor.ndim - 1 - axis
    padding = write.op.arguments["pad"]
    if any(padding[2 * from_right : 2 * from_right + 2]):
        raise Blocked("padded along the channels")
    if not _is_zero(write.op.arguments.get("value", 0) or 0):
        raise Blocked("adds one value to every channel")
    return [Step(write.op.arguments["self"], axis)]


def _repeat(ctx: Context, write: Write, axis: int) -> list[Step]:
    source = write.op.arguments["self"]
    if source.shape[axis - write.tensor.ndim] % ctx.size:  # whole streams may be repeated
        raise Blocked("repeated along the channels")
    return [Step(source, axis - write.tensor.ndim + source.ndim)]


def _zeros(ctx: Context, write: Write, axis: int) -> list[Step]:
    value = write.op.arguments.get("value", write.op.arguments.get("fill_value", 0))
    if not _is_zero(value):
        raise Blocked("adds one value to every channel")
    return []


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    "mul": _mul,
    "div": _div,
    **dict.fromkeys(("_to_copy", "clone", "neg", "alias", "_unsafe_view", "expand_copy"), _same),
    "copy": _copy,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _norm),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _matmul),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), _grouped_matmul),
    "mv": _mv,
    "convolution": _convolution,
    "embedding": _embedding,
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("sum", "mean"), _reduce),
    **dict.fromkeys(("cumsum", "index_select", "flip", "roll", "sort", "topk"), _along_other),
    "gather": _gather,
    "index": _index,
    **dict.fromkeys(("index_put", "_index_put_impl"), _index_put),
    **dict.fromkeys(("index_add", "scatter_add", "index_copy", "scatter"), _scatter),
    "constant_pad_nd": _pad,
    "repeat": _repeat,
    **dict.fromkeys(
        ("zeros", "zeros_like", "new_zeros", "zero", "fill", "full", "full_like", "empty",
         "empty_like", "new_empty", "new_full", "empty_strided", "new_empty_strided"),
        _zeros,
    ),
}  # fmt: skip


def step_back(ctx: Context, write: Write, axis: int) -> list[Step]:
    """What is asked of the inputs of ``write`` when its output is asked along ``axis``.

    Raises:
        Blocked: where nothing about the inputs would be enough.
    """
    rule = RULES.get(write.op.name)
    if rule is None:
        raise Blocked(f"passes through {write.op.name}, which is not linear per channel")
    return rule(ctx, write, axis)
