"""Walk back from the residual stream to the parameters that write to it.

Nodes are versions of memory: (storage, version, stride of the channel axis, gains so far). From the
stream at every block boundary each operation is stepped through by ``rules`` until a path ends at a
parameter (a writer), at zeros, or where it cannot go on (an obstacle).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from abliterate.writers.gains import Blocked, Context
from abliterate.writers.op_rules import Step, step_back
from abliterate.writers.op_trace import Trace, Write, storage_of
from abliterate.writers.plan import Gain, Obstacle


@dataclass(frozen=True)
class Node:
    """One version of one tensor's memory, its channel axis, and the gains on the way from it.

    ``part`` says which channels of the stream it holds, None for all of them.
    """

    storage: int
    version: int
    stride: int
    gains: tuple[Gain, ...]
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class ReachedParameter:
    """A parameter where a path ended: its name, d_model axis, gains, part, and what used it.

    ``product`` says that the use was a product or a lookup, rather than a plain addition.
    """

    parameter: str
    axis: int
    gains: tuple[Gain, ...]
    part: tuple[int, int] | None
    use: Write | None
    product: bool


@dataclass
class Walk:
    """What the walk found: the graph between nodes, writers and obstacles."""

    children: dict[Node, list[Node]] = field(default_factory=dict)
    ends: dict[Node, list[ReachedParameter | Obstacle]] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """A tensor, its channel axis, when it was read, by which write; gains and part so far."""

    tensor: Tensor
    axis: int
    seq: int
    gains: tuple[Gain, ...] = ()
    part: tuple[int, int] | None = None
    reader: Write | None = None
    product: bool = False


def node_of(trace: Trace, ask: Query) -> Node:
    """The node that a tensor was when it was read."""
    version = trace.version(ask.tensor, ask.seq)
    stride = ask.tensor.stride(ask.axis)
    return Node(storage_of(ask.tensor), version, stride, ask.gains, ask.part)


def axis_with(tensor: Tensor, stride: int, size: int) -> int | None:
    """The axis of a tensor with that stride and size: the same channels of the same memory.

    Failing that, an axis on which several streams of that size lie side by side.
    """
    axes = [i for i in range(tensor.ndim) if tensor.stride(i) == stride and tensor.shape[i] > 1]
    exact = [i for i in axes if tensor.shape[i] == size]
    axes = exact or [i for i in axes if tensor.shape[i] % size == 0]
    return axes[0] if len(axes) == 1 else None


#: Operations through which a matrix is still the matrix of the product that it goes into.
MOVES = frozenset({"_to_copy", "clone", "index", "index_select", "gather"})

#: In-place operations whose rules speak of what they write only, not of what was there.
ADDS_TO = frozenset(
    {"index_put", "_index_put_impl", "index_add", "scatter_add", "index_copy", "scatter"}
)


def _partial(tensor: Tensor) -> bool:
    """Whether a tensor is a view of only some of its memory."""
    return tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()


class StreamScaled(Exception):
    """The path came back to the stream, but through a gain: no direction survives that."""

    def __init__(self, gain: Gain) -> None:
        super().__init__()
        self.gain = gain

    def obstacle(self, module: str) -> Obstacle:
        """The obstacle, at the module of the gain (or at ``module``, if it is a bare centring)."""
        name = self.gain.parameter
        what = f"the per-channel gain {name}" if name else "a centring"
        reason = (
            f"the residual stream, or a normed copy of it, is added to the stream through {what}, "
            "so what was orthogonal to the direction before it is not after it"
        )
        return Obstacle(name.rpartition(".")[0] if name else module, reason)


class Walker:
    """Walks from asks to writers. ``stream`` holds the nodes at which blocks hand on the stream."""

    def __init__(self, ctx: Context, model: nn.Module, stream: Iterable[Node]) -> None:
        self.ctx = ctx
        self.stream = set(stream)
        self.buffers = {storage_of(b): name for name, b in model.named_buffers()}
        self.walk = Walk()

    def run(self, asks: Iterable[Query]) -> Walk:
        """Walk back from each ask; everything that is reached is visited once."""
        pending = list(asks)
        while pending:
            ask = pending.pop()
            node = node_of(self.ctx.trace, ask)
            if node in self.walk.children:
                continue
            self.walk.children[node] = []
            self.walk.ends[node] = []
            try:
                below = self._below(ask, node)
            except StreamScaled as error:
                self._end(node, error.obstacle(self._module(ask, node)))
                continue
            except Blocked as error:
                self._end(node, Obstacle(self._module(ask, node), str(error)))
                continue
            for step in below:
                self.walk.children[node].append(node_of(self.ctx.trace, step))
                pending.append(step)
        return self.walk

    def _end(self, node: Node, end: ReachedParameter | Obstacle) -> None:
        self.walk.ends[node].append(end)

    def _module(self, ask: Query, node: Node) -> str:
        write = self.ctx.trace.last_write(ask.tensor, ask.seq) or ask.reader
        return write.op.module if write else ""

    def _below(self, ask: Query, node: Node) -> list[Query]:
        """The asks that this one leads to; records an end where it leads to none."""
        if ask.gains and self._plain(node) in self.stream:
            raise StreamScaled(ask.gains[0])
        size = self.ctx.size if ask.part is None else ask.part[1] - ask.part[0]
        owner = self.ctx.parameters.get(node.storage)
        if owner is not None:
            axis = axis_with(owner[1], node.stride, size)
            if axis is None or owner[1].shape[axis] != size:
                raise Blocked(f"the channels are only a part of an axis of {owner[0]}")
            reached = ReachedParameter(owner[0], axis, ask.gains, ask.part, ask.reader, ask.product)
            self._end(node, reached)
            return []
        write = self.ctx.trace.last_write(ask.tensor, ask.seq)
        if write is None:
            name = self.buffers.get(node.storage)
            what = f"the buffer {name}" if name else "an input"
            raise Blocked(f"adds {what}, which is not a parameter")
        axis = axis_with(write.tensor, node.stride, size)
        if axis is None:
            raise Blocked(f"the channels are only a part of what {write.op.name} makes")
        below = []
        if write.inplace and (_partial(write.tensor) or write.op.name in ADDS_TO):
            below = [replace(ask, seq=write.op.seq, reader=write, product=False)]
        for step in step_back(replace(self.ctx, size=size), write, axis):
            below.append(self._next(ask, write, step))
        return below

    @staticmethod
    def _next(ask: Query, write: Write, step: Step) -> Query:
        if ask.part is not None and (step.gain is not None or step.part is not None):
            raise Blocked("only a part of the channels is multiplied or put together")
        gains = ask.gains if step.gain is None else (step.gain, *ask.gains)
        product = step.product or (ask.product and write.op.name in MOVES)
        part = step.part or ask.part
        return Query(step.tensor, step.axis, write.op.seq, gains, part, write, product)

    @staticmethod
    def _plain(node: Node) -> Node:
        return replace(node, gains=())
