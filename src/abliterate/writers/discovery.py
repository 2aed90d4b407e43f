"""Find what writes to the residual stream of a causal language model, from the model itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from abliterate.writers.backtrace import Query, ReachedParameter, Walk, Walker, node_of
from abliterate.writers.gains import Context
from abliterate.writers.hook_points import SiteFinder
from abliterate.writers.op_trace import Trace, record, storage_of, tensors_in
from abliterate.writers.plan import Gain, Kind, Obstacle, Writer, WriterPlan
from abliterate.writers.residual_stream import BlockCall, DiscoveryError, block_calls, leak

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DiscoveryError", "discover", "leak", "project", "trace_tokens", "writer_direction"]

_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"expert", "expert"),
    (r"attn|attention", "attention"),
    (r"mamba|mixer|ssm|conv|rnn|recurrent|delta|time_mix|rwkv", "mixer"),
    (r"mlp|ffn|feed_?forward|dense|\bfc|moe", "mlp"),
)


def trace_tokens(model: PreTrainedModel, batch: int = 2, tokens: int = 11) -> Tensor:
    """Random token ids ``[batch, tokens]``: enough to route to several experts, always the same."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    vocabulary = min(vocabulary, getattr(model.config.get_text_config(), "vocab_size", vocabulary))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    return ids.to(model.get_input_embeddings().weight.device)


def _layer(parameter: str, blocks: Sequence[BlockCall]) -> int | None:
    for block in blocks:
        if parameter.startswith(block.module + "."):
            return block.layer
    return None


def _looked_up(reached: ReachedParameter, layer: int | None) -> Tensor | None:
    """The indices that a table was looked up with; None if it is no table.

    Indexing a parameter inside a block picks experts, outside it is a table of embeddings.
    """
    use = reached.use
    if use is None or not (
        use.op.name == "embedding" or (use.op.name == "index" and layer is None)
    ):
        return None
    return next((t for t in tensors_in(use.op.arguments["indices"])), None)


def _kind(reached: ReachedParameter, layer: int | None, batch: int) -> Kind:
    """What a writer belongs to: tables by what looks them up, the rest by where they are."""
    indices = _looked_up(reached, layer)
    if indices is not None:
        same = indices.ndim < 2 or indices.shape[0] != batch or bool((indices == indices[:1]).all())
        return "position" if same else "embedding"
    for pattern, kind in _KINDS:
        if re.search(pattern, reached.parameter):
            return kind
    return "other"


def _siblings(
    model: nn.Module, parameter: str, used: set[str], shapes: dict[str, torch.Size]
) -> Iterable[str]:
    """Parameters that a writer's finding extends to: the same one in experts that no token met.

    Only members of a module list inside a block that this pass never ran, of the same class and
    with a parameter of the same shape: their use is the code that was traced.
    """
    parts = parameter.split(".")
    for index, part in enumerate(parts):
        prefix = ".".join(parts[:index])
        if not part.isdigit() or not isinstance(model.get_submodule(prefix), nn.ModuleList):
            continue
        container, kind = model.get_submodule(prefix), type(model.get_submodule(f"{prefix}.{part}"))
        for other in range(len(container)):  # type: ignore[arg-type]
            member = f"{prefix}.{other}"
            name = ".".join([member, *parts[index + 1 :]])
            same = type(model.get_submodule(member)) is kind
            if member not in used and same and shapes.get(name) == shapes[parameter]:
                yield name


def _moved(gain: Gain, source: str, target: str) -> Gain:
    """A gain that lives beside the source parameter, beside the target instead."""
    if gain.parameter is None:
        return gain
    left, right = source.split("."), target.split(".")
    split = next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))
    prefix, moved = ".".join(left[: split + 1]) + ".", ".".join(right[: split + 1]) + "."
    name = gain.parameter
    if name.startswith(prefix):
        name = moved + name.removeprefix(prefix)
    return replace(gain, parameter=name)


def _writers(
    model: nn.Module, trace: Trace, walk: Walk, blocks: Sequence[BlockCall], batch: int
) -> tuple[Writer, ...]:
    ran = {call.module for call in trace.calls}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    # One writer for each way, whatever it is called: a matrix may be used by several operations.
    seen: dict[tuple[str, int, tuple[Gain, ...], tuple[int, int] | None], Writer] = {}
    for reached in (end for ends in walk.ends.values() for end in ends):
        if isinstance(reached, Obstacle):
            continue
        layer = _layer(reached.parameter, blocks)
        kind = _kind(reached, layer, batch)
        bias = not reached.product and _looked_up(reached, layer) is None
        for name in (reached.parameter, *_siblings(model, reached.parameter, ran, shapes)):
            gains = tuple(_moved(g, reached.parameter, name) for g in reached.gains)
            writer = Writer(name, reached.axis, kind, layer, bias, gains, reached.part)
            seen.setdefault((name, reached.axis, gains, reached.part), writer)
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    return tuple(sorted(seen.values(), key=lambda w: (order[w.parameter], len(w.gains))))


