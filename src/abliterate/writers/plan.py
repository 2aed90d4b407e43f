"""What writes to the residual stream: the plan that discovery makes and the editor carries out.

A *writer* is a parameter whose product, lookup or value is added to the residual stream. Between it
and the stream there may be per-channel maps (a post-norm's gain, a LayerScale). With stream
direction ``r`` a contribution ``g * (y - mean) / sigma + b`` is orthogonal to ``r`` for every input
iff ``y`` is orthogonal to ``C(g * r)`` (``C`` centres where the norm subtracts the mean) and ``b``
is orthogonal to ``r``; so each writer carries the gains that turn ``r`` into its own direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["embedding", "position", "attention", "mixer", "mlp", "expert", "other"]


@dataclass(frozen=True)
class Gain:
    """A per-channel map between a writer and the residual stream.

    Attributes:
        parameter: name in ``model.named_parameters()``, or None where the map only centres.
        offset: added to the parameter to give the gain (1.0 for Gemma's ``1 + w``).
        centred: the map subtracts the channel mean first (LayerNorm), so the adjusted
            direction is centred too.
        index: which ``[d_model]`` vector of the parameter it is, with None at the channel axis:
            ``(None, 0, 2)`` is tap 2 of a depthwise convolution ``[d_model, 1, taps]``; empty
            where the parameter is ``[d_model]`` itself.
    """

    parameter: str | None
    offset: float = 0.0
    centred: bool = False
    index: tuple[int | None, ...] = ()

    @property
    def axis(self) -> int:
        """The parameter's channel axis."""
        return self.index.index(None) if self.index else 0

    def factors(self, values: Tensor) -> Tensor:
        """What the map multiplies each channel by, ``[d_model]``.

        Args:
            values: of the parameter, in the dtype to compute in.
        """
        if self.index:
            values = values[tuple(slice(None) if i is None else i for i in self.index)]
        return values.reshape(-1) + self.offset


@dataclass(frozen=True)
class Writer:
    """One parameter that writes to the residual stream, and the way that its product takes.

    A parameter whose product reaches the stream in several ways (the taps of a convolution after
    it, one matrix used at several depths) has one ``Writer`` for each; the span of their
    directions has to go.

    Attributes:
        parameter: name in ``model.named_parameters()``.
        axis: the axis of the parameter that is d_model (the *output* axis), non-negative.
        kind: what it belongs to.
        layer: decoder block index, or None outside the blocks (embeddings).
        bias: it is added as it is (a bias or a free vector) rather than multiplied.
        gains: per-channel maps between it and the stream, in the order in which the
            contribution passes them; empty where the plain direction is exact.
        part: the channels ``(start, stop)`` that it writes, where those are not all of them
            (Reformer's axial positions); None for all.
    """

    parameter: str
    axis: int
    kind: Kind
    layer: int | None
    bias: bool = False
    gains: tuple[Gain, ...] = ()
    part: tuple[int, int] | None = None


def block_of(name: str, blocks: Sequence[str]) -> int | None:
    """The decoder block that a module or parameter belongs to, by its place in ``blocks``.

    ``resid_pre`` of that layer enters it. None for what lies outside of them.
    """
    for layer, block in enumerate(blocks):
        if name == block or name.startswith(block + "."):
            return layer
    return None


@dataclass(frozen=True)
class HookPoint:
    """A place where ``ablate`` projects the direction out of the forward pass.

    Attributes:
        module: name in ``model.named_modules()``.
        layer: decoder block index, or None outside the blocks.
        at: "output": the module's output is a term that is added to the stream. "input": the
            module's first tensor argument is the stream, after a term that is no module's output.
        index: which element, where the output is a tuple.
    """

    module: str
    layer: int | None
    at: Literal["output", "input"] = "output"
    index: int = 0


@dataclass(frozen=True)
class Obstacle:
    """A place where no constant edit of the weights keeps the stream orthogonal to ``r``."""

    module: str
    reason: str


@dataclass(frozen=True)
class WriterPlan:
    """Every writer of a model, the sites where ``ablate`` acts, and what stands in the way.

    ``d_model`` is the width of one stream, so of the direction; ``blocks`` names the decoder
    blocks that hand the stream on, in the order in which they first run.
    """

    writers: tuple[Writer, ...]
    sites: tuple[HookPoint, ...]
    obstacles: tuple[Obstacle, ...] = ()
    d_model: int = 0
    blocks: tuple[str, ...] = ()
