"""Which engine the checkpoints of a session run on: decided once, before the first is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from abliterate.errors import UsageError
from abliterate.inference.engine import Opener
from abliterate.models.device_placement import Placement
from abliterate.models.loading import Checkpoint, LoadedModel, load_model
from abliterate.offload.engine import refuse_own_passes
from abliterate.offload.open_model import must_stream, open_stream, too_large
from abliterate.settings import parse_memory


@dataclass(frozen=True)
class OpenOptions:
    """How the user wants checkpoints to be opened.

    Attributes:
        device: where to compute.
        dtype: of the computation.
        trust_remote_code: run the code that comes with a checkpoint.
        offload: stream the layers from disk; None decides by what is free.
        activation_memory: a size such as ``8GB``, for a streamed model's activations.
        placement: the devices and ranks over which a model is spread instead.
        load_in: ``8bit`` or ``4bit`` holds the matrices of a model in memory so.
        attn_implementation: which of transformers' ways to compute attention.

    Raises:
        UsageError: ``activation_memory`` is no size, or ``offload`` and ``load_in`` are both asked
            for.
    """

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    offload: bool | None = None
    activation_memory: str | None = None
    placement: Placement = field(default_factory=Placement)
    load_in: str = "none"
    attn_implementation: str = "auto"

    def __post_init__(self) -> None:
        _ = self.activation_bytes
        if self.offload and self.load_in != "none":
            raise UsageError(
                f"--offload reads the layers from disk as they are, --load-in {self.load_in} keeps "
                "them in memory: leave one of the two out"
            )

    @property
    def activation_bytes(self) -> int | None:
        """``activation_memory`` as a number; None where it is not given."""
        text = self.activation_memory
        return parse_memory(text, "--activation-memory") if text else None

    @property
    def is_shared(self) -> bool:
        """Whether several devices or processes share a model."""
        return self.placement.is_spread or self.placement.ranks.size > 1

    @property
    def where(self) -> tuple[str, str, bool]:
        return self.device, self.dtype, self.trust_remote_code


def choose_opener(checkpoint: Checkpoint, options: OpenOptions) -> Opener:
    """What opens a checkpoint, and whatever is compared with it.

    Where nobody says how, by whether its weights fit into what is free; the log tells if not.

    Raises:
        CheckpointError: the checkpoint is damaged.
        UsageError: the device or dtype cannot be used.
    """
    streamed = options.offload
    if options.load_in != "none":
        return in_memory_opener(checkpoint, options)
    if streamed is None and not options.is_shared:
        streamed = must_stream(checkpoint, *options.where)
    return OffloadOpener(options) if streamed else InMemoryOpener(options)


def in_memory_opener(checkpoint: Checkpoint, options: OpenOptions) -> Opener:
    """What opens a checkpoint for a command that needs it in memory, whatever ``offload`` says.

    Raises:
        UsageError: the weights do not fit.
    """
    if options.is_shared:
        if options.load_in != "none":
            return InMemoryOpener(options)
        return choose_opener(checkpoint, options)
    if lacking := too_large(checkpoint, *options.where, options.load_in):
        needs = "this command needs" if options.load_in == "none" else "--load-in needs"
        raise UsageError(
            f"{lacking}: {needs} the model in memory, use a smaller --dtype or a larger machine"
        )
    return InMemoryOpener(options)


@dataclass(frozen=True)
class InMemoryOpener:
    """Loads checkpoints, on one device or over several."""

    generates: ClassVar[bool] = True
    reads_weights_every_pass: ClassVar[bool] = False
    limits: ClassVar[str | None] = None
    options: OpenOptions

    def require_in_memory(self, option: str) -> None:
        pass

    def open(self, checkpoint: Checkpoint) -> LoadedModel:
        options = self.options
        return load_model(
            checkpoint,
            *options.where,
            options.placement,
            options.load_in,
            options.attn_implementation,
        )


@dataclass(frozen=True)
class OffloadOpener:
    """Streams the layers of checkpoints from disk."""

    generates: ClassVar[bool] = False
    reads_weights_every_pass: ClassVar[bool] = True
    limits: ClassVar[str | None] = (
        "answers are not generated under --offload: refusal metrics and KL are measured, refusals "
        "in completions are not"
    )
    options: OpenOptions

    def require_in_memory(self, option: str) -> None:
        refuse_own_passes(option)

    def open(self, checkpoint: Checkpoint) -> LoadedModel:
        if self.options.is_shared:
            raise UsageError(
                "--offload streams one model in one process: leave out --device-map, "
                "--tensor-parallel and the launcher"
            )
        budget = self.options.activation_bytes
        return open_stream(
            checkpoint,
            *self.options.where,
            activation_memory=budget,
            attn_implementation=self.options.attn_implementation,
        )