def _asks(blocks: Sequence[BlockCall]) -> list[Query]:
    asks = []
    for block in blocks:
        asks.append(Query(block.stream_in, block.stream_in.ndim - 1, block.begin))
        asks.append(Query(block.stream_out, block.stream_out.ndim - 1, block.end))
    return asks


def _obstacles(walk: Walk) -> tuple[Obstacle, ...]:
    ends = (end for ends in walk.ends.values() for end in ends)
    return tuple(sorted({e for e in ends if isinstance(e, Obstacle)}, key=lambda o: o.module))


def _widths(model: PreTrainedModel, width: int) -> list[int]:
    """What d_model may be: a tensor may hold several streams side by side."""
    hidden = getattr(model.config.get_text_config(), "hidden_size", None)
    if isinstance(hidden, int) and hidden < width and width % hidden == 0:
        return [width, hidden]
    return [width]


def _plan(
    model: nn.Module, trace: Trace, calls: Sequence[BlockCall], size: int, batch: int
) -> WriterPlan:
    parameters = {storage_of(p): (name, p) for name, p in model.named_parameters()}
    largest = max(call.weight for call in calls)
    blocks = [call for call in calls if call.weight == largest]
    while True:
        asks = _asks(blocks)
        outputs = {node_of(trace, ask) for ask in asks[1::2]}
        walk = Walker(Context(trace, parameters, size), model, outputs).run(asks)
        # Another list of blocks of that width has the same stream if the walk came by it; a byte
        # encoder or an entropy model has one of its own.
        came_by = [c for c in calls if any(node_of(trace, a) in walk.children for a in _asks([c]))]
        if len(came_by) <= len(blocks):
            break
        blocks = came_by
    sites = SiteFinder(trace, walk, blocks, size).find()
    writers = _writers(model, trace, walk, blocks, batch)
    names = tuple(dict.fromkeys(b.module for b in sorted(blocks, key=lambda b: b.begin)))
    return WriterPlan(writers, sites, _obstacles(walk), size, names)


@contextmanager
def _eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Not ``batched_mm``: the trace would keep its copy of the weights of each token's experts."""
    before = getattr(model.config.get_text_config(), "_experts_implementation", None)
    if before != "batched_mm":
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@torch.inference_mode(False)  # in which torch would not take composite operations apart
def discover(model: PreTrainedModel, input_ids: Tensor | None = None) -> WriterPlan:
    """Find every parameter that writes to the residual stream, and where it adds to it.

    Runs a few tokens through the model once and walks back from each block boundary through the
    recorded operations. The model is left as it is. An operation that it does not know on the way
    is reported as an obstacle, never passed over.

    Args:
        model: a decoder-only causal language model, in evaluation mode.
        input_ids: ``[batch, tokens]`` to trace with; random by default.

    Raises:
        DiscoveryError: where no decoder blocks can be recognised.
    """
    ids = trace_tokens(model) if input_ids is None else input_ids
    with _eager_experts(model):
        trace = record(model, ids)
    blocks = block_calls(model, trace.calls)
    plans = [
        _plan(model, trace, blocks, size, ids.shape[0])
        for size in _widths(model, blocks[-1].stream_out.shape[-1])
    ]
    return min(plans, key=lambda plan: len(plan.obstacles))


def writer_direction(writer: Writer, direction: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The unit direction ``[d_model]`` (or of its part) that has to go from a writer, in float64.

    Args:
        direction: stream direction ``[d_model]``.
        parameters: the gains that the writer names, by name.
    """
    u = direction.double()
    for gain in reversed(writer.gains):
        if gain.parameter is not None:
            u = u * gain.factors(parameters[gain.parameter].detach().to(u.device).double())
        if gain.centred:
            u = u - u.mean()
    u = u if writer.part is None else u[slice(*writer.part)]
    norm = u.norm()
    return u / norm if norm > 0 else u


def orthonormal(directions: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis ``[k, d_model]`` of the span of directions ``[d_model]``."""
    if len(directions) == 1:
        return directions[0].unsqueeze(0)
    _, s, rows = torch.linalg.svd(torch.stack(list(directions)), full_matrices=False)
    basis: Tensor = rows[s > s.max() * 1e-9]
    return basis


def _remove(parameter: Tensor, axis: int, directions: Sequence[Tensor]) -> None:
    """Project the span of ``directions`` out of a parameter along ``axis``, in place."""
    basis = orthonormal(directions).T.to(parameter.device)
    value = parameter.detach().double().movedim(axis, 0)
    value = value - torch.tensordot(basis, torch.tensordot(basis.T, value, dims=1), dims=1)
    parameter.copy_(value.movedim(0, axis).to(parameter.dtype))


@torch.no_grad()
def project(model: nn.Module, plan: WriterPlan, direction: Tensor) -> None:
    """Project the direction out of every writer of the plan, in place (computed in float64).

    Args:
        direction: stream direction ``[d_model]``.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    spans: dict[tuple[str, int], list[Tensor]] = {}
    for writer in plan.writers:
        u = writer_direction(writer, direction, parameters)
        spans.setdefault((writer.parameter, writer.axis), []).append(u)
    for (name, axis), directions in spans.items():
        _remove(parameters[name], axis, directions)
